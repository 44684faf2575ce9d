"""Several cores that are connected as dispatchers are: a root, and nodes below it.

    tree = Tree(nodes=2)
    tree.root.submit("a")
    tree.settle()                          # messages go to and fro until nobody has anything to say
    tree.node("n1").finish("a")

Each core is an `Engine` (see `cores`) with executors and clients of its own; task names are known everywhere.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from rtml.graph.policy import Scheduling
from rtml.graph.tables import Close, Effect, Knock, Send
from rtml.messages import Message, decode, encode
from tests.unit.cores import Engine

#: Link number of a node's uplink, and of the first node at the root.
UP = 1 << 20


class Member(Engine):
    """An engine in a tree."""

    def __init__(self, tree: Tree, name: str, **settings: Any) -> None:
        self.tree = tree
        self.name = name
        super().__init__(**settings)

    def elsewhere(self, effect: Effect) -> None:
        """For another dispatcher."""
        if isinstance(effect, Send | Close):
            self.tree.carry(self, effect)


class Tree:
    """See the module."""

    def __init__(
        self, nodes: int = 1, workers: int = 1, root_workers: int = 0, scheduling: Scheduling | None = None, **node: Any
    ) -> None:
        self.root = Member(self, "root", workers=root_workers, scheduling=scheduling)
        self.nodes: dict[str, Member] = {}
        #: (node, up?, messages) on their way
        self._carried: deque[tuple[Member, bool, list[Message] | None]] = deque()
        self._links: dict[str, int] = {}
        self._last_link = UP
        #: messages that came to the root, by kind
        self.at_root: Counter[str] = Counter()
        for number in range(1, nodes + 1):
            self.add(f"n{number}", workers=workers, first_session=1000 * number, uplink=f"n{number}", **node)
        for member in self.nodes.values():
            self.connect(member.name)
        self.settle()
        self.at_root.clear()

    def add(self, name: str, **settings: Any) -> Member:
        """A node that is not connected yet."""
        member = self.nodes[name] = Member(self, name, **settings)
        member.ids = self.root.ids  # names are everywhere the same
        member.functions = self.root.functions
        member.core.tables.data = f"{name}:1"
        return member

    def node(self, name: str) -> Member:
        """A node."""
        return self.nodes[name]

    def connect(self, name: str) -> None:
        """The node's uplink is there."""
        member = self.nodes[name]
        self._last_link += 1
        self._links[name] = self._last_link
        for effect in member.core.connected(UP, member.now):
            if isinstance(effect, Send):
                self.carry(member, effect)

    def cut(self, name: str) -> None:
        """Its link breaks; what is on its way is lost."""
        link, member = self._links.pop(name), self.nodes[name]
        self._carried = deque(entry for entry in self._carried if entry[0] is not member)
        for engine, number in ((member, UP), (self.root, link)):
            engine._arrivals.append((number, None))
            engine._turn()

    def kill(self, name: str, *, refused: bool = False) -> None:
        """The node is gone for ever, with everything on it; its link breaks. `refused`: the kernel there says so."""
        self.cut(name)
        data = self.nodes.pop(name).core.tables.data
        if refused:
            self.root.knocked(self.knock(data).worker)

    def knock(self, data: str) -> Knock:
        """What the root wants to know of this data endpoint, since its link broke."""
        asked = [effect for _, _, effect in self.root.effects if isinstance(effect, Knock)]
        last = next(effect for effect in reversed(asked) if effect.data == data)
        assert last.lost
        return last

    def carry(self, sender: Member, effect: Send | Close) -> None:
        """A frame leaves a dispatcher for another one."""
        messages = decode(encode(effect.messages)) if isinstance(effect, Send) else None
        if sender is self.root:
            name = next((name for name, link in self._links.items() if link == effect.peer), None)
            if name is not None:
                self._carried.append((self.nodes[name], False, messages))
        elif effect.peer == UP and sender.name in self._links:
            self._carried.append((sender, True, messages))

    def settle(self) -> None:
        """All messages arrive."""
        turns = 0
        while self._carried:
            member, up, messages = self._carried.popleft()
            if up and member.name in self._links:
                self.at_root.update(type(message).__name__ for message in messages or ())
                self.root._arrivals.append((self._links[member.name], messages))
                self.root._turn()
            elif not up:
                member._arrivals.append((UP, messages))
                member._turn()
            turns += 1
            assert turns < 10_000, "they never stop talking"

    def advance(self, seconds: float, step: float = 0.01) -> None:
        """Time passes everywhere."""
        until = self.root.now + seconds
        while self.root.now < until - 1e-9:
            for member in (self.root, *self.nodes.values()):
                member.advance(min(step, until - self.root.now) if member is self.root else self.root.now - member.now)
            self.settle()
