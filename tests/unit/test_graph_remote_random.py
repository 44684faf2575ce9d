"""Trees of dispatchers under random work, cuts and restarts: every invariant after every step, and everything ends."""

from __future__ import annotations

import random

import pytest

from tests.unit.cores import Engine
from tests.unit.trees import UP, Tree

SEEDS = 60


class Play:
    """A random run of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tree = Tree(nodes=self.random.randint(1, 3), workers=self.random.randint(1, 2), root_workers=seed % 3 % 2)
        self.members: list[Engine] = [self.tree.root, *self.tree.nodes.values()]
        #: tasks that clients submitted, by where
        self.submitted: dict[str, Engine] = {}
        self.away: set[str] = set()
        self.number = 0
        #: children of a task, and those that wait for all of theirs in `get`
        self.children: dict[str, list[str]] = {}
        self.blocked: set[str] = set()

    def name(self) -> str:
        self.number += 1
        return f"t{self.number}"

    def running(self) -> list[tuple[Engine, str, str]]:
        """(engine, executor, task) of what executors are inside of and may go on with."""
        found = []
        for member in self.members:
            for name, peer in member.peers.items():
                if peer.worker and peer.link is not None:
                    hands = member.assigned(name)
                    blocked = [task for task in hands if task in self.blocked]
                    if blocked and all(child in member.results for child in self.children[blocked[-1]]):
                        member.resume(blocked[-1])
                        self.blocked.discard(blocked[-1])
                        found.append((member, name, blocked[-1]))
                    else:
                        found += [(member, name, task) for task in hands if task not in self.blocked][:1]
        return found

    def step(self) -> None:
        what = self.random.choices(
            ["submit", "child", "block", "finish", "cancel", "advance", "cut", "connect", "settle"],
            [4, 6, 4, 8, 1, 4, 0.5, 1, 8],
        )[0]
        getattr(self, what)()
        if self.random.random() < 0.7:
            self.tree.settle()

    def submit(self) -> None:
        member, name = self.random.choice(self.members), self.name()
        self.submitted[name] = member
        member.submit(name)

    def child(self) -> None:
        if running := self.running():
            member, _, parent = self.random.choice(running)
            name = self.name()
            self.children.setdefault(parent, []).append(name)
            member.submit(name, parent=parent)

    def block(self) -> None:
        for member, name, task in self.running():
            waits = [child for child in self.children.get(task, ()) if child not in member.results]
            if waits and self.random.random() < 0.5:
                self.blocked.add(task)
                others = [other for other in member.assigned(name) if other not in self.blocked]
                member.block(task, returned=others)
                return

    def finish(self) -> None:
        if running := self.running():
            member, _, task = self.random.choice(running)
            member.finish(task, run=self.random.choice([1e-4, 1e-2, 1.0]))

    def cancel(self) -> None:
        if self.submitted:
            name = self.random.choice(list(self.submitted))
            self.submitted[name].cancel(name)

    def advance(self) -> None:
        self.tree.advance(self.random.choice([0.001, 0.01, 0.1]))

    def cut(self) -> None:
        name = self.random.choice(sorted(self.tree.nodes))
        if name not in self.away:
            self.away.add(name)
            self.tree.cut(name)

    def connect(self) -> None:
        for name in sorted(self.away)[:1]:
            self.away.discard(name)
            self.tree.connect(name)

    def settle(self) -> None:
        self.tree.settle()

    def end(self) -> None:
        """Everything is repaired, and executors do what they are given."""
        for name in sorted(self.away):
            self.tree.connect(name)
        self.away.clear()
        for _ in range(400):
            self.tree.settle()
            for member, _, task in self.running():
                if any(task in member.assigned(w) for w, peer in member.peers.items() if peer.worker):
                    member.finish(task)
            self.tree.advance(0.06)
            if all(member.outcome(name) for name, member in self.submitted.items()):
                return
        missing = [name for name, member in self.submitted.items() if not member.outcome(name)]
        raise AssertionError(f"never ended: {missing}")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everything_ends(seed: int) -> None:
    play = Play(seed)
    for _ in range(play.random.randint(10, 120)):
        play.step()
    play.end()


def test_a_cut_uplink_is_noticed_on_both_sides() -> None:
    tree = Tree(nodes=1)
    tree.cut("n1")
    assert all(worker.session.peer is None for worker in tree.root.core.tables.remotes.values() if worker.session)
    assert tree.node("n1").core.tables.peers.get(UP) is None
