"""Invariants of actors and the calls on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rtml.graph.core import Core
from rtml.graph.invariants.common import all_tasks, hosts, waiting_calls
from rtml.graph.state import State
from rtml.messages import ACTOR, ASYNC_ACTOR, DISPATCHER, STOP, session_of


def actors(core: Core) -> Iterable[object]:
    """An actor is known until its task ends, knows its unfinished calls, and has a process of its own while alive."""
    calls: Counter[int] = Counter()
    for task in all_tasks(core):
        actor = task.hosted
        if actor is not None:
            if task.state is State.DONE or actor.task is not task:
                yield task.id, "is done and still an actor"
            name = actor.options.name
            if name and not actor.killed and core.actors.by_name.get(name) is not actor:
                yield task.id, "is not found by its name"
            there = task.home is not None or (task.worker is not None and task.worker.role == DISPATCHER)
            if task.state is State.ASSIGNED and not there and (task.worker is None or task.worker.actor is not actor):
                yield task.id, "is alive without a process of its own"
        if task.actor is not None and task.state is not State.DONE:
            calls[id(task.actor)] += 1
            creation = task.actor.task
            over = creation.state is State.DONE and not (creation.home is not None and task.state is State.ASSIGNED)
            if task.actor.calls.get(task.id) is not task or over:
                yield task.id, "is a call that its actor does not know of"
    for actor in hosts(core):
        if len(actor.calls) != calls[id(actor)]:
            yield actor.task.id, "has calls", len(actor.calls), calls[id(actor)]
        if not actor.awaited <= actor.calls.keys():
            yield actor.task.id, "waits for", actor.awaited
    for worker in core.tables.workers.values():
        if worker.role == DISPATCHER:
            continue
        for task in worker.queue.values():
            ours = worker.role in (ACTOR, ASYNC_ACTOR)
            if task.state is not State.DONE and ours != (task.actor is not None or task.hosted is not None):
                yield worker.id, "has", task.id
    if any(actor.task.state is State.DONE for actor in core.actors.by_name.values()):
        yield "a name belongs to an actor that has ended"


def calls_in_order(core: Core) -> Iterable[object]:
    """Of an ordered actor, no call of a submitter is with the process while an earlier one of his is not."""
    first: dict[tuple[int, int], int] = {}
    for actor, session, task in waiting_calls(core):
        key = (actor.task.id, session)
        if actor.ordered:
            first[key] = min(first.get(key, task.id), task.id)
    for worker in core.tables.workers.values():
        for task in worker.queue.values():
            if task.actor is not None and task.state is State.ASSIGNED and not core.recovery.active:
                earlier = first.get((task.actor.task.id, session_of(task.id)))
                if earlier is not None and earlier < task.id and not task.actor.retried:
                    yield worker.id, "has", task.id, "before", earlier


def actors_served(core: Core) -> Iterable[object]:
    """No call that may run now waits while its actor's process has nothing to do."""
    if core.recovery.waiting:
        return
    for actor, session, task in waiting_calls(core):
        worker = actor.task.worker or actor.task.home
        head = actor.queues[session].head()
        assert head is not None
        if worker is None or not worker.ready or head[4] is not task:
            continue
        if (len(worker.queue) > 1 and worker.role != DISPATCHER) or session in map(session_of, actor.awaited):
            continue
        last = task.function.definition.method != STOP or len(actor.calls) == 1
        if task.state is State.READY and last:
            yield worker.id, "is idle while", task.id, "waits"
