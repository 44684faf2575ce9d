"""Which task runs where and when: lanes, prefetch, batches, recall, children on top of blocked parents.

Rules:

* An idle executor gets one task or batch. Beyond that an executor is only given work that it will begin within
  `PREFETCH` seconds by a high quantile of the functions' run times; a function never seen gets none (D4).
* Batches are formed at the moment an executor is free for them (D5), as large as the limit, the learned cost and the
  tightest deadline allow.
* Ready children of a task that blocks in `get` may be run on top of it (D7).
* Unstarted work behind a task that runs longer than expected is recalled as soon as another executor is idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from heapq import heapify, heappop, heapreplace
from typing import Any, Final

from rtml.graph.alternatives import Choice, running_here, wait_for
from rtml.graph.devices import gpus, suits, tightest
from rtml.graph.locality import fetch_ahead, has_large
from rtml.graph.policy import Scheduling
from rtml.graph.pools import Pools
from rtml.graph.queues import Lane
from rtml.graph.spreading import Spreading
from rtml.graph.state import Profile, Shape, State, TaskState, WorkerState
from rtml.graph.tables import Tables, wake
from rtml.graph.workforce import UNKNOWN_COST, Workforce
from rtml.messages import (
    ASYNC_EXECUTOR,
    EXECUTOR,
    Attempt,
    Define,
    ErrorInfo,
    Recall,
)

#: Seconds of work that may wait on an executor.
PREFETCH: Final = 1e-3

#: And at most so many tasks.
PREFETCH_TASKS_MAX: Final = 128

#: Tasks at a time on one async executor.
ASYNC_TASKS_MAX: Final = 4096

#: Seconds that unstarted work may wait behind a running task while another executor is idle.
RECALL_AFTER: Final = 2e-3

#: Batches that are put off start so many of their predicted run times before the tightest deadline.
DEFER_MARGIN: Final = 1.5

#: Seconds by which a task that cannot make its deadline any more counts as due later.
LOST: Final = 1e6

#: Seconds after which a request that fits no free resources, but could, has a node kept free for it.
RESERVE_AFTER: Final = 0.5

#: Empty lanes that are kept for the next task of their kind.
LANES_KEPT: Final = 64

#: Children looked at when a blocked parent is to be fed.
_FEED_SCAN_MAX: Final = 256

#: Tasks of a lane that may wait for something better while later ones are looked at.
_LOOK_MAX: Final = 16


class Placement:
    """Decides where ready tasks run."""

    def __init__(self, tables: Tables, pools: Pools, workforce: Workforce, scheduling: Scheduling) -> None:
        self.tables = tables
        self.pools = pools
        self.workforce = workforce
        self.scheduling = scheduling
        #: set by `Hedging`: an attempt of a function that may be hedged was handed over
        self.on_hedgeable: Callable[[TaskState, float], None]
        self._lanes: dict[Any, Lane] = {}
        #: lanes with ready tasks
        self.active: dict[Any, Lane] = {}
        #: nodes that a more urgent lane waits for, as of the last pass
        self._reserved: set[str] = set()
        self._recall_timer: float | None = None
        self.spreading = Spreading(tables, workforce, blind=scheduling.blind)
        #: ready tasks with large arguments, which may lie on other nodes, and which were not thought about yet
        self._large: list[TaskState] = []

    # --- ready tasks

    def push(self, task: TaskState, now: float) -> ErrorInfo | None:
        """Queue a ready task; an error if no worker can ever run it."""
        profile, tables = task.profile, self.tables
        if profile.base is not None:
            task.profile = profile = profile.base  # it is tried again: all its alternatives are open
        key: Any = profile.lane
        if not profile.simple or profile.shape.cpu > self.pools.widest:
            error = self.pools.infeasible(task)
            if error is not None:
                return error
            if profile.batch:
                key = (key, task.function.definition.id, task.batch_key, profile.batch)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(profile, self.scheduling.weights)
        if not lane.count:
            self.active[key] = lane
        lane.push(task, tables.next_sequence())
        if (tables.data or tables.remotes) and has_large(task):
            self._large.append(task)
        return None

    def remove(self, task: TaskState) -> None:
        """A ready task is not to run any more."""
        if task.lane is not None:
            task.lane.remove(task)

    def recheck(self) -> None:
        """What the nodes offer has changed: ready tasks that fit none of them any more are doomed."""
        self.pools.widest = max((node.cpu for node in self.tables.nodes.values() if node.supervisor), default=1.0)
        for lane in self.active.values():
            while lane.count:
                task = lane.head()
                error = self.pools.infeasible(task)
                if error is None:
                    break
                lane.remove(task)
                self.pools.doomed.append((task, error))

    # --- the pass over all ready tasks, once per wake-up

    def schedule(self, now: float) -> None:
        """Hand out what can be handed out."""
        workforce, active = self.workforce, self.active
        if active:
            if self._reserved:
                self._reserved.clear()
            if self._large:
                self._follow_data(now)
            if workforce.stacked:
                for worker in list(workforce.stacked.values()):
                    if not worker.queue and worker.ready and worker.inline:
                        self._feed(worker, now)
            if len(active) == 1:
                key, lane = next(iter(active.items()))
                if lane.count:
                    self._fill(lane, now)
                if not lane.count:
                    self._retire(key)
            else:
                self._fill_all(now)
            if active and self.tables.remotes:
                self._spread(now)
        if workforce.crowded:
            self._check_recall(now)

    def _follow_data(self, now: float) -> None:
        """Tasks that begin earlier where their arguments lie go there; others have them fetched while they wait."""
        large, self._large = self._large, []
        for task in large:
            if task.state is not State.READY or task.lane is None:
                continue
            worker = None if task.profile.batch else self.spreading.nearer(task)
            if worker is not None:
                task.lane.remove(task)
                self.spreading.delegate(worker, task, now)
            elif self.tables.data:
                fetch_ahead(self.tables, task)

    def _spread(self, now: float) -> None:
        """What is left may run elsewhere, the most urgent first."""
        lanes = sorted(self.active.items(), key=lambda item: _urgency(item[1]))
        self.spreading.spread([lane for _, lane in lanes], now)
        for key, lane in lanes:
            if not lane.count:
                self._retire(key)

    def _fill_all(self, now: float) -> None:
        """Several lanes: always the one with the most urgent head."""
        order: list[tuple[tuple[int, float, int], int, Lane]] = []
        for number, (key, lane) in enumerate(list(self.active.items())):
            if lane.count:
                order.append((_urgency(lane), number, lane))
            else:
                self._retire(key)
        heapify(order)
        while order:
            lane = order[0][2]
            placed = self._place_one(lane, now)
            if placed and lane.count:
                heapreplace(order, (_urgency(lane), order[0][1], lane))
                continue
            heappop(order)
            if lane.count and lane.profile.role == EXECUTOR:
                self._reserve(lane, now)
        # What is left may still ride along as prefetch.
        for key, lane in list(self.active.items()):
            if lane.count and lane.profile.role == EXECUTOR and not (lane.batch or lane.profile.alternatives):
                self._prefetch(lane, now)
            if not lane.count:
                self._retire(key)

    def _retire(self, key: Any) -> None:
        """The lane is empty. Lanes come with batch keys, which are as many as a program likes."""
        del self.active[key]
        if len(self._lanes) > LANES_KEPT:
            del self._lanes[key]

    def _reserve(self, lane: Lane, now: float) -> None:
        """A wide request must not wait for ever while narrow ones take each free cpu: keep a node for it."""
        head, shape = lane.head(), lane.profile.shape
        if now - head.ready_at < RESERVE_AFTER:
            return
        for node in self.tables.nodes.values():
            if node.could_fit(shape) and not node.fits(shape):
                self._reserved.add(node.name)
                return

    def _fill(self, lane: Lane, now: float) -> None:
        while self._place_one(lane, now):
            if not lane.count:
                return
        if lane.count and lane.profile.role == EXECUTOR and not (lane.batch or lane.profile.alternatives):
            self._prefetch(lane, now)

    def _place_one(self, lane: Lane, now: float) -> bool:
        """Give the lane's next task or batch to an idle executor (any executor, for async functions)."""
        if not lane.profile.simple:
            if lane.profile.role == ASYNC_EXECUTOR:
                return self._place_async(lane, now)
            if lane.profile.alternatives:
                return self._place_best(lane, now)
        idle = self.workforce.idle[EXECUTOR]
        if not idle:
            self.pools.grow(lane, now)
            return False
        if lane.batch and not self._batch_due(lane, now):
            return False
        first = lane.pop()
        while first.deadline is not None and lane.count and self._is_lost(first, now):
            # Others can still make it. It comes after all of them, once, and runs if nobody else wants to.
            first.due = first.deadline + LOST
            lane.push(first, first.entry)
            first = lane.pop()
        worker = self.pick_idle(first)
        if worker is None:
            lane.unpop(first)
            if not any(suits(worker, lane.profile.shape) for worker in idle.values()):
                self.pools.grow(lane, now)  # all that are idle see other gpus
            return False
        self.assign(worker, self._take_batch(first, lane, now) if lane.batch else [first], now)
        return True

    def _place_best(self, lane: Lane, now: float) -> bool:
        """Tasks with alternatives: hand out all that had better begin now than wait."""
        kept: list[TaskState] = []
        ahead: Counter[int] = Counter()
        wanted: dict[int, Shape] = {}
        while lane.count and len(kept) < _LOOK_MAX:
            task = lane.pop()
            choice = Choice(task)
            for profile in task.profile.alternatives:
                self._offer(choice, profile, ahead, now)
            if choice.profile is not None and choice.worker is not None:
                choice.take()
                self.assign(choice.worker, [task], now)
                continue
            kept.append(task)
            if choice.profile is not None:
                ahead[choice.profile.shape.number] += 1
                wanted[choice.profile.shape.number] = choice.profile.shape
                if choice.patience is not None:
                    self.tables.at(now + choice.patience, wake, None)
        for task in reversed(kept):
            lane.unpop(task)
        for shape in wanted.values():
            self.pools.grow(lane, now, shape)
        return False

    def _offer(self, choice: Choice, profile: Profile, ahead: Counter[int], now: float) -> None:
        """What the own executors can do for a task, with one of its alternatives."""
        worker = self.pick_idle(choice.task, profile.shape)
        if worker is not None:
            choice.offer(profile, worker, 0.0)
            return
        for node in self.tables.nodes.values():
            if node.fits(profile.shape) and node.supervisor is not None:
                choice.offer(profile, None, 0.0)  # as soon as there is a process for it
            elif node.could_fit(profile.shape):
                begins = wait_for(choice, profile, node, running_here(node), ahead, now)
                if begins is not None:
                    choice.offer(profile, None, begins)

    def _is_lost(self, task: TaskState, now: float) -> bool:
        """Whether the task will miss its deadline even if it begins now, as far as is known, and was not put back yet.

        Where deadlines are the order, an overload would else be spent on what is just too late, one after the other.
        """
        deadline = task.deadline
        if deadline is None or task.due > deadline or self.scheduling.policy.due is None:
            return False
        function = task.function
        seconds = function.cost.predict(1) if task.profile.batch else function.estimate
        return seconds is not None and now + seconds > deadline

    def wanted(self, role: str) -> bool:
        """Whether ready tasks wait for executors of this role."""
        return any(lane.count and lane.profile.role == role for lane in self.active.values())

    def pick_idle(self, task: TaskState, shape: Shape | None = None) -> WorkerState | None:
        """The executor that became idle last among those that know the function, else the one that became idle last."""
        shape = shape or task.profile.shape
        function = task.spec.function
        reserved = self._reserved
        if shape.extra and gpus(shape):
            fitting = [one for one in self.workforce.idle[EXECUTOR].values() if one.ready and one.node.fits(shape)]
            bound = [one for one in fitting if one.devices and suits(one, shape) and one.node.name not in reserved]
            if bound:
                return tightest(bound)
        cold = None
        for worker in reversed(self.workforce.idle[EXECUTOR].values()):
            node = worker.node
            if not worker.ready or not node.fits(shape) or (reserved and node.name in reserved):
                continue
            if node.binds and not suits(worker, shape):
                continue
            if function in worker.functions:
                return worker
            cold = cold or worker
        return cold

    def _place_async(self, lane: Lane, now: float) -> bool:
        shape = lane.profile.shape
        alone = lane.head().alone
        best = None
        for worker in self.tables.workers.values():
            if (
                worker.role == ASYNC_EXECUTOR
                and worker.ready
                and not worker.lagging
                and not worker.secluded
                and not (alone and worker.queue)
                and len(worker.queue) < ASYNC_TASKS_MAX
                and worker.node.fits(shape)
                and suits(worker, shape)
                and (best is None or len(worker.queue) < len(best.queue))
            ):
                best = worker
        if best is None:
            self.pools.grow(lane, now)
            return False
        if lane.batch and not self._batch_due(lane, now):
            return False
        first = lane.pop()
        self.assign(best, self._take_batch(first, lane, now) if lane.batch else [first], now)
        return True

    def _prefetch(self, lane: Lane, now: float) -> None:
        """Queue more behind busy executors, as far as they will begin it within `PREFETCH` seconds."""
        shape = lane.profile.shape
        busy = [
            worker
            for node in self.tables.nodes.values()
            if node.name not in self._reserved
            for worker in node.workers.values()
            if worker.shape is shape and not worker.stack and worker.load < PREFETCH and worker.ready
            # What takes longer than was expected of it may take long.
            if now - worker.head_since < RECALL_AFTER
        ]
        if not busy:
            return
        busy.sort(key=_load)
        share = -(-lane.count // len(busy))
        for worker in busy:
            self._extend(worker, lane, min(share, PREFETCH_TASKS_MAX - len(worker.queue)), now)
            if not lane.count:
                return

    def _extend(self, worker: WorkerState, lane: Lane, most: int, now: float) -> None:
        tasks: list[TaskState] = []
        load = worker.load
        while lane.count and len(tasks) < most:
            task = lane.pop()
            estimate = task.function.estimate
            if (
                estimate is None
                or task.alone
                or task.profile.timeout
                or task.profile.prompt
                or load + estimate > PREFETCH
            ):
                lane.unpop(task)
                break
            load += estimate
            tasks.append(task)
        if tasks:
            self.assign(worker, tasks, now)

    def _feed(self, worker: WorkerState, now: float) -> None:
        """Run ready children of a blocked task on top of it."""
        parent = worker.stack[-1][0]
        if not parent.children or parent.apart:
            return
        tasks: list[TaskState] = []
        load = 0.0
        most = 1
        for looked, child in enumerate(parent.children.values()):
            if looked >= _FEED_SCAN_MAX or len(tasks) >= most:
                break
            lane = child.lane
            if (
                lane is None
                or lane.batch
                or lane.profile.alternatives
                or child.spec.stream
                or child.profile.role != EXECUTOR
                or child.alone
                or child.profile.timeout
                or child.profile.prompt
            ):
                # A timeout is enforced by ending the process, which would end the parent too.
                continue
            shape = child.profile.shape
            if tasks and shape is not tasks[0].profile.shape:
                continue
            if not tasks:
                if not worker.node.fits(shape) or bool(worker.devices) != bool(worker.node.binds and gpus(shape)):
                    continue
                most = min(PREFETCH_TASKS_MAX, -(-lane.count // (1 + len(self.workforce.idle[EXECUTOR]))))
            estimate = child.function.estimate
            if tasks and (estimate is None or load + estimate > PREFETCH):
                break
            load += estimate or UNKNOWN_COST
            tasks.append(child)
        if tasks:
            for task in tasks:
                task.lane.remove(task)
            self.assign(worker, tasks, now)

    # --- batches

    def _batch_due(self, lane: Lane, now: float) -> bool:
        """Whether the lane's batch may leave: it is full, or its head has waited as long as it may."""
        delay = lane.profile.batch_delay
        if lane.items >= lane.batch or not (delay or self.scheduling.policy.defer):
            return True
        head = lane.head()
        due = head.ready_at + delay
        if self.scheduling.policy.defer and head.deadline is not None:
            seconds = head.function.cost.predict(lane.items + 1)
            # Something always comes between; and of what is not known nothing can be put off.
            due = head.deadline - DEFER_MARGIN * seconds if seconds is not None else now
        if due <= now:
            return True
        if lane.wakes_at != due:
            lane.wakes_at = due
            self.tables.at(due, wake, None)
        return False

    def _take_batch(self, first: TaskState, lane: Lane, now: float) -> list[TaskState]:
        """The first, and as many tasks after it as the limit on items and the tightest deadline allow."""
        tasks = [first]
        items = first.spec.items
        predict = first.function.cost.cautious
        # Those that will be late even if they run alone keep no others waiting: else a backlog would end all batches.
        soonest = now + (predict(1) or 0.0)
        tightest = _tightest(None, first, soonest)
        while lane.count and not first.alone:
            task = lane.head()
            if task.alone or items + task.spec.items > lane.batch:
                break
            tightest = _tightest(tightest, task, soonest)
            if tightest is not None:
                seconds = predict(items + task.spec.items)
                if seconds is not None and now + seconds > tightest:
                    break
            items += task.spec.items
            tasks.append(lane.pop())
        return tasks

    # --- handing over

    def assign(self, worker: WorkerState, tasks: list[TaskState], now: float) -> None:
        """Hand these tasks, which are interchangeable for placement or one batch, to this executor."""
        workforce = self.workforce
        hand_over, known = workforce.hand_over, worker.functions
        first = tasks[0]
        batch = 0
        workforce.occupy(worker, tasks, now)
        if first.profile.batch:
            worker.batch_number += 1
            batch = worker.batch_number
            first.batch_head = True
            first.batch_items = sum([task.spec.items for task in tasks])
        session = worker.session
        assert session is not None
        under = worker.stack[-1][0].id if worker.stack else 0
        for task in tasks:
            spec, function, graph = task.spec, task.function, task.graph
            if spec.function not in known:
                known.add(spec.function)
                session.outbox.append(Define([function.definition]))
            context = graph.context
            if context is not None and context.definition.id not in known:
                known.add(context.definition.id)
                session.outbox.append(Define([context.definition]))
            if batch:
                task.batch_size = len(tasks)
                cost = (function.cost.predict(first.batch_items) or UNKNOWN_COST) if task is first else 0.0
            else:
                cost = function.estimate or UNKNOWN_COST
            hand_over(worker, task, task.attempt + 1, cost, now)
            if task.profile.hedge and not batch and not spec.stream and worker.role == EXECUTOR:
                self.on_hedgeable(task, now)
            worker.outgoing.append(
                Attempt(
                    spec.id,
                    task.attempt,
                    spec.function,
                    spec.args,
                    task.inputs,  # type: ignore[arg-type]  # all are resolved now
                    None if task.deadline is None else task.deadline - now,
                    batch,
                    graph.id,
                    task.chain()[:-1] if spec.parent else None,
                    under,
                    task.session.data_only or task.data_only,
                    0 if context is None else context.definition.id,
                )
            )
            if spec.stream:
                worker.outgoing[-1].stream, worker.outgoing[-1].skip = spec.stream, task.consumed
        self.tables.dirty[session.id] = session

    def _check_recall(self, now: float) -> None:
        """An executor is idle while work waits unstarted behind another's: bring it back."""
        crowded = self.workforce.crowded
        for worker in [worker for worker in crowded.values() if len(worker.queue) < 2]:
            del crowded[worker.id]
        if not self.workforce.idle[EXECUTOR]:
            return
        soonest = None
        for worker in crowded.values():
            if worker.stack or not worker.ready:
                continue
            head = next(iter(worker.queue.values()))
            if len(worker.queue) <= head.batch_size:
                continue
            if worker.shape is None or not self._has_room(worker.shape):
                continue  # it would only come back here
            due = worker.head_since + RECALL_AFTER
            if due <= now:
                self.recall(worker)
            elif soonest is None or due < soonest:
                soonest = due
        if soonest is not None and (self._recall_timer is None or self._recall_timer <= now):
            self._recall_timer = soonest
            self.tables.at(soonest, wake, None)

    def _has_room(self, shape: Shape) -> bool:
        """Whether an idle executor could take it."""
        return any(
            worker.ready and worker.node.fits(shape) and suits(worker, shape) and worker.node.name not in self._reserved
            for worker in self.workforce.idle[EXECUTOR].values()
        )

    def recall(self, worker: WorkerState) -> None:
        """Ask for the worker's unstarted tasks back."""
        if worker.session is not None and not worker.recalling:
            worker.recalling = True
            self.tables.tell(worker.session, Recall())
            self.tables.interrupts[worker.id] = worker


def _tightest(deadline: float | None, task: TaskState, soonest: float) -> float | None:
    """The earlier of the deadline and the task's, if that can be met at all."""
    own = task.deadline
    if own is None or own < soonest:
        return deadline
    return own if deadline is None else min(own, deadline)


def _load(worker: WorkerState) -> float:
    return worker.load


def _urgency(lane: Lane) -> tuple[int, float, int]:
    head = lane.head()
    return (-head.profile.priority, head.due, head.graph.order)
