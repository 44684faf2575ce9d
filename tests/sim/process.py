"""What the dispatcher's peers have in common: they connect, are frozen now and then, and die."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rtml.messages import Message
from tests.sim.network import Link
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.dispatcher import Dispatcher

#: Seconds between attempts to connect.
_RECONNECT = 0.02


class Process:
    """A simulated process with one link to the dispatcher."""

    def __init__(self, world: World, name: str, dispatcher: Dispatcher) -> None:
        self.world = world
        self.name = name
        self.dispatcher = dispatcher
        self.alive = True
        self.link: Link | None = None
        #: frames received and not read
        self.inbox: list[list[Message]] = []
        self._frozen_until = 0.0

    # --- for subclasses

    def introduce(self) -> list[Message]:
        """What to say first on a new connection."""
        raise NotImplementedError

    def poke(self) -> None:
        """There may be something to read, or to do."""
        raise NotImplementedError

    # --- links

    def connect(self) -> None:
        """Try until it works."""
        if not self.alive or self.link is not None:
            return
        link = self.dispatcher.accept(self)
        if link is None:
            self.after(_RECONNECT, self.connect)
            return
        self.link = link
        self.inbox.clear()
        self.world.log(self.name, "connects", link.number)
        link.up(self.introduce())

    def arrived(self, link: Link, messages: list[Message]) -> None:
        """A frame came."""
        if self.alive and link is self.link:
            self.inbox.append(messages)
            self.poke_soon()

    def lost(self, link: Link) -> None:
        """The link is closed. A process that does not look at it notices late."""
        if self.alive and link is self.link:
            self.world.log(self.name, "lost its link")
            self.link = None
            self.after(self.world.random.choice((0.0, _RECONNECT)), self.connect)

    def send(self, messages: list[Message]) -> None:
        """To the dispatcher, or to nobody."""
        if messages and self.link is not None:
            self.link.up(messages)

    # --- life

    def after(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """Like `World.at`, but only while the process lives, and not while it is frozen."""
        self.world.at(delay, self._guarded, action, arguments)

    def _guarded(self, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.alive:
            if self.world.now < self._frozen_until:
                self.world.at(self._frozen_until - self.world.now, self._guarded, action, arguments)
            else:
                action(*arguments)

    def poke_soon(self) -> None:
        """Read as soon as the process is not frozen."""
        self._guarded(self.poke, ())

    def freeze(self, seconds: float) -> None:
        """Neither read nor compute for a while."""
        self.world.log(self.name, "is frozen for", seconds)
        self._frozen_until = self.world.now + seconds

    def die(self) -> None:
        """End at once."""
        if self.alive:
            self.alive = False
            if self.link is not None:
                self.link.close_by_peer()
