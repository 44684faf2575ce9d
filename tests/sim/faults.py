"""What goes wrong with machines and links, at rates that the seed draws, until a time after which nothing does."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.client import Client
from tests.sim.dispatcher import Dispatcher
from tests.sim.node import Node
from tests.sim.process import Process
from tests.sim.world import World

#: Seconds of faults.
DURATION = 2.0


class Faults:
    """Draws and carries out faults."""

    def __init__(self, world: World, dispatcher: Dispatcher, node: Node, clients: list[Client]) -> None:
        self.world = world
        self.dispatcher = dispatcher
        self.node = node
        self.clients = clients

    def start(self) -> None:
        """Plan all of them."""
        settings = self.world.settings
        kinds: list[tuple[float, Callable[[], None]]] = [
            (settings.kill_rate, self._kill),
            (settings.freeze_rate, self._freeze),
            (settings.cut_rate, self._cut),
            (settings.restart_rate, self._restart),
            (settings.vanish_rate, self._vanish),
            (settings.spike_rate, self._spike),
        ]
        for rate, action in kinds:
            when = 0.0
            while rate:
                when += self.world.random.expovariate(rate)
                if when > DURATION:
                    break
                self.world.at(when, action)

    def _peers(self) -> list[Process]:
        found = [self.node, *self.node.executors.values(), *self.clients]
        return [process for process in found if process.alive]

    def _kill(self) -> None:
        executors = [executor for executor in self.node.executors.values() if executor.alive]
        if executors:
            self.node.kill(self.world.random.choice(executors), "signal SIGKILL")

    def _freeze(self) -> None:
        self.world.random.choice(self._peers()).freeze(self.world.random.choice((0.001, 0.05, 1.0)))

    def _cut(self) -> None:
        linked = [process for process in self._peers() if process.link is not None]
        if linked:
            self.world.disturbed = True
            process = self.world.random.choice(linked)
            assert process.link is not None
            self.world.log("faults", "cut the link of", process.name)
            process.link.cut()

    def _restart(self) -> None:
        if self.dispatcher.core is not None:
            self.world.disturbed = True
            self.dispatcher.die()
            self.world.at(self.world.random.choice((0.01, 0.3)), self.dispatcher.start)

    def _vanish(self) -> None:
        alive = [client for client in self.clients if client.alive]
        if len(alive) > 1:
            client = self.world.random.choice(alive)
            self.world.log(client.name, "vanishes")
            client.die()

    def _spike(self) -> None:
        self.world.slowness = self.world.random.choice((10.0, 100.0))
        self.world.at(self.world.random.choice((0.01, 0.2)), self._calm)

    def _calm(self) -> None:
        self.world.slowness = 1.0
