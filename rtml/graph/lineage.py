"""How results that were lost with their node are made again: by running the task that made them once more.

A result in another node's memory has a *lineage*: the task's call, and the lineages of its large arguments. When such
a result cannot be had, because its node is gone, a task with the same call is run (the *rebuild*), and whoever needs
the lost object takes what that makes. Nothing is rebuilt before somebody needs it, nor while another node has a copy.

Bounded: lineages reach `DEPTH_MAX` tasks back and keep at most `BYTES_MAX` in all; what has to run again for one result
takes at most `COST_MAX` seconds, and a result is rebuilt at most `REBUILDS_MAX` times. Tasks that may not be run again
(`retries=0`), actors' calls and streams have none, nor has what was `put`: if these are lost the error says so. A
reduction's inputs travel as handles: it says by what call of their values it can be made again (`Folded`). What is
rebuilt on the way to what somebody needs is let go like any task's arguments: a long chain does not stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec.structs import replace

from rtml.graph.keeping import Keeping
from rtml.graph.locality import Locality, references
from rtml.graph.state import FunctionState, Profile, Session, StoredObject, TaskState, WorkerState, inline_bytes
from rtml.graph.tables import Tables
from rtml.messages import DISPATCHER, OK, SESSION_MAX, ErrorInfo, ObjectRef, Task, TaskResult, task_id

DEPTH_MAX: Final = 10_000
COST_MAX: Final = 600.0
BYTES_MAX: Final = 256 * 1024 * 1024
#: What a lineage takes beside its inline arguments, roughly.
RECORD_BYTES: Final = 2048
REBUILDS_MAX: Final = 3
#: Nodes that were given up and are remembered.
GONE_MAX: Final = 1024

#: Accepts a task: whose, its spec, function and profile, and now.
Accept = Callable[[Session, Task, FunctionState, Profile, float], TaskState | None]


#: An answer of `Lineages.ask`: it is not lost, as far as can be told.
STILL_THERE: Final = "the node where it lies is there, but does not give it"
_PUT: Final = "it was put, or made by a task that cannot be run again (or is not known any more)"


class Lineage(msgspec.Struct, eq=False):
    """How an object was made."""

    spec: Task
    function: FunctionState
    profile: Profile
    inputs: list[bytes | ObjectRef | None] | None
    #: Lineages of the large arguments that have one, by object id.
    parents: dict[int, Lineage]
    depth: int
    #: seconds that its task ran, and those of the longest way to it
    run: float
    cost: float
    size: int
    #: the object's record, and lineages that have it among their parents
    users: int = 1
    rebuilds: int = 0
    #: the task that makes it again, and what came of an earlier one
    rebuild: TaskState | None = None
    #: somebody needs the rebuild's result for itself, not as an argument of the next rebuild: its record is kept
    held: bool = False


class Lineages:
    """Remembers how results were made, and has them made again."""

    def __init__(self, tables: Tables, keeping: Keeping, accept: Accept, locality: Locality) -> None:
        self.tables = tables
        self._locality = locality
        self.keeping = keeping
        self._accept = accept
        keeping.unneeded_made = self.forget
        self._bytes = 0
        self._rebuilt = 0
        #: data endpoints of nodes that were given up, oldest first
        self.gone: dict[str, None] = {}

    # --- remembering

    def of(self, task: TaskState, result: TaskResult) -> Lineage | None:
        """The lineage of what this task has just made elsewhere; None if it has none. Before its inputs are let go."""
        worker = task.worker
        if result.outcome != OK or worker is None or worker.role != DISPATCHER or task.session.role == DISPATCHER:
            return None
        spec, profile = task.spec, task.profile
        if not profile.retries or spec.actor or spec.hosts is not None or task.home is not None:
            return None
        folded, inputs, refs = result.folded, task.inputs, references(task)
        if folded is not None and folded.inputs is not None:
            spec, inputs = replace(spec, args=folded.args, handles=None), [*folded.inputs]
            refs = (payload for payload in folded.inputs if isinstance(payload, ObjectRef))
        elif spec.handles:
            return None
        parents = {}
        for ref in refs:
            stored = self.tables.objects.get(ref.id)
            if stored is not None and stored.lineage is not None:
                parents[ref.id] = stored.lineage
        depth = 1 + max((parent.depth for parent in parents.values()), default=0)
        cost = result.run + max((parent.cost for parent in parents.values()), default=0.0)
        args = len(spec.args) if isinstance(spec.args, bytes) else 0
        size = RECORD_BYTES + args + inline_bytes(inputs or ())
        if depth > DEPTH_MAX or cost > COST_MAX or self._bytes + size > BYTES_MAX:
            return None
        self._bytes += size
        for parent in parents.values():
            parent.users += 1
        kept = None if inputs is None else list(inputs)
        return Lineage(spec, task.function, profile, kept, parents, depth, result.run, cost, size)

    def forget(self, stored: StoredObject) -> None:
        """Nobody needs the object any more."""
        unused, stored.lineage = [stored.lineage], None
        while unused:
            lineage = unused.pop()
            lineage.users -= 1
            if not lineage.users:
                self._bytes -= lineage.size
                self._release(lineage)
                unused += lineage.parents.values()

    def _release(self, lineage: Lineage) -> None:
        rebuild, lineage.rebuild = lineage.rebuild, None
        if rebuild is not None and lineage.held:
            self.keeping.unhold(rebuild.id)
        lineage.held = False

    def rebuilds(self) -> list[TaskState]:
        """The tasks that make something again which somebody needs, and those that have."""
        found: dict[int, Lineage] = {}
        new = [stored.lineage for stored in self.tables.objects.values() if stored.lineage is not None]
        while new:
            lineage = new.pop()
            if id(lineage) not in found:
                found[id(lineage)] = lineage
                new += lineage.parents.values()
        return [lineage.rebuild for lineage in found.values() if lineage.rebuild is not None and lineage.held]

    # --- making again

    def gave_up(self, data: str) -> None:
        """The node with this data endpoint will not come back."""
        if data:
            self.gone[data] = None
            if len(self.gone) > GONE_MAX:
                del self.gone[next(iter(self.gone))]

    def forestall(self, task: TaskState, now: float) -> None:
        """Have arguments that lie on nodes which were given up made again now, if that can be done.

        The task would occupy its place for as long as somebody tries to fetch them.
        """
        if task.session.role == DISPATCHER:
            return
        waits: dict[int, TaskState] = {}
        for position, payload in enumerate(task.inputs or ()):
            if not isinstance(payload, ObjectRef) or payload.node not in self.gone:
                continue
            other = self._other(payload.id, payload.node)
            stored = self.tables.objects.get(payload.id)
            if other and task.inputs is not None:
                task.inputs[position] = replace(payload, node=other)
            elif stored is not None and _is_lost(stored.worker):
                rebuild = self._rebuild(stored.lineage, now)
                if rebuild is None:
                    return  # the attempt's error will say why
                waits[position] = rebuild
        for position, rebuild in waits.items():
            self._wait(task, position, rebuild)

    def recover(self, task: TaskState, error: ErrorInfo | None, now: float) -> bool:
        """Whether a task that could not have its arguments can wait until they are made again: it does then."""
        if error is None or error.type != "ObjectLost" or task.session.role == DISPATCHER:
            return False  # its home knows how its arguments were made
        waits: dict[int, TaskState] = {}
        moved = False
        for position, payload in enumerate(task.inputs or ()):
            if isinstance(payload, ObjectRef):
                if task.worker is not None:
                    self._locality.failed(payload.id, task.worker.node.data)  # it was to have a copy, and has not
                other = self._other(payload.id, payload.node)
                if other and task.inputs is not None:
                    task.inputs[position] = replace(payload, node=other)
                    moved = True
                    continue
                stored = self.tables.objects.get(payload.id)
                if stored is not None and _is_lost(stored.worker):
                    rebuild = self._rebuild(stored.lineage, now)
                    if rebuild is None:
                        return False
                    waits[position] = rebuild
        for position, rebuild in waits.items():
            self._wait(task, position, rebuild)
        if moved:
            return True
        if not waits and task.failures < task.profile.retries and any(ref.node for ref in references(task)):
            task.failures += 1  # where it lies could not be reached, and may still be there
            return True
        if not waits:
            self._explain(task, error)
        return bool(waits)

    def _explain(self, task: TaskState, error: ErrorInfo) -> None:
        """Say why a lost argument stays lost."""
        if any(ref.node and ref.id not in self.tables.objects for ref in references(task)):
            error.message += f"; {_PUT}"
            error.pickled = b""

    def _wait(self, task: TaskState, position: int, rebuild: TaskState) -> None:
        """The task gets the rebuild's result in this place."""
        assert task.inputs is not None
        before = task.inputs[position]
        if rebuild.result is not None:
            task.inputs[position] = payload = rebuild.result.payload
            if isinstance(payload, ObjectRef):
                self.keeping.need(task.id, payload.id)
        else:
            task.inputs[position] = None
            task.waiting += 1
            if rebuild.dependents is None:
                rebuild.dependents = []
            rebuild.dependents.append((task, position))
        if isinstance(before, ObjectRef):
            self.keeping.unneeded(before.id, task.id)

    def _other(self, object_id: int, data: str) -> str:
        """The data endpoint of a node that has a copy of what could not be had from `data`; "" if that is there."""
        self._locality.failed(object_id, data)
        remotes = self.tables.remotes.values()
        live = {one.node.data for one in remotes if one.session is not None and one.session.peer is not None}
        return "" if not data or data in live or data == self.tables.data else self._locality.elsewhere(object_id, live)

    def ask(self, argument: str, now: float) -> str:
        """Somebody cannot have an object ("id endpoint"): who else has it, the task that makes it again, or why not."""
        number, _, data = argument.partition(" ")
        if not number.isdigit():
            return "that is no object"
        other = self._other(int(number), data)
        if other:
            return f"at {other}"
        stored = self.tables.objects.get(int(number))
        if stored is None:
            return _PUT
        if not _is_lost(stored.worker):
            return STILL_THERE
        rebuild = self._rebuild(stored.lineage, now)
        if rebuild is None:
            return (
                "its node is gone, and it cannot be made again: only results of tasks that may be retried can, no more"
                f" than {REBUILDS_MAX} times, {DEPTH_MAX} tasks deep and {COST_MAX:g} s of work back"
            )
        return f"task {rebuild.id}"

    def _rebuild(self, lineage: Lineage | None, now: float) -> TaskState | None:
        """The task that makes it again; it may have ended."""
        if lineage is None:
            return None
        rebuild = lineage.rebuild
        if rebuild is None or rebuild.id not in self.tables.tasks or self._useless(rebuild):
            missing = self._missing(lineage)
            if missing is None or not all(self._start(one, now) for one in missing):
                return None
        rebuild = lineage.rebuild
        if rebuild is not None and not lineage.held:
            rebuild.holds += 1
            lineage.held = True
        return rebuild

    def _missing(self, lineage: Lineage) -> list[Lineage] | None:
        """What has to be made again for this one, arguments first; None if that is too much."""
        order: list[Lineage] = []
        known: set[int] = set()
        cost = 0.0
        stack = [(lineage, False)]
        while stack:
            one, arguments_done = stack.pop()
            if arguments_done:
                order.append(one)
            elif id(one) not in known:
                known.add(id(one))
                cost += one.run
                if one.rebuilds >= REBUILDS_MAX or cost > COST_MAX:
                    return None
                stack.append((one, True))
                for number, parent in one.parents.items():
                    if self._unreachable(number) and (parent.rebuild is None or self._useless(parent.rebuild)):
                        stack.append((parent, False))
        return order

    def _start(self, lineage: Lineage, now: float) -> bool:
        """Run its task once more. What it needs is there, or on its way."""
        self._release(lineage)
        lineage.rebuilds += 1
        deps: list[tuple[int, bytes | ObjectRef | None]] = []
        for payload in lineage.inputs or ():
            deps.append((0, payload))
            if isinstance(payload, ObjectRef) and payload.id in lineage.parents and self._unreachable(payload.id):
                argument = lineage.parents[payload.id].rebuild
                if argument is None:
                    return False
                deps[-1] = (argument.id, None) if argument.result is None else (0, argument.result.payload)
        self._rebuilt += 1
        spec = replace(lineage.spec, id=self._new_id(), deps=deps or None, parent=0, options=None)
        lineage.rebuild = self._accept(self.tables.detached, spec, lineage.function, lineage.profile, now)
        return lineage.rebuild is not None

    def _unreachable(self, object_id: int) -> bool:
        """Whether this object is gone, or its node is."""
        stored = self.tables.objects.get(object_id)
        return stored is None or _is_lost(stored.worker)

    def _useless(self, rebuild: TaskState) -> bool:
        """Whether what was made again is lost, too."""
        result = rebuild.result
        if result is None:
            return False
        if result.outcome != OK:
            return True
        return isinstance(result.payload, ObjectRef) and self._unreachable(result.payload.id)

    def _new_id(self) -> int:
        return task_id((self.tables.epoch >> 16) & SESSION_MAX or 1, self._rebuilt)


def _is_lost(worker: WorkerState) -> bool:
    """Whether what lies with this worker's node is out of reach: that dispatcher is gone or cannot be heard."""
    return worker.role == DISPATCHER and (worker.session is None or worker.session.peer is None)
