"""How much tenants use, in memory that all processes of a gateway share.

A row of the table is one tenant: when its next request may come (the generic cell rate algorithm: a token bucket in one
number, and `time.monotonic` is the same in all processes of a machine), and how many of its requests each process has
running. Two processes that count the same request at the very same moment may let one through too many; nothing adds
up, as the number is a time. Rows are taken under a file lock, and are never given back.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from typing import Final

from rtml.serving.tokens import Quota

#: Tenants that can have quotas; a token file with more is refused.
TENANTS_MAX: Final = 1024
#: Processes that can share the table.
PROCESSES_MAX: Final = 64
#: Numbers of a row: the tenant's name (hashed, as an exact integer), the time, and a count for each process.
_WIDTH: Final = 2 + PROCESSES_MAX
_NAME: Final = 0
_DUE: Final = 1
_RUNNING: Final = 2
_BYTES: Final = TENANTS_MAX * _WIDTH * 8


class Table:
    """The memory.

    Args:
        descriptor: Of the memory that is shared; -1: this process has its own.
        process: Number of this process in it.
    """

    def __init__(self, descriptor: int = -1, process: int = 0) -> None:
        self._own = descriptor < 0
        self.descriptor = make_memory() if self._own else descriptor
        self.process = process
        self._map = mmap.mmap(self.descriptor, _BYTES)
        self._cells = memoryview(self._map).cast("d")

    def close(self) -> None:
        """Give the memory back."""
        self._cells.release()
        self._map.close()
        if self._own:
            os.close(self.descriptor)

    def row(self, tenant: str) -> int:
        """Where a tenant's numbers are.

        Raises:
            ValueError: the table is full.
        """
        # 52 bits are exact in a float; two of 1024 tenants share a name with a probability of 1e-10.
        name = float(int.from_bytes(hashlib.sha256(tenant.encode()).digest()[:8]) >> 12 or 1)
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            for start in range(0, TENANTS_MAX * _WIDTH, _WIDTH):
                if self._cells[start + _NAME] in (0.0, name):
                    self._cells[start + _NAME] = name
                    return start
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)
        raise ValueError(f"there cannot be more than {TENANTS_MAX} tenants until the gateway is started anew")

    def forget(self, process: int) -> None:
        """A process has ended: nothing of it is running."""
        for start in range(0, TENANTS_MAX * _WIDTH, _WIDTH):
            if self._cells[start + _NAME] == 0.0:
                return
            self._cells[start + _RUNNING + process] = 0.0

    def admit(self, row: int, quota: Quota, now: float) -> float:
        """Count a request in.

        Args:
            row: The tenant's.
            quota: The tenant's.
            now: `time.monotonic()`.

        Returns:
            0.0 if it may run (then `leave` is called at its end), else the seconds after which one may.
        """
        cells = self._cells
        if quota.concurrency is not None:
            first = row + _RUNNING
            if sum(cells[first : first + PROCESSES_MAX]) >= quota.concurrency:
                return 1.0
        if quota.rate is not None:
            interval = 1 / quota.rate
            burst = max(1.0, quota.rate) if quota.burst is None else quota.burst
            due = max(cells[row + _DUE], now)
            early = due - now - (burst - 1) * interval
            if early > 1e-9:
                return early
            cells[row + _DUE] = due + interval
        cells[row + _RUNNING + self.process] += 1
        return 0.0

    def leave(self, row: int) -> None:
        """A request that was let in has ended."""
        self._cells[row + _RUNNING + self.process] -= 1


def make_memory() -> int:
    """Memory for a table: a descriptor that other processes can be given."""
    descriptor = os.memfd_create("rtml-quotas")
    os.truncate(descriptor, _BYTES)
    return descriptor
