"""The pure half of a stream at its producer: which items the consumer has not taken yet."""

from __future__ import annotations

from collections import deque

from rtml.messages import Attempt, Item, Items, ObjectRef


class Outlet:
    """Items of one attempt.

    Args:
        attempt: of the stream.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        #: Yielded so far, those that were left out counted as well.
        self.made = 0
        #: Not taken by the consumer; the first one has the number `made - len(waiting)`.
        self.waiting: deque[Item] = deque()
        #: How many of them were sent.
        self.sent = 0
        #: Their objects that the dispatcher does not need any more, as it lost sight of somebody.
        self.freed: set[int] = set()

    @property
    def skips(self) -> bool:
        """Whether the next item is one that the consumer has from an earlier attempt."""
        return self.made < self.attempt.skip

    @property
    def full(self) -> bool:
        """Whether the consumer has to take something first."""
        return len(self.waiting) >= self.attempt.stream

    @property
    def unsent(self) -> int:
        """Items that `send` would send."""
        return len(self.waiting) - self.sent

    def skip(self) -> None:
        """An item was yielded that is left out."""
        self.made += 1

    def put(self, item: Item) -> None:
        """An item was yielded."""
        self.made += 1
        self.waiting.append(item)

    def send(self) -> Items:
        """All that was not sent."""
        items = list(self.waiting)[self.sent :]
        self.sent = len(self.waiting)
        return Items(self.attempt.id, self.attempt.attempt, self.made - len(items), items)

    def again(self) -> list[Items]:
        """What was sent and not taken, as it may be lost with a connection."""
        items = list(self.waiting)[: self.sent]
        first = self.made - len(self.waiting)
        return [Items(self.attempt.id, self.attempt.attempt, first, items)] if items else []

    def taken(self, count: int) -> list[int]:
        """The consumer has the first `count` items; returns objects that may be recycled now."""
        freed: list[int] = []
        while self.waiting and self.made - len(self.waiting) < count:
            payload = self.waiting.popleft().payload
            self.sent = max(0, self.sent - 1)
            if isinstance(payload, ObjectRef) and payload.id in self.freed:
                self.freed.discard(payload.id)
                freed.append(payload.id)
        return freed

    def keeps(self, number: int) -> bool:
        """Whether an object that is to be freed may have to be sent again; it is remembered."""
        found = any(isinstance(item.payload, ObjectRef) and item.payload.id == number for item in self.waiting)
        if found:
            self.freed.add(number)
        return found

    def unsent_objects(self) -> list[int]:
        """Objects that nobody has heard of."""
        items = list(self.waiting)[self.sent :]
        return [item.payload.id for item in items if isinstance(item.payload, ObjectRef)]
