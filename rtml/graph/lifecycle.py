"""A task's way from submission to its one result: dependencies, retries, cancellation, expiry, ownership.

Rules (the invariants of `rtml.graph.check` restate them):

* `TaskState.move` is the only place that changes a task's state; `end` is the only way to DONE.
* Whoever ends takes its unfinished children along, except those whose handles are in its result and detached ones:
  these pass to the next owner above.
* A result is kept until its submitter acknowledged it and nobody else holds the task (`holds`).
* Nothing recurses: ends caused by an end go to a work list, so that a chain of a million dependents is only a loop.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from msgspec.structs import replace

from rtml.graph.actors import Actors
from rtml.graph.admission import MISSING_MAX, Admission, missing_steps
from rtml.graph.facts import completed_key, timing
from rtml.graph.freshness import Freshness
from rtml.graph.hedging import Hedging
from rtml.graph.keeping import Keeping
from rtml.graph.lineage import Lineages
from rtml.graph.locality import fetch_ahead, observe
from rtml.graph.placement import Placement
from rtml.graph.readiness import Readiness
from rtml.graph.state import (
    FunctionState,
    Graph,
    Profile,
    Receipt,
    Session,
    State,
    TaskState,
    WorkerState,
    failure,
    inline_bytes,
)
from rtml.graph.tables import Tables
from rtml.graph.workforce import Workforce
from rtml.messages import (
    CANCELLED,
    ERROR,
    EXPIRED,
    INLINE_MAX,
    OK,
    ErrorInfo,
    Finished,
    ObjectRef,
    Options,
    Revoke,
    Task,
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
        keeping.on_unheld = actors.unheld
        self._ending: deque[tuple[TaskState, TaskResult]] = deque()
        self.lineages = Lineages(tables, keeping, self._accept, placement.spreading.locality)

    def use(self, hedging: Hedging) -> None:
        """Have pairs of attempts decided by it."""
        self.hedging = hedging
        hedging.revoke = self._revoke

    # --- submission

    def submit(self, session: Session, specs: list[Task], now: float) -> None:
        """Accept tasks; one that is known already is answered again if it ended, else left alone."""
        tables = self.tables
        for spec in specs:
            known = tables.tasks.get(spec.id)
            if known is not None:
                if known.session is session and known.result is not None:
                    session.results.append(known.result)
                    tables.dirty[session.id] = session
                elif known.session is tables.detached and known.result is None:
                    self._reclaim(known, session)
                continue
            function = tables.functions.get(spec.function)
            if function is None:
                self._refuse(session, spec, failure("ProtocolError", f"function {spec.function:x} was not defined"))
                continue
            profile = function.profile
            if spec.options is not None:
                profile = tables.profile(function.definition, spec.options)
            if spec.parent:
                profile = self._inherited(spec, function, profile)
            self._accept(session, spec, function, profile, now)
        if self._ending:
            self.drain(now)

    def _accept(
        self, session: Session, spec: Task, function: FunctionState, profile: Profile, now: float
    ) -> TaskState | None:
        tables = self.tables
        owner: Session | TaskState = session
        parent = tables.tasks.get(spec.parent) if spec.parent else None
        if spec.parent:
            if parent is None or parent.state is not State.ASSIGNED:
                self._refuse(session, spec, failure("TaskCancelled", "the task that submitted it has ended"), CANCELLED)
                return None
            owner = parent
            graph = parent.graph
        error = self.actors.refusal(spec) if spec.actor else None
        if error is not None:
            self._refuse(session, spec, error)
            return None
        if parent is None:
            context = None
            if spec.context:
                context = tables.functions.get(spec.context)
                if context is None:
                    message = f"the graph's context {spec.context:x} was not defined"
                    self._refuse(session, spec, failure("ProtocolError", message))
                    return None
            graph = Graph(spec.id, session, tables.next_sequence(), spec.trace, context, session.id)
            if profile.tenant:
                graph.share = (session.id, profile.tenant)
            if profile.admission or (spec.options is not None and spec.options.deadline is not None):
                refused = self.admission.admit(graph, spec, function, profile, now)
                if refused is not None:
                    self._refuse(session, spec, refused)
                    return None
            if context is not None:
                self.readiness.pin(context)
        task = TaskState(spec.id, spec, function, profile, session, owner, graph, now)
        tables.tasks[spec.id] = task
        if owner.children is None:
            owner.children = {}
        owner.children[spec.id] = task
        graph.live += 1
        function.users += 1
        if parent is not None:
            task.depth = parent.depth + 1
            if spec.hosts is None:
                task.deadline = parent.deadline  # an actor outlives the call that made it
            task.due = parent.due
            if graph.live > tables.limits.graph_tasks_max or task.depth > tables.limits.depth_max:
                self._over_limit(task)
                return task
        else:
            task.due = now + self.policy.patience
        if spec.options is not None and spec.options.deadline is not None:
            self._set_deadline(task, now + spec.options.deadline)
        if spec.handles:
            # Only what is held now may be let go later.
            spec.handles = [handle for handle in spec.handles if handle in tables.tasks]
            for handle in spec.handles:
                tables.tasks[handle].holds += 1
        if spec.batch_key:
            task.batch_key = spec.batch_key
        if spec.actor:
            self.actors.admit(task, session)
        if profile.prompt:
            self.freshness.arrived(task, now)
        if spec.deps and not self._link(task, spec.deps):
            return task
        if not task.waiting:
            self._make_ready(task, now)
        return task

    def _inherited(self, spec: Task, function: FunctionState, profile: Profile) -> Profile:
        """What a child asks for: its parent's priority, unless its call or function names one."""
        parent = self.tables.tasks.get(spec.parent)
        definition, options = function.definition, spec.options or Options()
        if (
            parent is None
            or parent.profile.priority == profile.priority
            or definition.options.priority is not None
            or options.priority is not None
        ):
            return profile
        return self.tables.profile(definition, replace(options, priority=parent.profile.priority))

    def _refuse(self, session: Session, spec: Task, error: ErrorInfo, outcome: int = ERROR) -> None:
        """Answer a task that never came to be."""
        session.results.append(TaskResult(spec.id, 0, outcome, error=error))
        self.tables.dirty[session.id] = session

    def _over_limit(self, task: TaskState) -> None:
        limits = self.tables.limits
        what = (
            f"the graph has more than {limits.graph_tasks_max} live tasks (graph_tasks_max)"
            if task.graph.live > limits.graph_tasks_max
            else f"the graph is nested deeper than {limits.depth_max} tasks (depth_max)"
        )
        error = failure("LimitExceeded", f"{what}; submit fewer at a time, or raise the dispatcher's limit", task)
        self.fail(task, error)
        root = self.tables.tasks.get(task.graph.id)
        if root is not None:
            self.fail(root, error)

    def _set_deadline(self, task: TaskState, deadline: float) -> None:
        if task.deadline is None or deadline < task.deadline:
            task.deadline = deadline
            self.tables.at(deadline, self._expire, task.id)

    def _link(self, task: TaskState, deps: list[tuple[int, bytes | ObjectRef | None]]) -> bool:
        """Attach the dependencies; False if one has failed already."""
        if len(deps) > self.tables.limits.dependencies_max:
            message = (
                f"task {task.profile.name!r} has {len(deps)} futures among its arguments, more than "
                f"{self.tables.limits.dependencies_max} (dependencies_max); combine them in several steps"
            )
            self.fail(task, failure("LimitExceeded", message, task))
            return False
        inputs: list[bytes | ObjectRef | None] = []
        task.inputs = inputs
        for position, (dep_id, payload) in enumerate(deps):
            inputs.append(payload)
            if payload is not None:
                if payload.__class__ is ObjectRef:
                    self.keeping.need(task.id, payload.id)
                continue
            dep = self.tables.tasks.get(dep_id)
            if dep is task:
                self.fail(task, failure("ResourceDeadlock", "the task waits for its own result", task))
                return False
            if dep is None:
                message = f"argument {position + 1} is a future that the dispatcher does not know (any more)"
                self.fail(task, failure("ObjectLost", message, task))
                return False
            if dep.result is None:
                task.waiting += 1
                if dep.dependents is None:
                    dep.dependents = []
                dep.dependents.append((task, position))
            elif not self._supply(task, position, dep):
                return False
        return True

    def _supply(self, task: TaskState, position: int, dep: TaskState) -> bool:
        """Put an ended dependency's value in its place; False if it has none."""
        result = dep.result
        assert result is not None
        if result.outcome != OK:
            error = result.error or failure("DependencyFailed", "a dependency failed", dep)
            chain = [*(error.chain or dep.chain()), task.profile.name]
            inherited = replace(error, chain=chain)
            self._ending.append((task, TaskResult(task.id, task.attempt, result.outcome, error=inherited)))
            return False
        assert task.inputs is not None
        task.inputs[position] = result.payload
        if isinstance(result.payload, ObjectRef):
            self.keeping.need(task.id, result.payload.id)
        if result.handles:
            # Whoever else holds them may let go before this task has even begun.
            inner = [handle for handle in result.handles if handle in self.tables.tasks]
            task.spec.handles = [*(task.spec.handles or ()), *inner]
            for handle in inner:
                self.tables.tasks[handle].holds += 1
        if result.batch_key and task.profile.batch:
            task.batch_key = completed_key(task, position, result.batch_key)
        if task.function.definition.rows:
            task.spec.items = max(task.spec.items, result.items)
        return True

    def _make_ready(self, task: TaskState, now: float) -> None:
        task.move(State.READY)
        if not task.ready_at:
            task.ready_at = now
        if self.tables.data:
            fetch_ahead(self.tables, task)
        if task.deadline is not None and self.policy.due is not None:
            function = task.function
            run = function.cost.predict(1) if task.profile.batch else function.estimate
            task.due = min(task.due, self.policy.due(task.deadline, run or 0.0))
        error = self._too_large(task) if task.inputs else None
        if error is None and task.actor is None and task.hosted is None:
            error = self.placement.push(task, now)
        elif error is None:
            error = self.actors.ready(task)
        if error is not None:
            self.fail(task, error)

    def _reclaim(self, task: TaskState, session: Session) -> None:
        """A detached actor that survived both its submitter's connection and a dispatcher: the submitter is back."""
        self.tables.detached.children.pop(task.id)
        task.session = task.graph.session = task.owner = session
        session.children[task.id] = task
        if task.spec.hosts is not None and task.spec.hosts.held:
            self.keeping.hold(session, [task.id])

    def _too_large(self, task: TaskState) -> ErrorInfo | None:
        """Resolved dependencies travel in one frame, unless they are large enough to lie in shared memory."""
        inputs, most = task.inputs, self.tables.limits.inputs_max
        assert inputs is not None
        if len(inputs) * INLINE_MAX <= most or inline_bytes(inputs) <= most:
            return None
        message = (
            f"the {len(inputs)} futures among the arguments of task {task.profile.name!r} have more than {most} bytes "
            "in all (inputs_max); combine them in several steps"
        )
        return failure("LimitExceeded", message, task)

    # --- results of attempts

    def finished(self, worker: WorkerState, message: Finished, now: float, kept: int = 0) -> Receipt:
        """Take an executor's results; `kept` more of the message stay with the caller, who says `settle` for each."""
        results = message.results
        receipt = Receipt(worker, message.serial, len(results) + kept)
        worker.receipts.append(receipt)
        for result in results:
            if result.moved:
                observe(worker.node, result.moved, result.moving)
            task = self.workforce.reported(worker, result, now)
            if task is None or task.state is State.DONE:
                self.tables.wasted += result.run / (1 if task is None else task.batch_size)
                receipt.remaining -= 1
                self.keeping.discard(worker, result)
            else:
                self.conclude(task, receipt, result, now)
        if worker.actor is not None:
            self.actors.touch(worker)
        if self._ending:
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
        if result.outcome == ERROR and result.retryable and task.failures < task.profile.retries:
            self.keeping.settle(receipt)
            task.failures += 1
            self.again(task, now)
        elif result.outcome == ERROR and self.lineages.recover(task, result.error, now):
            self.keeping.settle(receipt)
            self.again(task, now)
        else:
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
            self._make_ready(task, now)

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
        self._ending.append((task, TaskResult(task.id, task.attempt, outcome, error=error)))

    def cancel_tree(self, task: TaskState, why: str) -> None:
        """End a task as cancelled, at the next `drain`; its descendants follow."""
        self.fail(task, failure("TaskCancelled", why, task), CANCELLED)

    def cancel(self, session: Session, ids: list[int], now: float) -> None:
        """A submitter does not want these any more."""
        for task_id in ids:
            task = self.tables.tasks.get(task_id)
            if task is not None and task.hosted is not None and task.state is State.ASSIGNED:
                self.actors.kill(task)
            elif task is not None and task.state is not State.DONE:
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
        self.fail(task, failure("TaskTimeout", message, task))
        self.drain(now)
        self.tables.at(now + TIMEOUT_GRACE, self._kill_stuck, (task, worker))

    def _kill_stuck(self, task_worker: tuple[TaskState, WorkerState], now: float) -> None:
        """Timer after a timeout: native code, or code that swallows interrupts, ends with its process."""
        task, worker = task_worker
        if worker.queue.get(task.id) is task or any(blocked is task for blocked, _ in worker.stack):
            self.workforce.pools.kill(worker, "task timeout")

    def drain(self, now: float) -> None:
        """Carry out all ends that are due."""
        ending = self._ending
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
        graph = task.graph
        graph.live -= 1
        if not graph.live and graph.context is not None:
            self.readiness.unpin(graph.context)
        function = task.function
        function.users -= 1
        if function.managed and not function.users:
            self.readiness.forget_unused(function)
        if task.actor is not None or task.hosted is not None:
            self.actors.ended(task)
        if task.profile.latest:
            self.freshness.ended(task)
        if task.children:
            self._leave_children(task, result)
        spec = task.spec
        lineage = self.lineages.of(task, result) if result.payload.__class__ is ObjectRef else None
        if spec.deps or spec.handles:
            self._let_go(task)
        if result.handles or result.payload.__class__ is ObjectRef:
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
            self.keeping.safe(task)  # nobody waits for it
        if task.dependents is not None or task.watchers is not None:
            self._announce(task, now)
        task.inputs = None

    def arrived(self, proxy: TaskState, result: TaskResult, now: float) -> None:
        """The result of another dispatcher's task, which is known here by its handle."""
        proxy.move(State.DONE)
        proxy.result = result
        proxy.graph.live -= 1
        proxy.function.users -= 1
        if result.handles or result.payload.__class__ is ObjectRef:
            self.keeping.keep(proxy, result)
        self._announce(proxy, now)

    def _announce(self, task: TaskState, now: float) -> None:
        """Tell those here who waited for this task."""
        if task.dependents is not None:
            self._resolve(task, now)
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
        escaped = self._escaped([*(result.handles or ()), *yielded]) if result.handles or yielded else ()
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

    def _escaped(self, handles: list[int]) -> set[int]:
        """Tasks that whoever gets this value can reach: futures inside of it, and inside of their values."""
        found: set[int] = set()
        new = handles
        while new:
            task_id = new.pop()
            if task_id not in found:
                found.add(task_id)
                task = self.tables.tasks.get(task_id)
                if task is not None and task.result is not None:
                    new += task.result.handles or ()
        return found

    def _let_go(self, task: TaskState) -> None:
        """The task needs its dependencies and handles no more."""
        for handle in task.spec.handles or ():
            self.keeping.unhold(handle)
        for payload in task.inputs or ():
            if isinstance(payload, ObjectRef):
                self.keeping.unneeded(payload.id, task.id)

    def _resolve(self, task: TaskState, now: float) -> None:
        """Supply those who waited for this task."""
        assert task.dependents is not None
        for dependent, position in task.dependents:
            if dependent.state is State.DONE:
                continue
            if self._supply(dependent, position, task):
                dependent.waiting -= 1
                if not dependent.waiting and dependent.state is State.WAITING:
                    self._make_ready(dependent, now)
        task.dependents = None


def _joined(known: list[str] | None, more: list[str]) -> list[str]:
    """Names of missing steps, each once, a bounded number."""
    return list(dict.fromkeys([*(known or ()), *more]))[:MISSING_MAX]
