"""Which ready tasks other dispatchers run: nodes below this one, or the parent above (D2).

Whatever stands at the other end of an uplink, it is one worker here: its node stands for all that it has, as it said in
its last `Offer` and as far as can be told since. Rules:

* A task runs at home if it can: others get what is left after the own executors (and their prefetch) are served. But
  it leaves at once, before any executor is looked for, if it begins earlier where its large arguments lie (`nearer`).
* Downwards work goes at once, to where it will begin first. Upwards it goes when no node here can ever run it, or when
  it has waited `SPILL_AFTER` seconds and the parent has room.
* No task is handed on to where it came from, or more than `HOPS_MAX` times. What finds no place here in `SPILL_AFTER`
  seconds is given back to where it came from, if there is room.
* Where it begins first counts the time to fetch its large arguments; it may even wait for a busy node that has them.
* Beyond what is free over there, only work that will begin within `AHEAD` seconds is sent (two round trips), and none
  that a newer call may supersede.
* An offer says what the other side's tasks may occupy here, with none of them counted: it counts them itself, so that
  two dispatchers that only send each other work need no further offers. A new one is sent when the last one has been
  wrong for two ticks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Final

from msgspec.structs import replace

from rtml.graph.alternatives import Choice, wait_for
from rtml.graph.locality import Locality
from rtml.graph.queues import Lane
from rtml.graph.state import Session, Shape, State, TaskState, WorkerState
from rtml.graph.tables import Tables, wake
from rtml.graph.workforce import UNKNOWN_COST, Workforce
from rtml.messages import EXECUTOR, Consumed, Define, Delegate, Delegated, Offer, Options, Task

#: Seconds after which a ready task may leave its home.
SPILL_AFTER: Final = 5e-3
#: Seconds after which a task from below that found no place goes back there.
GIVE_UP_AFTER: Final = 0.05
#: Seconds of work sent ahead to another dispatcher, beyond what is free there.
AHEAD: Final = 5e-3
#: Seconds of fetching arguments that are worth it to leave home at once.
WORTH_LEAVING: Final = 5e-3
#: Dispatchers that may hand a task on.
HOPS_MAX: Final = 4
#: Seconds between two looks at whether the others' belief is right.
TICK: Final = 0.02
#: Cpus by which it may be wrong.
_TOLERANCE: Final = 0.5
_LITTLE: Final = 1e-6
#: Other nodes that one is told of, which could take its objects.
_TAKERS_MAX: Final = 8
#: Tasks of a lane that are looked at when its first may not go where there is room.
_LOOK_MAX: Final = 16
#: Bytes of arguments for one worker in one wake-up, and in one message.
_BYTES_MAX: Final = 16 * 1024 * 1024
_TASKS_MAX: Final = 512


class Offers:
    """What was offered to another dispatcher, and by it."""

    __slots__ = ("doubts", "told", "wait")

    def __init__(self) -> None:
        #: the room that it was told of; None: of none yet
        self.told: dict[str, float] | None = None
        #: ticks in a row at which that was wrong
        self.doubts = 0
        #: seconds until work would begin there
        self.wait = 0.0


class Spreading:
    """Hands ready tasks to other dispatchers."""

    def __init__(self, tables: Tables, workforce: Workforce, *, blind: bool = False) -> None:
        self.tables = tables
        self.workforce = workforce
        self.locality = Locality(blind=blind)
        self._offers: dict[int, Offers] = {}
        self._ticking = False
        #: when the next look at what waits is due
        self._spill_at: float | None = None
        #: set when this node is to end
        self.leaving = False
        #: bytes of arguments for each in this pass
        self._bytes: dict[int, int] = {}

    # --- peers

    def joined(self, worker: WorkerState) -> None:
        """A dispatcher is (again) connected: it is told what there is."""
        self._offers[worker.id] = Offers()
        node = worker.node
        node.cpu = node.free_cpu = 0.0
        node.extra, node.free_extra = {}, {}
        self._offer_to(worker)

    def left(self, worker: WorkerState) -> None:
        """It will not come back under this id."""
        self._offers.pop(worker.id, None)
        self.tables.remotes.pop(worker.id, None)
        if worker.node.data:
            self.locality.lost(worker.node.data)
        self.offer_all()

    def offered(self, worker: WorkerState, offer: Offer) -> None:
        """The room that a dispatcher has for us, less what we have sent."""
        node = worker.node
        self._offers[worker.id].wait = offer.wait
        news = (node.cpu, node.extra) != (offer.cpu, offer.resources)
        node.cpu, node.extra = offer.cpu, dict(offer.resources)
        node.free_extra = dict(offer.room)
        node.free_cpu = node.free_extra.pop("cpu", 0.0)
        for task in worker.queue.values():
            node.take(task.profile.shape)
        worker.leaving = offer.leaving
        if news:
            self.offer_all(worker)

    # --- offers

    def changed(self, now: float) -> None:
        """Something here may not be what others were told: look a little later."""
        if not self._ticking:
            self._ticking = True
            self.tables.at(now + TICK, self._tick, None)

    def _tick(self, _: None, now: float) -> None:
        self._ticking = False
        for worker in self.tables.remotes.values():
            if worker.session is None or worker.session.peer is None:
                continue
            offers = self._offers[worker.id]
            wrong = offers.told is None or _differ(offers.told, self._room_for(worker))
            offers.doubts = offers.doubts + 1 if wrong else 0
            if offers.doubts > 1:
                self._offer_to(worker)
            elif wrong:
                self.changed(now)

    def offer_all(self, but: WorkerState | None = None) -> None:
        """What there is at all has changed: everybody is told at once, `but` not who said so."""
        for worker in self.tables.remotes.values():
            if worker is not but and worker.session is not None and worker.session.peer is not None:
                self._offer_to(worker)

    def _offer_to(self, worker: WorkerState) -> None:
        offers = self._offers[worker.id]
        offers.told, offers.doubts = self._room_for(worker), 0
        widest, resources = 0.0, dict[str, float]()
        others = [remote.node for remote in self.tables.remotes.values() if remote is not worker and remote.ready]
        for node in (*self.tables.nodes.values(), *others):
            widest = max(widest, node.cpu)
            for name, amount in node.extra.items():
                resources[name] = max(resources.get(name, 0.0), amount)
        assert worker.session is not None
        takers = [] if worker.upward else self._takers(worker)
        self.tables.tell(worker.session, Offer(widest, resources, offers.told, self._wait(), self.leaving, takers))

    def _takers(self, leaving: WorkerState) -> list[str]:
        """Some data endpoints that could take a node's objects when it leaves."""
        others = (remote for remote in self.tables.remotes.values() if remote is not leaving and remote.ready)
        data = [self.tables.data, *(remote.node.data for remote in islice(others, _TAKERS_MAX))]
        return [one for one in data if one]

    def _room_for(self, worker: WorkerState) -> dict[str, float]:
        """What tasks of this dispatcher may occupy here: what is free, and what they occupy already.

        It counts each from delegation to result. One that is blocked in `get` has its cpu counted twice, because what
        it waits for must find a place.
        """
        room = {"cpu": 0.0}

        def add(cpu: float, extra: Mapping[str, float]) -> None:
            room["cpu"] += cpu
            for name, amount in extra.items():
                room[name] = room.get(name, 0.0) + amount

        session = worker.session
        for node in self.tables.nodes.values():
            add(node.free_cpu, node.free_extra)
            for own in node.workers.values():
                for shape in _occupied(own, session):
                    add(shape.cpu, shape.extra)
                for task, shape in own.stack:
                    if task.session is session:
                        add(shape.cpu, shape.extra)
        for remote in self.tables.remotes.values():
            if remote is not worker and remote.ready:
                add(remote.node.free_cpu, remote.node.free_extra)
                for shape in _occupied(remote, session):
                    add(shape.cpu, shape.extra)
        return room

    def _wait(self) -> float:
        """Predicted seconds until work that arrives now would begin."""
        cpus = sum(node.cpu for node in self.tables.nodes.values())
        return sum(worker.load for worker in self.tables.workers.values()) / max(1.0, cpus)

    # --- handing over

    def spread(self, active: list[Lane], now: float) -> None:
        """What the own executors have left of these lanes."""
        self._bytes.clear()
        guests = any(
            worker.session is not None and worker.session.delegations for worker in self.tables.remotes.values()
        )
        for lane in active:
            if lane.count:
                self._spread(lane, guests, now)

    def _spread(self, lane: Lane, guests: bool, now: float) -> None:
        """Hand over what others have room for; `guests`: tasks of other dispatchers are here, which may go back."""
        passed: list[TaskState] = []
        if lane.profile.alternatives:
            self._spread_best(lane, now)
            return
        room = self._room(lane)
        while lane.count and len(passed) < _LOOK_MAX and (room or guests):
            task = lane.pop()
            able = [worker for worker, free in room if free or self._soon(worker, task)]
            worker = self._choose(task, able, now)
            if worker is not None and self.locality.has_far(task):
                worker = self._patiently(task, worker, able, now)
            if worker is not None:
                self.delegate(worker, task, now)
                room = self._room(lane)
            elif self._goes_back(task, now):
                self.give_back(task)
            else:
                passed.append(task)
        for task in reversed(passed):
            lane.unpop(task)
        if lane.count:
            self._look_again(lane, now)

    def _spread_best(self, lane: Lane, now: float) -> None:
        """Tasks with alternatives go where one of these ends them first, or wait for that."""
        kept: list[TaskState] = []
        ahead: Counter[int] = Counter()
        while lane.count and len(kept) < _LOOK_MAX:
            task = lane.pop()
            choice = Choice(task)
            for profile in task.profile.alternatives:
                for worker in [one for one in self.tables.remotes.values() if self._takes(one, task, now)]:
                    if worker.node.fits(profile.shape):
                        choice.offer(profile, worker, self._begins(worker) + self.locality.seconds(task, worker.node))
                    elif worker.node.could_fit(profile.shape) and not worker.upward:
                        running = [(one, one.assigned_at) for one in worker.queue.values()]
                        begins = wait_for(choice, profile, worker.node, running, ahead, now)
                        if begins is not None:
                            choice.offer(profile, None, begins)
            if choice.profile is not None and choice.worker is not None:
                choice.take()
                self.delegate(choice.worker, task, now)
                continue
            if self._goes_back(task, now):
                self.give_back(task)
                continue
            kept.append(task)
            if choice.profile is not None:
                ahead[choice.profile.shape.number] += 1
                if choice.patience is not None:
                    self.tables.at(now + choice.patience, wake, None)
        for task in reversed(kept):
            lane.unpop(task)
        if lane.count:
            self._look_again(lane, now)

    def _takes(self, worker: WorkerState, task: TaskState, now: float) -> bool:
        """Whether a task may go to this dispatcher at all, room or not."""
        if not worker.ready or worker.session is task.session or task.hops >= HOPS_MAX:
            return False
        if self._bytes.get(worker.id, 0) > _BYTES_MAX:
            return False
        waits = now - task.ready_at < SPILL_AFTER and not self.leaving
        nodes = self.tables.nodes.values()
        here = any(node.could_fit(one.shape) for node in nodes for one in task.profile.alternatives)
        return not (worker.upward and here and waits)

    def _room(self, lane: Lane) -> list[tuple[WorkerState, bool]]:
        """Who may take one more task of this lane; with False only one that begins soon, beyond what is free there."""
        room = []
        shape = lane.profile.shape
        for worker in self.tables.remotes.values():
            node = worker.node
            if not worker.ready or self._bytes.get(worker.id, 0) > _BYTES_MAX:
                continue
            if node.fits(shape):
                room.append((worker, True))
            elif worker.upward or not node.could_fit(shape):
                continue
            elif not lane.batch:
                if worker.load < AHEAD * max(1.0, node.cpu):
                    room.append((worker, False))
            elif len(worker.queue) < 2 * lane.batch * max(1.0, node.cpu):  # formed over there, of what waits
                room.append((worker, True))
        return room

    def _soon(self, worker: WorkerState, task: TaskState) -> bool:
        """Whether a task that finds nothing free there would begin within `AHEAD` seconds."""
        estimate = task.function.estimate
        if estimate is None or task.profile.prompt:
            return False
        return worker.load + estimate < AHEAD * max(1.0, worker.node.cpu)

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
            begins = self._begins(worker) + self.locality.seconds(task, worker.node)
            if best is None or begins < best[0]:
                best = (begins, worker)
        return None if best is None else best[1]

    def _begins(self, worker: WorkerState) -> float:
        """Predicted seconds until a task would begin there, had it all that it needs."""
        return self._offers[worker.id].wait + worker.load / max(1.0, worker.node.cpu)

    def _patiently(
        self, task: TaskState, chosen: WorkerState, room: list[WorkerState], now: float
    ) -> WorkerState | None:
        """`chosen`, or None if the task had better wait for a node that has no room but its arguments.

        It never waits longer than it would take to fetch them, as predicted when it was first thought about.
        """
        if not task.patience:
            transfer = self.locality.seconds(task, chosen.node)
            task.patience = now + transfer
            if transfer > 0:
                self.tables.at(task.patience, wake, None)
        if now >= task.patience:
            return chosen
        limit = self._begins(chosen) + self.locality.seconds(task, chosen.node)
        for worker in self.tables.remotes.values():
            if worker in room or not worker.ready or worker.upward or worker.session is task.session:
                continue
            if not worker.node.could_fit(task.profile.shape):
                continue
            work = (worker.load + (task.function.estimate or 0.0)) / max(1.0, worker.node.cpu)
            if self._offers[worker.id].wait + work + self.locality.seconds(task, worker.node) < limit:
                return None
        return chosen

    def nearer(self, task: TaskState) -> WorkerState | None:
        """Another dispatcher where a task begins earlier than here, where its arguments would have to be fetched.

        A node cannot know what the one above would do, but that this knows more. It asks so for its own tasks, once.
        """
        shape = task.profile.shape
        bandwidth = max((node.bandwidth for node in self.tables.nodes.values() if node.could_fit(shape)), default=0.0)
        if task.attempt or not bandwidth or not self.locality.has_far(task):
            return None
        fetching = self.locality.missing(task, self.tables.data) / bandwidth
        if fetching < WORTH_LEAVING:
            return None
        best, least = None, fetching + self._wait()
        for worker in self.tables.remotes.values():
            if not worker.ready or worker.session is task.session or not worker.node.fits(shape):
                continue
            if task.hops >= (1 if worker.upward else HOPS_MAX):
                continue
            begins = self._begins(worker) + (0.0 if worker.upward else self.locality.seconds(task, worker.node))
            if begins + WORTH_LEAVING < least:
                best, least = worker, begins
        return best

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

    def host(self, task: TaskState) -> WorkerState | None:
        """Another dispatcher to make an actor at, which no node here can ever hold; None: not now."""
        if self._fits_here(task) or task.hops >= HOPS_MAX:
            return None
        room = [
            worker
            for worker in self.tables.remotes.values()
            if worker.ready and worker.session is not task.session and worker.node.fits(task.profile.shape)
        ]
        # Below if possible: above it is only passed on.
        return min(room, key=lambda worker: (worker.upward, len(worker.queue)), default=None)

    def delegate(self, worker: WorkerState, task: TaskState, now: float) -> None:
        """Hand a ready task to another dispatcher."""
        task.patience = 0.0
        if worker.node.data:
            self.locality.sent(task, worker.node.data)
        self.workforce.occupy(worker, [task], now)
        self.workforce.hand_over(worker, task, task.attempt + 1, task.function.estimate or UNKNOWN_COST, now)
        self._send(worker, task, now)

    def _send(self, worker: WorkerState, task: TaskState, now: float) -> None:
        session, spec = worker.session, task.spec
        assert session is not None
        definition = task.function.definition
        if definition.id not in worker.functions:
            worker.functions.add(definition.id)
            self.tables.tell(session, Define([definition]))
        context = task.graph.context
        if context is not None and context.definition.id not in worker.functions:
            worker.functions.add(context.definition.id)
            self.tables.tell(session, Define([context.definition]))
        # Only to the last message that was not sent yet: what is defined meanwhile must come before.
        parcel = session.outbox[-1] if session.outbox else None
        if not isinstance(parcel, Delegate) or len(parcel.tasks) >= _TASKS_MAX:
            parcel = Delegate([])
            self.tables.tell(session, parcel)
        parcel.tasks.append(
            Delegated(
                Task(
                    spec.id, spec.function, spec.args, 0,
                    None if not task.inputs else [(0, payload) for payload in task.inputs],
                    spec.handles, self.options(task, now), task.batch_key, spec.items, task.graph.trace,
                    0 if context is None else context.definition.id, spec.actor, spec.hosts, spec.stream,
                ),
                task.attempt, task.graph.id, task.chain()[:-1], task.hops + 1, task.session.data_only or task.data_only,
                None if task.hosted is None else task.hosted.checkpoint,
            )
        )  # fmt: skip
        if spec.hosts is not None and not spec.hosts.held:
            parcel.tasks[-1].task.hosts = replace(spec.hosts, held=True)  # by this dispatcher
        if task.consumed:
            self.tables.tell(session, Consumed(spec.id, task.consumed))  # another attempt leaves that out
        if spec.args.__class__ is bytes:
            self._bytes[worker.id] = self._bytes.get(worker.id, 0) + len(spec.args)

    def redelegate(self, worker: WorkerState, now: float) -> None:
        """The dispatcher over there was restarted: what it had of ours is told again, as the same attempts."""
        self._bytes.clear()
        for task in list(worker.queue.values()):
            if task.state is not State.DONE:
                self._send(worker, task, now)

    def options(self, task: TaskState, now: float) -> Options:
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
            detached=profile.detached,
            tenant=profile.tenant,
            admission=False,  # its graph was let in here
            hedge=profile.hedge,
            latest=profile.latest,
            max_age=None if profile.max_age is None else max(0.0, task.submitted + profile.max_age - now),
        )

    def give_back(self, task: TaskState) -> None:
        """A task that another dispatcher delegated and that has not begun here goes back to it."""
        task.session.returning.add(task.id)
        self.tables.withdrawn.append(task)


def _occupied(worker: WorkerState, session: Session | None) -> list[Shape]:
    """What the worker's tasks from this submitter occupy."""
    if worker.role == EXECUTOR:
        head = next(iter(worker.queue.values()), None)
        return [worker.shape] if worker.shape is not None and head is not None and head.session is session else []
    return [task.profile.shape for task in worker.queue.values() if task.session is session]


def _differ(told: Mapping[str, float], room: Mapping[str, float]) -> bool:
    """Whether it would make a difference to know."""
    return any(
        abs(told.get(name, 0.0) - room.get(name, 0.0)) > (_TOLERANCE if name == "cpu" else _LITTLE)
        for name in told.keys() | room.keys()
    )
