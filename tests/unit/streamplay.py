"""Streams of a random run on a tree of dispatchers: their producers, their consumers, and what arrived."""

from __future__ import annotations

from random import Random

from rtml.messages import CANCELLED, OK, Consumed, Finished, Item, Items, Revoke, TaskResult
from tests.unit.trees import Member

#: Items that a producer may be ahead.
WINDOW = 3


class Streams:
    """Each item arrives once and in order, whatever happens to connections and producers."""

    def __init__(self, random: Random) -> None:
        self.random = random
        #: of a stream: how many items it has, and who consumes it
        self.made: dict[str, tuple[int, Member]] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        #: of an attempt, by where it runs: items made, and those that the consumer has
        self._revoked: set[tuple[str, int, int]] = set()
        self._producers: dict[tuple[str, str, int, int], list[int]] = {}

    def submit(self, member: Member, name: str) -> None:
        """A client asks for a stream."""
        self.made[name] = (self.random.choice((0, 1, 5, 12)), member)
        self.got[name] = []
        member.submit(name, stream=WINDOW, retries=5)

    def produce(self, member: Member, name: str) -> None:
        """The executor that runs it goes on: yields, or ends."""
        executor = member.holder(name)
        attempt = member.peers[executor].hands[member.ids[name]]
        state = self._producers.setdefault(
            (member.name, executor, attempt.id, attempt.attempt), [attempt.skip, attempt.skip]
        )
        for message in member.heard(executor, Consumed):
            assert isinstance(message, Consumed)
            if message.task == attempt.id:
                state[1] = max(state[1], message.count)
                if message.again and message.count < state[0]:
                    items = _items(message.count, state[0])
                    member.post(executor, Items(attempt.id, attempt.attempt, message.count, items))
        for message in member.heard(executor, Revoke):
            assert isinstance(message, Revoke)
            self._revoked.update((member.name, *key) for key in message.attempts)
        if (member.name, attempt.id, attempt.attempt) in self._revoked:
            member.finish(name, on=executor, outcome=CANCELLED)
            return
        total = self.made[name][0]
        made, taken = state
        if made < total and made - taken < WINDOW:
            state[0] += 1
            member.post(executor, Items(attempt.id, attempt.attempt, made, _items(made, made + 1)))
        elif made >= total:
            del member.peers[executor].hands[attempt.id]
            peer = member.peers[executor]
            peer.serial += 1
            tail = _items(min(taken, total), total)
            result = TaskResult(attempt.id, attempt.attempt, OK, b"", made=total, tail=tail)
            member.post(executor, Finished(peer.serial, [result]))

    def consume(self) -> None:
        """Consumers take what has come, and say so."""
        for name, (total, member) in self.made.items():
            got, before = self.got[name], len(self.got[name])
            for message in [one for one in member.peers["ann"].heard if isinstance(one, Items)]:
                if message.task == member.ids[name]:
                    member.peers["ann"].heard.remove(message)
                    self._take(name, message.first, message.items)
            result = member.results.get(name)
            if result is not None and name not in self.ended:
                self.ended.add(name)
                if result.outcome == OK:
                    self._take(name, result.made - len(result.tail or ()), result.tail or [])
                    assert got == list(range(total)), f"{name} arrived as {got} of {total}"
            elif len(got) > before:
                member.post("ann", Consumed(member.ids[name], len(got)))

    def _take(self, name: str, first: int, items: list[Item]) -> None:
        got = self.got[name]
        for position, item in enumerate(items, first):
            assert isinstance(item.payload, bytes)
            assert int(item.payload) == position
            if position == len(got):
                got.append(position)


def _items(first: int, end: int) -> list[Item]:
    return [Item(str(number).encode()) for number in range(first, end)]
