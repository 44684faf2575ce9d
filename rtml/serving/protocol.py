"""The HTTP connection: aiohttp's, but for how it treats clients that send no HTTP, or send it slowly.

A client has `read_timeout` seconds for the head of a request: from its first byte on, and on a new connection from the
start. aiohttp itself has a limit for idle connections only, which must be long for the sake of proxies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import Any, Final, NamedTuple

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from rtml.metrics import Cell
from rtml.serving import http

_logger = logging.getLogger("rtml.serving")

_TOO_SLOW_HEAD: Final = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"x-request-id: %s\r\nConnection: close\r\n\r\n"
)
_FULL_HEAD: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: 1\r\nx-request-id: %s\r\nConnection: close\r\n\r\n"
)
_TOO_SLOW: Final = b'{"error":"the request did not arrive in time","type":"RequestTimeout"}'


class Crowd(NamedTuple):
    """How many connections there are, and may be."""

    open: Cell
    refused: Cell
    most: float = math.inf


class Connection(RequestHandler):
    """One client's connection.

    Args:
        server: whose it is.
        **settings: for aiohttp's.
    """

    __slots__ = ("_ids", "_partial", "_patience", "_read_timeout", "_server")

    def __init__(self, server: Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._server = server
        self._ids = server.ids
        self._read_timeout = server.read_timeout
        #: Runs while the head of a request is awaited that has begun, or is the first.
        self._patience: asyncio.TimerHandle | None = None
        #: A part of that head has come.
        self._partial = False

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
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; begin to wait if it is the beginning of a head."""
        super().data_received(data)
        if self._messages or self._waiter is None or self._waiter.done():
            if self._patience is not None:
                self._stop_waiting()
            return
        self._partial = True
        if self._patience is None:
            self._patience = self._loop.call_later(self._read_timeout, self._expire)

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


class Server(web.Server):
    """Makes connections.

    Args:
        handler: answers requests.
        ids: names those that get no further.
        read_timeout: seconds for the head of a request.
        crowd: counts and limits connections.
        **settings: for aiohttp's.
    """

    def __init__(
        self, handler: http.Handler, ids: http.RequestIds, read_timeout: float, crowd: Crowd, **settings: Any
    ) -> None:
        super().__init__(handler, **settings)
        self.ids = ids
        self.read_timeout = read_timeout
        self._crowd = crowd
        #: Set when there is no connection; made when somebody waits for it.
        self._empty: asyncio.Event | None = None

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
