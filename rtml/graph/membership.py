"""Who is there: submitters, executors and nodes that come, go, and come back.

After a restart the dispatcher knows nothing. Peers notice that their link broke, say `Hello` with what they hold, and
submitters send their unresolved tasks again. For `Limits.recovery` seconds, or until every executor that the
supervisor listed has spoken, nothing is scheduled; meanwhile what an executor holds is *kept* by task id and adopted
when the task's submitter brings its spec. What is unclaimed after that time is revoked.
"""

from __future__ import annotations

from rtml.graph.lifecycle import Lifecycle
from rtml.graph.placement import Placement
from rtml.graph.pools import Pools
from rtml.graph.state import NodeState, Session, State, TaskState, WorkerState, failure
from rtml.graph.tables import Close, Send, Tables
from rtml.messages import (
    ASYNC_EXECUTOR,
    EXECUTOR,
    SUPERVISOR,
    WIRE_VERSION,
    ExecutorDied,
    ExecutorStarted,
    Finished,
    Hello,
    Node,
    Refused,
    Revoke,
    Submit,
    Task,
    TaskResult,
    Welcome,
)


class Membership:
    """Decides what a peer's coming and going means for the tasks it has to do with."""

    def __init__(self, tables: Tables, pools: Pools, placement: Placement, lifecycle: Lifecycle) -> None:
        self.tables = tables
        self.pools = pools
        self.placement = placement
        self.lifecycle = lifecycle
        #: executors that existed before this dispatcher and have not spoken yet
        self._expected: set[int] = set()
        self._recovering_until: float | None = None
        #: attempts held by executors, waiting for their specs: task id -> (worker, attempt)
        self._held: dict[int, tuple[WorkerState, int]] = {}
        #: results that came before the spec: task id -> (worker, serial, result)
        self._early: dict[int, tuple[WorkerState, int, TaskResult]] = {}
        #: children whose parent's spec has not come yet
        self._orphans: dict[int, list[tuple[Session, Task]]] = {}

    @property
    def recovering(self) -> bool:
        """Whether scheduling waits for peers to report what they hold."""
        return bool(self._expected)

    # --- hello

    def hello(self, peer: int, hello: Hello, now: float) -> Session | None:
        """A peer introduces itself; None if it is refused."""
        tables = self.tables
        reason = self._refusal(hello)
        if reason:
            tables.effects.append(Send(peer, [Refused(reason)]))
            tables.effects.append(Close(peer))
            return None
        session = tables.sessions.get(hello.session)
        if session is None:
            session = Session(hello.session, hello.role, hello.name)
            session.slot = self._free_slot()
            tables.sessions[hello.session] = session
        elif session.peer is not None and session.peer != peer:
            tables.peers.pop(session.peer, None)
            tables.effects.append(Close(session.peer))
        session.peer = peer
        session.gone_at = None
        session.timings = hello.timings
        tables.peers[peer] = session
        cpus = sum(node.cpu for node in tables.nodes.values())
        session.outbox[:0] = [Welcome(tables.epoch, session.slot, cpus=cpus), *tables.resend(session)]
        tables.dirty[session.id] = session
        if hello.role in (EXECUTOR, ASYNC_EXECUTOR):
            self._executor(session, hello, now)
        return session

    def _refusal(self, hello: Hello) -> str:
        if hello.wire[0] != WIRE_VERSION[0]:
            return (
                f"wire version {hello.wire[0]}.{hello.wire[1]} does not match the dispatcher's "
                f"{WIRE_VERSION[0]}.{WIRE_VERSION[1]}; install the same major version of rtml on both sides"
            )
        known = self.tables.sessions.get(hello.session)
        if known is not None and (known.role != hello.role or known.name != hello.name):
            return f"session id {hello.session:x} is taken; choose another"
        return ""

    def _free_slot(self) -> int:
        taken = {session.slot for session in self.tables.sessions.values()}
        slot = 1
        while slot in taken:
            slot += 1
        return slot

    def _executor(self, session: Session, hello: Hello, now: float) -> None:
        tables = self.tables
        worker = tables.workers.get(hello.worker)
        if worker is None:
            node = next(iter(tables.nodes.values()), None)
            if node is None:
                node = tables.nodes[""] = NodeState("", 0.0, {})
            worker = WorkerState(hello.worker, hello.role, node)
            tables.workers[worker.id] = node.workers[worker.id] = worker
        fresh = worker.session is not session
        worker.session = session
        session.worker = worker
        worker.recalling = False
        worker.functions.clear()
        if fresh:
            for task_id, attempt in hello.holds:
                self._adopt_or_hold(worker, task_id, attempt, now)
        self.placement.joined(worker, now)
        self._expected.discard(worker.id)

    def reconcile(self, worker: WorkerState, hello: Hello, now: float) -> None:
        """After a rejoin, once its results are in: what it never got runs elsewhere, ghosts are revoked again."""
        holds = set(hello.holds)
        missing = [(task.id, task.attempt) for task in worker.queue.values() if (task.id, task.attempt) not in holds]
        for task in self.placement.returned(worker, missing, now):
            self.lifecycle.again(task, now)
        ghosts = [(task.id, task.attempt) for task in worker.queue.values() if task.state is State.DONE]
        if ghosts and worker.session is not None:
            self.tables.tell(worker.session, Revoke(ghosts))
            self.tables.interrupts[worker.id] = worker
        self.lifecycle.drain(now)

    def _adopt_or_hold(self, worker: WorkerState, task_id: int, attempt: int, now: float) -> None:
        task = self.tables.tasks.get(task_id)
        if task is None:
            if not self._held:
                self.tables.at(now + self.tables.limits.recovery, self._end_recovery, None)
            self._held[task_id] = (worker, attempt)
        else:
            self._adopt(task, worker, attempt, now)

    def _adopt(self, task: TaskState, worker: WorkerState, attempt: int, now: float) -> None:
        """A task that is already running somewhere takes up its attempt."""
        if task.state is State.READY:
            self.placement.remove(task)
        if task.state is State.WAITING:
            task.waiting = 0
            task.move(State.READY)
        if task.state is State.READY:
            self.placement.adopt(worker, task, attempt, now)

    # --- what comes before its time after a restart

    def submit(self, session: Session, message: Submit, now: float) -> None:
        """Tasks, some of which may be running or done already in an executor that outlived the last dispatcher."""
        if not (self._held or self._early or self._recovering_until is not None):
            self.lifecycle.submit(session, message.tasks, now)
            return
        for spec in message.tasks:
            self._submit_recovering(session, spec, now)

    def _submit_recovering(self, session: Session, spec: Task, now: float) -> None:
        unknown = spec.parent and spec.parent not in self.tables.tasks
        if unknown and self._recovering_until is not None and now < self._recovering_until:
            self._orphans.setdefault(spec.parent, []).append((session, spec))
            return
        held = self._held.pop(spec.id, None)
        early = self._early.pop(spec.id, None)
        self.lifecycle.submit(session, [spec], now)
        task = self.tables.tasks.get(spec.id)
        if task is not None and held is not None:
            self._adopt(task, held[0], held[1], now)
        if task is not None and early is not None and task.state is not State.DONE:
            worker, serial, result = early
            self._adopt(task, worker, result.attempt, now)
            self.lifecycle.finished(worker, Finished(serial, [result]), now)
        for child_session, child in self._orphans.pop(spec.id, ()):
            self._submit_recovering(child_session, child, now)

    def keep_early(self, worker: WorkerState, message: Finished) -> Finished:
        """Set results aside whose specs have not come yet; the message without them."""
        if self._recovering_until is None:
            return message
        known = []
        for result in message.results:
            if result.id in self.tables.tasks:
                known.append(result)
            else:
                self._held.pop(result.id, None)
                self._early[result.id] = (worker, message.serial, result)
        return Finished(message.serial, known)

    def _end_recovery(self, _: None, now: float) -> None:
        self._expected.clear()
        self._recovering_until = None
        for task_id, (worker, attempt) in self._held.items():
            if worker.session is not None:
                self.tables.tell(worker.session, Revoke([(task_id, attempt)]))
                self.tables.interrupts[worker.id] = worker
        self._held.clear()
        for worker, _serial, result in self._early.values():
            self.lifecycle.discard(worker, result)
        self._early.clear()
        orphans, self._orphans = self._orphans, {}
        for waiting in orphans.values():
            for session, spec in waiting:
                self.lifecycle.submit(session, [spec], now)

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
            for name, amount in extra.items():
                node.free_extra[name] = node.free_extra.get(name, 0.0) + amount - node.extra.get(name, 0.0)
            node.extra = extra
        tables.nodes[message.name] = node
        node.supervisor = session
        node.blocked_max = message.blocked_max
        node.can_grow = message.can_grow
        for worker_id, role, _pid in message.executors:
            worker = tables.workers.get(worker_id)
            if worker is None:
                worker = WorkerState(worker_id, role, node)
                tables.workers[worker_id] = worker
            node.workers[worker_id] = worker
            worker.node = node
            if worker.session is None:
                self._expect(worker_id, now)
        for worker in [worker for worker in tables.workers.values() if worker.session is None]:
            if worker.node is node and worker.id not in {listed[0] for listed in message.executors}:
                self.died(ExecutorDied(worker.id, "gone when the supervisor came back"), now)

    def _expect(self, worker_id: int, now: float) -> None:
        if not self._expected:
            until = now + self.tables.limits.recovery
            self._recovering_until = until
            self.tables.at(until, self._end_recovery, None)
        self._expected.add(worker_id)

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
        else:
            self.tables.at(now + limits.session_grace, self._session_grace_over, session)

    def _worker_grace_over(self, session: Session, now: float) -> None:
        worker = session.worker
        if session.peer is None and worker is not None and worker.id in self.tables.workers:
            self.died(ExecutorDied(worker.id, "not heard of any more"), now)

    def _session_grace_over(self, session: Session, now: float) -> None:
        if session.peer is None and self.tables.sessions.get(session.id) is session:
            if session.gone_at is not None and now < session.gone_at + self.tables.limits.session_grace * 0.99:
                return
            self.end_session(session, now)

    def end_session(self, session: Session, now: float) -> None:
        """A submitter will not come back: end its graphs, free what it held."""
        self.tables.sessions.pop(session.id, None)
        self.tables.dirty.pop(session.id, None)
        for task in list(session.children.values()):
            self.lifecycle.cancel_tree(task, "its submitter is gone")
        self.lifecycle.drain(now)
        self.lifecycle.forget_session(session)

    def died(self, message: ExecutorDied, now: float) -> None:
        """An executor process ended: its tasks run elsewhere, and who is to blame is charged (D7)."""
        worker = self.tables.workers.pop(message.worker, None)
        self._expected.discard(message.worker)
        if worker is None:
            return
        self.placement.left(worker)
        self.pools.replace(worker, now)
        session = worker.session
        lost = [*(task for task, _ in worker.stack), *worker.queue.values()]
        running = set(message.running)
        blocked = [task for task, _ in worker.stack]
        inside = [task for task in worker.queue.values() if task.id in running]
        if not inside and blocked:
            inside = blocked[-1:]
        worker.queue, worker.stack = {}, []
        for task in lost:
            task.worker = None if task.state is not State.DONE else task.worker
        for task in lost:
            if task.state is State.DONE:
                continue
            if task in inside and len(inside) == 1:
                self._charge(task, message.reason, now)
            elif task in inside:
                self._suspect(task, message.reason, now)
            else:
                self.lifecycle.again(task, now)
        self.lifecycle.drain(now)
        for task_id in [task_id for task_id, held in self._held.items() if held[0] is worker]:
            del self._held[task_id]
        if session is not None:
            if session.peer is not None:
                self.tables.peers.pop(session.peer, None)
                self.tables.effects.append(Close(session.peer))
                session.peer = None
            session.gone_at = now
            self.end_session(session, now)

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

    def _suspect(self, task: TaskState, reason: str, now: float) -> None:
        """One of several that were inside a function: run it alone, so that a second crash tells."""
        task.alone = True
        task.suspected += 1
        if task.suspected > 2:
            self._charge(task, reason, now)
        else:
            self.lifecycle.again(task, now)
