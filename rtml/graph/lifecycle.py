"""A task's way to its one result: retries, cancellation, expiry, ownership. It begins in `rtml.graph.submission`.

Rules (the invariants of `rtml.graph.check` restate them):

* `TaskState.move` is the only place that changes a task's state; `end` is the only way to DONE.
* Whoever ends takes its unfinished children along, except those whose handles are in its result and detached ones:
  these pass to the next owner above.
* A result is kept until its submitter acknowledged it and nobody else holds the task (`holds`).
* Nothing recurses: ends caused by an end go to a work list, so that a chain of a million dependents is only a loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from rtml.graph.actors import Actors
from rtml.graph.admission import MISSING_MAX, Admission, missing_steps
from rtml.graph.dependencies import Dependencies
from rtml.graph.facts import timing
from rtml.graph.freshness import Freshness
from rtml.graph.hedging import Hedging
from rtml.graph.keeping import Keeping
from rtml.graph.lineage import Lineages
from rtml.graph.locality import fetch_ahead, observe
from rtml.graph.moving import Moving
from rtml.graph.placement import Placement
from rtml.graph.readiness import Readiness
from rtml.graph.state import (
    Receipt,
    Session,
    State,
    TaskState,
    WorkerState,
    failure,
)
from rtml.graph.submission import Submission
from rtml.graph.tables import Tables
from rtml.graph.workforce import Workforce
from rtml.messages import (
    CANCELLED,
    ERROR,
    EXPIRED,
    OK,
    ErrorInfo,
    Finished,
    ObjectRef,
    Revoke,
    TaskResult,
)

#: Seconds that an interrupted task has after its `timeout` before its process is killed.
TIMEOUT_GRACE: Final = 0.2


class Lifecycle:
    """Decides what becomes of tasks."""

    def __init__(
        self,
        tables: Tables,
        workforce: Workforce,
        placement: Placement,
        keeping: Keeping,
        readiness: Readiness,
        admission: Admission,
        actors: Actors,
    ) -> None:
        self.tables = tables
        self.readiness = readiness
        self.workforce = workforce
        self.placement = placement
        self.keeping = keeping
        self.admission = admission
        self.hedging: Hedging
        self.policy = admission.policy
        self.actors = actors
        self.freshness = Freshness(tables, self.fail, self.drain)
        actors.fail = self.fail
        actors.unneeded = keeping.unneeded
        actors.unhold = keeping.unhold
        #: set by `Remote`: another dispatcher's task is not wanted any more
        self.cancel_there: Callable[[TaskState], None]
        keeping.on_unheld = actors.unheld
        #: ends that are due: tasks, and the results to end them with
        self.ending: deque[tuple[TaskState, TaskResult]] = deque()
        self.moving = Moving(tables, placement.spreading.locality)
        self.dependencies = Dependencies(tables, keeping, self.ending, self.fail, self.make_ready, self.moving.place)
        self.submission = Submission(tables, self, readiness, admission, actors)
        self.lineages = Lineages(tables, keeping, self.submission.accept, placement.spreading.locality)

    def use(self, hedging: Hedging) -> None:
        """Have pairs of attempts decided by it."""
        self.hedging = hedging
        hedging.revoke = self._revoke

    def due_at(self, task: TaskState, deadline: float) -> None:
        """End the task at `deadline` if it has not ended by then; an earlier one stays."""
        if task.deadline is None or deadline < task.deadline:
            task.deadline = deadline
            self.tables.at(deadline, self._expire, task.id)

    def make_ready(self, task: TaskState, now: float) -> None:
        """It has all its arguments."""
        if task.inputs and self.lineages.gone:
            self.lineages.forestall(task, now)
            if task.waiting:
                if task.state is not State.WAITING:
                    task.move(State.WAITING)
                return
        task.move(State.READY)
        if not task.ready_at:
            task.ready_at = now
        if task.deadline is not None and self.policy.due is not None:
            function = task.function
            run = function.cost.predict(1) if task.profile.batch else function.estimate
            task.due = min(task.due, self.policy.due(task.deadline, run or 0.0))
        error = self.dependencies.too_large(task) if task.inputs else None
        if error is None:
            if task.actor is None and task.hosted is None:
                error = self.placement.push(task, now)
            else:
                if self.tables.data:
                    fetch_ahead(self.tables, task)
                error = self.actors.ready(task)
        if error is not None:
            self.fail(task, error)

    # --- results of attempts

    def finished(self, worker: WorkerState, message: Finished, now: float, kept: int = 0) -> Receipt:
        """Take an executor's results; `kept` more of the message stay with the caller, who says `settle` for each."""
        results, reported = message.results, self.workforce.reported
        receipt = Receipt(worker, message.serial, len(results) + kept)
        worker.receipts.append(receipt)
        for result in results:
            if result.moved:
                observe(worker.node, result.moved, result.moving)
            task = reported(worker, result, now)
            if task is not None and task.state is not State.DONE:
                self.conclude(task, receipt, result, now)
            else:
                self.tables.wasted += result.run / (1 if task is None else task.batch_size)
                receipt.remaining -= 1
                self.keeping.discard(worker, result)
        if worker.actor is not None:
            self.actors.touch(worker)
        if self.ending:
            self.drain(now)
        if not receipt.remaining:
            self.keeping.advance(worker)
        return receipt

    def conclude(self, task: TaskState, receipt: Receipt, result: TaskResult, now: float) -> None:
        """An assigned task's attempt has ended: so does the task, or it is tried again."""
        if task.pair is not None:
            winner = self.hedging.decide(task, result, now)
            if winner is None:
                self.tables.wasted += result.run
                self.keeping.settle(receipt)
                self.keeping.discard(receipt.worker, result)
                return
            task = winner
        if result.outcome == ERROR:
            repeated = result.retryable and task.failures < task.profile.retries
            if repeated or self.lineages.recover(task, result.error, now):
                self.keeping.settle(receipt)
                task.failures += repeated
                self.again(task, now)
                return
        task.receipt = receipt
        self.end(task, result, now)

    def again(self, task: TaskState, now: float) -> None:
        """Put a task whose attempt ended without a result back among the ready ones."""
        if task.spare:
            self.hedging.gone(task)
            return
        task.worker = None
        task.blocked = False
        if task.children:
            for child in list(task.children.values()):
                self.cancel_tree(child, "the task that submitted it is run again")
        if task.pair is not None and self.hedging.promote(task):
            return
        task.attempt = max(task.attempt, task.attempts)
        if task.waiting:
            task.move(State.WAITING)
        else:
            self.make_ready(task, now)

    def dequeue(self, task: TaskState) -> None:
        """A waiting or ready task is not to be run from the queues: somebody has it."""
        if task.state is State.READY:
            self.placement.remove(task)
        else:
            task.move(State.READY)
        if task.actor is not None or task.hosted is not None:
            self.actors.taken(task)

    # --- ends

    def fail(self, task: TaskState, error: ErrorInfo, outcome: int = ERROR) -> None:
        """End a task with an error of rtml's own, at the next `drain`."""
        self.ending.append((task, TaskResult(task.id, task.attempt, outcome, error=error)))

    def cancel_tree(self, task: TaskState, why: str) -> None:
        """End a task as cancelled, at the next `drain`; its descendants follow."""
        self.fail(task, failure("TaskCancelled", why, task), CANCELLED)

    def cancel(self, session: Session, ids: list[int], now: float) -> None:
        """A submitter does not want these any more."""
        for task_id in ids:
            task = self.tables.tasks.get(task_id)
            if task is None or task.state is State.DONE:
                continue
            if task.home is not None:
                self.cancel_there(task)
            elif task.hosted is not None and task.state is State.ASSIGNED:
                self.actors.kill(task)
            else:
                self.cancel_tree(task, "cancelled by its submitter")
        self.drain(now)

    def _expire(self, task_id: int, now: float) -> None:
        """Timer of a deadline. It has the id only: a task that ended long before is not kept for it."""
        task = self.tables.tasks.get(task_id)
        if task is not None and task.state is not State.DONE and task.deadline is not None:
            if task.deadline > now:
                self.tables.at(task.deadline, self._expire, task_id)
                return
            where = "running" if task.state is State.ASSIGNED else State.NAMES[task.state]
            message = f"the deadline passed while task {task.profile.name!r} was {where}"
            missing = missing_steps(task)
            self.fail(task, failure("DeadlineExceeded", message, task, missing=missing), EXPIRED)
            self.drain(now)

    def timed_out(self, task_attempt: tuple[int, int], now: float) -> None:
        """Timer of a task with `timeout`: it ends, is interrupted, and if that does not help its process ends."""
        task_id, attempt = task_attempt
        task = self.tables.tasks.get(task_id)
        if task is None or task.state is not State.ASSIGNED or task.attempt != attempt or task.worker is None:
            return
        worker = task.worker
        message = f"task {task.profile.name!r} ran longer than its timeout of {task.profile.timeout:g} s"
        self.fail(task, failure("TaskTimeout", message, task, missing=missing_steps(task)))
        self.drain(now)
        self.tables.at(now + TIMEOUT_GRACE, self._kill_stuck, (task, worker))

    def _kill_stuck(self, task_worker: tuple[TaskState, WorkerState], now: float) -> None:
        """Timer after a timeout: native code, or code that swallows interrupts, ends with its process."""
        task, worker = task_worker
        if worker.queue.get(task.id) is task or any(blocked is task for blocked, _ in worker.stack):
            self.workforce.pools.kill(worker, "task timeout")

    def drain(self, now: float) -> None:
        """Carry out all ends that are due."""
        ending = self.ending
        while ending:
            task, result = ending.popleft()
            if task.state is not State.DONE:
                self.end(task, result, now)

    def end(self, task: TaskState, result: TaskResult, now: float) -> None:
        """The one way to DONE. Ends that follow from it are left for `drain`."""
        tables = self.tables
        before = task.state
        if task.pair is not None:
            self.hedging.drop(task, now)
        if before is State.ASSIGNED:
            if task.receipt is None and task.hosted is None:
                self._revoke(task, now)
        elif before is State.READY:
            self.placement.remove(task)
        task.move(State.DONE)
        task.result = result
        children = task.owner.children
        if children is not None:
            children.pop(task.id, None)
        graph, function, spec = task.graph, task.function, task.spec
        graph.live -= 1
        if graph.context is not None and not graph.live:
            self.readiness.unpin(graph.context)
        function.users -= 1
        if function.managed and not function.users:
            self.readiness.forget_unused(function)
        if task.actor is not None or task.hosted is not None:
            self.actors.ended(task)
        if task.profile.latest:
            self.freshness.ended(task)
        if task.children:
            self._leave_children(task, result)
        inline = result.payload.__class__ is not ObjectRef
        lineage = None if inline else self.lineages.of(task, result)
        if spec.deps or spec.handles:
            self.dependencies.let_go(task)
        if result.handles or not inline:
            self.keeping.keep(task, result, lineage)
        if result.tail and task.worker is not None:
            self.keeping.give_items(task, task.worker, result.tail)
        session = task.session
        tables.ended.append((task, result, now))
        if result.missing:
            graph.missing = _joined(graph.missing, result.missing)
        if graph.plan is not None and graph.id == task.id:
            self.admission.ended(task, result.outcome, before, now)
        if session.timings:
            result.timing = timing(task, result, now)
        if session.id in tables.sessions:
            session.results.append(result)
            tables.dirty[session.id] = session
        else:
            self._announce(task, now)  # while its value is kept
            self.keeping.safe(task)  # its submitter does not wait for it
        if task.dependents is not None or task.watchers is not None:
            self._announce(task, now)
        task.inputs = None

    def arrived(self, proxy: TaskState, result: TaskResult, now: float) -> None:
        """The result of another dispatcher's task, which is known here by its handle."""
        proxy.move(State.DONE)
        proxy.result = result
        proxy.graph.live -= 1
        proxy.function.users -= 1
        if proxy.hosted is not None:
            self.actors.ended_there(proxy)
        if result.handles or result.payload.__class__ is ObjectRef:
            self.keeping.keep(proxy, result)
        self._announce(proxy, now)

    def _announce(self, task: TaskState, now: float) -> None:
        """Tell those here who waited for this task."""
        if task.dependents is not None:
            self.dependencies.resolve(task, now)
        if task.watchers is not None:
            for watcher in task.watchers:
                self.keeping.tell_watcher(watcher, task)
            task.watchers = None

    def _revoke(self, task: TaskState, now: float) -> None:
        """The attempt that is out there becomes a ghost: tell its executor. One that is not sent yet stays here."""
        worker = task.worker
        if worker is not None and worker.outgoing:
            kept = [attempt for attempt in worker.outgoing if attempt.id != task.id]
            if len(kept) < len(worker.outgoing):
                worker.outgoing = kept
                self.workforce.returned(worker, [(task.id, task.attempt)], now)
                return
        if worker is not None and worker.session is not None and not worker.dying:
            self.tables.tell(worker.session, Revoke([(task.id, task.attempt)]))
            self.tables.interrupts[worker.id] = worker

    def _leave_children(self, task: TaskState, result: TaskResult) -> None:
        """Unfinished children go with their parent, unless their handles escaped or they are detached."""
        assert task.children is not None
        yielded = [*task.yielded, *(handle for item in result.tail or () for handle in item.handles or ())]
        escaped = self.dependencies.reachable([*(result.handles or ()), *yielded]) if result.handles or yielded else ()
        for child in list(task.children.values()):
            if result.outcome == OK and (child.profile.detached or child.id in escaped):
                child.owner = task.owner
                if task.owner.children is None:
                    task.owner.children = {}
                task.owner.children[child.id] = child
                if child.deadline is not None:
                    # So far its root's timer was enough.
                    self.tables.at(child.deadline, self._expire, child.id)
            else:
                self.cancel_tree(child, "the task that submitted it has ended")
        task.children = None


def _joined(known: list[str] | None, more: list[str]) -> list[str]:
    """Names of missing steps, each once, a bounded number."""
    return list(dict.fromkeys([*(known or ()), *more]))[:MISSING_MAX]
