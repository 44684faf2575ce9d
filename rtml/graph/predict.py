"""What is learned about whole graphs: how long they take, and how much work of executors they bring.

A graph is known by the function of its root. What its end-to-end time is made of:

    time = wait for the work that was admitted before it  +  its own

The first part is counted (`rtml.graph.backlog`), the second learned: as quantiles of what was left when the counted
part was subtracted from the real time. So everything that the count does not see, and its own errors, is learned too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Any, Final

#: Values that a quantile is taken of: the last ones.
WINDOW: Final = 128

#: How much a new graph's work moves the expectation.
_GAIN: Final = 1 / 16

#: And the expected spread of it; until it is known, run times are taken to differ by a third.
_SPREAD_GAIN: Final = 1 / 64
_SPREAD_FIRST: Final = 1 / 9
#: What is further away than so many times what was expected counts as just so far.
_FAR: Final = 5.0

#: How much one end moves the portion of graphs that missed.
_MISS_GAIN: Final = 1 / 32


class Quantiles:
    """Quantiles of the last `WINDOW` values: exact, bounded, under a microsecond a value."""

    __slots__ = ("_ordered", "_recent")

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def observe(self, value: float) -> None:
        """One more value; the oldest is forgotten."""
        ordered, recent = self._ordered, self._recent
        recent.append(value)
        insort(ordered, value)
        if len(recent) > WINDOW:
            del ordered[bisect_left(ordered, recent.popleft())]

    def at(self, portion: float) -> float | None:
        """The value that `portion` of all do not exceed; None before the first one."""
        ordered = self._ordered
        return ordered[int(portion * (len(ordered) - 1) + 0.5)] if ordered else None

    def forget_above(self, value: float) -> None:
        """What was larger than this turned out to be the past."""
        kept = [seen for seen in self._recent if seen <= value]
        self._recent = deque(kept)
        self._ordered = sorted(kept)


class Forecast:
    """What was learned of the graphs that begin with one function."""

    __slots__ = ("_ends", "censored_at", "live", "missing", "own", "probed_at", "spread", "unknown", "work")

    def __init__(self) -> None:
        #: Seconds from submission to the end, less those that were explained by other graphs' work.
        self.own = Quantiles()
        #: Seconds of executors' time that a graph takes, its descendants included, on average; None: none has ended.
        self.work: float | None = None
        #: Variance of that, divided by it: so the variance of a sum of such graphs is their work times this. Seconds.
        self.spread = 0.0
        self._ends = 1
        #: Graphs that were admitted and have not ended.
        self.live = 0
        #: Those of them that were admitted when nothing was known.
        self.unknown: list[Any] = []
        #: When one was last let in although it was predicted to miss, or ended.
        self.probed_at = -1e9
        #: Portion of those that ended lately which missed.
        self.missing = 0.0
        #: When the last one that missed was learned from.
        self.censored_at = -1e9

    def ended(self, missed: bool) -> None:
        """A graph has ended in time or was too late."""
        self.missing += _MISS_GAIN * (missed - self.missing)

    def learn_work(self, seconds: float) -> None:
        """A graph took executors so many seconds."""
        if self.work is None:
            self.work = seconds
            self.spread = _SPREAD_FIRST * seconds
        else:
            self.work += _GAIN * (seconds - self.work)

    def learn_spread(self, expected: float, seconds: float) -> None:
        """A graph of which so much was expected took so much."""
        if expected > 0.0:
            away = min(seconds - expected, _FAR * expected)
            self._ends += 1
            self.spread += max(_SPREAD_GAIN, 1 / self._ends) * (away * away / expected - self.spread)
