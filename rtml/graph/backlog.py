"""How much work has been admitted and not done, by who has it to do first.

Each admitted graph has a `Plan`: the work that it is expected to bring, its descendants' included, less what they have
done. Plans are kept by *share* (priority class, session, tenant), because shares take turns, and inside of a share by
the *latest* moment at which the work before them must be done if they are to make it: in buckets, so that a question
costs some microseconds however many graphs there are. With the work its variance is summed: run times are independent,
so the error of a sum grows with its root.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from math import floor, sqrt
from typing import Any, Final, NamedTuple

import msgspec

#: (seconds from now, width of a bucket): finer for what is due soon.
_WIDTHS: Final = ((0.5, 1 / 128), (4.0, 1 / 16), (64.0, 1.0))
#: Nothing is told apart beyond so many seconds.
_HORIZON: Final = 64.0


class Amount(NamedTuple):
    """Some work: the seconds of executors that are expected, and their variance."""

    work: float
    spread: float


_NOTHING: Final = Amount(0.0, 0.0)


class Bucket:
    """Plans of one share that have to begin at about the same time."""

    __slots__ = ("count", "latest", "spread", "work")

    def __init__(self) -> None:
        self.count = 0
        #: their work that is not done, and its variance
        self.work = self.spread = 0.0
        #: the sum of their latest moments
        self.latest = 0.0


class Share:
    """The plans of one priority class, session and tenant."""

    __slots__ = ("buckets", "count", "key", "order", "priority", "spread", "weight", "work")

    def __init__(self, key: Any, priority: int, weight: int) -> None:
        self.key = key
        self.priority = priority
        self.weight = weight
        self.count = 0
        self.work = self.spread = 0.0
        self.buckets: dict[float, Bucket] = {}
        #: keys of the buckets, ascending
        self.order: list[float] = []


class Plan(msgspec.Struct, eq=False):
    """What is expected of one admitted graph, and what became of it."""

    backlog: Backlog
    forecast: Any
    tenant: str
    began: float
    budget: float | None
    #: seconds of waiting for others' work that were expected; None: nothing was known
    base: float | None = None
    #: seconds until its end that were predicted
    predicted: float | None = None
    #: let in although it was predicted to miss
    probe: bool = False
    #: seconds of executors' time that all plans had taken when it began
    worked: float = 0.0
    #: seconds of executors' time that it took so far
    done: float = 0.0
    #: seconds of executors' time that were expected of it; what of them is to come; their variance, divided by them
    expected: float = 0.0
    left: float = 0.0
    ratio: float = 0.0
    latest: float = 0.0
    key: float = 0.0
    #: how its deadline ended, for metrics; None while the graph lives, "" if there is none
    ending: str | None = None
    #: seconds that were predicted less those that it took, if it ended well
    error: float | None = None
    share: Share | None = None
    bucket: Bucket | None = None

    def charge(self, seconds: float) -> None:
        """An executor worked so long for it."""
        self.done += seconds
        self.backlog.worked += seconds
        share, bucket = self.share, self.bucket
        if share is not None and bucket is not None:  # it is not the only one
            taken = min(self.left, seconds)
            self.left -= taken
            bucket.work -= taken
            bucket.spread -= taken * self.ratio
            share.work -= taken
            share.spread -= taken * self.ratio


class Backlog:
    """All plans of admitted graphs that have not ended."""

    def __init__(self) -> None:
        self.shares: dict[Any, Share] = {}
        #: seconds that executors have worked for plans
        self.worked = 0.0

    def share(self, key: Any, priority: int, weight: int) -> Share:
        """The share of this key and priority; a new one is listed from its first plan on."""
        full = (priority, key)
        return self.shares.get(full) or Share(full, priority, weight)

    def add(self, plan: Plan, share: Share, latest: float, work: float, now: float) -> None:
        """Work is admitted that has to begin at `latest`."""
        self.shares[share.key] = share
        key = _bucket_of(latest, now)
        bucket = share.buckets.get(key)
        if bucket is None:
            bucket = share.buckets[key] = Bucket()
            insort(share.order, key)
        plan.share, plan.bucket, plan.key, plan.latest = share, bucket, key, latest
        plan.expected = work
        left = plan.left = max(0.0, work - plan.done)
        bucket.count += 1
        bucket.work += left
        bucket.spread += left * plan.ratio
        bucket.latest += latest
        share.count += 1
        share.work += left
        share.spread += left * plan.ratio

    def expect(self, plan: Plan, work: float) -> None:
        """It is known only now what a graph that was admitted before will bring."""
        if plan.share is not None and plan.bucket is not None:
            more = max(0.0, work - plan.done) - plan.left
            plan.left += more
            plan.bucket.work += more
            plan.bucket.spread += more * plan.ratio
            plan.share.work += more
            plan.share.spread += more * plan.ratio

    def remove(self, plan: Plan) -> None:
        """It has ended: what it left undone is not to be done any more."""
        share, bucket = plan.share, plan.bucket
        if share is None or bucket is None:
            return
        bucket.count -= 1
        bucket.work -= plan.left
        bucket.spread -= plan.left * plan.ratio
        bucket.latest -= plan.latest
        share.count -= 1
        share.work -= plan.left
        share.spread -= plan.left * plan.ratio
        if not bucket.count:
            del share.buckets[plan.key]
            del share.order[bisect_left(share.order, plan.key)]
        if not share.count:
            del self.shares[share.key]
        plan.share = plan.bucket = None
        plan.left = 0.0

    def before(self, share: Share, latest: float, work: float, now: float, room: Room) -> Amount:
        """What is begun before, or in turn with, a graph of `work` that has to begin at `latest`."""
        key = _bucket_of(latest, now)
        own = spread = 0.0
        for place in share.order:
            if place > key:
                break
            bucket = share.buckets[place]
            own += bucket.work - room.begun.get(bucket, 0.0)
            spread += bucket.spread
        others = self._others(share, own + work, room)
        return Amount(own + others.work, spread + others.spread)

    def _others(self, share: Share, own: float, room: Room) -> Amount:
        """What of the other shares is begun by the time that `own` of this one is."""
        if len(self.shares) == 1 and share.key in self.shares:
            return _NOTHING
        total = spread = 0.0
        for other in self.shares.values():
            work = other.work - room.begun.get(other, 0.0)
            if other is share or other.priority < share.priority or work <= 0.0:
                continue
            # Among equals they take turns.
            turns = own * other.weight / (share.weight * work) if other.priority == share.priority else 1.0
            part = min(1.0, turns)
            total += part * work
            spread += part * other.spread
        return Amount(total, spread)

    def harmed(self, share: Share, latest: float, own: Amount, now: float, room: Room, margin: float) -> bool:
        """Whether graphs of the share that have been admitted would begin too late if this one came before them.

        Args:
            share: whose.
            latest: when it has to begin.
            own: what it brings.
            now: the time.
            room: where work can be done.
            margin: standard deviations by which work may be more than expected.
        """
        key = _bucket_of(latest, now)
        done, spread = own
        for place in share.order:
            bucket = share.buckets[place]
            done += bucket.work - room.begun.get(bucket, 0.0)
            spread += bucket.spread
            if place <= key:
                continue
            last = bucket.latest / bucket.count - now
            # What is too late already is not made worse.
            if last > 0.0:
                mean = bucket.work / bucket.count
                ahead = max(0.0, done - mean)
                others, more = self._others(share, ahead + mean, room)
                if room.wait(ahead + others, spread + more, margin) > last:
                    return True
        return False


class Room:
    """Where work can be done: slots, some of which are busy for a while."""

    __slots__ = ("_filled", "_free", "_summed", "_until", "begun", "slots")

    def __init__(self, slots: float, busy: list[float], begun: dict[Bucket | Share, float]) -> None:
        """Args: how many there are; seconds until each of the busy ones is free; the work that those have begun."""
        self.slots = slots
        self.begun = begun
        self._until = sorted(busy)[: int(slots)]
        self._free = slots - len(self._until)
        #: until each of those moments: how much can be done; and the sum of the moments before it
        self._filled: list[float] = []
        self._summed = [0.0]
        for number, until in enumerate(self._until):
            self._filled.append((self._free + number) * until - self._summed[-1])
            self._summed.append(self._summed[-1] + until)

    def wait(self, work: float, spread: float = 0.0, margin: float = 0.0) -> float:
        """Seconds until a slot is free for what comes after so much work.

        The slots fill like vessels: what is busy for long takes nothing more before it is free. With a margin, so many
        standard deviations more.
        """
        work = max(work, 0.0)
        ready = bisect_right(self._filled, work)
        seconds = (work + self._summed[ready]) / (self._free + ready)
        return seconds + margin * sqrt(spread) / self.slots if margin and spread > 0.0 else seconds


def _bucket_of(latest: float, now: float) -> float:
    ahead = latest - now
    for limit, width in _WIDTHS:
        if ahead < limit:
            return floor(latest / width) * width
    return float(floor(now + _HORIZON))
