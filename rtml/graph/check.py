"""The invariants of the core, numbered, each in one sentence. Tests and the simulator call `check` after every wake-up.

They hold between two calls of `Core.handle`, not inside one. The cost is in proportion to everything the core knows,
so production code does not call this.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from rtml.graph.actors import ActorState
from rtml.graph.core import Core
from rtml.graph.queues import Lane
from rtml.graph.state import NodeState, Session, State, TaskState, WorkerState
from rtml.messages import ACTOR, ASYNC_ACTOR, DISPATCHER, EXECUTOR, STOP, ObjectRef

#: Resources are sums of floats.
_TOLERANCE: Final = 1e-6

Check = Callable[[Core], Iterable[object]]


def _all_tasks(core: Core) -> Iterable[TaskState]:
    return core.tables.tasks.values()


def _live(core: Core) -> list[TaskState]:
    return [task for task in core.tables.tasks.values() if task.state is not State.DONE and task.home is None]


def _lanes(core: Core) -> Iterable[Lane]:
    return core.placement._lanes.values()


def _queued(lane: Lane) -> Iterable[TaskState]:
    for shares in lane._classes.values():
        for queue in shares.values():
            for entry in (*queue.ordered, *queue.heap):
                if entry[4].entry == entry[3]:
                    yield entry[4]


def _is_idle(core: Core, worker: WorkerState) -> bool:
    return core.workforce.idle[worker.role].get(worker.id) is worker


def _tasks_by_id(core: Core) -> Iterable[object]:
    """Every record is stored under its own id."""
    tables = core.tables
    yield from (key for key, task in tables.tasks.items() if key != task.id)
    yield from (key for key, session in tables.sessions.items() if key != session.id)
    yield from (key for key, worker in tables.workers.items() if key != worker.id)
    yield from (key for key, node in tables.nodes.items() if key != node.name)
    yield from (key for key, stored in tables.objects.items() if key != stored.ref.id)


def _done_has_result(core: Core) -> Iterable[object]:
    """A task has a result exactly when it is done."""
    yield from (task.id for task in _all_tasks(core) if (task.result is not None) != (task.state is State.DONE))


def _waiting_calls(core: Core) -> Iterable[tuple[ActorState, int, TaskState]]:
    for task in _live(core):
        for session, queue in task.hosted.queues.items() if task.hosted is not None else ():
            for entry in (*queue.ordered, *queue.heap):
                if entry[4].entry == entry[3]:
                    yield task.hosted, session, entry[4]  # type: ignore[misc]


def _ready_is_queued(core: Core) -> Iterable[object]:
    """A task is in exactly one lane when it is ready, else in none; actors and calls on them have their own queues."""
    found: Counter[int] = Counter()
    for lane in _lanes(core):
        for task in _queued(lane):
            found[id(task)] += 1
            if task.lane is not lane or task.state is not State.READY:
                yield task.id, "in a lane, but", State.NAMES[task.state]
    for _, _, task in _waiting_calls(core):
        found[id(task)] += task.state is State.READY
    for actor in core.actors._pending.values():
        found[id(actor.task)] += 1
    for task in _all_tasks(core):
        if found[id(task)] != (task.state is State.READY):
            yield task.id, State.NAMES[task.state], "in lanes:", found[id(task)]


def _lane_counts(core: Core) -> Iterable[object]:
    """A lane counts its tasks, and is active when it has any."""
    active = set(map(id, core.placement._active.values()))
    for lane in _lanes(core):
        queued = len(list(_queued(lane)))
        if lane.count != queued or (queued and id(lane) not in active):
            yield lane.count, queued, id(lane) in active


def _assigned_is_held(core: Core) -> Iterable[object]:
    """An assigned task is held by exactly one worker, the one it names; a waiting or ready task by none."""
    held: dict[int, list[WorkerState]] = {}
    for worker in core.tables.workers.values():
        for task in (*worker.queue.values(), *(task for task, _ in worker.stack)):
            held.setdefault(id(task), []).append(worker)
    for task in _live(core):
        where = held.get(id(task), [])
        if task.state is State.ASSIGNED:
            if len(where) != 1 or task.worker is not where[0]:
                names = [worker.id for worker in where]
                yield task.id, "held by", names, "names", None if task.worker is None else task.worker.id
        elif where:
            yield task.id, State.NAMES[task.state], "held by", [worker.id for worker in where]


def _waiting_is_awaited(core: Core) -> Iterable[object]:
    """A task counts its unresolved inputs, each is awaited of an unfinished task, and it waits while it has any."""
    registered: Counter[int] = Counter()
    for task in _all_tasks(core):
        if task.dependents is not None:
            if task.state is State.DONE:
                yield task.id, "is done and still has dependents"
            for dependent, _ in task.dependents:
                registered[id(dependent)] += 1
    for task in _live(core):
        missing = sum(payload is None for payload in task.inputs or ())
        if task.waiting != missing or task.waiting != registered[id(task)]:
            yield task.id, "waits for", task.waiting, "missing", missing, "registered", registered[id(task)]
        if bool(task.waiting) != (task.state is State.WAITING) and task.state is not State.ASSIGNED:
            yield task.id, State.NAMES[task.state], "waits for", task.waiting


def _owned(core: Core) -> Iterable[object]:
    """An unfinished task is among the children of its owner, which is unfinished too, or a known session."""
    for task in _live(core):
        owner = task.owner
        if not owner.children or owner.children.get(task.id) is not task:
            yield task.id, "is not among its owner's children"
        if isinstance(owner, TaskState):
            if owner.state is State.DONE:
                yield task.id, "belongs to", owner.id, "which is done"
        elif owner is not core.tables.detached and core.tables.sessions.get(owner.id) is not owner:
            yield task.id, "belongs to a session that is gone"


def _children(core: Core) -> Iterable[object]:
    """The children of a task or session are unfinished, known, and name it as their owner."""
    tables = core.tables
    parents: list[TaskState | Session] = [*tables.tasks.values(), *tables.sessions.values(), tables.detached]
    for parent in parents:
        for child in (parent.children or {}).values():
            if child.owner is not parent or child.state is State.DONE or tables.tasks.get(child.id) is not child:
                yield parent.id, child.id, State.NAMES[child.state]


def _live_counts(core: Core) -> Iterable[object]:
    """Graphs and functions count their unfinished tasks."""
    graphs: Counter[int] = Counter()
    users: Counter[int] = Counter()
    for task in _live(core):
        graphs[id(task.graph)] += 1
        users[id(task.function)] += 1
    yield from ((task.graph.id, task.graph.live) for task in _live(core) if task.graph.live != graphs[id(task.graph)])
    for function in core.tables.functions.values():
        if function.users != users[id(function)]:
            yield function.definition.name, function.users, users[id(function)]


def _pins(core: Core) -> Iterable[object]:
    """A function counts who keeps it, the graphs whose context it is, and the contexts in use that name it."""
    functions = core.tables.functions
    pins = Counter({number: len(kept.sessions) for number, kept in core.readiness._kept.items()})
    graphs = {id(task.graph): task.graph for task in _all_tasks(core) if task.graph.live}
    pins.update(graph.context.definition.id for graph in graphs.values() if graph.context is not None)
    for number, function in functions.items():
        if pins[number] and function.definition.members:
            named = set(function.definition.members) & functions.keys()
            pins.update(member for member in named if not functions[member].definition.members)
    yield from ((number, f.pins, pins[number]) for number, f in functions.items() if f.pins != pins[number])
    yield from (number for number in pins if pins[number] and number not in functions)


def _queue_contents(core: Core) -> Iterable[object]:
    """A worker's queue holds assigned tasks of its own and ghosts; on its stack they are marked as blocked."""
    for worker in core.tables.workers.values():
        for task in worker.queue.values():
            if task.state not in {State.ASSIGNED, State.DONE} or (task.blocked and task.state is State.ASSIGNED):
                yield worker.id, task.id, State.NAMES[task.state]
        for task, _ in worker.stack:
            if task.state not in {State.ASSIGNED, State.DONE} or not task.blocked:
                yield worker.id, task.id, State.NAMES[task.state]


def _crowded_workers(core: Core) -> Iterable[object]:
    """A sync executor that has more than one task is among the crowded, where recalls are looked for."""
    for worker in core.tables.workers.values():
        if worker.role == EXECUTOR and len(worker.queue) > 1 and worker.id not in core.workforce.crowded:
            yield worker.id
    yield from (number for number in core.workforce.crowded if number not in core.tables.workers)


def _idle_workers(core: Core) -> Iterable[object]:
    """A worker that may be given work and has none is among the idle, and no other is."""
    for worker in core.tables.workers.values():
        empty = not worker.queue and not worker.stack
        idle = _is_idle(core, worker)
        if idle and not empty:
            yield worker.id, "is listed as idle and has work"
        if worker.ready and empty and not idle:
            yield worker.id, "has nothing to do and is not listed as idle"


def _blocked_workers(core: Core) -> Iterable[object]:
    """The workers with a blocked task are listed as such, and no others."""
    stacked = {worker.id for worker in core.tables.workers.values() if worker.stack}
    listed = set(core.workforce.stacked)
    if stacked != listed:
        yield "blocked", stacked, "listed", listed


def _used(node: NodeState) -> dict[str, float]:
    used: dict[str, float] = defaultdict(float)

    def add(cpu: float, extra: dict[str, float]) -> None:
        used["cpu"] += cpu
        for name, amount in extra.items():
            used[name] += amount

    for worker in node.workers.values():
        if worker.role != EXECUTOR:
            for task in worker.queue.values():
                add(task.profile.shape.cpu, task.profile.shape.extra)
        elif worker.shape is not None:
            add(worker.shape.cpu, worker.shape.extra)
        for _, shape in worker.stack:
            add(0.0, shape.extra)
        for shape, _ in worker.leftover:
            add(0.0, shape.extra)
    return used


def _accounts(core: Core) -> Iterable[object]:
    """What is free on a node is what it has less what its workers occupy; blocked tasks occupy all but cpu."""
    for node in core.tables.nodes.values():
        used = _used(node)
        if abs(node.free_cpu - (node.cpu - used["cpu"])) > _TOLERANCE:
            yield node.name, "cpu", node.free_cpu, node.cpu, used["cpu"]
        for name, total in node.extra.items():
            if abs(node.free_extra.get(name, 0.0) - (total - used[name])) > _TOLERANCE:
                yield node.name, name, node.free_extra.get(name), total, used[name]


def _shapes(core: Core) -> Iterable[object]:
    """A sync worker occupies a shape while it has a task that is not blocked, and none when it has nothing."""
    for worker in core.tables.workers.values():
        if worker.role == EXECUTOR:
            if worker.shape is not None and not worker.queue:
                yield worker.id, "occupies", str(worker.shape), "for nothing"
            if worker.shape is None and worker.queue and not worker.stack:
                yield worker.id, "runs and occupies nothing"


def _loads(core: Core) -> Iterable[object]:
    """A worker's load is the predicted time of what is in its queue."""
    for worker in core.tables.workers.values():
        load = sum(task.cost for task in worker.queue.values())
        if abs(worker.load - load) > _TOLERANCE + 1e-9 * load:
            yield worker.id, worker.load, load


def _serials(core: Core) -> Iterable[object]:
    """Results that were sent and not acknowledged have rising numbers up to the session's last."""
    for session in core.tables.sessions.values():
        serials = [sent.serial for sent in session.unacked]
        if serials != sorted(set(serials)) or (serials and serials[-1] > session.serial):
            yield session.id, serials, session.serial


def _undelivered(core: Core) -> Iterable[object]:
    """A result that is not acknowledged is on its way to its submitter; one that is, is kept for somebody's handle."""
    on_the_way = {
        (session.id, result.id)
        for session in core.tables.sessions.values()
        for results in (*(sent.results for sent in session.unacked), session.results)
        for result in results
    }
    for task in _all_tasks(core):
        if task.state is State.DONE:
            if task.acknowledged and not task.holds:
                yield task.id, "is kept for nobody"
            if not task.acknowledged and (task.session.id, task.id) not in on_the_way:
                yield task.id, "is done and its result was lost"


def _receipts(core: Core) -> Iterable[object]:
    """A receipt counts the results of its message that are not safe yet."""
    waiting: Counter[int] = Counter()
    for task in _all_tasks(core):
        if task.receipt is not None:
            waiting[id(task.receipt)] += 1
    for _, receipt, _ in core.recovery._early.values():
        waiting[id(receipt)] += 1
    for worker in core.tables.workers.values():
        for receipt in worker.receipts:
            if receipt.remaining != waiting[id(receipt)]:
                yield worker.id, receipt.serial, receipt.remaining, waiting[id(receipt)]
        if worker.receipts and not worker.receipts[0].remaining:
            yield worker.id, "was not told that its results are safe"
        if any(receipt.serial <= worker.safe for receipt in worker.receipts):
            yield worker.id, "was told too early that its results are safe"


def _holds(core: Core) -> Iterable[object]:
    """A task counts the handles that sessions, unfinished tasks, and the values of ended ones have of it."""
    handles: Counter[int] = Counter()
    for session in core.tables.sessions.values():
        handles.update(session.held)
    for task in _all_tasks(core):
        handles.update(task.inner if task.state is State.DONE else task.spec.handles or ())
    handles.update(task.id for task in core.lifecycle.lineages.rebuilds())
    for task in _all_tasks(core):
        if task.holds != handles[task.id]:
            yield task.id, "holds", task.holds, "handles", handles[task.id]


def _objects(core: Core) -> Iterable[object]:
    """A stored object is needed by somebody who is known: a session that got it, or a task (as input or result)."""
    tables = core.tables
    for object_id, stored in tables.objects.items():
        if not stored.holders:
            yield object_id, "is needed by nobody"
        for holder in stored.holders:
            session = tables.sessions.get(holder)
            task = tables.tasks.get(holder)
            if session is not None and object_id in session.objects:
                continue
            payload = None if task is None or task.result is None else task.result.payload
            own = isinstance(payload, ObjectRef) and payload.id == object_id
            if task is None or (task.state is State.DONE and not own):
                yield object_id, "is held by", holder, "which is gone"
    for session in tables.sessions.values():
        for object_id in session.objects:
            known = tables.objects.get(object_id)
            if known is not None and session.id not in known.holders:
                yield object_id, "was given to", session.id, "and is not kept for it"


def _inputs(core: Core) -> Iterable[object]:
    """The objects among the inputs of an unfinished task are kept for it, or by its submitter."""
    for task in _live(core):
        for payload in task.inputs or ():
            if isinstance(payload, ObjectRef):
                stored = core.tables.objects.get(payload.id)
                if stored is not None and stored.holders.isdisjoint({task.id, task.session.id}):
                    yield task.id, "needs", payload.id


def _peers(core: Core) -> Iterable[object]:
    """Links and connected sessions belong together one to one."""
    tables = core.tables
    yield from (peer for peer, session in tables.peers.items() if session.peer != peer)
    for session in tables.sessions.values():
        if session.peer is not None and tables.peers.get(session.peer) is not session:
            yield session.id, session.peer


def _nodes(core: Core) -> Iterable[object]:
    """Every worker is listed by its node, and by no other; what is being started has not spoken yet."""
    tables = core.tables
    nodes = [*tables.nodes.values(), *(worker.node for worker in tables.remotes.values())]
    for worker in tables.workers.values():
        if [node for node in nodes if worker.id in node.workers] != [worker.node]:
            yield worker.id, worker.node.name
    for node in nodes:
        yield from (worker_id for worker_id in node.workers if worker_id not in tables.workers)
    for worker_id in core.pools.starting:
        starting = tables.workers.get(worker_id)
        if starting is None or starting.session is not None:
            yield worker_id, "is not being started"


def _proxies(core: Core) -> Iterable[object]:
    """A task of another dispatcher is known here while somebody has a handle of it, and that dispatcher is known."""
    for task in _all_tasks(core):
        if task.home is not None:
            if not task.holds:
                yield task.id, "is known for nobody"
            if task.state is not State.DONE and core.tables.remotes.get(task.home.id) is not task.home:
                yield task.id, "belongs to", task.home.id, "which is gone"


def _delegations(core: Core) -> Iterable[object]:
    """What another dispatcher delegated is here, unfinished or with its result on the way; and it is its session's."""
    for session in core.tables.sessions.values():
        for task_id in session.delegations:
            task = core.tables.tasks.get(task_id)
            if core.recovery.active and task is None:
                continue
            if task is None or task.session is not session:
                yield session.id, task_id, "is not here"


def _settled(core: Core) -> Iterable[object]:
    """After a wake-up nothing that was decided is left undone or unsent."""
    tables = core.tables
    undone = (core.pools.doomed, tables.withdrawn, core.lifecycle._ending, tables.effects)
    if any(undone) or tables.dirty or tables.interrupts:
        yield "left over", undone
    for session in tables.sessions.values():
        if session.peer is not None and (session.outbox or session.results or session.watch_results):
            yield session.id, "has unsent messages"
    for worker in tables.workers.values():
        if worker.outgoing and worker.session is not None and worker.session.peer is not None:
            yield worker.id, "has unsent attempts"


def _work_conserving(core: Core) -> Iterable[object]:
    """No task that may run now is ready while an idle executor has room for it."""
    if core.recovery.waiting:
        return
    idle = [worker for worker in core.tables.workers.values() if _is_idle(core, worker) and worker.ready]
    for lane in core.placement._active.values():
        if not lane.count or (lane.batch and (lane.profile.batch_delay or core.placement.scheduling.policy.defer)):
            continue
        for worker in idle:
            if worker.node.name in core.placement._reserved:
                continue
            if worker.role == lane.profile.role and not worker.lagging and worker.node.fits(lane.profile.shape):
                yield worker.id, "is idle while", lane.head().id, "is ready"


def _plans(core: Core) -> Iterable[object]:
    """What is admitted and not done is the sum over the unfinished graphs that have plans."""
    admission = core.admission
    known = [task.graph.plan for task in _live(core) if task.graph.plan is not None]
    plans = {id(plan): plan for plan in known if plan.ending is None}
    if sum(admission.live.values()) != len(plans):
        yield "live", admission.live, "plans", len(plans)
    for share in admission.backlog.shares.values():
        own = [plan for plan in plans.values() if plan.share is share]
        left = sum(plan.left for plan in own)
        buckets = share.buckets.values()
        if share.count != len(own) or sum(bucket.count for bucket in buckets) != len(own):
            yield share.key, "counts", share.count, "of", len(own)
        if max(abs(share.work - left), abs(sum(bucket.work for bucket in buckets) - left)) > _TOLERANCE + 1e-9 * left:
            yield share.key, "has", share.work, "left of", left
        if share.order != sorted(share.buckets):
            yield share.key, "order", share.order


def _actors(core: Core) -> Iterable[object]:
    """An actor is known until its task ends, knows its unfinished calls, and has a process of its own while alive."""
    calls: Counter[int] = Counter()
    for task in _all_tasks(core):
        actor = task.hosted
        if actor is not None:
            if task.state is State.DONE or actor.task is not task:
                yield task.id, "is done and still an actor"
            name = actor.options.name
            if name and not actor.killed and core.actors.by_name.get(name) is not actor:
                yield task.id, "is not found by its name"
            there = task.worker is not None and task.worker.role == DISPATCHER
            if task.state is State.ASSIGNED and not there and (task.worker is None or task.worker.actor is not actor):
                yield task.id, "is alive without a process of its own"
        if task.actor is not None and task.state is not State.DONE:
            calls[id(task.actor)] += 1
            if task.actor.calls.get(task.id) is not task or task.actor.task.state is State.DONE:
                yield task.id, "is a call that its actor does not know of"
    for task in _live(core):
        if task.hosted is not None and len(task.hosted.calls) != calls[id(task.hosted)]:
            yield task.id, "has calls", len(task.hosted.calls), calls[id(task.hosted)]
    for worker in core.tables.workers.values():
        if worker.role == DISPATCHER:
            continue
        for task in worker.queue.values():
            ours = worker.role in (ACTOR, ASYNC_ACTOR)
            if task.state is not State.DONE and ours != (task.actor is not None or task.hosted is not None):
                yield worker.id, "has", task.id
    if any(actor.task.state is State.DONE for actor in core.actors.by_name.values()):
        yield "a name belongs to an actor that has ended"


def _calls_in_order(core: Core) -> Iterable[object]:
    """Of an ordered actor, no call of a submitter is with the process while an earlier one of his is not."""
    first: dict[tuple[int, int], int] = {}
    for actor, session, task in _waiting_calls(core):
        key = (actor.task.id, session)
        if actor.ordered:
            first[key] = min(first.get(key, task.id), task.id)
    for worker in core.tables.workers.values():
        for task in worker.queue.values():
            if task.actor is not None and task.state is State.ASSIGNED and not core.recovery.active:
                earlier = first.get((task.actor.task.id, task.session.id))
                if earlier is not None and earlier < task.id and not task.actor.retried:
                    yield worker.id, "has", task.id, "before", earlier


def _actors_served(core: Core) -> Iterable[object]:
    """No call that may run now waits while its actor's process has nothing to do."""
    if core.recovery.waiting:
        return
    for actor, session, task in _waiting_calls(core):
        worker = actor.task.worker
        head = actor.queues[session].head()
        assert head is not None
        if worker is None or not worker.ready or len(worker.queue) > 1 or head[4] is not task:
            continue
        last = task.function.definition.method != STOP or len(actor.calls) == 1
        if task.state is State.READY and last:
            yield worker.id, "is idle while", task.id, "waits"


def _pairs(core: Core) -> Iterable[object]:
    """A spare is a later attempt of an assigned task, on another worker, and is in no table but that worker's queue."""
    for task in _all_tasks(core):
        if task.spare or (task.pair is not None and task.state is not State.ASSIGNED):
            yield task.id, "is a spare" if task.spare else "has a spare, and is", State.NAMES[task.state]
    for worker in core.tables.workers.values():
        for task in worker.queue.values():
            first = task.pair
            if not task.spare or task.state is State.DONE:
                continue
            if first is None or first.pair is not task or first.attempt >= task.attempt or first.worker is worker:
                yield task.id, "is a spare of", first
        if any(task.spare for task, _ in worker.stack):
            yield worker.id, "has a blocked spare"


#: I1, I2, ... in this order.
INVARIANTS: Final[tuple[Check, ...]] = (
    _tasks_by_id,
    _done_has_result,
    _ready_is_queued,
    _lane_counts,
    _assigned_is_held,
    _waiting_is_awaited,
    _owned,
    _children,
    _live_counts,
    _pins,
    _queue_contents,
    _idle_workers,
    _crowded_workers,
    _blocked_workers,
    _accounts,
    _shapes,
    _loads,
    _serials,
    _undelivered,
    _receipts,
    _holds,
    _objects,
    _inputs,
    _peers,
    _nodes,
    _proxies,
    _delegations,
    _settled,
    _work_conserving,
    _plans,
    _actors,
    _calls_in_order,
    _actors_served,
    _pairs,
)


def check(core: Core) -> None:
    """Look at everything the core knows.

    Raises:
        AssertionError: an invariant does not hold; the message has its number, its sentence and the offenders.
    """
    for number, invariant in enumerate(INVARIANTS, 1):
        broken = list(invariant(core))
        assert not broken, f"I{number}: {invariant.__doc__} But: {broken[:5]}"
