"""An object on its way into a segment of this process's store: its bytes come in order, and are passed on at once."""

from __future__ import annotations

import os
from typing import Any, Final

from rtml.segment import HEADER_OFFSET
from rtml.spilling import write_at

#: Bytes of a new file that arrive before they are written, and of a recycled one that are received at once.
_SCRATCH: Final = 256 * 1024
_PIECE: Final = 1024 * 1024


class Incoming:
    """An object that arrives, from its segment's `HEADER_OFFSET` on. One thread writes, any may read what is there."""

    __slots__ = ("_fd", "_scratch", "at", "id", "memory", "place", "segment", "size")

    def __init__(
        self, object_id: int, size: int, segment: str, memory: memoryview, fd: int = -1, place: Any = None
    ) -> None:
        self.id = object_id
        self.size = size
        self.segment = segment
        self.memory = memory
        #: The store's record of the segment.
        self.place = place
        #: Everything before this offset is there.
        self.at = HEADER_OFFSET
        #: Of a new file: written through it, since its pages are not mapped.
        self._fd = fd
        self._scratch = memoryview(bytearray(_SCRATCH)) if fd >= 0 else memoryview(b"")

    def target(self) -> memoryview:
        """Where the next bytes go."""
        if self._fd >= 0:
            return self._scratch[: self.size - self.at]
        return self.memory[self.at : min(self.size, self.at + _PIECE)]

    def arrived(self, count: int) -> None:
        """So many bytes were written there."""
        if self._fd >= 0:
            write_at(self._fd, self._scratch[:count], self.at)
        self.at += count

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.at >= self.size

    def close(self) -> None:
        """No more bytes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
