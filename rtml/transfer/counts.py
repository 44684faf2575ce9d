"""What a data endpoint counts."""

from __future__ import annotations

import threading


class Counts:
    """Of one process; for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Bytes of objects that came and went.
        self.bytes_in = 0
        self.bytes_out = 0
        #: Objects that are being brought here; those that were, and those that could not be.
        self.in_flight = 0
        self.pulled = 0
        self.failed = 0
        #: Sources that stopped in the midst and were replaced; and those that gave nothing.
        self.resumed = 0
        self.refused = 0

    def arrived(self, count: int) -> None:
        """Bytes have come."""
        with self._lock:
            self.bytes_in += count

    def left(self, count: int) -> None:
        """Bytes were sent."""
        with self._lock:
            self.bytes_out += count

    def began(self) -> None:
        """An object is fetched."""
        with self._lock:
            self.in_flight += 1

    def ended(self, complete: bool) -> None:
        """It is here, or cannot be had."""
        with self._lock:
            self.in_flight -= 1
            if complete:
                self.pulled += 1
            else:
                self.failed += 1

    def source_failed(self, midway: bool) -> None:
        """A source has failed; `midway`: it had given something, and the rest comes from others."""
        with self._lock:
            if midway:
                self.resumed += 1
            else:
                self.refused += 1
