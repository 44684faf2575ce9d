"""Invariants of tasks, the lanes they wait in, and their graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rtml.graph.core import Core
from rtml.graph.devices import suits
from rtml.graph.invariants.common import TOLERANCE, all_tasks, is_idle, live, waiting_calls
from rtml.graph.queues import Lane
from rtml.graph.state import Session, State, TaskState, WorkerState


def tasks_by_id(core: Core) -> Iterable[object]:
    """Every record is stored under its own id."""
    tables = core.tables
    yield from (key for key, task in tables.tasks.items() if key != task.id)
    yield from (key for key, session in tables.sessions.items() if key != session.id)
    yield from (key for key, worker in tables.workers.items() if key != worker.id)
    yield from (key for key, node in tables.nodes.items() if key != node.name)
    yield from (key for key, stored in tables.objects.items() if key != stored.ref.id)


def done_has_result(core: Core) -> Iterable[object]:
    """A task has a result exactly when it is done."""
    yield from (task.id for task in all_tasks(core) if (task.result is not None) != (task.state is State.DONE))


def _lanes(core: Core) -> Iterable[Lane]:
    return core.placement._lanes.values()


def _queued(lane: Lane) -> Iterable[TaskState]:
    if lane._lone is not None:
        yield lane._lone
    for shares in lane._classes.values():
        for queue in shares.values():
            for entry in (*queue.ordered, *queue.heap):
                if entry[4].entry == entry[3]:
                    yield entry[4]


def ready_is_queued(core: Core) -> Iterable[object]:
    """A task is in exactly one lane when it is ready, else in none; actors and calls on them have their own queues."""
    found: Counter[int] = Counter()
    for lane in _lanes(core):
        for task in _queued(lane):
            found[id(task)] += 1
            if task.lane is not lane or task.state is not State.READY:
                yield task.id, "in a lane, but", State.NAMES[task.state]
    for _, _, task in waiting_calls(core):
        found[id(task)] += task.state is State.READY
    for actor in core.actors.pending.values():
        found[id(actor.task)] += 1
    for task in all_tasks(core):
        if found[id(task)] != (task.state is State.READY):
            yield task.id, State.NAMES[task.state], "in lanes:", found[id(task)]


def lane_counts(core: Core) -> Iterable[object]:
    """A lane counts its tasks, and is active when it has any."""
    active = set(map(id, core.placement.active.values()))
    for lane in _lanes(core):
        queued = len(list(_queued(lane)))
        if lane.count != queued or (queued and id(lane) not in active):
            yield lane.count, queued, id(lane) in active


def assigned_is_held(core: Core) -> Iterable[object]:
    """An assigned task is held by exactly one worker, the one it names; a waiting or ready task by none."""
    held: dict[int, list[WorkerState]] = {}
    for worker in core.tables.workers.values():
        for task in (*worker.queue.values(), *(task for task, _ in worker.stack)):
            held.setdefault(id(task), []).append(worker)
    for task in live(core):
        where = held.get(id(task), [])
        if task.state is State.ASSIGNED:
            if len(where) != 1 or task.worker is not where[0]:
                names = [worker.id for worker in where]
                yield task.id, "held by", names, "names", None if task.worker is None else task.worker.id
        elif where:
            yield task.id, State.NAMES[task.state], "held by", [worker.id for worker in where]


def waiting_is_awaited(core: Core) -> Iterable[object]:
    """A task counts its unresolved inputs, each is awaited of an unfinished task, and it waits while it has any."""
    registered: Counter[int] = Counter()
    for task in all_tasks(core):
        if task.dependents is not None:
            if task.state is State.DONE:
                yield task.id, "is done and still has dependents"
            for dependent, _ in task.dependents:
                registered[id(dependent)] += 1
    for task in live(core):
        missing = sum(payload is None for payload in task.inputs or ())
        if task.waiting != missing or task.waiting != registered[id(task)]:
            yield task.id, "waits for", task.waiting, "missing", missing, "registered", registered[id(task)]
        if bool(task.waiting) != (task.state is State.WAITING) and task.state is not State.ASSIGNED:
            yield task.id, State.NAMES[task.state], "waits for", task.waiting


def owned(core: Core) -> Iterable[object]:
    """An unfinished task is among the children of its owner, which is unfinished too, or a known session."""
    for task in live(core):
        owner = task.owner
        if not owner.children or owner.children.get(task.id) is not task:
            yield task.id, "is not among its owner's children"
        if isinstance(owner, TaskState):
            if owner.state is State.DONE:
                yield task.id, "belongs to", owner.id, "which is done"
        elif owner is not core.tables.detached and core.tables.sessions.get(owner.id) is not owner:
            yield task.id, "belongs to a session that is gone"


def children(core: Core) -> Iterable[object]:
    """The children of a task or session are unfinished, known, and name it as their owner."""
    tables = core.tables
    parents: list[TaskState | Session] = [*tables.tasks.values(), *tables.sessions.values(), tables.detached]
    for parent in parents:
        for child in (parent.children or {}).values():
            if child.owner is not parent or child.state is State.DONE or tables.tasks.get(child.id) is not child:
                yield parent.id, child.id, State.NAMES[child.state]


def live_counts(core: Core) -> Iterable[object]:
    """Graphs and functions count their unfinished tasks."""
    graphs: Counter[int] = Counter()
    users: Counter[int] = Counter()
    for task in live(core):
        graphs[id(task.graph)] += 1
        users[id(task.function)] += 1
    yield from ((task.graph.id, task.graph.live) for task in live(core) if task.graph.live != graphs[id(task.graph)])
    for function in core.tables.functions.values():
        if function.users != users[id(function)]:
            yield function.definition.name, function.users, users[id(function)]


def pins(core: Core) -> Iterable[object]:
    """A function counts who keeps it, the graphs whose context it is, and the contexts in use that name it."""
    functions = core.tables.functions
    pins = Counter({number: len(kept.sessions) for number, kept in core.readiness._kept.items()})
    graphs = {id(task.graph): task.graph for task in all_tasks(core) if task.graph.live}
    pins.update(graph.context.definition.id for graph in graphs.values() if graph.context is not None)
    for number, function in functions.items():
        if pins[number] and function.definition.members:
            named = set(function.definition.members) & functions.keys()
            pins.update(member for member in named if not functions[member].definition.members)
    yield from ((number, f.pins, pins[number]) for number, f in functions.items() if f.pins != pins[number])
    yield from (number for number in pins if pins[number] and number not in functions)


def work_conserving(core: Core) -> Iterable[object]:
    """No task that may run now is ready while an idle executor has room for it."""
    if core.recovery.waiting:
        return
    idle = [worker for worker in core.tables.workers.values() if is_idle(core, worker) and worker.ready]
    for lane in core.placement.active.values():
        if not lane.count or (lane.batch and (lane.profile.batch_delay or core.placement.scheduling.policy.defer)):
            continue
        for worker in idle:
            if worker.node.name in core.placement._reserved:
                continue
            if (
                worker.role == lane.profile.role
                and not worker.lagging
                and worker.node.fits(lane.profile.shape)
                and suits(worker, lane.profile.shape)
            ):
                yield worker.id, "is idle while", lane.head().id, "is ready"


def plans(core: Core) -> Iterable[object]:
    """What is admitted and not done is the sum over the unfinished graphs that have plans."""
    admission = core.admission
    known = [task.graph.plan for task in live(core) if task.graph.plan is not None]
    plans = {id(plan): plan for plan in known if plan.ending is None}
    if sum(admission.live.values()) + (admission.lone is not None) != len(plans):
        yield "live", admission.live, "and", admission.lone, "plans", len(plans)
    for share in admission.backlog.shares.values():
        own = [plan for plan in plans.values() if plan.share is share]
        left = sum(plan.left for plan in own)
        buckets = share.buckets.values()
        if share.count != len(own) or sum(bucket.count for bucket in buckets) != len(own):
            yield share.key, "counts", share.count, "of", len(own)
        if max(abs(share.work - left), abs(sum(bucket.work for bucket in buckets) - left)) > TOLERANCE + 1e-9 * left:
            yield share.key, "has", share.work, "left of", left
        spread = sum(plan.left * plan.ratio for plan in own)
        spreads = (share.spread, sum(bucket.spread for bucket in buckets))
        if max(abs(found - spread) for found in spreads) > TOLERANCE + 1e-9 * spread:
            yield share.key, "has", share.spread, "spread of", spread
        if share.order != sorted(share.buckets):
            yield share.key, "order", share.order
