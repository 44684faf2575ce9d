"""How far behind a gateway's event loop is, and which requests it refuses for that. Pure: told events and times.

A request that comes while the loop is busy waits in its socket until the loop looks again, unseen by the engine's
admission; with more requests than the loop can do, turns become longer and longer, and in the end nothing is answered
in time. So each request counts from the beginning of the turn in which it may have become readable; and one whose
budget would be gone before the gateway has done what came before it is refused before anything of it is read but its
head, which takes a small part of the time that an answer takes.

    needed = its age + the turn's work before it, twice

Twice, as its result comes back into a turn that is as long. How much longer than that it may take is learned from those
that were let in while the loop was behind (as admission learns its margin): each that was late after all adds to the
factor, each that was in time takes a little off.
"""

from __future__ import annotations

from typing import Final

#: Seconds behind from which on budgets are looked at.
BEHIND: Final = 0.004

#: Seconds of the loop that a request takes: what is assumed at first, and believed at least and most.
_COST: Final = 2e-4
_COST_MIN, _COST_MAX = 2e-5, 1e-2
_COST_GAIN: Final = 1 / 8
#: Requests of a turn from which on it can show that they cost more than expected.
_MANY: Final = 4

#: The portion of those let in that may be late, the factor's first, least and greatest value, and one step of it.
_BROKEN: Final = 0.003
_FACTOR: Final = 1.5
_FACTOR_MIN, _FACTOR_MAX = 1.2, 4.0
_FACTOR_STEP: Final = 0.1

#: Seconds; the shortest advice to come back.
_RETRY_MIN: Final = 0.001


class Pressure:
    """One event loop's. All times are seconds of one clock."""

    __slots__ = ("_since", "_woke", "busy", "cost", "factor", "queued", "reading")

    def __init__(self) -> None:
        #: Whether the loop reads what has come: the beginning of a turn. Then it does what there is to do.
        self.reading = False
        #: When this turn began.
        self._woke = 0.0
        #: When what was found may have come, at the earliest; 0: just then.
        self._since = 0.0
        #: Whether the loop has been at work since this turn began: then it looks for what has come without waiting.
        self.busy = False
        #: Requests of this turn that were let in.
        self.queued = 0
        #: Seconds of the loop that one takes.
        self.cost = _COST
        #: How much longer than expected a request may take.
        self.factor = _FACTOR

    def read(self, now: float) -> float:
        """Bytes were read. Returns since when they may have been there.

        Whoever finds `reading` false is to see to it that `have_read` is told when everything has been read, and `done`
        when the loop has done what there was to do, and has looked once more.
        """
        if not self.reading:
            self.reading = True
            self._turn(now)
        return self._since or now

    def have_read(self) -> None:
        """All that was there has been read; now it is worked at."""
        self.reading = False
        self.busy = True

    def done(self) -> None:
        """The work of the turn is done, and what had come by then is read or being read."""
        self.busy = False

    def behind(self, since: float, now: float) -> float:
        """Seconds from `since` until a request that is read now has been answered, but for the engine's part.

        0 if that is so little that nobody need care, and always for the first one that a loop finds which was idle.
        """
        needed = now - since + 2.0 * self.cost * self.queued
        return needed if needed > BEHIND else 0.0

    def refuses(self, needed: float, budget: float) -> float:
        """Seconds after which it is worth another try; 0: it is let in. `needed` is what `behind` said."""
        over = needed * self.factor - budget
        return max(_RETRY_MIN, over) if over > 0.0 else 0.0

    def teaches(self, needed: float, budget: float) -> bool:
        """Whether it would say something of the loop if one that is let in were late."""
        return 2.0 * needed * self.factor > budget

    def ended(self, kept: bool) -> None:
        """One that was let in and `teaches` was in time, or late."""
        factor = self.factor + _FACTOR_STEP * (-_BROKEN if kept else 1.0 - _BROKEN)
        self.factor = min(_FACTOR_MAX, max(_FACTOR_MIN, factor))

    def _turn(self, now: float) -> None:
        """The loop has looked for what has come, after the turn before."""
        # Did it work until then? If not, it waited, and what has come has just come.
        if self.busy:
            self._since, taken = self._woke, now - self._woke
            if self.queued:
                # A moment in which the machine stood still is not believed at once. And what is too much is found out
                # by few requests, too, since few are let in then.
                cost = min(_COST_MAX, 2.0 * self.cost, max(_COST_MIN, taken / self.queued))
                if cost < self.cost or self.queued >= _MANY:
                    self.cost += _COST_GAIN * (cost - self.cost)
        else:
            self._since = 0.0
        self._woke = now
        self.queued = 0
