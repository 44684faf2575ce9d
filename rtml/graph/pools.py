"""How many executors there are, and what they can ever offer.

A pool starts with one sync executor per cpu, or as many as the node was told. It grows while there is work and room but
no process for it (tasks that block in `get` lend their cpu out, tasks may ask for fractions of a cpu), up to
`blocked_max` more, and shrinks to what it started with when idle.
"""

from __future__ import annotations

from typing import Final

from rtml.graph.devices import choose, gpus, sees, suits
from rtml.graph.queues import Lane
from rtml.graph.state import NodeState, Profile, Shape, TaskState, WorkerState, amounts, failure
from rtml.graph.tables import Tables, wake
from rtml.messages import ACTOR, ASYNC_ACTOR, ASYNC_EXECUTOR, EXECUTOR, ErrorInfo, KillExecutor, StartExecutor

#: Longest wait in seconds before another executor is started after several died at their start.
START_BACKOFF_MAX: Final = 5.0


class Pools:
    """Decides when an executor is started, and which requests are hopeless."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        #: executors asked for and not yet there, by role
        self.starting: dict[int, str] = {}
        #: cpus of the largest node: what asks for no more, and nothing else, always fits
        self.widest = 1.0
        #: tasks found to be hopeless during a scheduling pass
        self.doomed: list[tuple[TaskState, ErrorInfo]] = []
        self._last_worker_id = 0
        #: after a restart, nodes may come back later than those who ask for what they offer
        self.patient = False

    def sync_workers(self, node: NodeState) -> list[WorkerState]:
        """The node's sync executors that are there to stay."""
        workers = node.workers.values()
        return [worker for worker in workers if worker.role == EXECUTOR and not (worker.leaving or worker.devices)]

    def surplus(self, node: NodeState) -> bool:
        """Whether the node has more sync executors than it is to keep."""
        return node.sync > node.warm and len(self.sync_workers(node)) > node.warm

    def infeasible(self, task: TaskState) -> ErrorInfo | None:
        """Why no worker can ever run the task; None if one can, now or when its pool grows."""
        shape = task.profile.shape
        if self.patient or (not shape.extra and shape.cpu <= self.widest):
            return None
        if task.profile.alternatives:
            return self._infeasible_all(task)
        nodes = list(self.tables.nodes.values())
        if any(node.can_grow or node.supervisor is None for node in nodes):
            return None
        remotes = self.tables.remotes.values()
        if self.tables.uplink and not any(remote.upward and remote.node.cpu for remote in remotes):
            return None  # what is there above, nobody has told yet
        nodes += [remote.node for remote in remotes]
        if not nodes:
            return None
        if not any(node.could_fit(shape) for node in nodes):
            offers = "; ".join(_offer(node) for node in nodes)
            message = (
                f"task {task.profile.name!r} asks for {shape}, which no worker can ever offer (there is: {offers})"
            )
            return failure("Unschedulable", message, task)
        return self.deadlock(task) if shape.extra else None

    def _infeasible_all(self, task: TaskState) -> ErrorInfo | None:
        """The same of a task that has alternatives: why none of them can ever run."""
        base, error = task.profile, None
        for profile in base.alternatives:
            task.profile = profile
            error = self.infeasible(task)
            if error is None:
                break
        task.profile = base
        return error

    def deadlock(self, task: TaskState) -> ErrorInfo | None:
        """Whether the task needs what only its own blocked ancestors hold."""
        held: dict[str, float] = {}
        owner = task.owner
        while isinstance(owner, TaskState):
            if owner.blocked:
                for name, amount in owner.profile.shape.extra.items():
                    held[name] = held.get(name, 0.0) + amount
            owner = owner.owner
        if not held:
            return None
        for node in self.tables.nodes.values():
            if all(
                amount <= node.extra.get(name, 0.0) - held.get(name, 0.0) + 1e-9
                for name, amount in task.profile.shape.extra.items()
            ):
                return None
        what = ", ".join(amounts(held))
        message = (
            f"task {task.profile.name!r} asks for {task.profile.shape}, but its own ancestors hold {what} while they "
            "wait for it; make the parent an async function, or give it less"
        )
        return failure("ResourceDeadlock", message, task)

    def grow(self, lane: Lane, now: float, shape: Shape | None = None) -> None:
        """Ask a supervisor for one more executor: there is work and room (for `shape`), but no process for it."""
        role = lane.profile.role
        shape = shape or lane.profile.shape
        if role in self.starting.values():
            return
        for node in self.tables.nodes.values():
            supervisor = node.supervisor
            if supervisor is None or supervisor.peer is None or not node.fits(shape):
                continue
            if now < node.start_after:
                continue  # a timer is set for that moment
            devices = choose(node, shape)
            if devices is None:
                continue
            workers = [
                worker
                for worker in node.workers.values()
                if worker.role == role and not worker.dying and bool(worker.devices) == bool(devices)
            ]
            if any(worker.session is None for worker in workers):
                continue  # one is on its way
            if role == EXECUTOR and len(workers) >= node.cpu + node.blocked_max:
                if all(worker.stack for worker in workers):
                    self._nesting_limit(lane, len(workers))
                continue
            alone = lane.head().alone
            if role == ASYNC_EXECUTOR and not alone and any(_takes_more(worker, shape) for worker in workers):
                continue
            if role == ASYNC_EXECUTOR and len(workers) > node.cpu and not devices:
                continue
            self._start(node, role, devices, shape)
            return

    def start_bound(self, profile: Profile) -> None:
        """Have as many executors started as there are gpus for such calls, which are to be ready before they come."""
        shape = profile.shape
        for node in self.tables.nodes.values():
            supervisor = node.supervisor
            if supervisor is None or supervisor.peer is None or not node.binds or not node.could_fit(shape):
                continue
            able = [one for one in node.workers.values() if one.role == profile.role and sees(one, shape)]
            missing = int(node.extra["gpu"] / gpus(shape) + 1e-9) - sum(not one.dying for one in able)
            for _ in range(missing):
                devices = choose(node, shape)
                if devices:
                    self._start(node, profile.role, devices, shape)

    def start_actor(self, task: TaskState, role: str, needed: int, now: float) -> ErrorInfo | None:
        """An actor needs a process of its own: have one started, unless `needed` of its role are on their way already.

        Returns an error if there are too many on every node.
        """
        if sum(starting == role for starting in self.starting.values()) >= needed:
            return None
        full = False
        for node in self.tables.nodes.values():
            supervisor = node.supervisor
            if supervisor is None or supervisor.peer is None or not node.could_fit(task.profile.shape):
                continue
            if (
                sum(worker.role in (ACTOR, ASYNC_ACTOR) for worker in node.workers.values())
                >= self.tables.limits.actors_max
            ):
                full = True
                continue
            full = False
            shape = task.profile.shape
            devices = choose(node, shape)
            if now >= node.start_after and node.fits(shape) and devices is not None:
                self._start(node, role, devices, shape)
                return None
        if not full:
            return None
        message = (
            f"there is no room for actor {task.profile.name!r}: each node has actors_max actors already; end some "
            "(rtml.stop, rtml.kill, or drop their handles), or raise actors_max"
        )
        return failure("LimitExceeded", message, task)

    def seen(self, worker_id: int) -> None:
        """This id is taken, for ever: a process that was believed dead may still live."""
        self._last_worker_id = max(self._last_worker_id, worker_id)

    def _start(self, node: NodeState, role: str, devices: tuple[int, ...] = (), meant: Shape | None = None) -> None:
        self.seen(self._last_worker_id + 1)
        worker = WorkerState(self._last_worker_id, role, node)
        if devices:
            worker.devices, worker.meant = devices, meant
        self.tables.workers[worker.id] = worker
        node.add(worker)
        self.starting[worker.id] = role
        assert node.supervisor is not None
        self.tables.tell(node.supervisor, StartExecutor(role, worker.id, list(devices)))

    def replace(self, worker: WorkerState, now: float) -> None:
        """An executor died: keep as many warm ones as the node is to have, but do not start dying ones in a loop."""
        node = worker.node
        if worker.session is None:
            node.start_failures += 1
            node.start_after = now + min(START_BACKOFF_MAX, 0.05 * 2 ** min(node.start_failures, 10))
            self.tables.at(node.start_after, wake, None)
            return
        connected = node.supervisor is not None and node.supervisor.peer is not None
        missed = worker.role == EXECUTOR and not worker.leaving and not worker.devices
        if connected and missed and len(self.sync_workers(node)) < node.warm:
            self._start(node, EXECUTOR)

    def kill(self, worker: WorkerState, reason: str) -> None:
        """End a process that does not react; its tasks are dealt with when its death is reported."""
        supervisor = worker.node.supervisor
        if not worker.dying and worker.id in self.tables.workers:
            worker.dying = True
            if supervisor is not None:  # else it is told when it is back
                self.tables.tell(supervisor, KillExecutor(worker.id, reason))

    def _nesting_limit(self, lane: Lane, executors: int) -> None:
        head = lane.head()
        message = (
            f"all {executors} executors of the node are blocked in get(); use async functions for tasks that wait, "
            "or raise blocked_max"
        )
        victim = head
        while isinstance(victim.owner, TaskState):
            victim = victim.owner
        self.doomed.append((victim, failure("NestingLimit", message, head)))


def _takes_more(worker: WorkerState, shape: Shape) -> bool:
    """Whether an async executor accepts further tasks."""
    return not (worker.lagging or worker.secluded) and suits(worker, shape)


def _offer(node: NodeState) -> str:
    parts = [f"cpu={node.cpu:g}", *amounts(node.extra)]
    return f"{node.name or 'node'} with {', '.join(parts)}"
