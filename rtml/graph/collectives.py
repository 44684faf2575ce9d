"""How many values become one: which node folds what, in which order, and what happens when one of them is gone.

A `Plan` is told what has happened (an input is there, a step has ended, a node is gone) and answers with commands. It
knows no values, only positions of inputs and the nodes where they lie. Rules:

* Of all inputs the first `wanted` to arrive are *chosen*; others are spares, for when one that was chosen is lost.
* What lies on one node is folded there, as it comes; nothing crosses the network before all that is wanted is there.
  By then it is known where everything lies, and a node with a hundred inputs sends one value, once. As that is streamed
  through all nodes, the end comes hardly later than if something had been on its way since the first arrival.
* Then the nodes are put into a chain, a binary tree or a star, whichever is predicted to be the fastest for this many
  nodes and bytes: a chain sends everything once, at full bandwidth, and pays a step's latency for each node.
* When a step breaks all steps between nodes are given up, and planned again without what is lost: the next inputs to
  arrive take its place; only if there will be too few is a lost input asked for again.
* The result is of exactly the inputs that `End` names, each once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

#: Seconds from the command to begin a step on another node until its first bytes could be read, and bytes a second
#: between two nodes, until they are measured.
LATENCY: Final = 2e-3
BANDWIDTH: Final = 125e6
#: A node whose steps break so often is given up, with all that lies there.
STRIKES_MAX: Final = 2
#: So often may a lost input be asked for again.
AGAIN_MAX: Final = 3


class Source(NamedTuple):
    """What a step folds: an input, or what another step makes of some."""

    made: bool
    number: int


class Step:
    """Some sources become one value, on one node.

    Args:
        number: its name.
        node: where.
        sources: inputs that lie there or elsewhere, and earlier steps.
        covers: positions of all inputs in it.
        final: what it makes is the result.
    """

    __slots__ = ("between", "covers", "done", "final", "node", "number", "sources")

    def __init__(
        self, number: int, node: str, sources: Sequence[Source], covers: Sequence[int], between: bool, final: bool
    ) -> None:
        self.number = number
        self.node = node
        self.sources = tuple(sources)
        self.covers = tuple(covers)
        #: Part of a plan between nodes, not of what one node does by itself.
        self.between = between
        self.final = final
        self.done = False


class Start(NamedTuple):
    """Begin this step, as soon as what its sources make can be read."""

    step: Step


class Stop(NamedTuple):
    """End this step, or forget what it has made."""

    number: int


class Again(NamedTuple):
    """Have this lost input made again: it then arrives or fails like any other."""

    position: int


class End(NamedTuple):
    """The final step is done; its value is of these inputs."""

    step: int
    contributors: list[int]


class Fail(NamedTuple):
    """Too few inputs can be had; -1 or the position of one that failed."""

    position: int


Command = Start | Stop | Again | End | Fail


class _Group:
    """What lies on one node."""

    __slots__ = ("parts", "running")

    def __init__(self) -> None:
        self.parts: list[Source] = []
        self.running: Step | None = None


class Plan:
    """One reduction.

    Args:
        count: inputs that there are or will be.
        wanted: how many of them are to be reduced.
        home: the node where the result shall be.
        latency: seconds that a further hop costs.
        bandwidth: bytes a second from one node to another.
    """

    def __init__(
        self, count: int, wanted: int, home: str, latency: float = LATENCY, bandwidth: float = BANDWIDTH
    ) -> None:
        self.wanted = wanted
        self.home = home
        self._latency = latency
        self._bandwidth = bandwidth
        #: Inputs that have neither arrived nor failed.
        self._pending = set(range(count))
        self._lost: dict[int, None] = {}
        self._asked: dict[int, int] = {}
        self._chosen: set[int] = set()
        self._spares: dict[int, None] = {}
        self._nodes: dict[int, str] = {}
        self._groups: dict[str, _Group] = {}
        self._steps: dict[int, Step] = {}
        self._made = 0
        self._size = 0
        self._strikes: dict[str, int] = {}
        self._combining = False
        self._first_failed = -1
        self._commands: list[Command] = []
        self.ended = False

    # --- what has happened

    def arrived(self, position: int, node: str, size: int = 0) -> None:
        """An input is there, on this node, of so many bytes."""
        if position in self._pending:
            self._pending.discard(position)
            self._nodes[position] = node
            self._spares[position] = None
            self._size = max(self._size, size)

    def failed(self, position: int) -> None:
        """An input has ended without a value."""
        if position in self._pending:
            self._pending.discard(position)
            if self._first_failed < 0:
                self._first_failed = position

    def finished(self, number: int) -> None:
        """All that this step makes is there."""
        step = self._steps.get(number)
        if step is None or step.done:
            return
        step.done = True
        if step.final:
            self.ended = True
            self._commands.append(End(number, sorted(step.covers)))
        elif not step.between:
            self._groups[step.node].running = None
            self._forget_all(source.number for source in step.sources if source.made)

    def broken(self, number: int, blamed: Iterable[Source] = (), *, gone: bool = False) -> None:
        """A step cannot go on, or what it made cannot be read any more.

        Args:
            number: of the step.
            blamed: its sources that could not be read; if none are, it was something at its own node.
            gone: that node is known not to be there any more.
        """
        step = self._steps.get(number)
        if step is None or self.ended:
            return
        self._give_up_between()
        blamed = list(blamed)
        if not step.between:
            self._undo(step)
        for source in blamed:
            if not source.made:
                self._lose(source.number)
            elif source.number in self._steps:
                maker = self._steps[source.number]
                self._undo(maker)
                self._strike(maker.node, gone=False)
        if not blamed:
            self._strike(step.node, gone=gone)

    def restart(self) -> None:
        """All steps are given up; what has arrived stays."""
        self._give_up_between()
        for step in list(self._steps.values()):
            self._undo(step)

    def is_doubtful(self, node: str) -> bool:
        """Whether something went wrong there lately."""
        return bool(self._strikes.get(node))

    # --- what to do

    def advance(self) -> list[Command]:
        """What is to be done now, in this order."""
        if not self.ended:
            self._choose()
        if not self.ended:
            complete = len(self._chosen) == self.wanted
            if not complete:
                for node, group in self._groups.items():
                    if group.running is None and len(group.parts) > 1:
                        self._fold(node, group)
            elif not self._combining and (self.home not in self._groups or self._groups[self.home].running is None):
                self._combine()
        commands, self._commands = self._commands, []
        return commands

    def _choose(self) -> None:
        while len(self._chosen) < self.wanted and self._spares:
            position = next(iter(self._spares))
            del self._spares[position]
            self._chosen.add(position)
            self._groups.setdefault(self._nodes[position], _Group()).parts.append(Source(False, position))
        for position in list(self._lost):
            if len(self._chosen) + len(self._pending) >= self.wanted:
                return
            del self._lost[position]
            if self._asked.setdefault(position, 0) < AGAIN_MAX:
                self._asked[position] += 1
                self._pending.add(position)
                self._commands.append(Again(position))
            elif self._first_failed < 0:
                self._first_failed = position
        if len(self._chosen) + len(self._pending) < self.wanted:
            self._end_badly(self._first_failed)

    def _end_badly(self, position: int) -> None:
        self.ended = True
        self._commands.append(Fail(position))

    def _fold(self, node: str, group: _Group) -> None:
        """Begin to fold what lies on one node."""
        group.running = step = self._begin(node, group.parts)
        group.parts = [Source(True, step.number)]

    def _combine(self) -> None:
        """Begin everything that leads to the result."""
        self._combining = True
        far = [(node, group) for node, group in self._groups.items() if node != self.home and group.parts]
        home = self._groups.get(self.home)
        parents = shape(len(far), self._size, self._latency, self._bandwidth)
        sources: list[list[Source]] = [list(group.parts) for _, group in far]
        sources.append(list(home.parts) if home is not None else [])
        for index, (node, _) in enumerate(far):
            mine = sources[index]
            if len(mine) == 1:
                made = mine[0]
            else:
                made = Source(True, self._begin(node, mine, between=True).number)
            sources[parents[index]].append(made)
        self._begin(self.home, sources[-1], between=True, final=True)

    def _begin(self, node: str, sources: list[Source], *, between: bool = False, final: bool = False) -> Step:
        self._made += 1
        covers = [
            position
            for source in sources
            for position in (self._steps[source.number].covers if source.made else (source.number,))
        ]
        step = self._steps[self._made] = Step(self._made, node, sources, covers, between, final)
        self._commands.append(Start(step))
        return step

    # --- what goes wrong

    def _give_up_between(self) -> None:
        self._combining = False
        self._forget_all([step.number for step in self._steps.values() if step.between])

    def _forget_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self._steps.pop(number, None) is not None:
                self._commands.append(Stop(number))

    def _undo(self, step: Step) -> None:
        """What this step of one node has folded is again what it was made of."""
        if step.between or step.number not in self._steps:
            return
        group = self._groups[step.node]
        if group.running is step:
            group.running = None
        group.parts = [part for part in group.parts if part != Source(True, step.number)]
        kept = {part.number for part in group.parts if not part.made}
        group.parts += [Source(False, position) for position in step.covers if position not in kept]
        earlier = [source.number for source in step.sources if source.made]
        self._forget_all([step.number, *earlier])

    def _strike(self, node: str, *, gone: bool) -> None:
        self._strikes[node] = strikes = self._strikes.get(node, 0) + 1
        if node == self.home:
            if strikes > STRIKES_MAX:
                self._end_badly(-1)
        elif gone or strikes >= STRIKES_MAX:
            self._strikes[node] = 0
            for position, at in list(self._nodes.items()):
                if at == node:
                    self._lose(position)

    def _lose(self, position: int) -> None:
        """An input cannot be had any more where it was."""
        node = self._nodes.pop(position, None)
        if node is None:
            return
        self._lost[position] = None
        self._spares.pop(position, None)
        if position not in self._chosen:
            return
        self._chosen.discard(position)
        for step in list(self._steps.values()):
            if not step.between and position in step.covers:
                self._undo(step)
        group = self._groups[node]
        group.parts = [part for part in group.parts if part != Source(False, position)]


def shape(count: int, size: int, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> list[int]:
    """To whom each of `count` nodes sends what it has, all of `size` bytes; `count` stands for home.

    Whoever sends has a lower number than who receives, so that steps can begin in this order.
    """
    seconds = size / bandwidth
    chain = count * latency + seconds
    star = latency + count * seconds
    tree = math.ceil(math.log2(count + 1)) * latency + 2 * seconds
    if star <= min(chain, tree):
        return [count] * count
    if chain <= tree:
        return [index + 1 for index in range(count)]
    return [count - (count - index - 1) // 2 for index in range(count)]
