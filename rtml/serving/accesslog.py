"""The access log: one JSON object a line for every request, written by a thread of its own.

The loop encodes a line (a microsecond) and puts it aside; several times a second what has gathered goes to the thread,
which does nothing but write. A disk or pipe that is too slow costs lines, which are counted, never requests. Lines are
appended by one `write` a batch, so several processes can share a file. `reopen` follows a rotation of the file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from datetime import datetime
from typing import Final

import msgspec

from rtml.metrics import Cell

_logger = logging.getLogger("rtml.serving")

#: Seconds that a line may wait for others before it is written.
_PERIOD: Final = 0.2
#: Bytes that may wait to be written; what comes then is dropped.
_PENDING_MAX: Final = 8 * 1024 * 1024
#: Seconds that the last lines may take at the end.
_GOODBYE: Final = 2.0
STDOUT: Final = "-"

_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, omit_defaults=True):
    """What is logged of a request; what is not known of it is left out. Times in seconds."""

    time: datetime
    method: str
    path: str
    status: int
    #: From the request's head to its answer.
    duration: float
    request_id: str
    bytes_in: int
    bytes_out: int
    remote: str = ""
    trace_id: str = ""
    tenant: str = ""
    model: str = ""
    version: str = ""
    #: Of the graph's root: waiting for an executor, and inside the function.
    queue: float | None = None
    compute: float | None = None
    #: The budget that the request had.
    deadline: float | None = None
    #: met, missed, cancelled, failed
    deadline_outcome: str = ""


class AccessLog:
    """Writes lines to a file, or to standard output.

    Args:
        path: Of the file, which is appended to; "-" is standard output.
        dropped: Counts lines that were lost because too many waited.
        failed: Counts lines that were lost because they could not be written; by the thread.
    """

    def __init__(self, path: str, dropped: Cell, failed: Cell) -> None:
        self._path = path
        self._dropped = dropped
        self._failed = failed
        self._lines: list[bytes] = []
        #: Bytes that the loop has put aside, and that the thread has not written; each written by one side only.
        self._given = 0
        self._written = 0
        self._timer: asyncio.TimerHandle | None = None
        #: Batches; None: open the file anew; b"": the end.
        self._batches: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._file = -1

    def open(self) -> None:
        """Open the file and start the thread.

        Raises:
            ValueError: the file cannot be opened.
        """
        try:
            self._file = self._open()
        except OSError as error:
            raise ValueError(f"cannot open the access log {self._path!r}: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._write_batches, name="rtml-access-log", daemon=True)
        self._thread.start()

    def write(self, line: Line) -> None:
        """Log a request; from the loop's thread only."""
        encoded = _encode(line) + b"\n"
        if self._given - self._written > _PENDING_MAX:
            self._dropped.value += 1
            return
        self._given += len(encoded)
        self._lines.append(encoded)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PERIOD, self.flush)

    def flush(self) -> None:
        """Give the thread what has gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            self._batches.put((b"".join(self._lines), len(self._lines)))
            self._lines.clear()

    def reopen(self) -> None:
        """Open the file anew, for whoever has moved it away."""
        self.flush()
        self._batches.put(None)

    def close(self) -> None:
        """Write what is there, and end the thread. Idempotent."""
        self.flush()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._batches.put((b"", 0))
        thread.join(_GOODBYE)
        if self._path != STDOUT and not thread.is_alive():
            os.close(self._file)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _open(self) -> int:
        if self._path == STDOUT:
            return 1
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _write_batches(self) -> None:
        while True:
            batch = self._batches.get()
            if batch is None:
                self._open_anew()
                continue
            data, lines = batch
            if not data:
                return
            self._write(data, lines)
            self._written += len(data)

    def _write(self, data: bytes, lines: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._failed.value += lines
            _logger.error("the access log %s cannot be written: %s", self._path, error.strerror or error)

    def _open_anew(self) -> None:
        if self._path == STDOUT:
            return
        try:
            new = self._open()
        except OSError as error:
            _logger.error("the access log %s stays as it is: %s", self._path, error.strerror or error)
            return
        os.close(self._file)
        self._file = new
