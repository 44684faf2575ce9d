"""An object on its way into a segment of this process's store: several sources may bring parts of it at once.

Whoever brings bytes claims a piece of what is missing, and gives back what it could not bring. What has arrived is
passed on at once (`upto`), and stays when a source fails.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right, insort
from typing import Any, Final

from rtml.segment import HEADER_OFFSET
from rtml.spilling import write_at

#: Bytes of a new file that arrive before they are written, and of a recycled one that are received at once.
_SCRATCH: Final = 256 * 1024
_PIECE: Final = 1024 * 1024


class Piece:
    """A part of an object that one source brings: from `at` (moves on as it arrives) to `end`."""

    __slots__ = ("at", "end", "scratch")

    def __init__(self, at: int, end: int) -> None:
        self.at = at
        self.end = end
        #: Of a new file: its pages are not mapped, so it is written from here.
        self.scratch = memoryview(b"")


class Incoming:
    """An object that arrives, from its segment's `HEADER_OFFSET` on; for many threads, each with pieces of its own.

    Args:
        object_id: its id.
        size: of the segment's content, with what lies before `HEADER_OFFSET`.
        segment: the segment's name.
        memory: the segment.
        fd: of a new file; closed by `close`.
        place: the store's record of the segment.
    """

    __slots__ = ("_fd", "_lock", "_missing", "_there", "id", "left", "memory", "place", "segment", "size")

    def __init__(
        self, object_id: int, size: int, segment: str, memory: memoryview, fd: int = -1, place: Any = None
    ) -> None:
        self.id = object_id
        self.size = size
        self.segment = segment
        self.memory = memory
        self.place = place
        #: Bytes that have not arrived.
        self.left = size - HEADER_OFFSET
        self._fd = fd
        self._lock = threading.Lock()
        #: What nobody has claimed, and what has arrived: disjoint [start, end] in ascending order.
        self._missing: list[list[int]] = [[HEADER_OFFSET, size]] if size > HEADER_OFFSET else []
        self._there: list[list[int]] = []

    def claim(self, most: int) -> Piece | None:
        """The first bytes that nobody brings, `most` of them at most; None if there are none."""
        with self._lock:
            if not self._missing:
                return None
            first = self._missing[0]
            piece = Piece(first[0], min(first[1], first[0] + most))
            first[0] = piece.end
            if first[0] >= first[1]:
                del self._missing[0]
        if self._fd >= 0:
            piece.scratch = memoryview(bytearray(min(_SCRATCH, piece.end - piece.at)))
        return piece

    def give_up(self, piece: Piece) -> None:
        """What has not arrived of the piece is to be brought by somebody else."""
        with self._lock:
            if piece.at < piece.end:
                insort(self._missing, [piece.at, piece.end])

    def target(self, piece: Piece) -> memoryview:
        """Where the next bytes of the piece go."""
        if self._fd >= 0:
            return piece.scratch[: piece.end - piece.at]
        return self.memory[piece.at : min(piece.end, piece.at + _PIECE)]

    def arrived(self, piece: Piece, count: int) -> None:
        """So many bytes were written there."""
        if self._fd >= 0:
            write_at(self._fd, piece.scratch[:count], piece.at)
        start, end = piece.at, piece.at + count
        piece.at = end
        with self._lock:
            self.left -= count
            there = self._there
            after = bisect_right(there, [start, self.size])
            if after and there[after - 1][1] == start:
                after -= 1
                there[after][1] = end
            else:
                there.insert(after, [start, end])
            if after + 1 < len(there) and there[after + 1][0] == end:
                there[after][1] = there.pop(after + 1)[1]

    def upto(self, offset: int) -> int:
        """Where what is there from `offset` on ends; `offset` itself if nothing is."""
        with self._lock:
            before = bisect_right(self._there, [offset, self.size]) - 1
            return max(offset, self._there[before][1]) if before >= 0 else offset

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.left <= 0

    def in_memory(self) -> memoryview:
        """All of it, to be written in any order, by whoever knows all the bytes."""
        self.close()
        self.place.populate(self.size)
        return self.memory

    def finished(self) -> None:
        """What was made in memory is an object from now on."""
        self.memory[HEADER_OFFSET : HEADER_OFFSET + 8] = self.id.to_bytes(8, "little")

    def close(self) -> None:
        """No more bytes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
