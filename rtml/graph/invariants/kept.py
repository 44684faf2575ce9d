"""Invariants of sessions, results on their way, and what is kept for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rtml.graph.core import Core
from rtml.graph.invariants.common import all_tasks, live
from rtml.graph.state import State
from rtml.messages import ObjectRef


def serials(core: Core) -> Iterable[object]:
    """Results that were sent and not acknowledged have rising numbers up to the session's last."""
    for session in core.tables.sessions.values():
        serials = [sent.serial for sent in session.unacked]
        if serials != sorted(set(serials)) or (serials and serials[-1] > session.serial):
            yield session.id, serials, session.serial


def undelivered(core: Core) -> Iterable[object]:
    """A result that is not acknowledged is on its way to its submitter; one that is, is kept for somebody's handle."""
    on_the_way = {
        (session.id, result.id)
        for session in core.tables.sessions.values()
        for results in (*(sent.results for sent in session.unacked), session.results)
        for result in results
    }
    for task in all_tasks(core):
        if task.state is State.DONE:
            if task.acknowledged and not task.holds:
                yield task.id, "is kept for nobody"
            if not task.acknowledged and (task.session.id, task.id) not in on_the_way:
                yield task.id, "is done and its result was lost"


def receipts(core: Core) -> Iterable[object]:
    """A receipt counts the results of its message that are not safe yet."""
    waiting: Counter[int] = Counter()
    for task in all_tasks(core):
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


def holds(core: Core) -> Iterable[object]:
    """A task counts the handles that sessions, unfinished tasks, and the values of ended ones have of it."""
    handles: Counter[int] = Counter()
    for session in core.tables.sessions.values():
        handles.update(session.held)
    for task in all_tasks(core):
        handles.update(task.inner if task.state is State.DONE else task.spec.handles or ())
        if task.actor is not None and task.state is not State.DONE:
            handles[task.actor.task.id] += 1
    handles.update(task.id for task in core.lifecycle.lineages.rebuilds())
    for task in all_tasks(core):
        if task.holds != handles[task.id]:
            yield task.id, "holds", task.holds, "handles", handles[task.id]


def objects(core: Core) -> Iterable[object]:
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


def inputs(core: Core) -> Iterable[object]:
    """The objects among the inputs of an unfinished task are kept for it, or by its submitter."""
    for task in live(core):
        for payload in task.inputs or ():
            if isinstance(payload, ObjectRef):
                stored = core.tables.objects.get(payload.id)
                if stored is not None and stored.holders.isdisjoint({task.id, task.session.id}):
                    yield task.id, "needs", payload.id


def peers(core: Core) -> Iterable[object]:
    """Links and connected sessions belong together one to one."""
    tables = core.tables
    yield from (peer for peer, session in tables.peers.items() if session.peer != peer)
    for session in tables.sessions.values():
        if session.peer is not None and tables.peers.get(session.peer) is not session:
            yield session.id, session.peer


def proxies(core: Core) -> Iterable[object]:
    """A task of another dispatcher is known here while somebody has a handle of it, and that dispatcher is known."""
    for task in all_tasks(core):
        if task.home is not None:
            if not task.holds:
                yield task.id, "is known for nobody"
            if task.state is not State.DONE and core.tables.remotes.get(task.home.id) is not task.home:
                yield task.id, "belongs to", task.home.id, "which is gone"


def delegations(core: Core) -> Iterable[object]:
    """What another dispatcher delegated is here, unfinished or with its result on the way; and it is its session's."""
    for session in core.tables.sessions.values():
        for task_id in session.delegations:
            task = core.tables.tasks.get(task_id)
            if core.recovery.active and task is None:
                continue
            if task is None or task.session is not session:
                yield session.id, task_id, "is not here"


def settled(core: Core) -> Iterable[object]:
    """After a wake-up nothing that was decided is left undone or unsent."""
    tables = core.tables
    undone = (core.pools.doomed, tables.withdrawn, core.lifecycle.ending, tables.effects)
    if any(undone) or tables.dirty or tables.interrupts:
        yield "left over", undone
    for session in tables.sessions.values():
        if session.peer is not None and (session.outbox or session.results or session.watch_results):
            yield session.id, "has unsent messages"
    for worker in tables.workers.values():
        if worker.outgoing and worker.session is not None and worker.session.peer is not None:
            yield worker.id, "has unsent attempts"
