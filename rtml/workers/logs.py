"""What tasks print: captured at `sys.stdout` and `sys.stderr`, named after the task, bounded, sent with other messages.

Logging needs nothing of its own: its handlers write to these streams. Lines are kept whole, per stream and task. What
user code writes to the file descriptors themselves (C libraries, subprocesses) goes where the supervisor's output goes.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import Final

from rtml.client.context import current_task
from rtml.messages import Logs

#: Characters that may wait to be sent; what is printed beyond them is dropped and counted.
PENDING_MAX: Final = 1024 * 1024
#: Characters of an unfinished line; then it is cut.
LINE_MAX: Final = 16 * 1024

_Line = tuple[int, str, int, str, str]


class LogBuffer:
    """Text of this process's tasks that is not sent yet. For any thread.

    Args:
        soon: called (without a lock held) when the first text after a `take` arrives: have it sent within a moment.
    """

    def __init__(self, soon: Callable[[], None]) -> None:
        self._soon = soon
        self._lock = threading.Lock()
        self._lines: list[_Line] = []
        #: Unfinished lines by (task, stream).
        self.partial: dict[tuple[int, str], tuple[str, str]] = {}
        self._size = 0
        self._dropped = 0
        self.dirty = False

    def write(self, stream: str, text: str) -> None:
        """Adds what the running task wrote to the stream "out" or "err"."""
        info = current_task()
        task, name = (info.id, info.name) if info is not None else (0, "")
        with self._lock:
            _, before = self.partial.pop((task, stream), ("", ""))
            complete, newline, rest = (before + text).rpartition("\n")
            if len(rest) > LINE_MAX:
                complete, newline, rest = f"{complete}{newline}{rest[:LINE_MAX]}", "\n", ""
            if rest:
                self.partial[task, stream] = (name, rest)
            if not newline:
                return
            wake = self._append(task, name, stream, complete)
        if wake:
            self._soon()

    def _append(self, task: int, name: str, stream: str, text: str) -> bool:
        wake = not self.dirty
        self.dirty = True
        if self._size + len(text) > PENDING_MAX:
            self._dropped += text.count("\n") + 1
            return wake
        self._size += len(text) + 1
        if self._lines and self._lines[-1][0] == task and self._lines[-1][3] == stream:
            # One entry for a run of lines; joining is cheap as long as the run is short.
            last = self._lines[-1][4]
            if len(last) < LINE_MAX:
                self._lines[-1] = (task, name, os.getpid(), stream, f"{last}\n{text}")
                return wake
        self._lines.append((task, name, os.getpid(), stream, text))
        return wake

    def end_lines(self, task: int) -> None:
        """The task ended: its unfinished lines are finished."""
        with self._lock:
            for key in [key for key in self.partial if key[0] == task]:
                name, text = self.partial.pop(key)
                self._append(task, name, key[1], text)

    def take(self) -> list[Logs]:
        """All whole lines so far, as messages (at most one)."""
        with self._lock:
            lines, self._lines, self._size = self._lines, [], 0
            dropped, self._dropped = self._dropped, 0
            self.dirty = False
        if dropped:
            lines.append(
                (0, "", os.getpid(), "err", f"[{dropped} lines dropped: printed faster than they can be sent]")
            )
        return [Logs(lines=lines)] if lines else []


class CapturedStream(io.TextIOBase):
    """Stands in for `sys.stdout` or `sys.stderr`.

    Args:
        name: "out" or "err".
        buffer: where the text goes.
        original: its file descriptor is given to those who ask for one.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, buffer: LogBuffer, original: int) -> None:
        self.name = name
        self._buffer = buffer
        self._original = original
        self.buffer = _Binary(self)

    def write(self, text: str, /) -> int:
        """Like any text file's."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._buffer.write(self.name, text)
        return len(text)

    def writable(self) -> bool:
        """Yes."""
        return True

    def isatty(self) -> bool:
        """No: colours and progress bars are for the submitter's own terminal."""
        return False

    def fileno(self) -> int:
        """The process's own stream, for subprocesses and the like: what goes there is not captured."""
        return self._original


class _Binary(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, text: CapturedStream) -> None:
        self._text = text

    def write(self, data: object, /) -> int:
        octets = bytes(data)  # type: ignore[call-overload]
        self._text.write(octets.decode("utf-8", "backslashreplace"))
        return len(octets)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._text.fileno()
