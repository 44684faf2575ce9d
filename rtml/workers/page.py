"""The running page: memory shared by a supervisor and its processes, in which each executor says what it is running.

When a process dies the supervisor reads from its slot which tasks were inside a function at that moment: those may be
to blame, everything else on the process is innocent (DESIGN D7). Writing costs two stores and no system call. The
process ids in it also tell the janitor whom to end when the supervisor is gone.

A slot is `WORDS` unsigned 64-bit words: process id, count of running ids, state, then the ids. Slot 0 is the
dispatcher's, the next one the data endpoint's.
"""

from __future__ import annotations

import mmap
from typing import Final

#: Processes of one node, the dispatcher included.
SLOTS_MAX: Final = 1024
WORDS: Final = 128
#: The data endpoint's slot; executors have those behind it.
DATA_SLOT: Final = 1
_WORD_BYTES: Final = 8

PID: Final = 0
COUNT: Final = 1
STATE: Final = 2
FIRST: Final = 3
#: Ids beyond this many (a bigger batch) are not named after a crash, so those re-run as innocents.
IDS_MAX: Final = WORDS - FIRST

#: Value of `STATE`: the process ends because it was asked to, or lost its reason to live.
LEFT: Final = 1


class RunningPage:
    """The supervisor's view of all slots. Made before the first fork."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, SLOTS_MAX * WORDS * _WORD_BYTES)
        self._words = memoryview(self._map).cast("Q")

    def slot(self, index: int) -> memoryview:
        """The words of one process: writes are seen by all."""
        assert 0 <= index < SLOTS_MAX
        return self._words[index * WORDS : (index + 1) * WORDS]

    def clear(self, index: int) -> None:
        """Empties a slot for its next process."""
        slot = self.slot(index)
        slot[COUNT] = slot[STATE] = slot[PID] = 0

    def running(self, index: int) -> list[int]:
        """Ids of the tasks that the process of this slot was inside of."""
        slot = self.slot(index)
        count = min(slot[COUNT], IDS_MAX)
        return list(slot[FIRST : FIRST + count])

    def left(self, index: int) -> bool:
        """Whether the process announced its end."""
        return self.slot(index)[STATE] == LEFT

    def pids(self) -> list[int]:
        """Processes that are entered in the page."""
        return [pid for pid in self._words[PID::WORDS].tolist() if pid]
