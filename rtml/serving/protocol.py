"""The HTTP connection: aiohttp's, but for how it treats clients that send no HTTP, or send it slowly.

A client has `read_timeout` seconds for the head of a request: from its first byte on, and on a new connection from the
start. aiohttp itself has a limit for idle connections only, which must be long for the sake of proxies.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from rtml.serving import http

_logger = logging.getLogger("rtml.serving")

_TOO_SLOW_HEAD: Final = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"x-request-id: %s\r\nConnection: close\r\n\r\n"
)
_TOO_SLOW: Final = b'{"error":"the request did not arrive in time","type":"RequestTimeout"}'


class Connection(RequestHandler):
    """One client's connection.

    Args:
        server: whose it is.
        **settings: for aiohttp's.
    """

    __slots__ = ("_ids", "_partial", "_patience", "_read_timeout")

    def __init__(self, server: Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._ids = server.ids
        self._read_timeout = server.read_timeout
        #: Runs while the head of a request is awaited that has begun, or is the first.
        self._patience: asyncio.TimerHandle | None = None
        #: A part of that head has come.
        self._partial = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self._patience = self._loop.call_later(self._read_timeout, self._expire)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait no more."""
        self._stop_waiting()
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
        **settings: for aiohttp's.
    """

    def __init__(self, handler: http.Handler, ids: http.RequestIds, read_timeout: float, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self.ids = ids
        self.read_timeout = read_timeout

    def __call__(self) -> RequestHandler:
        """A new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)
