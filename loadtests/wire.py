"""HTTP/1.1 over kept connections, with as little work as possible: the client shares the machine with what it measures.

It knows what servers of inference answer: one response to each request, with a length or in chunks.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import struct
from collections.abc import Callable
from typing import Final, cast

#: In place of a status: the connection failed, or no answer came in time.
BROKEN, TIMEOUT = 0, -1

_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.I)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.I)
_TIMING: Final = re.compile(
    rb"\r\nserver-timing:(?=.*?[ ,]queue;dur=([\d.]+))(?=.*?[ ,]compute;dur=([\d.]+)).*?[ ,]total;dur=([\d.]+)", re.I
)
_CLOSE: Final = re.compile(rb"\r\nconnection:[ \t]*close", re.I)


def response_end(data: bytes | bytearray) -> tuple[int, int, bool] | None:
    """Status, length of the first response in `data`, and whether the server closes after it; None: not all there.

    Raises:
        ValueError: this is no HTTP/1 response.
    """
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    head = bytes(data[: head_end + 2])
    if not head.startswith(b"HTTP/1."):
        raise ValueError(f"not an HTTP response: {head[:40]!r}")
    status = int(head[9:12])
    if status == 100:
        rest = response_end(data[head_end + 4 :])
        return None if rest is None else (rest[0], head_end + 4 + rest[1], rest[2])
    if found := _LENGTH.search(head):
        end = head_end + 4 + int(found[1])
    elif _CHUNKED.search(head):
        end = _chunks_end(data, head_end + 4)
    else:
        end = head_end + 4 if status in (204, 304) else -1
    if end < 0 or end > len(data):
        return None
    return status, end, _CLOSE.search(head) is not None


def timing(head: bytes | bytearray) -> tuple[float, float, float] | None:
    """Seconds that the server says of the whole, of waiting for an executor, and of the run; None if it does not."""
    found = _TIMING.search(head)
    if found is None:
        return None
    queue, run, total = (float(text) / 1e3 for text in found.groups())
    return total, queue, run


def body(response: bytes) -> bytes:
    """The body of a whole response."""
    head, _, rest = response.partition(b"\r\n\r\n")
    if not _CHUNKED.search(head + b"\r\n"):
        return rest
    found = b""
    while rest:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        found += rest[:size]
        rest = rest[size + 2 :] if size else b""
    return found


def _chunks_end(data: bytes | bytearray, at: int) -> int:
    while True:
        line = data.find(b"\r\n", at)
        if line < 0:
            return -1
        size = int(bytes(data[at:line]).partition(b";")[0], 16)
        at = line + 2 + size + 2
        if size == 0:
            return at if at <= len(data) else -1


class Connection(asyncio.Protocol):
    """One connection with at most one request under way.

    Args:
        answered: Told the connection, its request's number, and the status (or BROKEN) when the request has ended.
        lost: Told when the connection is of no further use.
        timed: Keep what the server says of its time.
    """

    def __init__(
        self, answered: Callable[[Connection, int, int], None], lost: Callable[[Connection], None], timed: bool = False
    ) -> None:
        self._timed = timed
        #: What `timing` gives for the last answer.
        self.timing: tuple[float, float, float] | None = None
        self._answered = answered
        self._lost = lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        #: Number of the request under way, -1: none.
        self.request = -1
        self.usable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are no asyncio.Transport by name.
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def send(self, request: int, data: bytes) -> None:
        """Sends a request, on a usable connection without one."""
        assert self._transport is not None
        self.request = request
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        try:
            found = response_end(buffer)
        except ValueError:
            self.abort()
            return
        if found is None:
            return
        status, end, close = found
        if self._timed:
            self.timing = timing(buffer[: buffer.find(b"\r\n\r\n")])
        del buffer[:end]
        if close:
            self.usable = False
        request, self.request = self.request, -1
        if close and self._transport is not None:
            self._transport.close()
        if request >= 0:
            self._answered(self, request, status)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        request, self.request = self.request, -1
        self._lost(self)
        self.timing = None
        if request >= 0:
            self._answered(self, request, BROKEN)

    def abort(self) -> None:
        """Ends it at once; the request under way ends with BROKEN unless it was taken out before."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()


class Timer:
    """Calls back at moments of CLOCK_MONOTONIC, to some 50 microseconds; event loops round to milliseconds."""

    _CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC, _ABSTIME = 1, 0o2004000, 1

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(self._CLOCK_MONOTONIC, self._NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._loop = loop
        self._callback = callback
        loop.add_reader(self._fd, self._due)

    def at(self, when: float) -> None:
        """Calls back once at `when`, or at once if that has passed; replaces what was asked before."""
        seconds = int(when)
        # A time of 0 would disarm it.
        nanoseconds = max(1, int((when - seconds) * 1e9))
        self._libc.timerfd_settime(self._fd, self._ABSTIME, struct.pack("qqqq", 0, 0, seconds, nanoseconds), None)

    def _due(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._callback()

    def close(self) -> None:
        """Frees the descriptor."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
