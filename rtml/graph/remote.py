"""Other dispatchers as peers: each is our worker, and our submitter (D2).

One session stands for both. What it delegates to us are its tasks, submitted by that session; how they end is told as a
worker tells it (`Finished`, with its own attempt numbers, kept until `Safe`). What we delegate to it are attempts of
that worker. Both sides follow the same rules, so a tree of dispatchers needs neither a second protocol nor a second
scheduler.

Handles. A task id that comes from another dispatcher and is not known here gets a *proxy*: a record without a spec,
assigned for ever to the dispatcher it came from (`TaskState.home`), which is asked for the result (`Watch`) and told
when nobody here needs it any more (`Unwatch`). So a future can be passed on through any number of dispatchers.

When a connection returns, each side says what it holds. Attempts that the other never got run elsewhere; a restarted
dispatcher is told again what was delegated to it, and finds the attempts that its executors still have (`Recovery`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from msgspec.structs import replace

from rtml.graph.abroad import Abroad
from rtml.graph.lifecycle import Lifecycle
from rtml.graph.recovery import Recovery
from rtml.graph.spreading import Spreading
from rtml.graph.state import (
    FunctionState,
    Graph,
    NodeState,
    Profile,
    Session,
    Shape,
    State,
    TaskState,
    WorkerState,
    failure,
)
from rtml.graph.tables import LetGo, Tables
from rtml.messages import (
    DISPATCHER,
    ERROR,
    SESSION_MAX,
    Cancel,
    Consumed,
    Delegate,
    Finished,
    Forgot,
    Free,
    Function,
    Hello,
    Hosted,
    Kept,
    Offer,
    Options,
    Recall,
    Reply,
    Results,
    Returned,
    Revoke,
    Safe,
    Task,
    TaskResult,
    Unwatch,
    Watch,
    WatchResults,
    Welcome,
)

#: Worker ids of dispatchers begin here: executors are numbered from 1.
WORKER_IDS = 1 << 40


class Remote:
    """The messages between dispatchers."""

    def __init__(self, tables: Tables, lifecycle: Lifecycle, recovery: Recovery, spreading: Spreading) -> None:
        self.tables = tables
        self.lifecycle = lifecycle
        self.keeping = lifecycle.keeping
        self.recovery = recovery
        self.spreading = spreading
        nothing = Function(0, "")
        #: what proxies are made of
        self._nobody = Session(0, DISPATCHER, "")
        self._function = FunctionState(nothing, Profile(nothing, Options(), Shape(0.0, {})), None)
        #: of the dispatcher above; each time that we are given up we join it under another id
        self._uplink: Session | None = None
        self._joined = 0
        #: the dispatcher above was restarted: what it says that it holds is not what it will hold
        self._told_again = False
        #: proxies made in this wake-up
        self._adopted: list[TaskState] = []
        #: those that nobody wants any more, of which their dispatchers may not have heard
        self._cancelled: set[int] = set()
        lifecycle.cancel_there = self._cancel_there
        self.abroad = Abroad(tables, lifecycle)
        self.abroad.adopt, self.abroad.inherit = self.adopt, self._inherit
        #: what to do with messages that only dispatchers say
        self.handlers: dict[type, Callable[[Session, Any, float], None]] = {
            Delegate: self.delegated,
            Offer: self.offered,
            Revoke: self.revoked,
            Recall: self.recalled,
            Safe: self._safe,
            Free: self._free,
            Welcome: self.welcomed,
            WatchResults: self.watched,
            Hosted: self.abroad.hosted,
            Reply: self.abroad.answered,
            Kept: self._kept,
            Forgot: self._forgot,
        }

    # --- peers

    def hello(self, session: Session, hello: Hello, now: float) -> WorkerState:
        """A dispatcher below introduces itself."""
        known = self.tables.remotes.get(hello.worker)
        worker = known or self._worker(session, hello.worker, hello.name)
        self._again(worker, now)
        self.lifecycle.readiness.joined(worker, again=known is not None)
        self.tables.tell(session, self._greeting(session, ""))
        return worker

    def uplink(self) -> Session:
        """The session that stands for the dispatcher above."""
        session = self._uplink
        if session is None or session.worker is None or session.worker.id not in self.tables.remotes:
            # 31 bits that differ from those of all other dispatchers, and from our own before.
            number = (self.tables.epoch + self._joined) & SESSION_MAX or 1
            self._joined += 1
            session = self._uplink = Session(number, DISPATCHER, self.tables.uplink)
            self.tables.sessions[number] = session
            self._worker(session, WORKER_IDS + number, "above").upward = True
        return session

    def introduce(self, session: Session, now: float) -> None:
        """Say who we are and what we hold to the dispatcher above."""
        worker = session.worker
        assert worker is not None
        # First of all, and what was to be said before the link broke is said again.
        session.outbox = [self._greeting(session, self.tables.uplink), *self.tables.resend(session)]
        self._again(worker, now)

    def _worker(self, session: Session, worker_id: int, name: str) -> WorkerState:
        worker = WorkerState(worker_id, DISPATCHER, NodeState(name, 0.0, {}))
        self.tables.workers[worker_id] = self.tables.remotes[worker_id] = worker
        worker.node.add(worker)
        worker.session, session.worker = session, worker
        return worker

    def _greeting(self, session: Session, name: str) -> Hello:
        """What we say first to another dispatcher, with what we hold of its."""
        holds = list(session.delegations.items())
        worker = WORKER_IDS + session.id
        data = self.tables.data
        return Hello(DISPATCHER, session.id, name=name, worker=worker, holds=holds, epoch=session.epoch, data=data)

    def _again(self, worker: WorkerState, now: float) -> None:
        """A connection has begun."""
        session = worker.session
        assert session is not None
        worker.recalling = worker.leaving = False
        worker.functions.clear()
        worker.safe_sent = 0
        self.spreading.joined(worker)
        watched = [task.id for task in self.tables.tasks.values() if task.home is worker and task.result is None]
        if watched:
            self.tables.tell(session, Watch(watched))
            if self._cancelled:
                self.tables.tell(session, Cancel(sorted(self._cancelled.intersection(watched))))
        for task in worker.queue.values():
            if task.spec.stream and task.state is State.ASSIGNED:
                # Items may have been on their way when the connection ended, and so may the word that they were taken.
                self.tables.tell(session, Consumed(task.id, task.consumed, again=True))
        self.abroad.again(worker)

    def _cancel_there(self, proxy: TaskState) -> None:
        self._cancelled.add(proxy.id)
        assert proxy.home is not None
        if proxy.home.session is not None:
            self.tables.tell(proxy.home.session, Cancel([proxy.id]))

    def welcomed(self, session: Session, message: Welcome, now: float) -> None:
        """The dispatcher above says which incarnation it is."""
        worker = session.worker
        if worker is None or not worker.upward:
            return
        before, session.epoch = session.epoch, message.epoch
        self._told_again = bool(before) and before != message.epoch
        if self._told_again:
            # It knows nothing any more, and numbers its results from the beginning.
            worker.serial = worker.safe = worker.safe_sent = 0
            worker.receipts.clear()
            self.spreading.redelegate(worker, now)

    def greeted(self, peer: int) -> Session | None:
        """The session, if this is the link to the dispatcher above: it answers our introduction."""
        session = self.tables.peers.get(peer)
        return session if session is not None and session is self._uplink else None

    def comparable(self, session: Session) -> bool:
        """Whether what the peer says that it holds is all that it will have of what we gave it."""
        return session is not self._uplink or not self._told_again

    def died(self, worker: WorkerState, now: float) -> None:
        """It is given up. Its attempts were dealt with; what is only known by handle is lost."""
        self.spreading.left(worker)
        self.abroad.left(worker, now)
        for task in [task for task in self.tables.tasks.values() if task.home is worker and task.result is None]:
            where = worker.node.name or "another dispatcher"
            if task.hosted is not None:
                error = failure("ActorDied", f"{where}, where the actor belongs, is gone")
            else:
                error = failure("ObjectLost", f"{where}, where the future's task belongs, is gone")
            self._cancelled.discard(task.id)
            self.lifecycle.arrived(task, TaskResult(task.id, 0, ERROR, error=error), now)

    # --- it is our submitter

    def delegated(self, session: Session, message: Delegate, now: float) -> None:
        """Tasks of another dispatcher."""
        worker = session.worker
        assert worker is not None
        for item in message.tasks:
            spec = item.task
            known = self.tables.tasks.get(spec.id)
            if known is not None and 0 < known.answered < item.attempt and not known.holds:
                self.keeping.safe(known)  # it has the result, and wants another attempt
                known = None
            if known is not None and known.session is session:
                session.delegations[spec.id] = item.attempt
                if known.result is not None:
                    session.results.append(replace(known.result, attempt=item.attempt))
                    self.tables.dirty[session.id] = session
                continue
            if known is not None and known.home is None:
                # It was ours before it went around: whoever sent it here is told to keep it.
                self.tables.tell(session, Returned([(spec.id, item.attempt)]))
                continue
            if known is not None:
                self._forget_proxy(known)
            self.adopt(spec.handles, worker)
            session.delegations[spec.id] = item.attempt
            if self.recovery.active:
                self.recovery.submit(session, [spec], now)
            else:
                self.lifecycle.submission.submit(session, [spec], now)
            task = self.tables.tasks.get(spec.id)
            if task is None:
                if known is not None:
                    self._refused_here(known, session)
                continue
            if known is not None:
                self._inherit(known, task)
            if task.hosted is not None:
                task.hosted.checkpoint = item.checkpoint
            task.hops, task.ancestors = item.hops, tuple(item.chain)
            task.graph.id = item.graph or spec.id
            task.data_only = item.data_only

    def revoked(self, session: Session, message: Revoke, now: float) -> None:
        """It does not want these any more."""
        attempts = message.attempts
        wanted = [task for task, attempt in attempts if session.delegations.get(task) == attempt]
        unknown = [(task, attempt) for task, attempt in attempts if task not in session.delegations]
        if wanted:
            self.lifecycle.cancel(session, wanted, now)
        if unknown:
            self.tables.tell(session, Returned(unknown))

    def recalled(self, session: Session, message: Recall, now: float) -> None:
        """It wants back what has not begun."""
        self._return(session)
        if not self.tables.withdrawn:
            self.tables.tell(session, Returned([]))

    def _safe(self, session: Session, message: Safe, now: float) -> None:
        self.keeping.acknowledged(session, message.serial)

    def _free(self, session: Session, message: Free, now: float) -> None:
        unknown = [object_id for object_id in message.objects if object_id not in self.tables.objects]
        if unknown:
            self.tables.effects.append(LetGo(unknown))  # taken over from a node that left: the endpoint has them
        self.keeping.release(session, message.objects)

    def return_all(self) -> None:
        """This node is to end: what has not begun goes back to where it came from."""
        for worker in self.tables.remotes.values():
            if worker.session is not None:
                self._return(worker.session)

    def _return(self, session: Session) -> None:
        for task in list(session.children.values()):
            if task.state in (State.READY, State.WAITING) and task.id in session.delegations:
                self.spreading.give_back(task)

    def answers(self, session: Session) -> None:
        """Put what ended for another dispatcher into its words, before it is sent."""
        results, session.results = session.results, []
        finished: list[TaskResult] = []
        returned: list[tuple[int, int]] = []
        for result in results:
            attempt = session.delegations.pop(result.id, None)
            if attempt is None:
                continue
            task = self.tables.tasks.get(result.id)
            if result.id in session.returning:
                session.returning.discard(result.id)
                returned.append((result.id, attempt))
                if task is not None:
                    self.keeping.safe(task)
            else:
                if task is not None:
                    task.answered = attempt
                finished.append(replace(result, attempt=attempt, retryable=False, timing=None))
        if returned:
            session.outbox.append(Returned(returned, leaving=self.spreading.leaving))
        if finished:
            session.serial += 1
            session.unacked.append(Results(session.serial, finished))
            session.outbox.append(Finished(session.serial, finished))

    def _inherit(self, proxy: TaskState, task: TaskState) -> None:
        """Whoever waited for the handle now waits for the task itself."""
        task.holds += proxy.holds
        task.watchers, task.dependents = proxy.watchers, proxy.dependents
        self.lifecycle.actors.moved_here(proxy, task)

    def _refused_here(self, proxy: TaskState, session: Session) -> None:
        """A task that was known by its handle came, and was not accepted: that is its end."""
        self.tables.tasks[proxy.id] = proxy
        result = next(result for result in session.results if result.id == proxy.id)
        self.lifecycle.arrived(proxy, result, 0.0)

    # --- it is our worker

    def offered(self, session: Session, offer: Offer, now: float) -> None:
        """What it can do for us."""
        if session.worker is not None:
            self.spreading.offered(session.worker, offer)
            if session.worker.upward:
                self.lifecycle.moving.takers = offer.data
            self.lifecycle.placement.recheck()

    def finished(self, worker: WorkerState, results: Iterable[TaskResult]) -> None:
        """Before its results are applied: the futures inside of them are its own."""
        for result in results:
            if result.handles:
                self.adopt(result.handles, worker, given=True)

    def _kept(self, session: Session, message: Kept, now: float) -> None:
        if session.worker is not None:
            self.lifecycle.readiness.below(session.worker, message)

    def _forgot(self, session: Session, message: Forgot, now: float) -> None:
        if session.worker is not None:
            self.lifecycle.readiness.forgotten(session.worker, message)

    # --- handles

    def adopt(self, handles: list[int] | None, home: WorkerState, given: bool = False) -> None:
        """Tasks of another dispatcher that are known here by handle from now on; it holds `given` ones for us."""
        watched = []
        for task_id in handles or ():
            known = self.tables.tasks.get(task_id)
            if known is not None:
                if known.hosted is not None and known.worker is home:
                    self.lifecycle.actors.held_again(known, home)
                elif given and known.home is not home and home.session is not None:
                    # Else each would keep it for the other for ever.
                    self.tables.tell(home.session, Unwatch([task_id]))
                continue
            spec = Task(task_id, 0, b"")
            graph = Graph(task_id, self._nobody, 0, "")
            function, nobody = self._function, self._nobody
            proxy = TaskState(task_id, spec, function, function.profile, nobody, nobody, graph, 0.0)
            graph.live = 1
            self._function.users += 1
            proxy.move(State.READY)
            proxy.move(State.ASSIGNED)
            proxy.home = home
            proxy.acknowledged = True  # kept by its holders alone
            self.tables.tasks[task_id] = proxy
            self._adopted.append(proxy)
            watched.append(task_id)
        if watched and home.session is not None:
            self.tables.tell(home.session, Watch(watched))

    def settle(self) -> None:
        """Forget those that came with something nobody wanted."""
        adopted, self._adopted = self._adopted, []
        for proxy in adopted:
            if not proxy.holds and self.tables.tasks.get(proxy.id) is proxy:
                self._forget_proxy(proxy)

    def watched(self, session: Session, message: WatchResults, now: float) -> None:
        """Results of tasks that are known here by handle."""
        worker = session.worker
        for result in message.results:
            proxy = self.tables.tasks.get(result.id)
            if proxy is None or proxy.home is not worker or worker is None or proxy.state is State.DONE:
                continue
            if result.handles:
                self.adopt(result.handles, worker, given=True)
            self._cancelled.discard(proxy.id)
            self.lifecycle.arrived(proxy, result, now)
        self.lifecycle.drain(now)

    def _forget_proxy(self, proxy: TaskState) -> None:
        """The task itself comes now."""
        del self.tables.tasks[proxy.id]
        self._cancelled.discard(proxy.id)
        if proxy.home is not None and proxy.home.session is not None:
            self.tables.tell(proxy.home.session, Unwatch([proxy.id]))
