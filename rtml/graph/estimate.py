"""What the scheduler learns about run times.

`high_estimate` is an expectile: an exponentially weighted mean that moves up fast and down slowly, so that it settles
near the 0.96 expectile of the run times and a burst of slow calls is believed at once. `BatchCost` is an exponentially
weighted least-squares fit of `seconds = a + b * items`, and how far run times are away from it.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

_UP: Final = 0.25
_DOWN: Final = 0.01

#: Standard deviations by which a batch may take longer than predicted where a deadline limits its size.
CAUTION: Final = 2.0

#: Seconds an executor needs around the shortest call; no estimate goes below it.
CALL_FLOOR: Final = 4e-6


def high_estimate(old: float | None, seconds: float) -> float:
    """The estimate after one more run of `seconds`."""
    seconds += CALL_FLOOR
    if old is None:
        return seconds
    return old + (seconds - old) * (_UP if seconds > old else _DOWN)


class BatchCost:
    """Predicts the run time of a batch of n items."""

    __slots__ = ("_n", "_nn", "_nt", "_t", "_w", "noise")

    DECAY: Final = 0.95

    def __init__(self) -> None:
        self._w = self._n = self._nn = self._t = self._nt = 0.0
        #: variance of run times, compared with the squares of those that were predicted
        self.noise = 0.0

    def copy(self) -> BatchCost:
        """What it has learned, to learn on from."""
        other = BatchCost()
        other._w, other._n, other._nn, other._t, other._nt = self._w, self._n, self._nn, self._t, self._nt
        other.noise = self.noise
        return other

    def observe(self, items: int, seconds: float) -> None:
        """Learn that a batch of `items` took `seconds`: at most twice of what was predicted is believed at once."""
        decay = self.DECAY
        expected = self.predict(items) if self._is_known(items) else None
        if expected:
            seconds = min(seconds, 2.0 * expected)
            away = seconds / expected - 1.0
            self.noise = decay * self.noise + (1.0 - decay) * away * away
        self._w = self._w * decay + 1.0
        self._n = self._n * decay + items
        self._nn = self._nn * decay + items * items
        self._t = self._t * decay + seconds
        self._nt = self._nt * decay + items * seconds

    def _is_known(self, items: int) -> bool:
        """Whether what is predicted for this size rests on runs of it, or of two other sizes."""
        same = abs(items * self._w - self._n) <= 1e-6 * self._n
        return self._n > 0.0 and (same or self._w * self._nn - self._n * self._n > 1e-9 * self._w * self._nn)

    def predict(self, items: int) -> float | None:
        """Seconds for a batch of `items`; None before the first observation."""
        if self._w == 0.0:
            return None
        variance = self._w * self._nn - self._n * self._n
        mean = self._t / self._w
        if not self._n:
            return mean  # they had no items: what comes has some overhead, too
        if variance <= 1e-9 * self._w * self._nn:
            # One size only was seen: assume cost in proportion, which is pessimistic for larger batches.
            return mean * max(1.0, items * self._w / self._n)
        slope = max(0.0, (self._w * self._nt - self._n * self._t) / variance)
        intercept = max(0.0, mean - slope * self._n / self._w)
        return intercept + slope * items

    def cautious(self, items: int) -> float | None:
        """Seconds that a batch of `items` will hardly exceed; None before the first observation."""
        seconds = self.predict(items)
        return None if seconds is None else seconds * (1.0 + CAUTION * sqrt(self.noise))
