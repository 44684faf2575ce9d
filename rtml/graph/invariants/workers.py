"""Invariants of executors and nodes: what they have, occupy and are listed as."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from rtml.graph.core import Core
from rtml.graph.invariants.common import TOLERANCE, all_tasks, is_idle
from rtml.graph.state import NodeState, State
from rtml.messages import EXECUTOR


def queue_contents(core: Core) -> Iterable[object]:
    """A worker's queue holds assigned tasks of its own and ghosts; on its stack they are marked as blocked."""
    for worker in core.tables.workers.values():
        for task in worker.queue.values():
            if task.state not in {State.ASSIGNED, State.DONE} or (task.blocked and task.state is State.ASSIGNED):
                yield worker.id, task.id, State.NAMES[task.state]
        for task, _ in worker.stack:
            if task.state not in {State.ASSIGNED, State.DONE} or not task.blocked:
                yield worker.id, task.id, State.NAMES[task.state]


def crowded_workers(core: Core) -> Iterable[object]:
    """A sync executor that has more than one task is among the crowded, where recalls are looked for."""
    for worker in core.tables.workers.values():
        if worker.role == EXECUTOR and len(worker.queue) > 1 and worker.id not in core.workforce.crowded:
            yield worker.id
    yield from (number for number in core.workforce.crowded if number not in core.tables.workers)


def idle_workers(core: Core) -> Iterable[object]:
    """A worker that may be given work and has none is among the idle, and no other is."""
    for worker in core.tables.workers.values():
        empty = not worker.queue and not worker.stack
        idle = is_idle(core, worker)
        if idle and not empty:
            yield worker.id, "is listed as idle and has work"
        if worker.ready and empty and not idle:
            yield worker.id, "has nothing to do and is not listed as idle"


def blocked_workers(core: Core) -> Iterable[object]:
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


def accounts(core: Core) -> Iterable[object]:
    """What is free on a node is what it has less what its workers occupy; blocked tasks occupy all but cpu."""
    for node in core.tables.nodes.values():
        used = _used(node)
        if abs(node.free_cpu - (node.cpu - used["cpu"])) > TOLERANCE:
            yield node.name, "cpu", node.free_cpu, node.cpu, used["cpu"]
        for name, total in node.extra.items():
            if abs(node.free_extra.get(name, 0.0) - (total - used[name])) > TOLERANCE:
                yield node.name, name, node.free_extra.get(name), total, used[name]


def shapes(core: Core) -> Iterable[object]:
    """A sync worker occupies a shape while it has a task that is not blocked, and none when it has nothing."""
    for worker in core.tables.workers.values():
        if worker.role == EXECUTOR:
            if worker.shape is not None and not worker.queue:
                yield worker.id, "occupies", str(worker.shape), "for nothing"
            if worker.shape is None and worker.queue and not worker.stack:
                yield worker.id, "runs and occupies nothing"


def loads(core: Core) -> Iterable[object]:
    """A worker's load is the predicted time of what is in its queue."""
    for worker in core.tables.workers.values():
        load = sum(task.cost for task in worker.queue.values())
        if abs(worker.load - load) > TOLERANCE + 1e-9 * load:
            yield worker.id, worker.load, load


def nodes(core: Core) -> Iterable[object]:
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


def pairs(core: Core) -> Iterable[object]:
    """A spare is a later attempt of an assigned task, on another worker, and is in no table but that worker's queue."""
    for task in all_tasks(core):
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
