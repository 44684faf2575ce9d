"""What the scheduler learns about run times.

`high_estimate` is an expectile: an exponentially weighted mean that moves up fast and down slowly, so that it settles
near the 0.96 expectile of the run times and a burst of slow calls is believed at once. `BatchCost` is an exponentially
weighted least-squares fit of `seconds = a + b * items`.
"""

from __future__ import annotations

from typing import Final

_UP: Final = 0.25
_DOWN: Final = 0.01

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

    __slots__ = ("_n", "_nn", "_nt", "_t", "_w")

    DECAY: Final = 0.95

    def __init__(self) -> None:
        self._w = self._n = self._nn = self._t = self._nt = 0.0

    def copy(self) -> BatchCost:
        """What it has learned, to learn on from."""
        other = BatchCost()
        other._w, other._n, other._nn, other._t, other._nt = self._w, self._n, self._nn, self._t, self._nt
        return other

    def observe(self, items: int, seconds: float) -> None:
        """Learn that a batch of `items` took `seconds`."""
        decay = self.DECAY
        self._w = self._w * decay + 1.0
        self._n = self._n * decay + items
        self._nn = self._nn * decay + items * items
        self._t = self._t * decay + seconds
        self._nt = self._nt * decay + items * seconds

    def predict(self, items: int) -> float | None:
        """Seconds for a batch of `items`; None before the first observation."""
        if self._w == 0.0:
            return None
        variance = self._w * self._nn - self._n * self._n
        mean = self._t / self._w
        if variance <= 1e-9 * self._w * self._nn:
            # One size only was seen: assume cost in proportion, which is pessimistic for larger batches.
            return mean * max(1.0, items * self._w / self._n)
        slope = max(0.0, (self._w * self._nt - self._n * self._t) / variance)
        intercept = max(0.0, mean - slope * self._n / self._w)
        return intercept + slope * items
