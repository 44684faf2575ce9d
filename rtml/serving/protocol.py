"""The HTTP connection: aiohttp's, but for slow clients, for what is no HTTP, and for requests that come in one piece.

A client has `read_timeout` seconds for the head of a request: from its first byte on, and on a new connection from the
start. aiohttp itself has a limit for idle connections only, which must be long for the sake of proxies.

Most requests arrive whole, one at a time. Such a one is answered by a task that begins as soon as it has come, and its
answer is written at once; aiohttp's own way (`RequestHandler.start`: a task for each connection that waits for parsed
messages, another one for each request, an answer in several steps) is left to all others, and to answers that are not
plain bytes. What a client sends meanwhile waits. The parser is aiohttp's in any case. But clients repeat themselves: a
head that was parsed on this connection before, byte for byte but for the number of its budget, is not parsed again. And
when the loop is so far behind that such a request would be too late (`rtml.serving.pressure`), it is refused there and
then, without a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final, NamedTuple

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE, HttpVersion11, RawRequestMessage, StreamWriter
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_writer import _serialize_headers
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler
from multidict import CIMultiDict, CIMultiDictProxy

from rtml.errors import InvalidInput
from rtml.metrics import Cell
from rtml.serving import http
from rtml.serving.pressure import Pressure

_logger = logging.getLogger("rtml.serving")

_TOO_SLOW_HEAD: Final = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"x-request-id: %s\r\nConnection: close\r\n\r\n"
)
_FULL_HEAD: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: 1\r\nx-request-id: %s\r\nConnection: close\r\n\r\n"
)
_REFUSED_HEAD: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: %d\r\nx-request-id: %s\r\n\r\n%s"
)
#: As JSON of an `Overloaded`: made without one, as there may be thousands a second.
_REFUSED: Final = (
    b'{"error":"the gateway is behind: it would probably take %.1f ms; it has %.1f","type":"Overloaded",'
    b'"predicted":%.6f,"budget":%.6f,"retry_after":%.6f,"quota":false}'
)
#: The end of a head; and what is before a budget in it.
_END: Final = b"\r\n\r\n"
_BUDGET: Final = f"\r\n{http.DEADLINE}: ".encode()
#: Heads that a connection remembers, and their most bytes.
_HEADS_MAX: Final = 16
_HEAD_MAX: Final = 2048
#: The status of what is refused.
_UNAVAILABLE: Final = 503
#: Bytes that may wait until a request has been answered before the client is told to pause.
_AHEAD_MAX: Final = 256 * 1024
#: Answers that are what they say.
_PLAIN: Final = (web.Response, http.PlainResponse)
#: Larger answers are not copied behind their heads.
_JOIN_MAX: Final = 64 * 1024
_TOO_SLOW: Final = b'{"error":"the request did not arrive in time","type":"RequestTimeout"}'


class Crowd(NamedTuple):
    """How many connections there are, and may be."""

    open: Cell
    refused: Cell
    most: float = math.inf


class _Known(NamedTuple):
    """A head that was parsed, and the size of its body."""

    message: RawRequestMessage
    size: int
    #: Of a request with this head; empty before the first that comes again.
    fields: dict[str, Any]


class Connection(RequestHandler):
    """One client's connection.

    Args:
        server: whose it is.
        **settings: for aiohttp's.
    """

    __slots__ = (
        "_ahead", "_answering", "_fresh", "_heads", "_ids", "_new", "_partial", "_patience", "_pressure",
        "_read_timeout", "_server", "_tight", "since",
    )  # fmt: skip

    def __init__(self, server: Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._server = server
        self._ids = server.ids
        self._read_timeout = server.read_timeout
        self._pressure = server.pressure
        #: Since when the last bytes may have been there, on `perf_counter`'s clock; 0: not known.
        self.since = 0.0
        #: The budget of the request that is being answered, if it was let in although the loop was behind; else 0.
        self._tight = 0.0
        #: Runs while the head of a request is awaited that has begun, or is the first.
        self._patience: asyncio.TimerHandle | None = None
        #: Nothing has come, and `start` may not have begun to wait for it.
        self._new = True
        #: A part of that head has come.
        self._partial = False
        #: Answers the request that came in one piece; and what the client has sent since.
        self._answering: asyncio.Task[None] | None = None
        self._ahead = bytearray()
        #: The parser holds no part of a request: what comes now is the beginning of one.
        self._fresh = True
        #: What was parsed lately, by the head's bytes.
        self._heads: dict[bytes, _Known] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait, unless there are too many connections."""
        super().connection_made(transport)
        server = self._server
        if not server.opened():
            error = http.HttpError(503, "there are too many connections", "TooManyConnections")
            body = bytes(http.error_response(error).body or b"")  # type: ignore[arg-type]  # it is bytes
            self.transport.write(_FULL_HEAD % (len(body), self._ids.new().encode()) + body)  # type: ignore[union-attr]
            self.force_close()
            return
        self._patience = self._loop.call_later(self._read_timeout, self._expire)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        self._server.closed()
        if self._answering is not None:
            self._answering.cancel()
        self._heads.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; begin to answer if it is a whole request, to wait if it is the beginning of a head."""
        if self._answering is not None:
            self._ahead += data
            if len(self._ahead) > _AHEAD_MAX and not self._buffer_paused:
                self._pause_reading_for_buffer()
            return
        pressure = self._pressure
        if not pressure.reading:
            self._loop.call_soon(self._server.have_read)
        self.since = pressure.read(perf_counter())
        waiter, new, self._new = self._waiter, self._new, False
        if (waiter.done() if waiter is not None else not new) or self._partial or self._upgraded:
            self._fresh = False
            super().data_received(data)
        else:
            head = data[: data.find(_END) + len(_END)]
            key, budget = _cut(head)
            if self._fresh:
                known = self._heads.get(key)
                if known is not None and len(data) == len(head) + known.size:
                    message = known.message
                    if self._refused(message, budget):
                        return
                    if budget is None:
                        self._begin(message, data[len(head) :], known.fields)
                    else:
                        self._begin(_again(message, budget), data[len(head) :])
                    return
                self._fresh = False
            self._waiter = None  # so that `start` is not told
            super().data_received(data)
            self._waiter = waiter
            if self._take(data, head, key):
                return
            if self._messages and waiter is not None and not waiter.done():
                waiter.set_result(None)
        if self._messages or (waiter.done() if waiter is not None else not new):
            if self._patience is not None:
                self._stop_waiting()
            return
        self._partial = True
        if self._patience is None:
            self._patience = self._loop.call_later(self._read_timeout, self._expire)

    # --- whole requests -----------------------------------------------------------------------------------------------

    def _take(self, data: bytes, head: bytes, key: bytes) -> bool:
        """Begin to answer what was parsed, if it is one whole request. It is remembered if `data` is all of it.

        Args:
            data: What was parsed last.
            head: Its beginning.
            key: What of that is remembered.
        """
        if len(self._messages) != 1 or self._parser is None:
            return False
        message, payload = self._messages[0]
        if not isinstance(message, RawRequestMessage) or message.version != HttpVersion11 or message.should_close:
            return False
        if message.upgrade or message.chunked or not (payload is EMPTY_PAYLOAD or payload._eof):
            return False
        self._messages.clear()
        self._parser.message_consumed()
        body = payload.read_nowait()
        if len(head) + len(body) == len(data) and len(head) <= _HEAD_MAX and _is_head(head, message):
            self._fresh = True
            if len(self._heads) >= _HEADS_MAX:
                del self._heads[next(iter(self._heads))]
            self._heads[key] = _Known(message, len(body), {})
        if not self._refused(message, message.headers.get(http.DEADLINE)):
            self._begin(message, body)
        return True

    def _begin(self, message: RawRequestMessage, body: bytes, fields: dict[str, Any] | None = None) -> None:
        if self._patience is not None:
            self._stop_waiting()
        pressure = self._pressure
        self._request_in_progress = True
        self._answering = self._loop.create_task(self._answer(message, body, fields))
        pressure.queued += 1

    def _refused(self, message: RawRequestMessage, text: str | None) -> bool:
        """Refuse a request for which the loop alone would take longer than its budget, which `text` says."""
        pressure = self._pressure
        needed = pressure.behind(self.since, perf_counter())
        if not needed or text is None or self.transport is None:
            return False
        try:
            budget = http.parse_deadline(text)
        except InvalidInput:
            return False  # its route says so
        retry = pressure.refuses(needed, budget)
        if not retry:
            if pressure.teaches(needed, budget):
                self._tight = budget
            return False
        if self._patience is not None:
            self._stop_waiting()
        body = _REFUSED % ((budget + retry) * 1e3, budget * 1e3, budget + retry, budget, retry)
        name = self._ids.accept(message.headers.get(http.REQUEST_ID))
        self.transport.write(_REFUSED_HEAD % (len(body), math.ceil(retry), name.encode(), body))
        self._server.turned_away(self, message, name, len(body))
        self._stay()
        return True

    def arrived(self) -> float:
        """When the request that begins to be answered may have come, at the earliest, on `perf_counter`'s clock."""
        since = self.since
        if self._answering is None:
            self.since = 0.0  # the client may have sent the next one already; when is not known
        return since or perf_counter()

    def _request(self, message: RawRequestMessage, fields: dict[str, Any] | None) -> web.BaseRequest:
        """The request of a head; `fields` are those of an earlier one with the same, or become so."""
        writer, task = StreamWriter(self, self._loop), self._answering
        if fields:
            request = web.BaseRequest.__new__(web.BaseRequest)
            own = request.__dict__
            own.update(fields)
            own["_payload_writer"], own["_task"], own["_state"] = writer, task, {}
            return request
        request = self._server.request_factory(message, EMPTY_PAYLOAD, self, writer, task)  # type: ignore[arg-type]
        if fields is not None:
            fields.update(request.__dict__, _payload_writer=None, _task=None)
        return request

    async def _answer(self, message: RawRequestMessage, body: bytes, fields: dict[str, Any] | None) -> None:
        """What `RequestHandler.start` does for one request."""
        keep = False
        try:
            request = self._request(message, fields)
            request._read_bytes = body
            self._current_request = request
            try:
                response = await self._server.request_handler(request)
            except Exception as error:  # noqa: BLE001 - as aiohttp does
                response = self.handle_error(request, 500, error)
            self._current_request = None
            if self._tight and response.status == _UNAVAILABLE:
                self._tight = 0.0  # no promise was made
            plain = _plain(message, response)
            if plain is None:
                _, reset = await self.finish_response(request, response, None)
                keep = bool(response.keep_alive) and not reset
            elif self.transport is not None:
                keep = response.keep_alive is not False
                for part in plain:
                    self.transport.write(part)
                if self._paused:
                    await self._drain_helper()
        except ConnectionError:
            keep = False
        finally:
            self._answered(keep)

    def _answered(self, keep: bool) -> None:
        """The answer has been written: look at what came meanwhile, or end the connection."""
        self._answering = self._current_request = None
        if self._tight:
            self._pressure.ended(perf_counter() - self.since <= self._tight)
            self._tight = 0.0
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        if not keep or self._close or self._force_close:
            self.close()
            if self.transport is not None:
                self.transport.close()
            return
        self._stay()
        if self._ahead:
            ahead, self._ahead = bytes(self._ahead), bytearray()
            if self._buffer_paused:
                self._resume_reading_for_buffer()
            self.data_received(ahead)

    def _stay(self) -> None:
        """Wait for the next request, not for ever."""
        self._next_keepalive_close_time = close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_time, self._process_keepalive)

    def _process_keepalive(self) -> None:
        """A connection was idle for long, if none of its requests is being answered."""
        if self._answering is not None:
            self._keepalive_handle = None
            return
        super()._process_keepalive()

    # --- slow clients -------------------------------------------------------------------------------------------------

    def _stop_waiting(self) -> None:
        self._partial = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _expire(self) -> None:
        """The head did not come in time. A connection on which nothing came at all is closed without a word."""
        self._patience = None
        if self._waiter is None or self._waiter.done() or self.transport is None:
            return
        if self._partial:
            self.transport.write(_TOO_SLOW_HEAD % (len(_TOO_SLOW), self._ids.new().encode()) + _TOO_SLOW)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP; errors of handlers never come here (`Routes.answer`)."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already, there cannot be another one")
        _logger.debug("%s sent no valid HTTP: %r", request.remote, exc)
        if isinstance(exc, LineTooLong):
            status = 431
        # The parser's message quotes the line below, which may be long and is the client's own.
        said = (message or "").partition("\n")[0].rstrip(":")
        error = http.HttpError(status, f"this is no valid HTTP request: {said or 'malformed'}", "BadRequest")
        response = http.error_response(error)
        response.headers[http.REQUEST_ID] = self._ids.new()
        response.force_close()
        return response


def _is_head(head: bytes, message: RawRequestMessage) -> bool:
    """Whether `head` is what was parsed, and not the end of it whose beginning came before."""
    line = f"{message.method} {message.path} HTTP/1.1\r\n".encode("utf-8", "surrogateescape")
    return head.startswith(line) and head.endswith(_END) and head.count(b"\r\n") == len(message.raw_headers) + 2


def _cut(head: bytes) -> tuple[bytes, str | None]:
    """A head without the number of its budget, and that: clients say of each request what is left."""
    at = head.find(_BUDGET)
    if at < 0:
        return head, None
    at += len(_BUDGET)
    end = head.find(b"\r", at)
    value = head[at:end]
    if not value.replace(b".", b"", 1).isdigit():
        return head, None
    return b"%b\0%b" % (head[:at], head[end:]), value.decode()  # with what is in no head


def _again(message: RawRequestMessage, budget: str) -> RawRequestMessage:
    """A head that was parsed before, with another budget."""
    headers = CIMultiDict(message.headers)
    headers[http.DEADLINE] = budget
    return message._replace(headers=CIMultiDictProxy(headers))


def _plain(message: RawRequestMessage, response: web.StreamResponse) -> tuple[bytes, ...] | None:
    """The bytes of an answer, as aiohttp would send them; None if it is of a kind that is left to aiohttp.

    Of what a `web.Response` can do beside (cookies, ranges, its own compression) no route makes use.
    """
    if response.__class__ not in _PLAIN or message.method == "HEAD":
        return None
    body, status = response._body, response._status
    if body.__class__ is not bytes or status < 200 or status in (204, 304):
        return None
    headers = response._headers
    headers["Content-Length"] = str(len(body))
    if response.__class__ is web.Response:
        headers.setdefault("Content-Type", "application/octet-stream")
    headers["Date"] = rfc822_formatted_time()
    headers["Server"] = SERVER_SOFTWARE
    if response._keep_alive is False:
        headers["Connection"] = "close"
    head = _serialize_headers(f"HTTP/1.1 {status} {response._reason}", headers)
    return (head + body,) if len(body) <= _JOIN_MAX else (head, body)


class Server(web.Server):
    """Makes connections.

    Args:
        handler: answers requests.
        ids: names those that get no further.
        read_timeout: seconds for the head of a request.
        crowd: counts and limits connections.
        turned_away: told of each request that got no further, as its connection, its head, id, and the answer's bytes.
        **settings: for aiohttp's.
    """

    def __init__(
        self,
        handler: http.Handler,
        ids: http.RequestIds,
        read_timeout: float,
        crowd: Crowd,
        turned_away: Callable[[Connection, RawRequestMessage, str, int], None],
        **settings: Any,
    ) -> None:
        super().__init__(handler, **settings)
        self.ids = ids
        self.read_timeout = read_timeout
        self.pressure = Pressure()
        self.turned_away = turned_away
        self._crowd = crowd
        #: Set when there is no connection; made when somebody waits for it.
        self._empty: asyncio.Event | None = None

    def have_read(self) -> None:
        """All that had come in this turn of the loop has been read."""
        self.pressure.have_read()
        # After all that was made ready by reading, and one more look at the sockets, for which uvloop does not wait.
        self._loop.call_soon(self.pressure.done)

    def opened(self) -> bool:
        """A connection came; False: it is one too many."""
        crowd = self._crowd
        crowd.open.value += 1
        if crowd.open.value <= crowd.most:
            return True
        crowd.refused.value += 1
        return False

    def closed(self) -> None:
        """A connection ended."""
        self._crowd.open.value -= 1
        if self._empty is not None and self._crowd.open.value <= 0:
            self._empty.set()

    async def wait_until_empty(self, timeout: float) -> None:
        """Return when there is no connection, or after `timeout` seconds."""
        self._empty = asyncio.Event()
        if self._crowd.open.value <= 0:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._empty.wait()

    def __call__(self) -> RequestHandler:
        """A new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)
