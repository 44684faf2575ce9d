"""What all routes of the gateway have in common: answers, errors, request ids, deadlines, counting.

A route is a coroutine function of a request; `Routes.answer` finds it, and turns what it raises into JSON. Everything
here is on the path of every request, so there is no framework between the server's protocol and the route: aiohttp's
low-level server calls `Routes.answer` directly (10 us of 95 less than with its router; measured with a no-op).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from rtml.errors import ConnectionLost, InvalidInput, Overloaded, RtmlError, SubmitError
from rtml.messages import Timing
from rtml.serving import bodies, tracing
from rtml.serving.bodies import Buffer
from rtml.serving.draining import Draining
from rtml.serving.engine import RemoteError
from rtml.serving.tracing import TRACEPARENT, TRACESTATE
from rtml.serving.visits import VISIT, Visit

_logger = logging.getLogger("rtml.serving")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
#: The handlers of one path by method.
Methods = dict[str, Handler]

#: A request's budget in milliseconds.
DEADLINE: Final = "x-rtml-deadline-ms"
#: Names of steps that the answer had to do without, comma-separated, each quoted as in a URL.
MISSING_STEPS: Final = "x-rtml-missing-steps"
REQUEST_ID: Final = "x-request-id"
CONTENT_ENCODING: Final = "Content-Encoding"
#: nginx's code for a client that has gone; nobody reads it but the metrics.
CLIENT_GONE: Final = 499

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MESSAGE_MAX: Final = 2000
#: Compressed bytes that do not hold up the others for long, even if they are a thousand times as many in the end.
_INFLATE_HERE: Final = 4096

#: Bodies from this size on are read into one place.
_LARGE: Final = 256 * 1024

#: With every 503 that says nothing else of when to come back.
_RETRY: Final = {"Retry-After": "1"}

_encode_json = msgspec.json.Encoder().encode


#: Seconds; a longer budget is as good as this one, and the engine's messages have a limit, too.
BUDGET_MAX: Final = 1e9


class HttpError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, kind: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or "HttpError"
        self.headers = headers


class PlainResponse(web.Response):
    """As `web.Response`, for status 200 and a body of bytes: made without a look at what no route gives."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        # Nothing of `web.Response.__init__` but what it keeps.
        self._state = {}
        self._headers = CIMultiDict(headers)
        self._status = 200
        self._reason = "OK"
        self._body = body
        self._compressed_body = None
        self._zlib_executor_size = 1024
        self._zlib_executor = None


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`value` as JSON. Whoever is told that something is not there now is told to come back, too."""
    if status == 503 and headers is None:
        headers = _RETRY
    return web.Response(body=_encode_json(value), status=status, headers=headers, content_type="application/json")


def constant(value: Any) -> Handler:
    """A handler that always answers `value`."""

    async def handler(request: web.BaseRequest) -> web.Response:
        return json_response(value)

    return handler


class Failure(NamedTuple):
    """What a client is told about an error, in whatever protocol: never a traceback."""

    #: As HTTP says it.
    status: int
    #: The error's type.
    kind: str
    message: str
    headers: dict[str, str]
    #: Facts beside the message, as JSON.
    details: dict[str, Any]


def explain(error: BaseException) -> Failure:
    """What to tell the client. Whoever is told that something is not there now is told to come back, too."""
    if isinstance(error, HttpError):
        status, kind, headers = error.status, error.kind, error.headers
    else:
        status, kind, headers = status_of(error), kind_of(error), None
    # Whoever reports nothing better than an unknown exception's text at least says what it was.
    message = str(error)[:_MESSAGE_MAX] or kind
    if isinstance(error, ConnectionLost):  # says where the engine was looked for, which is for the operator
        message = "the engine cannot be reached"
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    details = error.details if isinstance(error, RtmlError) else {}
    if headers is None:
        headers = _RETRY if status == 503 else {}
    return Failure(status, kind, message, headers, details)


def error_json(error: BaseException) -> bytes:
    """The same where the status has been sent already."""
    _, kind, message, _, details = explain(error)
    return _encode_json({"error": message, "type": kind, **details})


def error_response(error: BaseException) -> web.Response:
    """The answer for an error: its message and type."""
    status, kind, message, headers, details = explain(error)
    return json_response({"error": message, "type": kind, **details}, status, headers)


def status_of(error: BaseException) -> int:
    """The HTTP status for an error of a graph."""
    if isinstance(error, InvalidInput):
        return error.http_status
    # What is a bad request between a program and the engine is the program's fault here, not the client's.
    if isinstance(error, SubmitError) or not isinstance(error, RtmlError):
        return 500
    # Cancelled with the client still there: by an operator, or because the engine stops.
    return 503 if error.http_status == CLIENT_GONE else error.http_status


def kind_of(error: BaseException) -> str:
    """The name of an error's type."""
    if isinstance(error, RemoteError):
        return error.info.type
    return type(error).__name__


def log_error(where: str, request_id: str, error: BaseException) -> None:
    """Tell the operator what clients are not told."""
    if isinstance(error, RemoteError):
        _logger.error("%s: request %s failed: %s\n%s", where, request_id, error.info.type, error.info.traceback)
    elif not isinstance(error, HttpError) and status_of(error) == 500:
        _logger.error("%s: request %s failed", where, request_id, exc_info=error)
    elif isinstance(error, ConnectionLost):
        _logger.error("%s: request %s failed: %s", where, request_id, error)


class RequestIds:
    """Names for requests that bring none."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def of(self, request: web.BaseRequest) -> str:
        """The request's own id if it is a decent one, else a new one."""
        given = request.headers.get(REQUEST_ID)
        return f"{self._prefix}-{next(self._numbers):x}" if given is None else self.accept(given)

    def accept(self, given: str | None) -> str:
        """`given` if it is a decent id, else a new one."""
        return given if given is not None and _REQUEST_ID.fullmatch(given) else self.new()

    def new(self) -> str:
        """A new id."""
        return f"{self._prefix}-{next(self._numbers):x}"


def deadline_of(request: web.BaseRequest) -> float | None:
    """The budget in seconds that the request's header gives it.

    Raises:
        InvalidInput: it is no positive number of milliseconds.
    """
    text = request.headers.get(DEADLINE)
    return None if text is None else parse_deadline(text)


def parse_deadline(text: str) -> float:
    """The seconds in the value of the header `x-rtml-deadline-ms`.

    Raises:
        InvalidInput: it is no positive number of milliseconds.
    """
    try:
        # Python reads underscores and other scripts' digits, too; the header does not.
        milliseconds = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise InvalidInput(f"header {DEADLINE} must be a positive number of milliseconds, not {text[:40]!r}")
    return min(milliseconds / 1e3, BUDGET_MAX)


def arrived(request: web.BaseRequest) -> float:
    """When it came, on `time.perf_counter`'s clock: not later than that, if the event loop was busy then."""
    found: Callable[[], float] | None = getattr(request.protocol, "arrived", None)
    return time.perf_counter() if found is None else found()


def tightest(*budgets: float | None) -> float | None:
    """The smallest of those that are given."""
    given = [budget for budget in budgets if budget is not None]
    return min(given) if given else None


#: One format is quicker than six fields of an f-string, on the way of every answer.
_TIMING: Final = (
    'queue;dur=%.3f, batch;desc="%d", transfer;dur=%.3f, compute;dur=%.3f, serialise;dur=%.3f, total;dur=%.3f'
)


def server_timing(timing: Timing | None, total: float) -> str:
    """The header `Server-Timing`, in milliseconds: where the time of the graph's root went, and the whole.

    `batch` is no time but how many calls shared the run; `serialise` is what is left: the gateway's own part and the
    way to the dispatcher and back.
    """
    if timing is None:
        return f"total;dur={total * 1e3:.3f}"
    queued, transfer, run = timing.queued, timing.transfer, timing.run
    rest = total - queued - transfer - run
    rest = rest if rest > 0.0 else 0.0
    return _TIMING % (queued * 1e3, timing.batch, transfer * 1e3, run * 1e3, rest * 1e3, total * 1e3)


async def read_body(request: web.BaseRequest, timeout: float) -> Buffer:
    """The whole body; a `memoryview` if it is large.

    Args:
        request: whose.
        timeout: seconds that the client may take to send it.

    Raises:
        HttpError: it is larger than the gateway allows, compressed wrongly, or does not come in time.
    """
    body: Buffer | None = request._read_bytes  # it came with the head
    if body is None:
        body = await _read_raw(request, timeout)
    elif len(body) > request.client_max_size:
        raise _too_large(request.client_max_size)
    encoding = request.headers.get(CONTENT_ENCODING)
    if not encoding:
        return body
    encoding = encoding.strip().lower()
    if encoding not in bodies.ENCODINGS:
        message = f"bodies can be compressed with {', '.join(bodies.ENCODINGS[:2])}, not {encoding[:40]!r}"
        raise HttpError(415, message, "InvalidInput", {"Accept-Encoding": ", ".join(bodies.ENCODINGS)})
    limit = request.client_max_size
    try:
        if len(body) > _INFLATE_HERE:
            plain = await asyncio.to_thread(bodies.decompress, encoding, body, limit)
        else:
            plain = bodies.decompress(encoding, body, limit)
    except ValueError as error:
        raise HttpError(400, str(error), "InvalidInput") from None
    if plain is None:
        raise _too_large(limit)
    return plain


async def _read_raw(request: web.BaseRequest, timeout: float) -> Buffer:
    """The body as it came."""
    limit = request.client_max_size
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    try:
        if request.content.is_eof():
            return await request.read()
        async with asyncio.timeout(timeout):
            if (request.content_length or 0) >= _LARGE:
                return await _read_large(request, request.content_length or 0)
            return await request.read()
    except TimeoutError:
        message = f"the body did not arrive within {timeout:g} s"
        raise HttpError(408, message, "RequestTimeout", {"Connection": "close"}) from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise HttpError(400, "the body cannot be read: wrong length", "InvalidInput") from None


def stopping() -> HttpError:
    """What is told to those for whom the gateway that stops does not wait."""
    return HttpError(503, "the gateway stops, and does not wait any longer", "Stopping")


def too_many(most: float) -> HttpError:
    """A model or endpoint has as many requests as it may."""
    return HttpError(503, f"there are {most:g} requests being answered here already, the most that may be", "QueueFull")


async def _read_large(request: web.BaseRequest, size: int) -> Buffer:
    """A body whose size is known, with one copy: each piece goes to its place in what will hold all of it.

    `request.read` joins the pieces of every turn, then adds them to what it has, which moves as it grows, and copies
    that once more in the end.
    """
    # Not zeroed, unlike a bytearray.
    whole: memoryview = np.empty(size, np.uint8).data
    content, position = request.content, 0
    while True:
        piece, end = await content.readchunk()
        if not piece and not end:
            return whole[:position]
        whole[position : position + len(piece)] = piece
        position += len(piece)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes", "TooLarge")


class Routes:
    """Paths and methods -> handlers.

    Args:
        ids: Names requests.
    """

    def __init__(self, ids: RequestIds) -> None:
        self._ids = ids
        self._exact: dict[str, Methods] = {}
        #: Paths below a prefix, that somebody else knows.
        self._below: list[tuple[str, Callable[[str], Methods]]] = []
        self._draining = Draining()

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Serve exactly `path`.

        Raises:
            ValueError: it is served already.
        """
        methods = self._exact.setdefault(path, {})
        if method in methods:
            raise ValueError(f"{method} {path} is served twice")
        methods[method] = handler
        if method == "GET":
            methods["HEAD"] = handler

    def add_below(self, prefix: str, find: Callable[[str], Methods]) -> None:
        """Ask `find` for the handlers of a path that begins with `prefix` and is served by nothing else.

        Args:
            prefix: Like "/v2/models/".
            find: Gets the whole path; raises `HttpError` if there is nothing. Called by every request.
        """
        self._below.append((prefix, find))

    def paths(self) -> Iterable[str]:
        """The exact paths."""
        return self._exact

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Handle a request; every error becomes an answer, except that the client has gone."""
        visit = VISIT.get()
        if visit is None and (parent := request.headers.get(TRACEPARENT)) is not None:
            visit = Visit(tracing.follow(parent, request.headers.get(TRACESTATE, "")))
            VISIT.set(visit)
        draining = self._draining
        task = draining.enter()
        try:
            response = await self._handler(request)(request)
        except asyncio.CancelledError:
            if not draining.given_up(task):
                raise
            response = error_response(stopping())
        except Exception as error:  # noqa: BLE001 - the boundary between handlers and clients
            log_error(request.path, request.headers.get(REQUEST_ID, "?"), error)
            response = error_response(error)
        finally:
            draining.leave(task)
        if REQUEST_ID not in response.headers:
            response.headers[REQUEST_ID] = self._ids.of(request)
        if visit is not None and visit.trace is not None:
            response.headers[TRACEPARENT] = visit.trace.header
            if visit.trace.state:
                response.headers[TRACESTATE] = visit.trace.state
        if draining.begun:
            # The connection ends after this answer: a client that knows does not send its next request into the void.
            response.force_close()
        return response

    def say_goodbye(self) -> None:
        """From now on every answer tells its client that the connection ends."""
        self._draining.begin()

    async def drain(self, timeout: float) -> None:
        """Let what runs end, and tell clients that their connections do; cancel the rest after `timeout` seconds."""
        await self._draining.drain(timeout)

    def _handler(self, request: web.BaseRequest) -> Handler:
        path = request.path
        methods = self._exact.get(path)
        if methods is None:
            methods = self._find(path)
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise HttpError(405, f"{path[:200]} takes {allowed}", "MethodNotAllowed", {"Allow": allowed})
        return handler

    def _find(self, path: str) -> Methods:
        for prefix, find in self._below:
            if path.startswith(prefix):
                return find(path)
        raise HttpError(404, f"there is nothing at {path[:200]}", "NotFound")
