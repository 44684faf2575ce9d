"""The dispatcher's brain: messages and a clock in, effects out.

    effects = core.handle(batch, now)      # batch: everything that arrived in one wake-up
    effects = core.settle()                # once those are carried out: what nobody waits for
    core.next_wakeup()                     # when to call again if nothing arrives

A wake-up has one `now`. All messages are applied first, then one scheduling pass places what is ready (so it decides
with everything known), then each peer gets one frame. These parts share the tables and own the decisions:

    Membership   who is there, what a death or a return means
    Submission   how a task comes to be, or why not
    Lifecycle    a task from there to its one result
    Admission    which graphs are let in, and what was learned of them
    Keeping      what is kept for whom, and when it is forgotten
    Actors       tasks that go on until their actor ends, and the calls on them
    Hedging      which attempts get a second one beside them
    Placement    which ready task runs where, and in which batch
    Workforce    what each executor has and occupies
    Recovery     what is known again after a restart
    Pools        how many executors there are, and what can never run
    Readiness    which functions executors keep ready, and which are forgotten

The way of a request: `Submit` -> Submission.submit -> Placement.push -> Placement.schedule -> `Assign` ...
`Finished` -> Lifecycle.finished -> Placement.reported, Lifecycle.end -> `Results`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from rtml.graph.actors import Actors
from rtml.graph.admission import Admission
from rtml.graph.hedging import Hedging
from rtml.graph.interrupts import Interrupts
from rtml.graph.keeping import Keeping
from rtml.graph.lifecycle import Lifecycle
from rtml.graph.membership import Membership
from rtml.graph.outgoing import flush, pass_on
from rtml.graph.placement import Placement
from rtml.graph.policy import Scheduling
from rtml.graph.pools import Pools
from rtml.graph.readiness import Readiness
from rtml.graph.recovery import Recovery
from rtml.graph.remote import Remote
from rtml.graph.snapshot import snapshot
from rtml.graph.state import Session, WorkerState
from rtml.graph.streams import Streams
from rtml.graph.tables import Answer, Effect, Ended, Limits, Send, Tables, wake
from rtml.graph.workforce import Workforce
from rtml.messages import (
    CANCELLED,
    DISPATCHER,
    EXECUTOR,
    EXECUTORS,
    SUPERVISOR,
    Ack,
    Blocked,
    Cancel,
    Checkpoint,
    Consumed,
    Define,
    ExecutorDied,
    ExecutorStarted,
    Farewell,
    Finished,
    HandOver,
    Heartbeat,
    Hello,
    Holding,
    Hosting,
    Items,
    Keep,
    Logs,
    LoopLag,
    Message,
    Moved,
    Node,
    Prepared,
    Query,
    Refused,
    Rehello,
    Release,
    Resumed,
    Returned,
    Submit,
    TaskResult,
    Unwatch,
    Watch,
)

#: Of a wake-up: (link number, its messages), or (link number, None) when the link closed.
Arrivals = Sequence[tuple[int, list[Message] | None]]


#: Messages of plain results that are forgotten together: acknowledgements that come with submissions are looked at when
#: there are so many.
ACKS_LATE: Final = 8

#: Seconds in which the last messages of a process may come that has left in order, after its supervisor's report.
LAST_WORDS: Final = 0.5


class Core:
    """All decisions of a dispatcher.

    Args:
        epoch: a number that no earlier dispatcher of these peers had (random).
        limits: bounds on everything.
        uplink: this node's name for the dispatcher above it; "" if there is none.
        scheduling: in which order tasks run.
    """

    def __init__(
        self, epoch: int, limits: Limits | None = None, uplink: str = "", scheduling: Scheduling | None = None
    ) -> None:
        scheduling = scheduling or Scheduling()
        self.tables = Tables(epoch, limits or Limits(), uplink)
        self.pools = Pools(self.tables)
        self.workforce = Workforce(self.tables, self.pools)
        self.placement = Placement(self.tables, self.pools, self.workforce, scheduling)
        self.keeping = Keeping(self.tables)
        self.readiness = Readiness(self.tables)
        self.readiness.on_bound = self.pools.start_bound
        self.admission = Admission(self.tables, scheduling)
        self.actors = Actors(self.tables, self.workforce, self.placement, self.pools)
        self.hedging = Hedging(self.tables, self.workforce, self.placement)
        self.lifecycle = Lifecycle(
            self.tables, self.workforce, self.placement, self.keeping, self.readiness, self.admission, self.actors
        )
        self.lifecycle.use(self.hedging)
        self.submission = self.lifecycle.submission
        self.streams = Streams(self.tables, self.keeping)
        self.recovery = Recovery(self.tables, self.workforce, self.lifecycle, self.streams)
        self.remote = Remote(self.tables, self.lifecycle, self.recovery, self.placement.spreading)
        self.membership = Membership(
            self.tables, self.workforce, self.placement, self.lifecycle, self.recovery, self.remote
        )
        self.interrupts = Interrupts(self.tables, self.pools, self.recovery)
        self.workforce.on_timeout = self.lifecycle.timed_out
        #: deaths of executors by kind of reason, and the last lags of async executors' loops in seconds, for metrics
        self.deaths: Counter[str] = Counter()
        self.lags: deque[float] = deque(maxlen=1_000)
        #: what an operator should read in the log; the shell takes them out
        self.notices: list[str] = []
        #: messages that were dropped: unknown peer, or not for this role
        self.dropped = 0
        #: sessions with results that are safe with their submitters, which is not yet dealt with
        self._acks: list[Session] = []
        #: reported deaths that are not dealt with, and until when what the dead said last is waited for
        self._deaths: list[tuple[ExecutorDied, float]] = []
        self._handlers: dict[type, Callable[[Session, Any, float], None]] = {
            Submit: self._submit,
            Ack: self._ack,
            Define: self._define,
            Cancel: self._cancel,
            Watch: self._watch,
            Unwatch: self._unwatch,
            Release: self._release,
            Holding: self._holding,
            Query: self._query,
            Keep: self._keep,
            Farewell: self._farewell,
            Prepared: self._prepared,
            Logs: self._logs,
            Heartbeat: self._heartbeat,
            Finished: self._finished,
            Blocked: self._blocked,
            Resumed: self._resumed,
            Returned: self._returned,
            LoopLag: self._loop_lag,
            Hosting: self._hosting,
            Checkpoint: self._checkpoint,
            Items: self._items,
            Consumed: self._consumed,
            Node: self._node,
            HandOver: self._hand_over,
            Moved: self._moved,
            ExecutorStarted: self._started,
            ExecutorDied: self._died,
        }
        for kind, handler in (self.remote.handlers | {Refused: self._refused}).items():
            self._handlers[kind] = self._of_dispatcher(handler)

    def handle(self, arrivals: Arrivals, now: float) -> list[Effect]:
        """Apply everything that arrived, fire due timers, schedule, and say what is to be done.

        Args:
            arrivals: decoded messages by link, in the order of arrival.
            now: seconds of a monotonic clock; never less than in the call before.
        """
        tables = self.tables
        if self._acks:
            self._forget_acknowledged()
        for peer, messages in arrivals:
            if messages is None:
                self.membership.gone(peer, now)
            else:
                self._receive(peer, messages, now)
        # Last, because what a process sent before it died may come after its supervisor's report.
        if self._deaths:
            deaths, self._deaths = self._deaths, []
            for death, due in deaths:
                if now < due and self.membership.may_speak(death.worker):
                    self._deaths.append((death, due))
                else:
                    self.membership.died(death, now)
        if tables.timers:
            tables.run_timers(now)
        if not self.recovery.expected:
            if self.placement.active or self.workforce.crowded:
                self.placement.schedule(now)
            self.actors.schedule(now)
            if self.lifecycle.ending:
                self.lifecycle.drain(now)
            while self.pools.doomed or tables.withdrawn:
                doomed, self.pools.doomed = self.pools.doomed, []
                for task, error in doomed:
                    self.lifecycle.fail(task, error)
                withdrawn, tables.withdrawn = tables.withdrawn, []
                for task in withdrawn:
                    self.lifecycle.cancel_tree(task, "given back to the dispatcher it came from")
                self.lifecycle.drain(now)
                self.placement.schedule(now)
        if self.readiness.restless:
            self.readiness.advance()
        if tables.remotes:
            self.remote.settle()
            if arrivals:
                self.placement.spreading.changed(now)
        if tables.interrupts:
            self.interrupts.send(now)
        return flush(tables, self.remote)

    def settle(self) -> list[Effect]:
        """What can wait until the effects of `handle` are carried out: forgets what is safe with its submitter.

        Without this call the next `handle` begins with it.
        """
        if self._acks:
            self._forget_acknowledged()
            if self.tables.dirty or self.tables.effects:
                return flush(self.tables, self.remote)
        return []

    def _forget_acknowledged(self) -> None:
        acks, self._acks = self._acks, []
        for session in acks:
            self.keeping.acknowledged(session, session.acknowledged)

    def next_wakeup(self) -> float | None:
        """When `handle` is to be called again, with no arrivals if need be; None: only when something arrives."""
        timers = self.tables.timers
        return timers[0][0] if timers else None

    def take_ended(self) -> list[Ended]:
        """The records of tasks that ended since the last call."""
        return self.tables.take_ended()

    # --- messages

    def _receive(self, peer: int, messages: list[Message], now: float) -> None:
        session = self.tables.peers.get(peer)
        rejoined = None
        for message in messages:
            if session is not None:
                handler = self._handlers.get(message.__class__)
                if handler is not None:
                    handler(session, message, now)
                    continue
            if isinstance(message, Hello):
                session = self.remote.greeted(peer) or self.membership.hello(peer, message, now)
                if session is None:
                    return
                if self.remote.comparable(session):
                    rejoined = message
            elif session is not None:
                self.dropped += 1
            else:
                self.dropped += len(messages)
                self.tables.effects.append(Send(peer, [Rehello(self.tables.epoch)]))
                return
        if rejoined is not None and session is not None and session.worker is not None:
            self.membership.reconcile(session.worker, rejoined, now)

    def _submit(self, session: Session, message: Submit, now: float) -> None:
        if self.recovery.active:
            self.recovery.submit(session, message.tasks, now)
        else:
            self.submission.submit(session, message.tasks, now)
        if message.ack:
            session.acknowledged = message.ack
            if session.referring or len(session.unacked) >= ACKS_LATE:
                self._acks.append(session)

    def _ack(self, session: Session, message: Ack, now: float) -> None:
        session.acknowledged = message.serial
        self._acks.append(session)

    def _define(self, session: Session, message: Define, now: float) -> None:
        for function in message.functions:
            self.tables.define(function).definers.add(session.id)

    def _cancel(self, session: Session, message: Cancel, now: float) -> None:
        unknown = [task for task in message.tasks if task not in self.tables.tasks]
        self.lifecycle.cancel(session, message.tasks, now)
        if self.recovery.active:
            self.recovery.cancelled(unknown)
        elif session.returned and unknown:
            # They never came, or ended when nobody could be told: the submitter is not to wait for their ends.
            session.results += [TaskResult(task, 0, CANCELLED) for task in unknown]
            self.tables.dirty[session.id] = session

    def _watch(self, session: Session, message: Watch, now: float) -> None:
        if self.recovery.active:
            self.recovery.watch(session, message.tasks)
        else:
            self.keeping.watch(session, message.tasks)

    def _unwatch(self, session: Session, message: Unwatch, now: float) -> None:
        self.keeping.unwatch(session, message.tasks)
        if session.role == DISPATCHER and session.worker is not None:
            self.remote.abroad.over(session.worker, message.tasks)
        if self.recovery.active:
            self.recovery.dropped(session, handles=message.tasks)

    def _release(self, session: Session, message: Release, now: float) -> None:
        self.keeping.release(session, message.objects)
        if self.recovery.active:
            self.recovery.dropped(session, objects=message.objects)

    def _holding(self, session: Session, message: Holding, now: float) -> None:
        self.recovery.holding(session, message.objects, message.handles)

    def _query(self, session: Session, message: Query, now: float) -> None:
        if message.what == "rebuild":
            self.remote.abroad.rebuild(session, message, now)
        elif message.what == "actor":
            self.remote.abroad.find(session, message)
        elif session.peer is not None:
            self.tables.effects.append(Answer(session.peer, message))

    def _keep(self, session: Session, message: Keep, now: float) -> None:
        self.readiness.keep(session, message)

    def _prepared(self, session: Session, message: Prepared, now: float) -> None:
        worker = self._worker_of(session)
        if worker is not None:
            self.readiness.prepared(worker, message)

    def _heartbeat(self, session: Session, message: Heartbeat, now: float) -> None:
        """It is alive: that was all."""

    def _logs(self, session: Session, message: Logs, now: float) -> None:
        pass_on(self.tables, message.lines)

    # --- messages of executors

    def _worker_of(self, session: Session) -> WorkerState | None:
        if session.worker is None:
            self.dropped += 1
        return session.worker

    def _finished(self, session: Session, message: Finished, now: float) -> None:
        worker = session.worker
        if worker is None or message.serial <= worker.serial:
            self.dropped += worker is None
            return  # sent again after a reconnect, and already known
        worker.serial = message.serial
        if worker.role == DISPATCHER:
            self.remote.finished(worker, message.results)
        if worker.unclaimed:
            worker.unclaimed.difference_update([result.id for result in message.results])
        if self.recovery.active:
            self.recovery.finished(worker, message, now)
        else:
            self.lifecycle.finished(worker, message, now)

    def _blocked(self, session: Session, message: Blocked, now: float) -> None:
        worker = self._worker_of(session)
        if worker is None:
            return
        self._take_back(worker, message.returned, now)
        task = worker.queue.get(message.task)
        if worker.role != EXECUTOR:
            return  # it holds nothing that could be lent out
        if task is not None and task.attempt == message.attempt and task.spare:
            # It is there to be quick, not to wait; and its children would be run for the other one.
            self.hedging.drop(task, now)
        elif task is not None and task.attempt == message.attempt:
            if task.graph.plan is not None and worker.role == EXECUTOR:
                task.graph.plan.charge(now - worker.head_since)
            self.workforce.blocked(worker, task, message.inline)
        elif self.recovery.active:
            self.recovery.blocked(worker, message)

    def _resumed(self, session: Session, message: Resumed, now: float) -> None:
        worker = self._worker_of(session)
        if worker is not None and worker.stack and worker.stack[-1][0].id == message.task:
            self.workforce.resumed(worker, worker.stack[-1][0], now)
        else:
            self.recovery.resumed(message.task)

    def _returned(self, session: Session, message: Returned, now: float) -> None:
        worker = self._worker_of(session)
        if worker is not None:
            worker.recalling = False
            worker.leaving = worker.leaving or message.leaving
            self._take_back(worker, message.attempts, now)

    def _take_back(self, worker: WorkerState, attempts: list[tuple[int, int]], now: float) -> None:
        if worker.unclaimed:
            worker.unclaimed.difference_update([task for task, _ in attempts])
        if self.recovery.active:
            self.recovery.returned(worker, attempts)
        for task in self.workforce.returned(worker, attempts, now):
            self.lifecycle.again(task, now)
            if task.profile.prompt:
                self.lifecycle.freshness.returned(task)
        self.lifecycle.drain(now)

    def _loop_lag(self, session: Session, message: LoopLag, now: float) -> None:
        worker = self._worker_of(session)
        if worker is not None:
            worker.lagging = message.lag > 0
            if worker.lagging:
                self.lags.append(message.lag)

    def _hosting(self, session: Session, message: Hosting, now: float) -> None:
        worker = self._worker_of(session)
        if worker is not None and not message.attempt and worker.role == DISPATCHER:
            self.remote.abroad.told(worker, message)
        elif worker is not None:
            self.recovery.hosting(worker, message, now)

    def _items(self, session: Session, message: Items, now: float) -> None:
        worker = self._worker_of(session)
        if worker is not None:
            self.streams.items(worker, message)

    def _farewell(self, session: Session, message: Farewell, now: float) -> None:
        if session.worker is None and session.role not in {*EXECUTORS, DISPATCHER, SUPERVISOR}:
            self.membership.end_session(session, now)

    def _consumed(self, session: Session, message: Consumed, now: float) -> None:
        self.streams.consumed(session, message)

    def _checkpoint(self, session: Session, message: Checkpoint, now: float) -> None:
        if self._worker_of(session) is not None:
            self.remote.abroad.checkpoint(session, message)

    # --- messages of other dispatchers

    def connected(self, peer: int, now: float) -> list[Effect]:
        """The link `peer` to the dispatcher above this one is there (again)."""
        self.membership.dialled(peer, now)
        return flush(self.tables, self.remote)

    def knocked(self, worker: int, now: float) -> list[Effect]:
        """Nothing listens any more where this node's data endpoint was (see `Knock`)."""
        self.membership.knocked(worker, now)
        return flush(self.tables, self.remote)

    def _refused(self, session: Session, message: Refused, now: float) -> None:
        if session.worker is not None and session.worker.upward:
            self.notices.append(f"the dispatcher above refuses this node, which joins anew: {message.reason}")
            self.membership.died(ExecutorDied(session.worker.id, "refused"), now)

    def _of_dispatcher(self, handler: Callable[[Session, Any, float], None]) -> Callable[[Session, Any, float], None]:
        """The handler, for messages of other dispatchers only."""

        def guarded(session: Session, message: Any, now: float) -> None:
            if session.role == DISPATCHER:
                handler(session, message, now)
            else:
                self.dropped += 1

        return guarded

    # --- messages of supervisors

    def _supervises(self, session: Session) -> bool:
        """Only a supervisor speaks for processes; from anybody else it is dropped."""
        self.dropped += session.role != SUPERVISOR
        return session.role == SUPERVISOR

    def _node(self, session: Session, message: Node, now: float) -> None:
        if self._supervises(session):
            self.membership.node(session, message, now)

    def _hand_over(self, session: Session, message: HandOver, now: float) -> None:
        if self._supervises(session):
            self.lifecycle.moving.leavings(session, message, now)

    def _moved(self, session: Session, message: Moved, now: float) -> None:
        if session.role == DISPATCHER or self._supervises(session):
            self.lifecycle.moving.moved(session, message, now)

    def _started(self, session: Session, message: ExecutorStarted, now: float) -> None:
        if self._supervises(session):
            self.membership.started(message)

    def _died(self, session: Session, message: ExecutorDied, now: float) -> None:
        if not self._supervises(session):
            return
        due = now
        if message.reason == "left":
            # It has sent all that it had to say; on another link, which may be slower than its supervisor's.
            due += LAST_WORDS
            self.tables.at(due, wake, None)
        self._deaths.append((message, due))
        if message.reason != "left":
            self.notices.append(f"executor {message.worker} died: {message.reason}")
        # "signal SIGSEGV" and "exit code 3" are counted by their first word: a closed set for the metric's label.
        self.deaths[message.reason.partition(" ")[0].rstrip(":") or "unknown"] += 1

    def snapshot(self) -> dict[str, Any]:
        """Numbers for `rtml status` and metrics; costs time in proportion to the tasks."""
        return snapshot(self)
