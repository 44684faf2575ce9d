"""How much work has been admitted and not done, by who has it to do first.

Each admitted graph has a `Plan`: the work that it is expected to bring, its descendants' included, less what they have
done. Plans are kept by *share* (priority class, session, tenant), because shares take turns, and inside of a share by
the *latest* moment at which the work before them must be done if they are to make it: in buckets, so that a question
costs some microseconds however many graphs there are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import floor
from typing import Any, Final

#: (seconds from now, width of a bucket): finer for what is due soon.
_WIDTHS: Final = ((0.5, 1 / 128), (4.0, 1 / 16), (64.0, 1.0))
#: Nothing is told apart beyond so many seconds.
_HORIZON: Final = 64.0


#: Work that was promised a time is taken for so much longer when others want to come before it.
PROMISE_MARGIN: Final = 1.15


class Bucket:
    """Plans of one share that have to begin at about the same time."""

    __slots__ = ("count", "latest", "work")

    def __init__(self) -> None:
        self.count = 0
        #: their work that is not done
        self.work = 0.0
        #: the sum of their latest moments
        self.latest = 0.0


class Share:
    """The plans of one priority class, session and tenant."""

    __slots__ = ("buckets", "count", "key", "order", "priority", "weight", "work")

    def __init__(self, key: Any, priority: int, weight: int) -> None:
        self.key = key
        self.priority = priority
        self.weight = weight
        self.count = 0
        self.work = 0.0
        self.buckets: dict[float, Bucket] = {}
        #: keys of the buckets, ascending
        self.order: list[float] = []


class Plan:
    """What is expected of one admitted graph, and what became of it."""

    __slots__ = (
        "backlog", "base", "began", "bucket", "budget", "done", "ending", "error", "forecast", "key", "latest", "left",
        "predicted", "probe", "share", "tenant", "worked",
    )  # fmt: skip

    def __init__(self, backlog: Backlog, forecast: Any, tenant: str, began: float, budget: float | None) -> None:
        self.backlog = backlog
        self.forecast = forecast
        self.tenant = tenant
        self.began = began
        self.budget = budget
        #: seconds of waiting for others' work that were expected; None: nothing was known
        self.base: float | None = None
        #: seconds until its end that were predicted
        self.predicted: float | None = None
        #: let in although it was predicted to miss
        self.probe = False
        #: seconds of executors' time that all plans had taken when it began
        self.worked = 0.0
        #: seconds of executors' time that it took so far
        self.done = 0.0
        #: of what was expected, what is to come
        self.left = 0.0
        self.latest = 0.0
        self.key = 0.0
        #: how its deadline ended, for metrics; None while the graph lives, "" if there is none
        self.ending: str | None = None
        #: seconds that were predicted less those that it took, if it ended well
        self.error: float | None = None
        self.share: Share | None = None
        self.bucket: Bucket | None = None

    def charge(self, seconds: float) -> None:
        """An executor worked so long for it."""
        self.done += seconds
        self.backlog.worked += seconds
        share, bucket = self.share, self.bucket
        if share is not None and bucket is not None:
            taken = min(self.left, seconds)
            self.left -= taken
            bucket.work -= taken
            share.work -= taken


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
        plan.share, plan.bucket, plan.key, plan.latest, plan.left = share, bucket, key, latest, work
        bucket.count += 1
        bucket.work += work
        bucket.latest += latest
        share.count += 1
        share.work += work

    def expect(self, plan: Plan, work: float) -> None:
        """It is known only now what a graph that was admitted before will bring."""
        if plan.share is not None and plan.bucket is not None:
            more = max(0.0, work - plan.done) - plan.left
            plan.left += more
            plan.bucket.work += more
            plan.share.work += more

    def remove(self, plan: Plan) -> None:
        """It has ended: what it left undone is not to be done any more."""
        share, bucket = plan.share, plan.bucket
        if share is None or bucket is None:
            return
        bucket.count -= 1
        bucket.work -= plan.left
        bucket.latest -= plan.latest
        share.count -= 1
        share.work -= plan.left
        if not bucket.count:
            del share.buckets[plan.key]
            del share.order[bisect_left(share.order, plan.key)]
        if not share.count:
            del self.shares[share.key]
        plan.share = plan.bucket = None
        plan.left = 0.0

    def before(self, share: Share, latest: float, work: float, now: float) -> float:
        """Work that is done before, or in turn with, a graph of `work` that has to begin at `latest`."""
        key = _bucket_of(latest, now)
        own = 0.0
        for place in share.order:
            if place > key:
                break
            own += share.buckets[place].work
        return own + self._others(share, own + work)

    def _others(self, share: Share, own: float) -> float:
        """Work of the other shares that is done by the time that `own` of this one is."""
        total = 0.0
        for other in self.shares.values():
            if other is share or other.priority < share.priority:
                continue
            if other.priority > share.priority:
                total += other.work
            else:
                # They take turns.
                total += min(other.work, own * other.weight / share.weight)
        return total

    def harmed(self, share: Share, latest: float, work: float, now: float, room: tuple[float, float]) -> bool:
        """Whether graphs of the share that have been admitted would begin too late if this one came before them.

        Args:
            share: whose.
            latest: when it has to begin.
            work: what it brings.
            now: the time.
            room: tasks that run at a time, and seconds that those have run which do now.
        """
        key = _bucket_of(latest, now)
        slots, done = room[0], -room[1]
        for place in share.order:
            bucket = share.buckets[place]
            if place <= key:
                done += bucket.work
                continue
            mean = bucket.work / bucket.count
            ahead = max(0.0, done + bucket.work - mean) + work
            done += bucket.work
            end = now + PROMISE_MARGIN * (ahead + self._others(share, ahead + mean)) / slots
            # What is too late already is not made worse.
            if now < bucket.latest / bucket.count < end:
                return True
        return False


def _bucket_of(latest: float, now: float) -> float:
    ahead = latest - now
    for limit, width in _WIDTHS:
        if ahead < limit:
            return floor(latest / width) * width
    return float(floor(now + _HORIZON))
