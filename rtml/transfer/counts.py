"""What a data endpoint counts: in a file in shared memory, which the node's dispatcher reads when somebody scrapes.

The counts go on in the endpoint's next life, and reading them needs nobody's answer.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from typing import Any, Final

#: The file's name in the node's directory of shared memory.
COUNTS_FILE: Final = ".counts"

_NAMES: Final = ("bytes_in", "bytes_out", "in_flight", "pulled", "failed", "resumed", "refused")
_SIZE: Final = 8 * len(_NAMES)


def _count(name: str) -> Any:
    number = _NAMES.index(name)
    return property(lambda counts: counts._cells[number])


class Counts:
    """Of one process; for many threads.

    Args:
        directory: of the node's shared memory; "" for counts that nobody else sees.
    """

    #: Bytes of objects that came and went.
    bytes_in: int = _count("bytes_in")
    bytes_out: int = _count("bytes_out")
    #: Objects that are being brought here; those that were, and those that could not be.
    in_flight: int = _count("in_flight")
    pulled: int = _count("pulled")
    failed: int = _count("failed")
    #: Sources that stopped in the midst and were replaced; and those that gave nothing.
    resumed: int = _count("resumed")
    refused: int = _count("refused")

    def __init__(self, directory: str = "") -> None:
        self._lock = threading.Lock()
        self._memory: Any = bytearray(_SIZE)
        if directory:
            fd = os.open(f"{directory}/{COUNTS_FILE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, _SIZE)
                self._memory = mmap.mmap(fd, _SIZE)
            finally:
                os.close(fd)
        self._cells = memoryview(self._memory).cast("Q")
        self._cells[_NAMES.index("in_flight")] = 0

    def close(self) -> None:
        """What is counted from now on is seen by nobody else."""
        with self._lock:
            cells, memory = self._cells, self._memory
            self._memory = bytearray(cells)
            self._cells = memoryview(self._memory).cast("Q")
            cells.release()
            if isinstance(memory, mmap.mmap):
                with contextlib.suppress(BufferError):
                    memory.close()

    def _add(self, name: str, count: int) -> None:
        with self._lock:
            self._cells[_NAMES.index(name)] += count

    def arrived(self, count: int) -> None:
        """Bytes have come."""
        self._add("bytes_in", count)

    def left(self, count: int) -> None:
        """Bytes were sent."""
        self._add("bytes_out", count)

    def began(self) -> None:
        """An object is fetched."""
        self._add("in_flight", 1)

    def ended(self, complete: bool) -> None:
        """It is here, or cannot be had."""
        self._add("in_flight", -1)
        self._add("pulled" if complete else "failed", 1)

    def source_failed(self, midway: bool) -> None:
        """A source has failed; `midway`: it had given something, and the rest comes from others."""
        self._add("resumed" if midway else "refused", 1)


def read(directory: str) -> dict[str, int]:
    """What the endpoint with this directory has counted, by the names of `Counts`; {} if there is none."""
    try:
        with open(f"{directory}/{COUNTS_FILE}", "rb") as file:
            return dict(zip(_NAMES, struct.unpack(f"{len(_NAMES)}Q", file.read())))
    except (OSError, struct.error):
        return {}
