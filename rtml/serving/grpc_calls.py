"""What every gRPC call of the gateway has in common: names, budgets, errors, counting, the drain.

A handler is run by `Calls.answer`: what it raises becomes a status of gRPC with the same message that the HTTP side
gives. An error's type, the request's id and, when coming back makes sense, `retry-after` and gRPC's own
`grpc-retry-pushback-ms` stand in the trailing metadata. Tokens, quotas, limits, traces and the access log are those of
the HTTP side, too: `Calls.request` holds them around each request, of which a stream has many.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import grpc

from rtml.metrics import Target
from rtml.serving import http, tracing
from rtml.serving.access import Access
from rtml.serving.accesslog import Line
from rtml.serving.draining import Draining
from rtml.serving.front import Door, add_progress
from rtml.serving.grpc_messages import INFERENCE
from rtml.serving.inference import Progress
from rtml.serving.visits import VISIT, Visit

_Result = TypeVar("_Result")

#: HTTP status -> gRPC's.
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
#: Characters of an error's message: it travels in a header, of which a peer may refuse more than 8 KiB, and each byte
#: of what is not ASCII takes three.
_DETAILS_MAX: Final = 500
#: The same for the facts beside the message.
_FACTS_MAX: Final = 2000


class Call:
    """One call on its way.

    Args:
        method: Its name.
        context: Of grpc.
        ids: Names it if it brings no name.
    """

    __slots__ = ("_context", "id", "metadata", "method")

    def __init__(self, method: str, context: Any, ids: http.RequestIds) -> None:
        self.method = method
        self._context = context
        #: What it brought, by name in lower case; of several values of one name the last.
        self.metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        self.id = ids.accept(self.metadata.get(http.REQUEST_ID))

    def progress(self, deadline: float | None, request_id: str = "") -> Progress:
        """A request of this call begins.

        Args:
            deadline: Seconds that it has if the call says nothing.
            request_id: Its own id, if the call has several.

        Raises:
            InvalidInput: the metadata has an impossible deadline.
        """
        text = self.metadata.get(http.DEADLINE)
        own = http.tightest(self._context.time_remaining(), None if text is None else http.parse_deadline(text))
        return Progress(request_id or self.id, deadline if own is None else own)

    def visit(self, *, traced: bool) -> Visit:
        """Whose request it is: of the trace that it names, else of a new one if it is to be `traced`."""
        parent = self.metadata.get(tracing.TRACEPARENT)
        if parent is not None:
            return Visit(tracing.follow(parent, self.metadata.get(tracing.TRACESTATE, "")))
        return Visit(tracing.begin() if traced else None)

    @property
    def peer(self) -> str:
        """The client's address: "127.0.0.1" of "ipv4:127.0.0.1:5000"."""
        return str(self._context.peer()).partition(":")[2].rpartition(":")[0]

    def trailing(self, visit: Visit, progress: Progress) -> tuple[tuple[str, str], ...]:
        """What is said behind an answer."""
        timing = http.server_timing(progress.timing, progress.elapsed())
        trailing = ((http.REQUEST_ID, progress.id), ("server-timing", timing))
        return trailing if visit.trace is None else (*trailing, (tracing.TRACEPARENT, visit.trace.header))


class Calls:
    """The calls that run now.

    Args:
        ids: Names those that bring no name.
        door: What they pass on their way in.
    """

    def __init__(self, ids: http.RequestIds, door: Door) -> None:
        self.ids = ids
        self._door = door
        self._draining = Draining()
        #: Reads of streams, which would never end by themselves.
        self._readers: set[asyncio.Task[None]] = set()

    @property
    def draining(self) -> bool:
        """Whether `drain` has begun."""
        return self._draining.begun

    async def answer(self, method: str, context: Any, handler: Callable[[Call], Awaitable[_Result]]) -> _Result:
        """The handler's answer; every error becomes a status, except that the client has gone."""
        draining = self._draining
        task = draining.enter()
        call = Call(method, context, self.ids)
        try:
            return await handler(call)
        except asyncio.CancelledError:
            if not draining.given_up(task):
                raise
            failure = http.explain(http.stopping())
        except Exception as error:  # noqa: BLE001 - the boundary between handlers and clients
            http.log_error(method, call.id, error)
            failure = http.explain(error)
        finally:
            draining.leave(task)
        code = _CODES.get(failure.status, grpc.StatusCode.INTERNAL)
        await context.abort(code, failure.message[:_DETAILS_MAX], trailing_of(call, failure))
        raise AssertionError("unreachable: abort raises")

    @contextmanager
    def request(self, call: Call, path: str, size: int, *, bounded: bool = True) -> Iterator[Visit]:
        """Around a request: it is let in, belongs to a trace, and is logged.

        Args:
            call: That brought it.
            path: What HTTP would call it: tokens are good for paths.
            size: Its bytes.
            bounded: Whether it counts to the requests that the process may have.

        Raises:
            HttpError: it is not let in.
        """
        started = time.perf_counter()
        access, log, _ = self._door.checks
        visit = call.visit(traced=log is not None)
        before = VISIT.set(visit)
        status = http.CLIENT_GONE
        try:
            with self._admitted(call, path, visit, access, bounded):
                yield visit
            status = 200
        except Exception as error:
            status = http.explain(error).status
            raise
        finally:
            VISIT.reset(before)
            if log is not None:
                log.write(_line(call, visit, status, time.perf_counter() - started, size))

    @contextmanager
    def _admitted(self, call: Call, path: str, visit: Visit, access: Access | None, bounded: bool) -> Iterator[None]:
        entered = False
        ticket = None
        try:
            try:
                if bounded:
                    self._door.load.enter()
                    entered = True
                if access is not None:
                    ticket = access.enter(call.metadata.get("authorization"), path)
                    visit.tenant = ticket.tenant
            except http.HttpError as error:
                self._door.refused.labels(error.kind).value += 1
                raise
            yield
        finally:
            if access is not None and ticket is not None:
                access.leave(ticket)
            if entered:
                self._door.load.leave()

    @contextmanager
    def reading(self, task: asyncio.Task[None]) -> Iterator[None]:
        """While this holds, `task` waits for a stream's next request; `drain` cancels it."""
        self._readers.add(task)
        if self.draining:
            task.cancel()
        try:
            yield
        finally:
            self._readers.discard(task)

    async def drain(self, timeout: float) -> None:
        """Read no more from streams and let what runs end; cancel the rest after `timeout` seconds."""
        self._draining.begin()
        for task in self._readers:
            task.cancel()
        await self._draining.drain(timeout)


def trailing_of(call: Call, failure: http.Failure) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of a call that failed."""
    trailing: tuple[tuple[str, str], ...] = (
        (http.REQUEST_ID, call.id),
        ("rtml-error-type", failure.kind[:_DETAILS_MAX]),
    )
    if failure.details:
        facts = json.dumps(failure.details)  # in ASCII, as headers are
        if len(facts) <= _FACTS_MAX:
            trailing = (*trailing, ("rtml-error-details", facts))
    after = failure.headers.get("Retry-After")
    if after is None:
        return trailing
    return (*trailing, ("retry-after", after), ("grpc-retry-pushback-ms", str(int(float(after) * 1000))))


@contextmanager
def counted(target: Target, progress: Progress, visit: Visit) -> Iterator[None]:
    """Count a request of a model.

    Raises:
        HttpError: the model has too many.
    """
    visit.progress = progress
    if target.in_flight.value >= target.in_flight_max:
        target.refused("grpc")
        raise http.too_many(target.in_flight_max)
    target.in_flight.value += 1
    status = http.CLIENT_GONE
    try:
        yield
        status = 200
    except Exception as error:
        status = http.explain(error).status
        raise
    finally:
        target.in_flight.value -= 1
        target.ended(status, progress.elapsed(), progress.budget, bool(progress.missing), protocol="grpc")


def _line(call: Call, visit: Visit, status: int, seconds: float, size: int) -> Line:
    """What the access log says of a request."""
    line = Line(
        time=datetime.now(UTC),
        method="POST",
        path=f"/{INFERENCE}/{call.method}",
        status=status,
        duration=round(seconds, 6),
        request_id=call.id,
        bytes_in=size,
        bytes_out=0,
        remote=call.peer,
        trace_id="" if visit.trace is None else visit.trace.id,
        tenant=visit.tenant,
    )
    add_progress(line, visit)
    return line
