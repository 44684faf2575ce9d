"""One seed: build the world, run it, judge it."""

from __future__ import annotations

import hashlib
import traceback
from dataclasses import dataclass

from rtml.graph.check import check
from tests.sim import actors
from tests.sim.client import Client
from tests.sim.dispatcher import Dispatcher
from tests.sim.faults import DURATION, Faults
from tests.sim.node import Node
from tests.sim.plans import Drawer
from tests.sim.world import Violation, World, line

#: Virtual seconds after the last fault in which everything must end.
PATIENCE = 60.0

#: And after the programs' ends, for acknowledgements, graces and idle executors.
SETTLE = 30.0


@dataclass(frozen=True)
class Verdict:
    """How a seed went."""

    seed: int
    error: str
    tasks: int
    events: int
    #: of the whole log
    digest: str
    #: the log's last lines
    tail: list[str]


class Simulation:
    """One seed's world."""

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.world = World(seed, verbose)
        world = self.world
        self.dispatcher = Dispatcher(world)
        self.node = Node(world, self.dispatcher)
        drawer = Drawer(world.random, world.plans, world.settings.program_faults)
        count = world.settings.clients
        programs = [drawer.roots(world.random.choice((1, 3, 10)), world.settings.tasks // count) for _ in range(count)]
        for roots in programs:
            actors.draw(seed, world.plans, roots, world.settings.program_faults, world.settings.cpus)
        self.clients = [Client(world, n, self.dispatcher, roots) for n, roots in enumerate(programs, 1)]
        self.faults = Faults(world, self.dispatcher, self.node, self.clients)

    def run(self) -> None:
        """From start to verdict. Raises `AssertionError` if anything is wrong."""
        world = self.world
        world.log("world", world.settings)
        self.dispatcher.start()
        self.node.start()
        for client in self.clients:
            world.at(world.random.choice((0.0, 0.01)), client.start)
        self.faults.start()
        if not world.run(world.now + DURATION + PATIENCE, self._done):
            raise Violation("not everything ended: " + "; ".join(self._unfinished()))
        for client in self.clients:
            if client.alive:
                client.judge()
                client.let_go()
        self._end_detached()
        # Until the faults are over too.
        world.run(max(world.now, 100.0 + DURATION) + SETTLE, lambda: False)
        self._check_quiet()
        for client in self.clients:
            if client.alive:
                client.leave()
        world.run(world.now + SETTLE, lambda: False)
        self._check_empty()

    def _end_detached(self) -> None:
        """Somebody else ends the actors that were to outlive their programs."""
        survivor = next(client for client in self.clients if client.alive)
        for client in self.clients:
            if not client.alive:
                for future in client.futures:
                    if future.plan is not None and future.plan.hosts is not None:
                        survivor.submitter.core.end(future.id)
        survivor._flush_soon()

    def _done(self) -> bool:
        return all(client.done for client in self.clients)

    def _unfinished(self) -> list[str]:
        return [
            f"{client.name} waits for {[future.id for future in client.futures if not client._ended(future)]}"
            for client in self.clients
            if not client.done
        ]

    def _check_quiet(self) -> None:
        """All results are delivered and dropped, programs are still there: nothing may be kept for them."""
        core = self.dispatcher.core
        assert core is not None
        check(core)
        tasks = {task.id: task.state for task in core.tables.tasks.values()}
        if tasks:
            raise Violation(f"the dispatcher still keeps these tasks: {tasks}")

    def _check_empty(self) -> None:
        """The programs are gone: the engine is as it was at first."""
        core = self.dispatcher.core
        assert core is not None
        check(core)
        tables = core.tables
        if tables.tasks or tables.objects:
            raise Violation(f"left in the dispatcher: tasks {list(tables.tasks)}, objects {list(tables.objects)}")
        for node in tables.nodes.values():
            if abs(node.free_cpu - node.cpu) > 1e-6 or any(
                abs(node.free_extra[name] - amount) > 1e-6 for name, amount in node.extra.items()
            ):
                raise Violation(f"resources are lost: {node.free_cpu} of {node.cpu}, {node.free_extra} of {node.extra}")
        for executor in self.node.executors.values():
            if executor.levels or executor.core.queue or executor.core.running:
                raise Violation(f"{executor.name} still works: {executor.core.running} {executor.core.queue}")
        if self.world.memory and not self.world.dispatcher_deaths:
            raise Violation(f"shared memory is lost: {list(self.world.memory)}")
        alive = {executor.worker for executor in self.node.executors.values() if executor.alive}
        if alive != set(tables.workers):
            raise Violation(f"executors {alive} live, the dispatcher knows {set(tables.workers)}")


def run_seed(seed: int, verbose: bool = False) -> Verdict:
    """Run one seed."""
    simulation = Simulation(seed, verbose)
    world = simulation.world
    error = ""
    try:
        simulation.run()
    except Violation as problem:
        error = str(problem)
    except Exception as problem:
        last = traceback.extract_tb(problem.__traceback__)[-1]
        error = f"{type(problem).__name__} in {last.name}, line {last.lineno}: {problem}"
    lines = hashlib.sha256()
    for record in world.records:
        lines.update(line(record).encode())
    tail = [line(record) for record in world.records[-40:]] if error else []
    return Verdict(seed, error, len(world.plans), world.happened, lines.hexdigest(), tail)
