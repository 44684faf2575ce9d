"""Ready queues: who runs next among tasks that compete for the same place.

A *lane* holds the ready tasks that are interchangeable for placement: one resource shape and role, and for batch
functions also one function and batch key. Inside it the order is priority class, then fair turns of the *shares* (a
root session, or one tenant of it; a tenant may have several turns in a row), then the due time (`rtml.graph.policy`),
then the oldest graph, then the deepest task.

Keys mostly arrive in ascending order, so a queue is a deque with a heap beside it for the exceptions: constant time
whatever its length. Tasks that left (cancelled, taken by their blocked parent) are skipped when they come up: a task's
`entry` tells the valid entry from stale ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Any, Final

from rtml.graph.state import Profile, TaskState

#: No tenant has more than one turn in a row.
_EQUAL: Final[Mapping[str, int]] = MappingProxyType({})

Entry = tuple[float, int, int, int, TaskState]


class ReadyQueue:
    """Entries in ascending order; stale ones are dropped on the way."""

    __slots__ = ("heap", "ordered")

    def __init__(self) -> None:
        self.ordered: deque[Entry] = deque()
        self.heap: list[Entry] = []

    def push(self, entry: Entry) -> None:
        """Add an entry."""
        ordered = self.ordered
        if not ordered or entry >= ordered[-1]:
            ordered.append(entry)
        else:
            heappush(self.heap, entry)

    def head(self) -> Entry | None:
        """The first valid entry, left in place."""
        ordered, heap = self.ordered, self.heap
        while ordered and ordered[0][4].entry != ordered[0][3]:
            ordered.popleft()
        while heap and heap[0][4].entry != heap[0][3]:
            heappop(heap)
        if ordered and (not heap or ordered[0] <= heap[0]):
            return ordered[0]
        return heap[0] if heap else None

    def pop(self) -> TaskState | None:
        """Take the first valid task."""
        ordered, heap = self.ordered, self.heap
        while ordered or heap:
            if ordered and (not heap or ordered[0] <= heap[0]):
                entry = ordered.popleft()
            else:
                entry = heappop(heap)
            if entry[4].entry == entry[3]:
                return entry[4]
        return None


class Lane:
    """Ready tasks of one kind of place."""

    __slots__ = (
        "_classes", "_lone", "_priorities", "_turns", "_weights", "batch", "count", "items", "profile", "wakes_at",
    )  # fmt: skip

    def __init__(self, profile: Profile, weights: Mapping[str, int] = _EQUAL) -> None:
        #: shape, role and batching of everything in here
        self.profile = profile
        self.batch = profile.batch
        #: valid entries
        self.count = 0
        #: what they count for in a batch
        self.items = 0
        #: the moment that a timer is set for, while a batch waits for more
        self.wakes_at = 0.0
        #: the only task; it is put into a queue when another one comes
        self._lone: TaskState | None = None
        self._classes: dict[int, dict[Any, ReadyQueue]] = {}
        #: turns in a row of tenants
        self._weights = weights
        #: those that a share has used up of the turns that it has now, where it has several
        self._turns: dict[Any, int] = {}
        #: priorities present, most urgent first
        self._priorities: list[int] = []

    def push(self, task: TaskState, sequence: int) -> None:
        """Add a ready task; `sequence` is unique and ascending."""
        task.entry = sequence
        task.lane = self
        self.items += task.spec.items
        if not self.count:
            self.count = 1
            self._lone = task
            return
        self.count += 1
        lone = self._lone
        if lone is not None:
            self._lone = None
            self._queue(lone, lone.entry)
        self._queue(task, sequence)

    def _queue(self, task: TaskState, sequence: int) -> None:
        priority = task.profile.priority
        shares = self._classes.get(priority)
        if shares is None:
            shares = self._classes[priority] = {}
            self._priorities = sorted(self._classes, reverse=True)
        graph = task.graph
        queue = shares.get(graph.share)
        if queue is None:
            queue = shares[graph.share] = ReadyQueue()
        queue.push((task.due, graph.order, -task.depth, sequence, task))

    def remove(self, task: TaskState) -> None:
        """The task is not to be run from here (its entry goes stale)."""
        task.entry = 0
        task.lane = None
        self.count -= 1
        self.items -= task.spec.items
        if not self.count:
            self._lone = None
            self._clear()

    def pop(self) -> TaskState:
        """Take the next task; only if `count`."""
        lone = self._lone
        if lone is not None:
            self._lone = lone.lane = None
            self.count = 0
            self.items -= lone.spec.items
            return lone
        while True:
            priority = self._priorities[0]
            shares = self._classes[priority]
            share, queue = next(iter(shares.items()))
            task = queue.pop()
            alone = len(shares) == 1
            if task is None or (not alone and self._turn_ends(share)):
                # To the end of the round, or out if it has nothing left.
                del shares[share]
                if task is not None and (queue.ordered or queue.heap):
                    shares[share] = queue
                if not shares:
                    self._drop(priority)
            if task is not None:
                task.lane = None
                self.count -= 1
                self.items -= task.spec.items
                if not self.count and not (
                    alone and len(self._priorities) == 1 and not queue.ordered and not queue.heap
                ):
                    self._clear()
                # Else an empty queue stays for the next task, which mostly is like this one.
                return task

    def _turn_ends(self, share: Any) -> bool:
        """Count a turn of the share; whether it was the last one of this round."""
        weight = self._weights.get(share[1], 1) if share.__class__ is tuple else 1
        if weight == 1:
            return True
        used = self._turns.get(share, 0) + 1
        self._turns[share] = used % weight
        return used >= weight

    def unpop(self, task: TaskState) -> None:
        """Put back what `pop` has just given: it is the next one again, and the turn its share's."""
        self.push(task, task.entry)
        if self._lone is not None:
            return
        shares = self._classes[task.profile.priority]
        share = task.graph.share
        if share in self._turns:
            self._turns[share] = (self._turns[share] - 1) % self._weights.get(share[1], 1)
        if next(iter(shares)) != share:
            others = dict(shares)
            shares.clear()
            shares[share] = others.pop(share)
            shares.update(others)

    def head(self) -> TaskState:
        """The next task, left in place; only if `count`."""
        if self._lone is not None:
            return self._lone
        while True:
            priority = self._priorities[0]
            shares = self._classes[priority]
            share, queue = next(iter(shares.items()))
            entry = queue.head()
            if entry is not None:
                return entry[4]
            del shares[share]
            if not shares:
                self._drop(priority)

    def _drop(self, priority: int) -> None:
        del self._classes[priority]
        self._priorities.remove(priority)

    def _clear(self) -> None:
        self._classes.clear()
        self._priorities.clear()
        if self._turns:
            self._turns.clear()
