"""What happens to every HTTP request before its route, and after: limits, tokens, the access log.

A gateway with none of them has no front (`Checks.any`): `Routes.answer` is the server's handler then.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from aiohttp import web
from aiohttp.http import RawRequestMessage

from rtml.metrics import Counter, deadline_outcome
from rtml.serving import http, tracing
from rtml.serving.access import Access, Ticket
from rtml.serving.accesslog import AccessLog, Line
from rtml.serving.protocol import Connection
from rtml.serving.tracing import TRACEPARENT, TRACESTATE
from rtml.serving.visits import VISIT, Visit

#: What operators ask is answered however busy the gateway is.
_ALWAYS: Final = frozenset(("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"))
_PATH_MAX: Final = 512


class Checks(NamedTuple):
    """What a front looks at."""

    access: Access | None = None
    log: AccessLog | None = None
    #: Requests that may be running in this process; None: any number.
    concurrency_max: int | None = None

    @property
    def any(self) -> bool:
        """Whether there is anything to look at."""
        return self.access is not None or self.log is not None or self.concurrency_max is not None


class Load:
    """How many requests a process answers, of all its protocols.

    Args:
        most: That it answers at a time; None: any number.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._running = 0

    def enter(self) -> None:
        """One more.

        Raises:
            HttpError: there are too many.
        """
        if self._most is not None and self._running >= self._most:
            raise http.HttpError(503, f"the gateway has its most requests running: {self._most}", "Busy")
        self._running += 1

    def leave(self) -> None:
        """One less."""
        self._running -= 1


class Door(NamedTuple):
    """What a request passes on its way in."""

    checks: Checks
    #: Of the process.
    load: Load
    #: Counts what is not let in, by reason.
    refused: Counter


class Front:
    """Answers requests by way of `answer`.

    Args:
        answer: The routes'.
        door: What requests pass before it.
        ids: Names requests.
    """

    def __init__(self, answer: http.Handler, door: Door, ids: http.RequestIds) -> None:
        self._answer = answer
        self._access = door.checks.access
        self._log = door.checks.log
        self._load = door.load
        self._refused = door.refused
        self._ids = ids

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle a request."""
        started = time.perf_counter()
        visit = Visit(self._trace(request))
        VISIT.set(visit)
        response: web.StreamResponse | None = None
        try:
            response = await self._pass(request, visit)
        finally:
            if self._log is not None:
                self._log.write(_line(request, response, visit, time.perf_counter() - started))
        return response

    async def _pass(self, request: web.BaseRequest, visit: Visit) -> web.StreamResponse:
        bounded = request.path not in _ALWAYS
        try:
            if bounded:
                self._load.enter()
        except http.HttpError as error:
            return self._refuse(request, error)
        try:
            ticket = Ticket()
            if self._access is not None:
                try:
                    ticket = self._access.enter(request.headers.get("Authorization"), request.path)
                except http.HttpError as error:
                    return self._refuse(request, error)
            visit.tenant = ticket.tenant
            try:
                return await self._answer(request)
            finally:
                if self._access is not None:
                    self._access.leave(ticket)
        finally:
            if bounded:
                self._load.leave()

    def _refuse(self, request: web.BaseRequest, error: http.HttpError) -> web.Response:
        self._refused.labels(error.kind).value += 1
        response = http.error_response(error)
        response.headers[http.REQUEST_ID] = self._ids.of(request)
        if request.body_exists:
            # The body is not read, and what is not read cannot be followed by another request.
            response.force_close()
        return response

    def _trace(self, request: web.BaseRequest) -> tracing.Trace | None:
        parent = request.headers.get(TRACEPARENT)
        if parent is not None:
            return tracing.follow(parent, request.headers.get(TRACESTATE, ""))
        # What is logged can be looked up, so it has a trace.
        return None if self._log is None else tracing.begin()


def _line(request: web.BaseRequest, response: web.StreamResponse | None, visit: Visit, seconds: float) -> Line:
    """What the access log says of a request; without a response its client has gone."""
    status = http.CLIENT_GONE if response is None else response.status
    line = Line(
        time=datetime.now(UTC),
        method=request.method,
        path=request.path[:_PATH_MAX],
        status=status,
        duration=round(seconds, 6),
        request_id="" if response is None else response.headers.get(http.REQUEST_ID, ""),
        bytes_in=_received(request),
        bytes_out=0 if response is None else response.body_length or _size(response),
        remote=request.remote or "",
        trace_id="" if visit.trace is None else visit.trace.id,
        tenant=visit.tenant,
    )
    add_progress(line, visit)
    return line


def turned_away(door: Door, connection: Connection, message: RawRequestMessage, request_id: str, sent: int) -> None:
    """Count a request that the connection itself has refused, and log it like all others."""
    door.refused.labels("Overloaded").value += 1
    log = door.checks.log
    if log is None:
        return
    remote = connection.peername
    length = message.headers.get("Content-Length", "")
    line = Line(
        time=datetime.now(UTC),
        method=message.method,
        path=message.url.path[:_PATH_MAX],
        status=503,
        duration=round(time.perf_counter() - connection.since, 6),
        request_id=request_id,
        bytes_in=int(length) if length.isdecimal() else 0,
        bytes_out=sent,
        remote=str(remote[0]) if isinstance(remote, list | tuple) else str(remote or ""),
    )
    log.write(line)


def add_progress(line: Line, visit: Visit) -> None:
    """Put into the line what is known of the request's way through the engine, if it took it."""
    progress = visit.progress
    if progress is None:
        return
    line.request_id = progress.id
    if progress.model is not None:
        line.model, line.version = progress.model.name, progress.model.version
    timing = progress.timing
    if timing is not None:
        line.queue, line.compute = round(timing.queued, 6), round(timing.run, 6)
    if progress.budget is not None:
        line.deadline = round(progress.budget, 6)
        line.deadline_outcome = deadline_outcome(line.status, line.duration, progress.budget, bool(progress.missing))


def _received(request: web.BaseRequest) -> int:
    """Bytes of the body, as far as they came."""
    if request._read_bytes is not None:
        return len(request._read_bytes)
    return request.content_length or 0


def _size(response: web.StreamResponse) -> int:
    """Bytes of an answer that is not sent yet."""
    body: Any = getattr(response, "body", None)
    return len(body) if isinstance(body, bytes | bytearray | memoryview) else 0
