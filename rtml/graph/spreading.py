"""Which ready tasks other dispatchers run: nodes below this one, or the parent above (D2).

Whatever stands at the other end of an uplink, it is one worker here: its node stands for all that it has, as it said in
its last `Offer` and as far as can be told since. Rules:

* A task runs at home if it can: others get what is left after the own executors (and their prefetch) are served.
* Downwards work goes at once, to where it will begin first. Upwards it goes when no node here can ever run it, or when
  it has waited `SPILL_AFTER` seconds and the parent has room.
* No task is handed on to where it came from, or more than `HOPS_MAX` times. What finds no place here in `SPILL_AFTER`
  seconds is given back to where it came from, if there is room.
* Beyond what is free over there, only work that will begin within `AHEAD` seconds is sent (two round trips).
* An offer is sent when what the other side believes has been wrong for two ticks, so that two dispatchers that only
  send each other work need no other messages.
"""

from __future__ import annotations

from typing import Final

from rtml.graph.queues import Lane
from rtml.graph.state import Session, Shape, State, TaskState, WorkerState
from rtml.graph.tables import Tables, wake
from rtml.graph.workforce import UNKNOWN_COST, Workforce
from rtml.messages import EXECUTOR, Define, Delegate, Delegated, Offer, Options, Task

#: Seconds after which a ready task may leave its home.
SPILL_AFTER: Final = 5e-3
#: Seconds after which a task from below that found no place goes back there.
GIVE_UP_AFTER: Final = 0.05
#: Seconds of work sent ahead to another dispatcher, beyond what is free there.
AHEAD: Final = 5e-3
#: Dispatchers that may hand a task on.
HOPS_MAX: Final = 4
#: Seconds between two looks at whether the others' belief is right.
TICK: Final = 0.02
#: Cpus by which it may be wrong.
_TOLERANCE: Final = 0.5
#: Tasks of a lane that are looked at when its first may not go where there is room.
_LOOK_MAX: Final = 16
#: Bytes of arguments for one worker in one wake-up, and in one message.
_BYTES_MAX: Final = 16 * 1024 * 1024
_TASKS_MAX: Final = 512


class Belief:
    """What one dispatcher makes of another's offers."""

    __slots__ = ("doubts", "given", "here", "mine", "sent", "theirs", "wait")

    def __init__(self) -> None:
        #: tasks that were sent on this connection, and those that no offer has covered yet: (number, shape)
        self.sent = 0
        self.theirs: list[tuple[int, Shape]] = []
        #: tasks that came on this connection, and the cpus of all that are here
        self.given = 0
        self.here = 0.0
        #: free cpus that the other side reckons with; None: it was told nothing yet
        self.mine: float | None = None
        #: ticks in a row at which it was wrong
        self.doubts = 0
        #: seconds until work would begin there
        self.wait = 0.0


class Spreading:
    """Hands ready tasks to other dispatchers."""

    def __init__(self, tables: Tables, workforce: Workforce) -> None:
        self.tables = tables
        self.workforce = workforce
        self._beliefs: dict[int, Belief] = {}
        self._ticking = False
        #: when the next look at what waits is due
        self._spill_at: float | None = None
        #: set when this node is to end
        self.leaving = False
        self._parcels: dict[int, tuple[Delegate, int]] = {}

    # --- peers

    def joined(self, worker: WorkerState, now: float) -> None:
        """A dispatcher is (again) connected: it is told what there is."""
        before, belief = self._beliefs.get(worker.id), Belief()
        if before is not None:
            belief.here = before.here
        self._beliefs[worker.id] = belief
        node = worker.node
        node.cpu = node.free_cpu = 0.0
        node.extra, node.free_extra = {}, {}
        self._offer_to(worker)

    def left(self, worker: WorkerState) -> None:
        """It will not come back under this id."""
        self._beliefs.pop(worker.id, None)
        self.tables.remotes.pop(worker.id, None)
        self.offer_all()

    def offered(self, worker: WorkerState, offer: Offer) -> None:
        """What a dispatcher says that it can do, less what it had not seen yet."""
        belief, node = self._beliefs[worker.id], worker.node
        belief.wait = offer.wait
        belief.theirs = [entry for entry in belief.theirs if entry[0] > offer.seen]
        news = (node.cpu, node.extra) != (offer.cpu, offer.resources)
        node.cpu, node.extra = offer.cpu, dict(offer.resources)
        node.free_cpu, node.free_extra = offer.free_cpu, dict(offer.free_resources)
        for _, shape in belief.theirs:
            node.take(shape)
        worker.leaving = offer.leaving
        if news:
            self.offer_all(worker)

    def received(self, worker: WorkerState, shape: Shape) -> None:
        """A task came from there: that dispatcher has counted it."""
        belief = self._beliefs[worker.id]
        belief.given += 1
        belief.here += shape.cpu
        if belief.mine is not None:
            belief.mine -= shape.cpu

    def answered(self, worker: WorkerState, shape: Shape) -> None:
        """Its result, or the task itself, goes back."""
        belief = self._beliefs.get(worker.id)
        if belief is not None:
            belief.here -= shape.cpu
            if belief.mine is not None:
                belief.mine += shape.cpu

    # --- offers

    def changed(self, now: float) -> None:
        """Something here may not be what others believe: look a little later."""
        if not self._ticking:
            self._ticking = True
            self.tables.at(now + TICK, self._tick, None)

    def _tick(self, _: None, now: float) -> None:
        self._ticking = False
        for worker in self.tables.remotes.values():
            belief = self._beliefs[worker.id]
            if worker.session is None or worker.session.peer is None:
                continue
            wrong = belief.mine is None or abs(self._free_for(worker) - belief.mine) > _TOLERANCE
            belief.doubts = belief.doubts + 1 if wrong else 0
            if belief.doubts > 1:
                self._offer_to(worker)
            elif wrong:
                self.changed(now)

    def offer_all(self, but: WorkerState | None = None) -> None:
        """What there is at all has changed: everybody is told at once, `but` not who said so."""
        for worker in self.tables.remotes.values():
            if worker is not but and worker.session is not None and worker.session.peer is not None:
                self._offer_to(worker)

    def _offer_to(self, worker: WorkerState) -> None:
        belief = self._beliefs[worker.id]
        belief.mine = self._free_for(worker)
        belief.doubts = 0
        widest, resources, free_resources = 0.0, dict[str, float](), dict[str, float]()
        others = [remote.node for remote in self.tables.remotes.values() if remote is not worker and remote.ready]
        for node in (*self.tables.nodes.values(), *others):
            widest = max(widest, node.cpu)
            for name, amount in node.extra.items():
                resources[name] = max(resources.get(name, 0.0), amount)
                free_resources[name] = free_resources.get(name, 0.0) + node.free_extra.get(name, 0.0)
        assert worker.session is not None
        offer = Offer(widest, resources, belief.mine, free_resources, self._wait(), belief.given, self.leaving)
        self.tables.tell(worker.session, offer)

    def _free_for(self, worker: WorkerState) -> float:
        """Cpus that are free for work from this dispatcher: it counts each of its tasks from delegation to result.

        So what it has here counts as taken, whether it runs or waits, and what its tasks really occupy does not. But
        for tasks that are blocked in `get`: what they wait for must find a place.
        """
        free = -self._beliefs[worker.id].here
        for node in self.tables.nodes.values():
            free += node.free_cpu
            for own in node.workers.values():
                free += _occupied(own, worker.session)
                free += sum(shape.cpu for task, shape in own.stack if task.session is worker.session)
        for remote in self.tables.remotes.values():
            if remote is not worker:
                free += remote.node.free_cpu + _occupied(remote, worker.session)
        return free

    def _wait(self) -> float:
        """Predicted seconds until work that arrives now would begin."""
        cpus = sum(node.cpu for node in self.tables.nodes.values())
        return sum(worker.load for worker in self.tables.workers.values()) / max(1.0, cpus)

    # --- handing over

    def spread(self, active: list[Lane], now: float) -> None:
        """What the own executors have left of these lanes."""
        self._parcels.clear()
        for lane in active:
            if lane.count:
                self._spread(lane, now)

    def _spread(self, lane: Lane, now: float) -> None:
        passed: list[TaskState] = []
        while lane.count and len(passed) < _LOOK_MAX:
            room = [worker for worker in self.tables.remotes.values() if worker.ready and self._room(worker, lane)]
            task = lane.pop()
            worker = self._choose(task, room, now)
            if worker is not None:
                self._delegate(worker, task, now)
            elif self._goes_back(task, now):
                self.give_back(task)
            else:
                passed.append(task)
        for task in reversed(passed):
            lane.unpop(task)
        if lane.count:
            self._look_again(lane, now)

    def _room(self, worker: WorkerState, lane: Lane) -> bool:
        parcel = self._parcels.get(worker.id)
        if parcel is not None and parcel[1] > _BYTES_MAX:
            return False
        node, shape = worker.node, lane.profile.shape
        if node.fits(shape):
            return True
        if worker.upward or not node.could_fit(shape):
            return False
        if lane.batch:  # formed over there, of what waits
            return len(worker.queue) < 2 * lane.batch * max(1.0, node.cpu)
        estimate = lane.head().function.estimate
        return estimate is not None and worker.load + estimate < AHEAD * max(1.0, node.cpu)

    def _choose(self, task: TaskState, room: list[WorkerState], now: float) -> WorkerState | None:
        """Where the task will begin first, if it may leave."""
        if task.hops >= HOPS_MAX:
            return None
        best: tuple[float, WorkerState] | None = None
        for worker in room:
            if worker.session is task.session:
                continue
            if worker.upward and now - task.ready_at < SPILL_AFTER and not self.leaving and self._fits_here(task):
                continue
            begins = self._beliefs[worker.id].wait + worker.load / max(1.0, worker.node.cpu)
            if best is None or begins < best[0]:
                best = (begins, worker)
        return None if best is None else best[1]

    def _fits_here(self, task: TaskState) -> bool:
        return any(node.could_fit(task.profile.shape) for node in self.tables.nodes.values())

    def _goes_back(self, task: TaskState, now: float) -> bool:
        """Whether a task that another dispatcher delegated is better off there: it would wait longer here."""
        origin = task.session.worker
        if origin is None or task.id not in task.session.delegations or not origin.ready:
            return False
        waited = now - task.ready_at
        if origin.node.fits(task.profile.shape):
            return waited >= SPILL_AFTER or self.leaving
        # It had no room, but is where the task's executors are, if there are none elsewhere.
        return not origin.upward and waited >= GIVE_UP_AFTER

    def _look_again(self, lane: Lane, now: float) -> None:
        ready_at = lane.head().ready_at
        due = next((ready_at + after for after in (SPILL_AFTER, GIVE_UP_AFTER) if ready_at + after > now), now)
        if due > now and (self._spill_at is None or not now < self._spill_at <= due):
            self._spill_at = due
            self.tables.at(due, wake, None)

    def _delegate(self, worker: WorkerState, task: TaskState, now: float) -> None:
        self.workforce.occupy(worker, [task], now)
        self.workforce.hand_over(worker, task, task.attempt + 1, task.function.estimate or UNKNOWN_COST, now)
        self._send(worker, task, now)

    def _send(self, worker: WorkerState, task: TaskState, now: float) -> None:
        session, spec = worker.session, task.spec
        assert session is not None
        belief = self._beliefs[worker.id]
        belief.sent += 1
        belief.theirs.append((belief.sent, task.profile.shape))
        definition = task.function.definition
        if definition.id not in worker.functions:
            worker.functions.add(definition.id)
            self.tables.tell(session, Define([definition]))
            self._parcels.pop(worker.id, None)
        context = task.graph.context
        if context is not None and context.definition.id not in worker.functions:
            worker.functions.add(context.definition.id)
            self.tables.tell(session, Define([context.definition]))
            self._parcels.pop(worker.id, None)
        parcel, size = self._parcels.get(worker.id, (None, 0))
        if parcel is None or len(parcel.tasks) >= _TASKS_MAX:
            parcel = Delegate([])
            self.tables.tell(session, parcel)
        parcel.tasks.append(
            Delegated(
                Task(
                    spec.id, spec.function, spec.args, 0,
                    None if not task.inputs else [(0, payload) for payload in task.inputs],
                    spec.handles, self._options(task, now), task.batch_key, spec.items, task.graph.trace,
                    0 if context is None else context.definition.id,
                ),
                task.attempt, task.graph.id, task.chain()[:-1], task.hops + 1, task.session.data_only or task.data_only,
            )
        )  # fmt: skip
        size += len(spec.args) if spec.args.__class__ is bytes else 0
        self._parcels[worker.id] = (parcel, size)

    def redelegate(self, worker: WorkerState, now: float) -> None:
        """The dispatcher over there was restarted: what it had of ours is told again, as the same attempts."""
        self._parcels.clear()
        for task in list(worker.queue.values()):
            if task.state is not State.DONE:
                self._send(worker, task, now)

    def _options(self, task: TaskState, now: float) -> Options:
        """All that this call asks for, with what is left of its deadline."""
        profile, shape = task.profile, task.profile.shape
        extra = dict(shape.extra)
        return Options(
            cpu=shape.cpu,
            gpu=extra.pop("gpu", 0.0),
            memory=int(extra.pop("memory", 0.0)),
            resources=extra,
            retries=max(0, profile.retries - task.failures),
            timeout=profile.timeout,
            deadline=None if task.deadline is None else task.deadline - now,
            priority=profile.priority,
            batch=profile.batch,
            batch_delay=profile.batch_delay,
            name=profile.name,
            tenant=profile.tenant or None,
            hedge=profile.hedge or None,
        )

    def give_back(self, task: TaskState) -> None:
        """A task that another dispatcher delegated and that has not begun here goes back to it."""
        task.session.returning.add(task.id)
        self.tables.withdrawn.append(task)


def _occupied(worker: WorkerState, session: Session | None) -> float:
    """Cpus of the worker that a submitter's tasks occupy."""
    if worker.role == EXECUTOR:
        head = next(iter(worker.queue.values()), None)
        return worker.shape.cpu if worker.shape is not None and head is not None and head.session is session else 0.0
    return sum(task.profile.shape.cpu for task in worker.queue.values() if task.session is session)
