"""The supervisor: starts, kills and signals executors, reports their deaths, restarts the dispatcher."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    ASYNC_EXECUTOR,
    EXECUTOR,
    SUPERVISOR,
    ExecutorDied,
    ExecutorStarted,
    Hello,
    Interrupt,
    KillExecutor,
    Message,
    Rehello,
    StartExecutor,
    Welcome,
)
from rtml.messages import Node as NodeMessage
from tests.sim.actors import ActorProcess, AsyncActorProcess
from tests.sim.executor import AsyncExecutor, Executor, SyncExecutor
from tests.sim.plans import FUNCTIONS
from tests.sim.process import Process
from tests.sim.world import Violation, World

if TYPE_CHECKING:
    from tests.sim.dispatcher import Dispatcher

_KINDS: dict[str, type[Executor]] = {
    EXECUTOR: SyncExecutor,
    ASYNC_EXECUTOR: AsyncExecutor,
    ACTOR: ActorProcess,
    ASYNC_ACTOR: AsyncActorProcess,
}

#: Labels and fractions of the node.
EXTRA = {"gpu": 1.0, "disk": 1.0}


class Node(Process):
    """One supervisor with its executors."""

    def __init__(self, world: World, dispatcher: Dispatcher) -> None:
        super().__init__(world, "supervisor", dispatcher)
        self.session = world.new_session()
        self.epoch = 0
        self.executors: dict[int, Executor] = {}

    def start(self) -> None:
        """Start the first executors, and connect."""
        cpus = self.world.settings.cpus
        for worker in range(1, cpus + 1):
            self._fork(worker, EXECUTOR)
        self._fork(cpus + 1, ASYNC_EXECUTOR)
        self.connect()

    def introduce(self) -> list[Message]:
        settings = self.world.settings
        executors = [(executor.worker, executor.role, executor.worker) for executor in self.executors.values()]
        return [
            Hello(SUPERVISOR, self.session, name="node", epoch=self.epoch),
            NodeMessage(
                "node",
                float(settings.cpus),
                gpu=EXTRA["gpu"],
                resources={"disk": EXTRA["disk"]},
                executors=executors,
                blocked_max=settings.blocked_max,
            ),
        ]

    def poke(self) -> None:
        inbox, self.inbox = self.inbox, []
        for messages in inbox:
            for message in messages:
                self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case StartExecutor():
                self._fork(message.worker, message.role)
                self.send([ExecutorStarted(message.worker, message.role, message.worker)])
            case KillExecutor():
                if message.worker in self.executors:
                    self.kill(self.executors[message.worker], f"killed: {message.reason}")
            case Interrupt():
                if message.worker in self.executors:
                    self.executors[message.worker].interrupt()
            case Welcome():
                self.epoch = message.epoch
            case Rehello():
                self.epoch = message.epoch
                self.send(self.introduce())
            case _:
                pass

    def _fork(self, worker: int, role: str) -> None:
        if worker in self.executors:
            raise Violation(f"executor id {worker} is given twice")
        executor = self.executors[worker] = _KINDS[role](self.world, worker, self.dispatcher, self)
        self.world.log(self.name, "forks", executor.name)
        executor.after(self.world.random.uniform(0.0, 0.02), executor.connect)

    def kill(self, executor: Executor, reason: str) -> None:
        """The process ends now; it is noticed a little later."""
        if not executor.alive:
            return
        self.world.log(executor.name, "dies", reason)
        running = executor.running()
        for task in running:
            self.world.died_inside[task] = self.world.died_inside.get(task, 0) + 1
        executor.die()
        self.after(self.world.latency(), self._reap, executor, reason, running)

    def _reap(self, executor: Executor, reason: str, running: list[int]) -> None:
        del self.executors[executor.worker]
        self.send([ExecutorDied(executor.worker, reason, running)])

    def check_capacity(self) -> None:
        """Labels and fractions are never given twice, unless somebody alive was believed dead."""
        if self.world.disturbed:
            return
        used: dict[str, float] = defaultdict(float)
        for executor in self.executors.values():
            if executor.alive:
                for level in executor.levels:
                    options = FUNCTIONS[level.attempts[0].function].options
                    used["gpu"] += options.gpu or 0.0
                    for name, amount in (options.resources or {}).items():
                        used[name] += amount
        for name, amount in used.items():
            if amount > EXTRA[name] + 1e-9:
                raise Violation(f"{amount:g} of {EXTRA[name]:g} {name} are in use")
