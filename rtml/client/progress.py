"""A line on the terminal that says how far a long `map` is. Nothing is drawn when standard error is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

#: Seconds before the first line, so that short maps stay silent, and between two.
_PATIENCE: Final = 2.0
PERIOD: Final = 0.2

_WIDTH: Final = 30


class Progress:
    """Draws `done` of `total`.

    Args:
        name: of what is mapped.
        total: calls in all.
        stream: a terminal.
    """

    def __init__(self, name: str, total: int, stream: TextIO) -> None:
        self._name = name
        self._total = total
        self._stream = stream
        self._begin = time.monotonic()
        self._next = self._begin + _PATIENCE
        self._drawn = False

    @property
    def due(self) -> bool:
        """Whether it is time for `draw`."""
        return time.monotonic() >= self._next

    def draw(self, done: int) -> None:
        """Show that `done` calls have ended."""
        now = time.monotonic()
        self._next = now + PERIOD
        self._drawn = True
        rate = done / (now - self._begin)
        left = f"{(self._total - done) / rate:.0f} s left" if done else "waiting"
        filled = _WIDTH * done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        self._write(f"\r{self._name} [{bar}] {done}/{self._total}  {rate:.1f}/s  {left} \x1b[K")

    def close(self) -> None:
        """Remove the line."""
        if self._drawn:
            self._drawn = False
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._next = float("inf")  # The terminal is gone: never again.


def for_map(name: str, total: int) -> Progress | None:
    """A progress line for `total` calls, if there is somebody to see it."""
    stream = sys.stderr
    try:
        seen = total > 1 and stream is not None and stream.isatty()
    except ValueError:  # closed
        return None
    return Progress(name, total, stream) if seen else None
