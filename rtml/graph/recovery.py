"""After a restart: what peers hold is fitted together again, in whatever order they come back.

A new dispatcher knows nothing. Peers notice that their link broke, say `Hello` with what they hold, and submitters send
their unresolved tasks again. Nothing is scheduled until every executor that the supervisor listed has spoken, or for
`Limits.recovery` seconds. For that time everything that comes before what it belongs to is kept:

* an attempt that an executor holds, or its result, until the submitter brings the task;
* a child until its parent is there;
* an actor that an earlier dispatcher had been told of, until the executor that has it is there: a second one would not
  have its state.

What is unclaimed after that time is revoked. An executor that was believed dead and comes back is treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from rtml.graph.lifecycle import Lifecycle
from rtml.graph.state import Receipt, Session, State, TaskState, WorkerState
from rtml.graph.streams import Streams
from rtml.graph.tables import Tables
from rtml.graph.workforce import Workforce
from rtml.messages import Blocked, Finished, Hosting, ObjectRef, Revoke, Task, TaskResult, session_of


class Recovery:
    """Keeps what came too early."""

    def __init__(self, tables: Tables, workforce: Workforce, lifecycle: Lifecycle, streams: Streams) -> None:
        self.tables = tables
        self.streams = streams
        self.workforce = workforce
        self.lifecycle = lifecycle
        #: executors that existed before this dispatcher and have not spoken yet
        self.expected: set[int] = set()
        #: until when things are kept; None: nothing is
        self._until: float | None = None
        #: whether something may come, or has come, before what it belongs to
        self.active = False
        #: attempts held by executors: task id -> (worker, attempt)
        self._held: dict[int, tuple[WorkerState, int]] = {}
        #: those of them that are blocked
        self._blocked: dict[int, Blocked] = {}
        #: results: task id -> (worker, receipt, result)
        self._early: dict[int, tuple[WorkerState, Receipt, TaskResult]] = {}
        #: tasks by one that has to come before them: their parent, or one whose future they were given
        self._parked: dict[int, list[tuple[Session, Task]]] = {}
        self._watches: dict[int, list[Session]] = {}
        #: who has objects that are not known here yet
        self._holding: dict[int, list[Session]] = {}
        #: tasks of which somebody who came back has the future
        self._handles: set[int] = set()
        #: tasks that were cancelled before they came
        self._cancelled: set[int] = set()
        #: actors that executors have, which nobody has claimed yet: (where, what)
        self._hosted: dict[int, tuple[WorkerState, Hosting]] = {}
        #: the last call on an actor that was parked, by submitter and actor: later ones come after it
        self._parked_calls: dict[tuple[int, int], int] = {}
        #: nothing that is missing will come any more
        self._closing = False
        #: last in, first out: tasks to submit, and tasks to end with their early result
        self._work: list[tuple[Session, Task] | TaskState] = []

    @property
    def waiting(self) -> bool:
        """Whether scheduling waits for peers to report what they hold."""
        return bool(self.expected)

    # --- executors

    def begin(self, now: float) -> None:
        """A peer is here that knew an earlier dispatcher: keep what comes too early."""
        until = now + self.tables.limits.recovery
        if self._until is None:
            self.tables.at(until, self._end, None)
            self.workforce.pools.patient = True
        self._until = until
        self.active = True

    def expect(self, worker_id: int, now: float) -> None:
        """This executor lives and will say Hello."""
        self.begin(now)
        self.expected.add(worker_id)

    def spoke(self, worker_id: int) -> None:
        """It did, or it is dead."""
        self.expected.discard(worker_id)

    def holds(self, worker: WorkerState, holds: list[tuple[int, int]], now: float) -> None:
        """An executor that is new here holds these attempts, running ones first."""
        for task_id, attempt in holds:
            self.begin(now)
            task = self.tables.tasks.get(task_id)
            if task is not None and self._adopt(task, worker, attempt, now):
                self._release(task_id)
            else:
                other = self._held.get(task_id)
                if other is not None and other[0] is not worker:
                    # A task and its spare: the first one that is known goes on.
                    self._revoke(task_id, worker, attempt)
                    continue
                self._held[task_id] = (worker, attempt)
                worker.unclaimed.add(task_id)
                self._release(task_id)  # an actor that waits for this
        self._run(now)

    def hosting(self, worker: WorkerState, message: Hosting, now: float) -> None:
        """An executor that comes back has an actor, which it can describe by itself."""
        number = message.task.id
        task = self.tables.tasks.get(number)
        if task is not None and task.worker is worker:
            self._restore(task, worker, message)
        elif self.lifecycle.actors.has_ended(number):
            self._revoke(number, worker, message.attempt)
        elif number in self._held:
            self._hosted[number] = (worker, message)
            options = message.task.options
            if options is not None and options.detached:
                self._adopt_hosted(number, now)

    def _restore(self, task: TaskState, worker: WorkerState, message: Hosting) -> None:
        if message.checkpoint is not None:
            self.lifecycle.keeping.checkpoint(task, worker, message.checkpoint)

    def _adopt_hosted(self, number: int, now: float) -> None:
        """Nobody else will tell of this actor: it goes on, with nobody as its submitter."""
        message = self._hosted[number][1]
        spec = message.task
        self.tables.define(message.function)
        spec.parent, spec.handles = 0, None
        if spec.deps:
            spec.deps = [(dep, payload) for (dep, _), payload in zip(spec.deps, message.inputs, strict=True)]
        if spec.hosts is not None:
            spec.hosts.held = False
        self._submit(self.tables.detached, spec, now)

    def blocked(self, worker: WorkerState, message: Blocked) -> None:
        """A held attempt waits for others."""
        if self._held.get(message.task) == (worker, message.attempt):
            self._blocked[message.task] = message

    def resumed(self, task_id: int) -> None:
        """It does not any more."""
        self._blocked.pop(task_id, None)

    def returned(self, worker: WorkerState, attempts: list[tuple[int, int]]) -> None:
        """Held attempts that the executor gave back unstarted."""
        for task_id, attempt in attempts:
            if self._held.get(task_id) == (worker, attempt):
                del self._held[task_id]

    def finished(self, worker: WorkerState, message: Finished, now: float) -> None:
        """Results, some of which may be of tasks that are not here yet, or not known to be with this executor."""
        known: list[TaskResult] = []
        early: list[TaskResult] = []
        for result in message.results:
            task = self.tables.tasks.get(result.id)
            wanted = task is None or (task.state < State.ASSIGNED and task.attempt <= result.attempt)
            (early if wanted and not self.workforce.has(worker, result.id) else known).append(result)
        receipt = self.lifecycle.finished(worker, Finished(message.serial, known), now, kept=len(early))
        for result in early:
            self._held.pop(result.id, None)
            self._blocked.pop(result.id, None)
            if result.id in self._early:
                self._drop(self._early.pop(result.id))
            self._early[result.id] = (worker, receipt, result)
            task = self.tables.tasks.get(result.id)
            if task is not None:
                self._claim(task)
            self._release(result.id)
        self._run(now)

    def has_revoked(self, worker: WorkerState) -> bool:
        """Whether the executor works on something that nobody claimed in time."""
        return any(task_id not in self._held for task_id in worker.unclaimed)

    def died(self, worker: WorkerState) -> None:
        """The executor is gone; its results are as good as ever."""
        self.expected.discard(worker.id)
        for task_id in [task_id for task_id, held in self._held.items() if held[0] is worker]:
            del self._held[task_id]

    # --- submitters

    def submit(self, session: Session, tasks: list[Task], now: float) -> None:
        """Tasks, some of which may be running or done already, or come before their parents."""
        self._work += [(session, spec) for spec in reversed(tasks)]
        self._run(now)

    def _run(self, now: float) -> None:
        while self._work:
            entry = self._work.pop()
            if isinstance(entry, TaskState):
                self._conclude(entry, now)
            else:
                self._submit(*entry, now)

    def watch(self, session: Session, tasks: list[int]) -> None:
        """Somebody wants the results of tasks, some of which may not be here yet."""
        for task_id in tasks:
            if task_id in self.tables.tasks:
                self.lifecycle.keeping.watch(session, [task_id])
            else:
                self._watches.setdefault(task_id, []).append(session)

    def holding(self, session: Session, objects: list[int], handles: list[int]) -> None:
        """A submitter that comes back has these objects and handles, and no others but those it is being sent."""
        keeping = self.lifecycle.keeping
        if self.active:
            self._handles.update(handles)
        sent = [result for message in session.unacked for result in message.results] + session.results
        expected = {result.payload.id for result in sent if isinstance(result.payload, ObjectRef)}
        keeping.release(session, sorted(session.objects - expected - set(objects)))
        expected = {handle for result in sent for handle in result.handles or ()}
        keeping.unwatch(session, sorted(session.held - expected - set(handles)))
        for object_id in objects:
            if keeping.need(session.id, object_id):
                session.objects.add(object_id)
            elif self.active:
                self._holding.setdefault(object_id, []).append(session)

    def dropped(self, session: Session, handles: Sequence[int] = (), objects: Sequence[int] = ()) -> None:
        """What a submitter watched or held before it was known here."""
        for kept, ids in ((self._watches, handles), (self._holding, objects)):
            for number in ids:
                if session in kept.get(number, ()):
                    kept[number].remove(session)

    def cancelled(self, tasks: list[int]) -> None:
        """Tasks that may come later are not wanted any more."""
        self._cancelled.update(task for task in tasks if task not in self.tables.tasks)

    def _submit(self, session: Session, spec: Task, now: float) -> None:
        if self.tables.sessions.get(session.id) is not session and session is not self.tables.detached:
            return  # it ended while this was parked
        missing = self._missing(session, spec)
        if missing:
            self._parked.setdefault(missing, []).append((session, spec))
            if spec.actor:
                self._parked_calls[session.id, spec.actor] = spec.id
            return
        if self._parked_calls.get((session.id, spec.actor)) == spec.id:
            del self._parked_calls[session.id, spec.actor]
        self.lifecycle.submission.submit(session, [spec], now)
        task = self.tables.tasks.get(spec.id)
        if task is None:
            self._release(spec.id)
            return
        for watcher in self._watches.pop(spec.id, ()):
            if self.tables.sessions.get(watcher.id) is watcher:
                self.lifecycle.keeping.watch(watcher, [spec.id])
        if spec.id in self._cancelled:
            self.lifecycle.cancel(session, [spec.id], now)
        held = self._held.pop(spec.id, None)
        if held is not None and not self._adopt(task, *held, now):
            self._held[spec.id] = held
        if spec.id in self._hosted:
            self._restore(task, *self._hosted.pop(spec.id))
        self._claim(task)
        self._release(spec.id)

    def _missing(self, session: Session, spec: Task) -> int:
        """A task that has to be here before this one; 0 if there is none."""
        tasks = self.tables.tasks
        if spec.id in tasks or self._closing:
            return 0
        if spec.parent:
            parent = tasks.get(spec.parent)
            if parent is None or parent.state < State.ASSIGNED:
                return spec.parent
        if not self.active:
            return 0
        if spec.hosts is not None:
            known = spec.id in self._held or spec.id in self._early
            above = session.worker is not None and session.worker.upward
            if not known and not above and session.epoch not in {0, self.tables.epoch}:
                # It may live on a node that is not back yet, of which nobody knows, and has its state there.
                return spec.id
        elif spec.actor:
            if spec.actor not in tasks:
                return spec.actor
            before = self._parked_calls.get((session.id, spec.actor), spec.id)
            if before < spec.id:
                return before  # calls of one submitter stay in their order
        for dep, payload in spec.deps or ():
            if payload is None and dep not in tasks:
                return dep
        return next((handle for handle in spec.handles or () if handle not in tasks), 0)

    def _release(self, task_id: int) -> None:
        """What waited for this task is looked at again, before anything else."""
        self._work += reversed(self._parked.pop(task_id, ()))

    # --- fitting together

    def _adopt(self, task: TaskState, worker: WorkerState, attempt: int, now: float) -> bool:
        """A task that waits to be run turns out to be with an executor already."""
        if task.state >= State.ASSIGNED or task.attempt > attempt:
            return False
        self.lifecycle.dequeue(task)
        worker.unclaimed.discard(task.id)
        self.workforce.adopt(worker, task, attempt, now)
        if task.hosted is not None:
            self.lifecycle.actors.adopted(task, worker)
        if task.spec.stream:
            self.streams.tell(task, again=True)
        message = self._blocked.pop(task.id, None)
        if message is not None:
            self.workforce.blocked(worker, task, message.inline)
        return True

    def _claim(self, task: TaskState) -> None:
        """A task whose result is here already ends, after the children that it submitted have come."""
        early = self._early.get(task.id)
        if early is None:
            return
        worker, _, result = early
        if task.state < State.ASSIGNED and task.attempt <= result.attempt:
            self.lifecycle.dequeue(task)
            task.move(State.ASSIGNED)
            task.worker, task.attempt = worker, result.attempt
            self._work.append(task)
        else:
            self._drop(self._early.pop(task.id))

    def _conclude(self, task: TaskState, now: float) -> None:
        early = self._early.pop(task.id)
        if task.state is State.DONE:
            self._drop(early)
        else:
            self.lifecycle.conclude(task, early[1], early[2], now)
            self.lifecycle.drain(now)

    def _drop(self, early: tuple[WorkerState, Receipt, TaskResult]) -> None:
        worker, receipt, result = early
        self.lifecycle.keeping.discard(worker, result)
        self.lifecycle.keeping.settle(receipt)

    def _revoke(self, task_id: int, worker: WorkerState, attempt: int) -> None:
        if worker.session is not None and self.tables.workers.get(worker.id) is worker:
            self.tables.tell(worker.session, Revoke([(task_id, attempt)]))
            self.tables.interrupts[worker.id] = worker

    # --- the end of it

    def _end(self, _: None, now: float) -> None:
        assert self._until is not None
        if now < self._until:
            self.tables.at(self._until, self._end, None)
            return
        self._until = None
        self.active = False
        self.expected.clear()
        self.workforce.pools.patient = False
        self.lifecycle.placement.recheck()
        self.lifecycle.actors.recheck()
        self._keep_hosted(now)
        self._submit_parked(now)
        self._blocked.clear()
        self._cancelled.clear()
        held, self._held = self._held, {}
        for task_id, (worker, attempt) in held.items():
            self._revoke(task_id, worker, attempt)
        self._settle_results()
        watches, self._watches = self._watches, {}
        for task_id, watchers in watches.items():
            for session in watchers:
                if self.tables.sessions.get(session.id) is session:
                    self.lifecycle.keeping.watch(session, [task_id])

    def _keep_hosted(self, now: float) -> None:
        """Actors whose submitters are gone, but that somebody else has a handle of, or calls."""
        self._parked_calls.clear()
        for number in list(self._hosted):
            if number in self._handles or number in self._parked or number in self._watches:
                self._adopt_hosted(number, now)
        self._hosted.clear()

    def _submit_parked(self, now: float) -> None:
        """What they waited for does not come any more; whoever is let in lets his children in."""
        # Those that waited for a dependency or a handle only: that is not waited for any more.
        self._submit_all(self._take_parked(), now)
        # Those that outlived their parents, which had ended before the restart.
        handles = [handle for _, _, result in self._early.values() for handle in result.handles or ()]
        wanted = {*handles, *self._watches, *self._handles}
        self._handles.clear()
        parked = self._take_parked()
        for _, spec in parked:
            if spec.id in wanted or (spec.options is not None and spec.options.detached):
                spec.parent = 0
        self._submit_all(sorted(parked, key=lambda entry: entry[1].parent != 0), now)
        # The others, whose attempts' results nobody will ask for.
        self._closing = True
        self._submit_all(self._take_parked(), now)
        self._closing = False

    def _take_parked(self) -> list[tuple[Session, Task]]:
        parked, self._parked = self._parked, {}
        return [entry for waiting in parked.values() for entry in waiting]

    def _submit_all(self, entries: list[tuple[Session, Task]], now: float) -> None:
        for session, spec in entries:
            if self.tables.sessions.get(session.id) is session:
                self.submit(session, [spec], now)

    def _settle_results(self) -> None:
        """Results that nobody asked for again: their submitters have them already, and maybe their objects."""
        keeping = self.lifecycle.keeping
        early, self._early = self._early, {}
        holding, self._holding = self._holding, {}
        for worker, receipt, result in early.values():
            if isinstance(result.payload, ObjectRef):
                keeping.adopt(worker, result.payload, holding.pop(result.payload.id, []))
            keeping.settle(receipt)
        for object_id, sessions in holding.items():
            owner = self.tables.sessions.get(session_of(object_id))
            if owner is not None and owner.worker is not None:
                keeping.adopt(owner.worker, ObjectRef(object_id, 0, ""), sessions)
