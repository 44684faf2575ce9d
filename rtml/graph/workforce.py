"""What each executor has: its queue, the resources it occupies, the tasks blocked on top of one another.

Rules:

* A sync executor holds one shape at a time, from the first task of its queue to the last. Async executors, and other
  dispatchers as workers of this one, account each task by itself.
* A task that blocks in `get` lends its cpu out and keeps everything else (D7).
* What is learned from a result (run times) is learned here, where the attempt leaves its executor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rtml.graph.devices import suits
from rtml.graph.estimate import high_estimate
from rtml.graph.pools import Pools
from rtml.graph.state import TRIED, Shape, State, TaskState, WorkerState
from rtml.graph.tables import Tables
from rtml.messages import DISPATCHER, EXECUTOR, EXECUTORS, OK, Leave, TaskResult

#: Seconds of a task that was never seen to run, as far as an executor's load is concerned.
UNKNOWN_COST: Final = 1e-3

#: Seconds after which an idle executor beyond the node's cpus is sent away.
SURPLUS_IDLE: Final = 5.0

#: Seconds after which an idle executor that is bound to gpus goes, and what it has in their memory with it.
BOUND_IDLE: Final = 60.0


class Workforce:
    """Keeps the accounts of executors."""

    def __init__(self, tables: Tables, pools: Pools) -> None:
        self.tables = tables
        self.pools = pools
        #: executors without work by role; the last one became idle last (it is the warm one)
        self.idle: dict[str, dict[int, WorkerState]] = {role: {} for role in (*EXECUTORS, DISPATCHER)}
        #: sync executors that may have more than one task (`Placement` takes out those that have not)
        self.crowded: dict[int, WorkerState] = {}
        #: executors with a blocked task on top
        self.stacked: dict[int, WorkerState] = {}
        #: set by the core: what to do when a task's own timeout passes
        self.on_timeout: Any = None

    def occupy(self, worker: WorkerState, tasks: list[TaskState], now: float) -> None:
        """The worker is about to get these tasks, all of one shape: count what they take."""
        shape = tasks[0].profile.shape
        role = worker.role
        if role != EXECUTOR:
            worker.secluded = tasks[0].alone
            for _ in tasks:
                worker.node.take(shape)
        elif worker.shape is None:
            worker.shape = shape
            worker.node.take(shape)
        if not worker.queue:
            self.idle[role].pop(worker.id, None)
            worker.head_since = now

    def hand_over(self, worker: WorkerState, task: TaskState, attempt: int, cost: float, now: float) -> None:
        """A ready task is with the worker from now on, as this attempt of `cost` predicted seconds."""
        task.move(State.ASSIGNED)
        task.attempt = attempt
        task.worker = worker
        task.assigned_at = now
        task.cost = cost
        worker.load += cost
        queue = worker.queue
        queue[task.id] = task
        if len(queue) > 1 and worker.role == EXECUTOR:
            self.crowded[worker.id] = worker
        if task.profile.timeout is not None and worker.role != DISPATCHER:  # it counts from its start over there
            self.tables.at(now + task.profile.timeout, self.on_timeout, (task.id, attempt))

    def adopt(self, worker: WorkerState, task: TaskState, attempt: int, now: float) -> None:
        """A ready task turns out to be with an executor already (after a restart of the dispatcher).

        When it began is not known: it gets the whole time of its timeout again.
        """
        # One of several alternatives: which one it is cannot be told, but for those that need gpus.
        task.profile = next((one for one in task.profile.alternatives if suits(worker, one.shape)), task.profile)
        self.occupy(worker, [task], now)
        self.hand_over(worker, task, attempt, task.function.estimate or UNKNOWN_COST, now)

    def joined(self, worker: WorkerState, now: float) -> None:
        """An executor said Hello (again)."""
        self.pools.starting.pop(worker.id, None)
        worker.node.start_failures = 0
        if not worker.queue and not worker.stack:
            worker.idle_since = now
            self.idle[worker.role][worker.id] = worker

    def left(self, worker: WorkerState) -> None:
        """An executor is gone: forget what it occupied. Its tasks are the caller's business."""
        self.pools.starting.pop(worker.id, None)
        self.idle[worker.role].pop(worker.id, None)
        self.stacked.pop(worker.id, None)
        self.crowded.pop(worker.id, None)
        if worker.role != EXECUTOR:
            for task in worker.queue.values():
                worker.node.give(task.profile.shape)
        elif worker.shape is not None:
            worker.node.give(worker.shape)
        for _, shape in worker.stack:
            worker.node.give(Shape(0.0, shape.extra))
        for shape, _ in worker.leftover:
            worker.node.give(Shape(0.0, shape.extra))
        worker.shape = None
        worker.node.drop(worker)

    def reported(self, worker: WorkerState, result: TaskResult, now: float) -> TaskState | None:
        """Account for a reported attempt; the task it was of, if this worker had it."""
        queue = worker.queue
        task = queue.get(result.id)
        if task is None and worker.stack:
            task = self._unwind(worker, result.id, now)
            queue = worker.queue
        if task is None or task.attempt != result.attempt:
            return None
        del queue[result.id]
        worker.load -= task.cost
        plan = task.graph.plan
        if plan is not None:
            if worker.role == EXECUTOR:
                took = now - max(worker.head_since, task.assigned_at)
                if task.batch_size > 1:
                    # The first one reported stands for all of its batch.
                    if took > 0.0:
                        worker.batch_took = took
                    took = worker.batch_took / task.batch_size
                plan.charge(took)
            elif worker.role == DISPATCHER and not task.function.definition.asynchronous:
                plan.charge(result.run / task.batch_size)
        worker.head_since = now
        if result.outcome == OK:
            function = task.function
            profile = task.profile
            if not profile.batch and task.batch_size == 1:
                function.estimate = high_estimate(function.estimate, result.run)
                if profile.base is not None:
                    times, number = function.times or {}, profile.shape.number
                    before = times.get(number, TRIED)
                    times[number] = high_estimate(None if before == TRIED else before, result.run)
                    function.times = times
                if function.runs is not None:
                    function.runs.observe(result.run)
            elif task.batch_head:
                function.cost.observe(task.batch_items, result.run)
        self._freed(worker, task, now)
        return task

    def has(self, worker: WorkerState, task_id: int) -> bool:
        """Whether the worker has an attempt of this task, as far as is known here."""
        return task_id in worker.queue or any(task.id == task_id for task, _ in worker.stack)

    def _unwind(self, worker: WorkerState, task_id: int, now: float) -> TaskState | None:
        """A task that counts as blocked has ended, so it goes on no more, and neither does what was blocked above."""
        if self.has(worker, task_id):
            while task_id not in worker.queue:
                self.resumed(worker, worker.stack[-1][0], now)
        return worker.queue.get(task_id)

    def _freed(self, worker: WorkerState, task: TaskState, now: float) -> None:
        """A task left the worker's queue."""
        role, node = worker.role, worker.node
        if role != EXECUTOR:
            node.give(task.profile.shape)
        if worker.leftover:
            self._give_leftover(worker, task.id)
        if worker.queue:
            return
        worker.load = 0.0
        worker.secluded = False
        if worker.shape is not None:
            node.give(worker.shape)
            worker.shape = None
        if not worker.stack:
            worker.idle_since = now
            self.idle[role][worker.id] = worker
            if role == EXECUTOR and (worker.devices or node.sync > node.warm):
                if worker.devices:
                    self.tables.at(now + BOUND_IDLE, self._dismiss_bound, worker)
                elif self.pools.surplus(node):
                    self.tables.at(now + SURPLUS_IDLE, self._dismiss, worker)

    def _give_leftover(self, worker: WorkerState, task_id: int) -> None:
        for entry in list(worker.leftover):
            shape, tasks = entry
            tasks.discard(task_id)
            if not tasks:
                worker.leftover.remove(entry)
                worker.node.give(Shape(0.0, shape.extra))

    def returned(self, worker: WorkerState, attempts: Iterable[tuple[int, int]], now: float) -> list[TaskState]:
        """Unstarted attempts that the worker gave back; those still wanted are to be made ready again."""
        wanted = []
        for task_id, attempt in attempts:
            task = worker.queue.get(task_id)
            if task is None or task.attempt != attempt:
                continue
            del worker.queue[task_id]
            worker.load -= task.cost
            self._freed(worker, task, now)
            if task.state is not State.DONE:
                wanted.append(task)
        return wanted

    def blocked(self, worker: WorkerState, task: TaskState, inline: bool = True) -> None:
        """The worker's running task waits: its cpu is lent out, and its children may run on top of it if `inline`."""
        worker.inline = inline
        shape = worker.shape
        del worker.queue[task.id]
        worker.load = worker.load - task.cost if worker.queue else 0.0
        if shape is None:
            shape = task.profile.shape
            worker.node.take(shape)
        worker.stack.append((task, shape))
        worker.shape = None
        worker.node.free_cpu += shape.cpu
        self._occupy_again(worker, task)
        task.blocked = True
        self.stacked[worker.id] = worker
        for child in list((task.children or {}).values()):
            if child.state is State.READY and child.profile.shape.extra:
                error = self.pools.deadlock(child)
                if error is not None:
                    self.pools.doomed.append((child, error))

    def _occupy_again(self, worker: WorkerState, parent: TaskState) -> None:
        """Children that were on their way when the parent went on are run on top of it, now that it blocks again."""
        child = next((task for task in worker.queue.values() if task.owner is parent), None)
        if child is None:
            return
        for entry in worker.leftover:
            if child.id in entry[1]:
                worker.leftover.remove(entry)
                worker.node.give(Shape(0.0, entry[0].extra))
                break
        worker.shape = child.profile.shape
        worker.node.take(worker.shape)

    def resumed(self, worker: WorkerState, task: TaskState, now: float) -> None:
        """The blocked task goes on at once, whether its cpu is free or not."""
        if not worker.stack or worker.stack[-1][0] is not task:
            return
        _, shape = worker.stack.pop()
        worker.inline = True
        if worker.shape is not None:
            # Unstarted children are on their way back, if they had arrived. They lend their cpu like the parent before.
            worker.node.free_cpu += worker.shape.cpu
            if worker.shape.extra:
                worker.leftover.append((worker.shape, set(worker.queue)))
        worker.node.free_cpu -= shape.cpu
        worker.shape = shape
        if worker.queue and worker.role == EXECUTOR:
            self.crowded[worker.id] = worker
        worker.queue = {task.id: task, **worker.queue}
        worker.load += task.cost
        worker.head_since = now
        task.blocked = False
        if not worker.stack:
            self.stacked.pop(worker.id, None)

    def _dismiss(self, worker: WorkerState, now: float) -> None:
        """An executor beyond the cpus that had nothing to do for a while goes."""
        idle = self.idle[EXECUTOR]
        if worker.id not in idle or now - worker.idle_since < SURPLUS_IDLE * 0.99:
            return
        if self.pools.surplus(worker.node):
            self._send_away(worker)

    def _dismiss_bound(self, worker: WorkerState, now: float) -> None:
        idle = worker.id in self.idle[EXECUTOR] and now - worker.idle_since >= BOUND_IDLE * 0.99
        if idle and not worker.prepared:
            self._send_away(worker)

    def _send_away(self, worker: WorkerState) -> None:
        if worker.session is not None:
            del self.idle[EXECUTOR][worker.id]
            worker.leaving = True
            self.tables.tell(worker.session, Leave())
