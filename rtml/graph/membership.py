"""Who is there: submitters, executors and nodes that come, go, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rtml.graph.lifecycle import Lifecycle
from rtml.graph.placement import Placement
from rtml.graph.recovery import Recovery
from rtml.graph.remote import Remote
from rtml.graph.state import NodeState, Session, State, TaskState, WorkerState, failure
from rtml.graph.tables import Close, Knock, Send, Tables
from rtml.graph.workforce import Workforce
from rtml.messages import (
    ASYNC_EXECUTOR,
    CLIENT,
    DISPATCHER,
    EXECUTORS,
    SUPERVISOR,
    WIRE_VERSION,
    ExecutorDied,
    ExecutorStarted,
    Free,
    Hello,
    KillExecutor,
    Node,
    Refused,
    Revoke,
    Welcome,
)

#: Times that a coroutine's process may die while it awaits, before it runs alone.
_ADRIFT_MAX: Final = 2

#: Longest time in seconds that a submitter may ask to be waited for.
GRACE_MAX: Final = 3600.0


class Membership:
    """Decides what a peer's coming and going means for the tasks it has to do with."""

    def __init__(
        self,
        tables: Tables,
        workforce: Workforce,
        placement: Placement,
        lifecycle: Lifecycle,
        recovery: Recovery,
        remote: Remote,
    ) -> None:
        self.tables = tables
        self.pools = workforce.pools
        self.workforce = workforce
        self.placement = placement
        self.lifecycle = lifecycle
        self.recovery = recovery
        self.remote = remote
        #: Whether a peer has shown that it may only submit; set by whoever has the links.
        self.is_guest: Callable[[int], bool] = lambda peer: False
        #: executors whose end was reported: their last messages may come after that. Ids are never used again.
        self._dead: set[int] = set()

    # --- hello

    def hello(self, peer: int, hello: Hello, now: float) -> Session | None:
        """A peer introduces itself; None if it is refused."""
        tables = self.tables
        reason = self._refusal(peer, hello)
        if reason:
            tables.effects.append(Send(peer, [Refused(reason)]))
            tables.effects.append(Close(peer))
            return None
        session = tables.sessions.get(hello.session)
        if session is None:
            session = Session(hello.session, hello.role, hello.name)
            tables.sessions[hello.session] = session
            if hello.epoch == tables.epoch:
                # It was given up meanwhile. It goes on from the serials that it knows: all of them are below this.
                session.serial = tables.next_sequence()
        elif session.peer is not None and session.peer != peer:
            tables.peers.pop(session.peer, None)
            tables.effects.append(Close(session.peer))
        session.peer = peer
        session.gone_at = None
        session.returned = hello.epoch == tables.epoch
        session.timings = hello.timings
        session.grace = min(hello.grace, GRACE_MAX) or tables.limits.session_grace
        session.data_only = hello.data_only
        session.epoch = hello.epoch
        # What it still waits for it will ask for again.
        session.watch_results = []
        if hello.epoch not in {0, tables.epoch}:
            self.recovery.begin(now)
        tables.peers[peer] = session
        cpus = sum(node.cpu for node in tables.nodes.values())
        session.outbox[:0] = [Welcome(tables.epoch, cpus=cpus, data=tables.endpoints()), *tables.resend(session)]
        tables.dirty[session.id] = session
        if hello.role in EXECUTORS:
            self._executor(session, hello, now)
        elif hello.role == DISPATCHER:
            self._dispatcher(session, hello, now)
        return session

    def _dispatcher(self, session: Session, hello: Hello, now: float) -> None:
        """Another dispatcher joins below this one."""
        for other in list(self.tables.remotes.values()):
            gone = other.session is None or other.session.peer is None
            if other.node.name == hello.name and other.id != hello.worker and gone and not other.upward:
                # Its supervisor has started it again. What it ran goes there once more, where its executors have it.
                self.died(ExecutorDied(other.id, "restarted"), now)
        fresh = hello.worker not in self.tables.remotes
        worker = self.remote.hello(session, hello, now)
        if fresh:
            self.recovery.holds(worker, hello.holds, now)
        self.workforce.joined(worker, now)
        if hello.data and worker.node.data != hello.data:
            worker.node.data = hello.data
            self._knock(worker, lost=False)
            self.lifecycle.lineages.gone.pop(hello.data, None)
            for client in self.tables.sessions.values():
                if client.role == CLIENT and client.peer is not None:
                    self.tables.tell(client, Welcome(self.tables.epoch, data=self.tables.endpoints()))

    def dialled(self, peer: int, now: float) -> None:
        """The link to the dispatcher above is there: introduce this node."""
        session = self.remote.uplink()
        session.peer = peer
        session.gone_at = None
        self.tables.peers[peer] = session
        assert session.worker is not None
        self.workforce.joined(session.worker, now)
        self.remote.introduce(session, now)

    def _refusal(self, peer: int, hello: Hello) -> str:
        if hello.role != CLIENT and self.is_guest(peer):
            return (
                f"the key that was shown is a client's, which may not join as {hello.role}; nodes show the secret of"
                " a node.public or node-NAME.public in the dispatcher's directory of keys"
            )
        if hello.wire[0] != WIRE_VERSION[0]:
            return (
                f"wire version {hello.wire[0]}.{hello.wire[1]} does not match the dispatcher's "
                f"{WIRE_VERSION[0]}.{WIRE_VERSION[1]}; install the same major version of rtml on both sides"
            )
        if hello.worker in self._dead:
            return f"{hello.role} {hello.worker} has been given up"
        worker = self.tables.workers.get(hello.worker) if hello.worker else None
        other = worker.session if worker is not None else None
        if other is not None and other.id != hello.session and other.peer is not None:
            return f"executor {hello.worker} is here already"
        known = self.tables.sessions.get(hello.session)
        if known is not None and (known.role != hello.role or known.name != hello.name):
            return f"session id {hello.session:x} is taken; choose another"
        return ""

    def _executor(self, session: Session, hello: Hello, now: float) -> None:
        tables = self.tables
        worker = tables.workers.get(hello.worker)
        if worker is None:
            node = next(iter(tables.nodes.values()), None)
            if node is None:
                node = tables.nodes[""] = NodeState("", 0.0, {})
            self.pools.seen(hello.worker)
            worker = WorkerState(hello.worker, hello.role, node)
            tables.workers[worker.id] = worker
            node.add(worker)
        fresh = worker.session is not session
        worker.session = session
        session.worker = worker
        worker.devices = tuple(hello.devices)
        worker.recalling = False
        worker.functions.clear()
        self.lifecycle.readiness.joined(worker)
        worker.safe_sent = 0
        if fresh:
            self.recovery.holds(worker, hello.holds, now)
        else:
            if worker.freed:
                tables.tell(session, Free(list(worker.freed)))
            # Who still waits will say so again.
            while worker.stack:
                self.workforce.resumed(worker, worker.stack[-1][0], now)
        self.workforce.joined(worker, now)
        self.lifecycle.actors.touch(worker)
        self.recovery.spoke(worker.id)

    def reconcile(self, worker: WorkerState, hello: Hello, now: float) -> None:
        """After a rejoin, once its results are in: what it never got runs elsewhere, ghosts are revoked again."""
        holds = set(hello.holds)
        missing = [(task.id, task.attempt) for task in worker.queue.values() if (task.id, task.attempt) not in holds]
        for task in self.workforce.returned(worker, missing, now):
            self.lifecycle.again(task, now)
        ghosts = [(task.id, task.attempt) for task in worker.queue.values() if task.state is State.DONE]
        if ghosts and worker.session is not None:
            self.tables.tell(worker.session, Revoke(ghosts))
            self.tables.interrupts[worker.id] = worker
        self.lifecycle.drain(now)

    # --- nodes

    def node(self, session: Session, message: Node, now: float) -> None:
        """A supervisor says what its node offers, and which executors live there."""
        tables = self.tables
        node = tables.nodes.get(message.name) or tables.nodes.pop("", None)
        extra = dict(message.resources)
        if message.gpu:
            extra["gpu"] = message.gpu
        if message.memory:
            extra["memory"] = float(message.memory)
        if node is None:
            node = NodeState(message.name, message.cpu, extra)
        else:
            node.name = message.name
            node.free_cpu += message.cpu - node.cpu
            node.cpu = message.cpu
            for name in extra | node.extra:
                more = extra.get(name, 0.0) - node.extra.get(name, 0.0)
                node.free_extra[name] = node.free_extra.get(name, 0.0) + more
            node.extra = extra
        tables.nodes[message.name] = node
        node.supervisor = session
        node.binds = message.binds
        node.blocked_max = message.blocked_max
        node.can_grow = message.can_grow
        node.warm = max(1.0, message.cpu, message.workers)
        for worker_id, role, _pid in message.executors:
            worker = tables.workers.get(worker_id)
            if worker is None:
                self.pools.seen(worker_id)
                worker = WorkerState(worker_id, role, node)
                tables.workers[worker_id] = worker
            node.add(worker)
            worker.node = node
            if worker.dying and session.peer is not None:
                self.tables.tell(session, KillExecutor(worker_id, "the last order to end it may be lost"))
            if worker.session is None and session.epoch not in {0, tables.epoch}:
                self.recovery.expect(worker_id, now)
        alive = {listed[0] for listed in message.executors}
        for worker in [worker for worker in node.workers.values() if worker.id not in alive]:
            self.died(ExecutorDied(worker.id, "gone when the supervisor came back"), now)
        self.placement.recheck()
        self.lifecycle.readiness.upset()
        if message.leaving and not self.placement.spreading.leaving:
            self.placement.spreading.leaving = True
            self.remote.return_all()
        self.placement.spreading.offer_all()

    def started(self, message: ExecutorStarted) -> None:
        """A supervisor forked an executor on its own account (to replace a dead one)."""
        # Nothing to do until it says Hello; the record is made then.

    # --- leaving

    def gone(self, peer: int, now: float) -> None:
        """A link is closed. Its session may come back."""
        session = self.tables.peers.pop(peer, None)
        if session is None or session.peer != peer:
            return
        session.peer = None
        session.gone_at = now
        limits = self.tables.limits
        if session.role == SUPERVISOR:
            for node in self.tables.nodes.values():
                if node.supervisor is session:
                    node.supervisor = None
            self.tables.sessions.pop(session.id, None)
        elif session.worker is not None:
            self.tables.at(now + limits.worker_grace, self._worker_grace_over, session)
            self._knock(session.worker, lost=True)
        else:
            self.tables.at(now + session.grace, self._session_grace_over, session)

    def _knock(self, worker: WorkerState, *, lost: bool) -> None:
        if worker.role == DISPATCHER and not worker.upward and worker.node.data:
            self.tables.effects.append(Knock(worker.id, worker.node.data, lost))

    def knocked(self, worker_id: int, now: float) -> None:
        """Nothing listens any more where this node's data endpoint was: all of its processes have ended.

        Its supervisor has the listening socket, and ends with all that it has started.
        """
        worker = self.tables.workers.get(worker_id)
        if worker is not None and (worker.session is None or worker.session.peer is None):
            self.died(ExecutorDied(worker_id, "its link is broken and nothing listens there any more"), now)

    def _worker_grace_over(self, session: Session, now: float) -> None:
        worker = session.worker
        if session.gone_at is None or now < session.gone_at + self.tables.limits.worker_grace * 0.99:
            return
        if worker is None or self.tables.workers.get(worker.id) is not worker or session.peer is not None:
            return
        supervisor = worker.node.supervisor
        if supervisor is not None and not worker.dying:
            # It may still be running: only its end allows to run its tasks elsewhere.
            worker.dying = True
            self.tables.tell(supervisor, KillExecutor(worker.id, "not heard of any more"))
            session.gone_at = now
            self.tables.at(now + self.tables.limits.worker_grace, self._worker_grace_over, session)
        else:
            self.died(ExecutorDied(worker.id, "not heard of any more"), now)

    def _session_grace_over(self, session: Session, now: float) -> None:
        if session.peer is None and self.tables.sessions.get(session.id) is session:
            if session.gone_at is not None and now < session.gone_at + session.grace * 0.99:
                return
            self.end_session(session, now)

    def end_session(self, session: Session, now: float) -> None:
        """A submitter will not come back: end its graphs, free what it held."""
        if session.peer is not None:
            del self.tables.peers[session.peer]
            session.peer = None
        self.tables.sessions.pop(session.id, None)
        self.tables.dirty.pop(session.id, None)
        for task in list(session.children.values()):
            if task.hosted is not None and task.profile.detached:
                del session.children[task.id]
                task.session = task.owner = self.tables.detached
                task.owner.children[task.id] = task
            else:
                self.lifecycle.cancel_tree(task, "its submitter is gone")
        self.lifecycle.drain(now)
        self.lifecycle.keeping.forget_session(session)
        self.lifecycle.readiness.end_session(session)

    def may_speak(self, worker_id: int) -> bool:
        """Whether more may come of a process that has ended: its link is open, and results are missing."""
        worker = self.tables.workers.get(worker_id)
        if worker is None or worker.session is None or worker.session.peer is None:
            return False
        worker.leaving = True  # it gets nothing more
        tasks = (*worker.queue.values(), *(task for task, _ in worker.stack))
        return any(task.state is not State.DONE for task in tasks)

    def died(self, message: ExecutorDied, now: float) -> None:
        """An executor process ended: its tasks run elsewhere, and who is to blame is charged (D7)."""
        self._dead.add(message.worker)
        worker = self.tables.workers.pop(message.worker, None)
        self.recovery.spoke(message.worker)
        if worker is None:
            return
        self.workforce.left(worker)
        blameless = self.lifecycle.readiness.died(worker, message.reason)
        self.pools.replace(worker, now)
        if worker.role == DISPATCHER:
            self.lifecycle.lineages.gave_up(worker.node.data)
        session = worker.session
        lost = [*(task for task, _ in worker.stack), *worker.queue.values()]
        running = set(message.running)
        blocked = [task for task, _ in worker.stack]
        inside = [task for task in worker.queue.values() if task.id in running]
        if not inside:
            # The innermost one that waits was inside of `get`, or of what it does beside.
            inside = [task for task in blocked[-1:] if task.id in running]
        # Coroutines that all awaited, and nobody ended the process: what one left behind (a thread, a timer) may have.
        adrift = not inside and worker.role == ASYNC_EXECUTOR and not message.reason.startswith("killed: ")
        worker.queue, worker.stack = {}, []
        for task in lost:
            task.worker = None if task.state is not State.DONE else task.worker
        for task in blocked:
            task.apart = True
        if worker.actor is not None:
            for task in self.lifecycle.actors.died(worker, lost, message):
                self.lifecycle.again(task, now)
            lost = []
        if worker.role == DISPATCHER:
            for task in self.lifecycle.actors.lost(lost, worker, message.reason):
                self.lifecycle.again(task, now)
            lost = [task for task in lost if task.hosted is None and task.actor is None]
        for task in lost:
            if task.state is State.DONE:
                continue
            if task.spare:
                self.lifecycle.hedging.gone(task)
            elif blameless:
                self.lifecycle.again(task, now)
            elif task in inside and len(inside) == 1:
                self._charge(task, message.reason, now)
            elif task in inside:
                self._suspect(task, message.reason, now)
            elif adrift:
                self._adrift(task, message.reason, now)
            else:
                self.lifecycle.again(task, now)
        if worker.role == DISPATCHER:
            self.remote.died(worker, now)
        self.lifecycle.drain(now)
        self.recovery.died(worker)
        if session is not None:
            if session.peer is not None:
                self.tables.peers.pop(session.peer, None)
                self.tables.effects.append(Close(session.peer))
                session.peer = None
            session.gone_at = now
            self.end_session(session, now)
            if not self.recovery.active:
                self.lifecycle.keeping.sweep(worker)

    def _charge(self, task: TaskState, reason: str, now: float) -> None:
        """The only task that was inside a function: the crash is its own."""
        task.failures += 1
        task.alone = True
        if task.failures > task.profile.retries:
            attempts = "attempt" if task.failures == 1 else "attempts"
            message = (
                f"the executor died ({reason}) while it ran task {task.profile.name!r}, "
                f"{task.failures} {attempts} in all"
            )
            self.lifecycle.fail(task, failure("WorkerDied", message, task))
        else:
            self.lifecycle.again(task, now)

    def _adrift(self, task: TaskState, reason: str, now: float) -> None:
        """It awaited when its process died: run it alone when that happens again and again."""
        if task.alone:
            self._charge(task, reason, now)
        else:
            task.suspected += 1
            task.alone = task.suspected > _ADRIFT_MAX
            self.lifecycle.again(task, now)

    def _suspect(self, task: TaskState, reason: str, now: float) -> None:
        """One of several that were inside a function: run it alone, so that a second crash tells."""
        task.alone = True
        task.suspected += 1
        if task.suspected > 2:
            self._charge(task, reason, now)
        else:
            self.lifecycle.again(task, now)
