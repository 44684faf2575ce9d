"""Links between the dispatcher and its peers: each direction keeps its order, everything else is chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rtml.messages import Message, decode, encode

if TYPE_CHECKING:
    from tests.sim.dispatcher import Dispatcher
    from tests.sim.world import World

#: Seconds after which both ends of a broken link know that it is.
_NOTICED_MAX = 0.5


class Peer(Protocol):
    """The end of a link that is not the dispatcher's."""

    name: str

    def arrived(self, link: Link, messages: list[Message]) -> None:
        """A frame came."""

    def lost(self, link: Link) -> None:
        """The link is closed."""


class Link:
    """One connection. What is under way when it is cut is lost; what a peer sent before it closed still arrives."""

    def __init__(self, world: World, number: int, peer: Peer, dispatcher: Dispatcher) -> None:
        self.world = world
        self.number = number
        self.peer = peer
        self.dispatcher = dispatcher
        self.open = True
        self._up_at = self._down_at = 0.0

    def up(self, messages: list[Message]) -> None:
        """The peer sends a frame."""
        if self.open:
            frame = encode(messages)
            self._up_at = max(self._up_at, self.world.now + self.world.latency())
            self.world.at(self._up_at - self.world.now, self._arrive_up, frame)

    def down(self, messages: list[Message]) -> None:
        """The dispatcher sends a frame."""
        if self.open:
            frame = encode(messages)
            self._down_at = max(self._down_at, self.world.now + self.world.latency())
            self.world.at(self._down_at - self.world.now, self._arrive_down, frame)

    def _arrive_up(self, frame: bytes) -> None:
        if self.open:
            self.dispatcher.arrived(self, decode(frame))

    def _arrive_down(self, frame: bytes) -> None:
        if self.open:
            self.peer.arrived(self, decode(frame))

    def cut(self) -> None:
        """The connection breaks; both ends notice in their own time."""
        if self.open:
            self.open = False
            self.world.at(self._noticed(), self.dispatcher.lost, self)
            self.world.at(self._noticed(), self.peer.lost, self)

    def _noticed(self) -> float:
        return min(_NOTICED_MAX, self.world.latency() * self.world.random.choice((1, 1, 100)))

    def close_by_peer(self) -> None:
        """The peer's process ended: what it had sent arrives, then the end."""
        self._up_at = max(self._up_at, self.world.now + self.world.latency())
        self.world.at(self._up_at - self.world.now, self._end)

    def close_by_dispatcher(self) -> None:
        """The dispatcher closes: what it had sent arrives, then the end."""
        self._down_at = max(self._down_at, self.world.now + self.world.latency())
        self.world.at(self._down_at - self.world.now, self._end)

    def _end(self) -> None:
        if self.open:
            self.open = False
            self.dispatcher.lost(self)
            self.peer.lost(self)
