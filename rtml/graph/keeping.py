"""What is kept for whom, and when it is forgotten: results, shared-memory objects, tasks that somebody has a handle of.

* A result is kept until its submitter acknowledged it; an executor is told which of its results are safe.
* The record of an ended task is kept beyond that while somebody *holds* it: a session that watches it or got its
  handle inside of a value, a task that has its handle among its arguments, a kept record that has it inside its value.
* An object is kept while somebody needs it: the session that got it, a task that has it as an input, the record of the
  task whose result it is. The last one frees it at its owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rtml.graph.state import Receipt, Session, StoredObject, TaskState, WorkerState, failure
from rtml.graph.tables import Sweep, Tables, Unlink
from rtml.messages import ERROR, Free, Item, ObjectRef, TaskResult, Unwatch


class Keeping:
    """Decides what may be forgotten."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        #: set by the core: nobody has a handle of this unfinished task any more
        self.on_unheld: Callable[[TaskState], None] = _nothing
        #: told of objects with a lineage that nobody needs any more
        self.unneeded_made: Callable[[StoredObject], None] = lambda stored: None

    # --- results

    def acknowledged(self, session: Session, serial: int) -> None:
        """All results up to `serial` are safe with their submitter."""
        unacked = session.unacked
        results: list[TaskResult] = []
        while unacked and unacked[0].serial <= serial:
            results += unacked.popleft().results
        self._safe_all(results)
        if not (unacked or session.results):
            session.referring = False

    def _safe_all(self, results: list[TaskResult]) -> None:
        tasks = self.tables.tasks
        for result in results:
            task = tasks.get(result.id)
            if task is not None and task.result is not None:  # one may come after it was cancelled as unknown
                self.safe(task)

    def safe(self, task: TaskState) -> None:
        """The submitter has the result, or will never want it."""
        receipt = task.receipt
        if receipt is not None:
            task.receipt = None
            receipt.remaining -= 1
            if not receipt.remaining:
                self.advance(receipt.worker)
        task.acknowledged = True
        if not task.holds:
            result = task.result
            if task.inner or task.home is not None or (result is not None and result.payload.__class__ is ObjectRef):
                self._forget(task)
            else:
                self.tables.tasks.pop(task.id, None)  # the usual one, with which nothing else goes

    def settle(self, receipt: Receipt) -> None:
        """One result of the executor's message is safe, or nobody wants it."""
        receipt.remaining -= 1
        if not receipt.remaining:
            self.advance(receipt.worker)

    def advance(self, worker: WorkerState) -> None:
        """Messages of which all results are safe may be forgotten by the executor, in order."""
        receipts = worker.receipts
        while receipts and not receipts[0].remaining:
            worker.safe = max(worker.safe, receipts.popleft().serial)

    def discard(self, worker: WorkerState, result: TaskResult) -> None:
        """A result nobody wants: its object goes back at once."""
        for payload in (result.payload, *[item.payload for item in result.tail or ()]):
            if isinstance(payload, ObjectRef):
                self.discard_object(worker, payload)

    def discard_object(self, worker: WorkerState, ref: ObjectRef) -> None:
        """An object nobody wants goes back at once."""
        if ref.id not in self.tables.objects:
            self._free(worker, ref)

    def give_items(self, task: TaskState, worker: WorkerState, items: list[Item]) -> None:
        """Items of a stream go to its submitter, who needs what they refer to."""
        session = task.session
        if self.tables.sessions.get(session.id) is not session:
            return
        for item in items:
            if item.handles:
                task.yielded = [*task.yielded, *item.handles]
                self.hold(session, item.handles)
            ref = item.payload
            if isinstance(ref, ObjectRef):
                stored = self.tables.objects.setdefault(ref.id, StoredObject(ref, worker))
                stored.holders.add(session.id)
                session.objects.add(ref.id)

    # --- records

    def keep(self, task: TaskState, result: TaskResult, lineage: Any = None) -> None:
        """The record of a task that ends keeps what its value refers to; so does who gets the value."""
        session = task.session
        session.referring = True
        known = session.id in self.tables.sessions
        if result.handles:
            task.inner = [handle for handle in result.handles if handle in self.tables.tasks]
            for handle in task.inner:
                self.tables.tasks[handle].holds += 1
            if known:
                self.hold(session, task.inner)
        ref = result.payload
        owner = task.worker or task.home
        if isinstance(ref, ObjectRef) and owner is not None:
            stored = self.tables.objects[ref.id] = StoredObject(ref, owner)
            stored.holders.add(task.id)
            stored.lineage = lineage
            if known:
                stored.holders.add(session.id)
                session.objects.add(ref.id)

    def hold(self, session: Session, handles: list[int]) -> None:
        """The session has handles of these tasks, until it says `Unwatch` or ends."""
        for handle in handles:
            task = self.tables.tasks.get(handle)
            if task is not None and handle not in session.held:
                task.holds += 1
                session.held.add(handle)

    def unhold(self, task_id: int) -> None:
        """One holder less."""
        task = self.tables.tasks.get(task_id)
        if task is not None:
            self._unhold(task)

    def _unhold(self, task: TaskState) -> None:
        task.holds -= 1
        if not task.holds:
            if task.acknowledged:
                self._forget(task)
            elif task.hosted is not None:
                self.on_unheld(task)

    def _forget(self, task: TaskState) -> None:
        """Nobody can ask for this result any more; nor, by way of it, for what it alone kept."""
        pending = [task]
        while pending:
            task = pending.pop()
            self.tables.tasks.pop(task.id, None)
            if task.home is not None and task.home.session is not None:
                self.tables.tell(task.home.session, Unwatch([task.id]))
            if task.result is not None and task.result.payload.__class__ is ObjectRef:
                self.unneeded(task.result.payload.id, task.id)
            for handle in task.inner:
                inner = self.tables.tasks.get(handle)
                if inner is not None:
                    inner.holds -= 1
                    if not inner.holds and inner.acknowledged:
                        pending.append(inner)
                    elif not inner.holds and inner.hosted is not None:
                        self.on_unheld(inner)
            task.inner = ()

    # --- objects

    def adopt(self, owner: WorkerState, ref: ObjectRef, sessions: list[Session]) -> None:
        """An object older than this dispatcher is kept for these sessions; it is freed if nobody has it."""
        if ref.id in self.tables.objects:
            return
        stored = StoredObject(ref, owner)
        for session in sessions:
            if self.tables.sessions.get(session.id) is session:
                stored.holders.add(session.id)
                session.objects.add(ref.id)
        if stored.holders:
            self.tables.objects[ref.id] = stored
        else:
            self._free(owner, ref)

    def checkpoint(self, task: TaskState, worker: WorkerState, payload: bytes | ObjectRef) -> None:
        """An actor's state as of now, kept in the place of the one before."""
        actor = task.hosted
        if actor is None:
            return
        before, actor.checkpoint = actor.checkpoint, payload
        if isinstance(payload, ObjectRef):
            stored = self.tables.objects.setdefault(payload.id, StoredObject(payload, worker))
            stored.holders.add(task.id)
        if isinstance(before, ObjectRef) and before != payload:
            self.unneeded(before.id, task.id)

    def need(self, holder: int, object_id: int) -> bool:
        """Keep an object for a task or session; False if it is not known (any more)."""
        stored = self.tables.objects.get(object_id)
        if stored is None:
            return False
        stored.holders.add(holder)
        return True

    def unneeded(self, object_id: int, holder: int) -> None:
        """A session or task needs an object no more."""
        stored = self.tables.objects.get(object_id)
        if stored is None:
            return
        stored.holders.discard(holder)
        if not stored.holders:
            del self.tables.objects[object_id]
            if stored.lineage is not None:
                self.unneeded_made(stored)
            self._free(stored.worker, stored.ref)

    def _free(self, owner: WorkerState, ref: ObjectRef) -> None:
        session = owner.session
        if session is not None and self.tables.sessions.get(session.id) is session:
            self.tables.tell(session, Free([ref.id]))
            owner.freed.append(ref.id)
        else:
            self.tables.effects.append(Unlink(ref))

    def release(self, session: Session, objects: list[int]) -> None:
        """A submitter dropped results that lie in shared memory."""
        for object_id in objects:
            session.objects.discard(object_id)
            self.unneeded(object_id, session.id)

    def sweep(self, worker: WorkerState) -> None:
        """An executor is dead: what it stored and nobody needs (or never heard of) is removed."""
        if worker.session is not None:
            kept = frozenset(stored.ref.segment for stored in self.tables.objects.values() if stored.worker is worker)
            self.tables.effects.append(Sweep(worker.session.id, kept))

    # --- handles

    def watch(self, session: Session, ids: list[int]) -> None:
        """Somebody with a handle wants the result of a task it did not submit, and to hold it."""
        self.hold(session, ids)
        for task_id in ids:
            task = self.tables.tasks.get(task_id)
            if task is None:
                error = failure("ObjectLost", "the future's task is not known (any more); its submitter may have ended")
                session.watch_results.append(TaskResult(task_id, 0, ERROR, error=error))
                self.tables.dirty[session.id] = session
            elif task.result is not None:
                self.tell_watcher(session, task)
            elif session not in (task.watchers or ()):
                task.watchers = [*(task.watchers or ()), session]

    def unwatch(self, session: Session, ids: list[int]) -> None:
        """The session's handles of these tasks are gone."""
        for task_id in ids:
            task = self.tables.tasks.get(task_id)
            if task is not None and task.watchers:
                task.watchers = [watcher for watcher in task.watchers if watcher is not session] or None
            if task_id in session.held:
                session.held.discard(task_id)
                self.unhold(task_id)

    def tell_watcher(self, watcher: Session, task: TaskState) -> None:
        """Send the result of an ended task to one who watches it."""
        result = task.result
        assert result is not None
        if self.tables.sessions.get(watcher.id) is not watcher:
            return
        watcher.watch_results.append(result)
        self.tables.dirty[watcher.id] = watcher
        self.hold(watcher, result.handles or [])
        if isinstance(result.payload, ObjectRef) and self.need(watcher.id, result.payload.id):
            watcher.objects.add(result.payload.id)

    # --- sessions

    def forget_session(self, session: Session) -> None:
        """The submitter is gone for good: nothing is kept for it any more."""
        for sent in session.unacked:
            self._safe_all(sent.results)
        self._safe_all(session.results)
        session.unacked.clear()
        session.results = []
        self.unwatch(session, sorted(session.held))
        self.release(session, sorted(session.objects))


def _nothing(task: TaskState) -> None:
    pass
