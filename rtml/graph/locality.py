"""Where a task's large arguments lie, and what it costs to have them elsewhere.

An `ObjectRef` names the data endpoint of the node where the object was made. Nodes to which a task with that argument
was sent have a copy, as far as can be told. What is missing at a node costs its bytes over the bandwidth that the node
was seen to have when it fetched others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from rtml.graph.state import NodeState, TaskState
from rtml.graph.tables import Ahead, Tables
from rtml.messages import ObjectRef

#: Bytes a second that a node is believed to fetch until it was seen.
BANDWIDTH: Final = 250e6
#: Weight of the newest observation, and bytes below which a transfer says more about latency than bandwidth.
_NEWEST: Final = 0.3
_TELLING: Final = 256 * 1024
#: Objects of which copies are remembered.
_OBJECTS_MAX: Final = 16_384


def references(task: TaskState) -> Iterator[ObjectRef]:
    """The task's large arguments, as far as they are known."""
    if task.spec.args.__class__ is ObjectRef:
        yield task.spec.args
    for payload in task.inputs or ():
        if isinstance(payload, ObjectRef):
            yield payload


def has_large(task: TaskState) -> bool:
    """Whether the task may have large arguments at all: most have none."""
    return bool(task.inputs) or task.spec.args.__class__ is ObjectRef


class Locality:
    """What one dispatcher knows of copies.

    Args:
        blind: placement does not care where arguments are, for comparisons.
    """

    def __init__(self, *, blind: bool = False) -> None:
        self._blind = blind
        #: Data endpoints with a copy, by object id, oldest first.
        self._copies: OrderedDict[int, set[str]] = OrderedDict()

    def has_far(self, task: TaskState) -> bool:
        """Whether the task has large arguments at all that other nodes can fetch."""
        if self._blind or not has_large(task):
            return False
        return any(ref.node for ref in references(task))

    def missing(self, task: TaskState, data: str) -> int:
        """Bytes that would have to be fetched to the node with this data endpoint."""
        total = 0
        for ref in references(task):
            if ref.node and ref.node != data and data not in self._copies.get(ref.id, ()):
                total += ref.size
        return total

    def seconds(self, task: TaskState, node: NodeState) -> float:
        """Predicted time to fetch what is missing there."""
        if self._blind or not has_large(task):
            return 0.0
        return self.missing(task, node.data) / node.bandwidth

    def sent(self, task: TaskState, data: str) -> None:
        """The task goes to this node: what it needs will be there."""
        for ref in references(task):
            if ref.node and ref.node != data:
                self.known(ref.id, data)

    def known(self, object_id: int, data: str) -> None:
        """This node has a copy."""
        self._copies.setdefault(object_id, set()).add(data)
        if len(self._copies) > _OBJECTS_MAX:
            self._copies.popitem(last=False)

    def failed(self, object_id: int, data: str) -> None:
        """It is not there, or cannot be had from there."""
        self._copies.get(object_id, set()).discard(data)

    def elsewhere(self, object_id: int, live: set[str]) -> str:
        """One of these data endpoints that has a copy; "" if none has."""
        return min(self._copies.get(object_id, set()) & live, default="")

    def lost(self, data: str) -> None:
        """A node is gone, and its copies."""
        for copies in self._copies.values():
            copies.discard(data)


def fetch_ahead(tables: Tables, task: TaskState) -> None:
    """Have this node begin to fetch what the task needs, while it waits for its turn."""
    far = [ref for ref in references(task) if ref.node not in ("", tables.data)]
    if far:
        tables.effects.append(Ahead(far))


def observe(node: NodeState, moved: int, seconds: float) -> None:
    """Learn from bytes that were fetched there."""
    if moved >= _TELLING and seconds > 0:
        node.bandwidth += _NEWEST * (moved / seconds - node.bandwidth)
