"""How a submitter gets a connection, and gets it back: what all drivers do the same way, blocking."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rtml import link as links
from rtml.errors import ConnectionLost, ProtocolError
from rtml.link import KeyRefused, Link, LinkClosed
from rtml.link.keys import peer_keys
from rtml.messages import Farewell, Hello, Message, Refused, Submit, Welcome, decode, encode

if TYPE_CHECKING:
    from rtml.client.client import Client

#: Seconds that a dispatcher, once connected, may take to answer.
_HANDSHAKE_TIMEOUT: Final = 10.0

#: Seconds without an answer after which whoever waits for the first one is told what it waits for.
_PATIENCE: Final = 1.5

_PAUSE_MIN: Final = 0.01
_PAUSE_MAX: Final = 1.0

_logger = logging.getLogger("rtml.client")


class Peer:
    """What else speaks on a client's link. This one, for plain submitters, says nothing; executors have more to say."""

    def introduce(self, client: Client) -> list[Message]:
        """The first messages of every connection; what the client has to repeat follows."""
        name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        with client.lock:
            return [client.core.hello(os.getpid(), name, platform.python_version())]

    def receive(self, message: Message) -> None:
        """A message that is not, or not only, for the client."""

    def collect(self) -> list[Message]:
        """What to send, before the client's messages."""
        return []


class Connector:
    """Connects to one dispatcher.

    Args:
        address: as for `rtml.link.connect`.
        connect_timeout: seconds to wait for the dispatcher at first.
        reconnect_timeout: seconds to try after a connection was lost.
        obstacle: says why no dispatcher will ever appear, or "".
        timings: ask for the timing of each result (`Hello.timings`).
        keys: directory of keys, for a tcp address; "" for none.

    Raises:
        AddressError: the keys cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout: float = 10.0,
        reconnect_timeout: float = 30.0,
        obstacle: Callable[[], str] | None = None,
        timings: bool = False,
        keys: str = "",
    ) -> None:
        self.address = address
        self.keys = keys
        self._curve = peer_keys(keys) if keys and address.startswith("tcp://") else None
        self._connect_timeout = connect_timeout
        self._reconnect_timeout = reconnect_timeout
        self._obstacle = obstacle
        self._timings = timings

    def first(self, client: Client, peer: Peer) -> Link:
        """A link on which the dispatcher has welcomed us.

        Raises:
            ConnectionLost: nobody answers in time.
            ProtocolError: we are refused.
        """
        began = time.monotonic()
        deadline = began + self._connect_timeout
        # An engine that is started here takes its time, and says itself what is wrong; who waits shortly hears it soon.
        told = self._obstacle is not None or self._connect_timeout <= 2 * _PATIENCE
        refused: KeyRefused | None = None  # says more than that the last, short attempt was too short
        while True:
            now = time.monotonic()
            left = deadline - now
            wait = left if told else min(left, began + _PATIENCE - now)
            try:
                link = links.connect(self.address, max(0.0, min(wait, _PAUSE_MAX)), self._curve)
            except LinkClosed as error:
                obstacle = self._obstacle() if self._obstacle is not None else ""
                if obstacle:
                    raise ConnectionLost(f"{error}; {obstacle}") from error
                if isinstance(error, KeyRefused):
                    refused = error
                now = time.monotonic()
                if now >= deadline:
                    raise LinkClosed(self._unanswered(refused or error)) from error
                if not told and now >= began + _PATIENCE:
                    told = True
                    _logger.warning("%s; trying for %.0f s more", error, deadline - now)
            else:
                return self._handshake(link, client, peer)

    def _unanswered(self, error: LinkClosed) -> str:
        """What was tried, for how long, and what to look at."""
        text = f"{error}, for {self._connect_timeout:g} s"
        if self._obstacle is not None:
            return text
        if isinstance(error, KeyRefused):
            return f"{text}; the dispatcher's directory of keys must have the public half of {self.keys}/client.secret"
        if not self.address.startswith("tcp://"):
            return (
                f"{text}; is its engine still running? `rtml status` without an address looks for those of this machine"
            )
        host = self.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            socket.getaddrinfo(host, None)
        except OSError as unknown:
            return f"{text}; the name {host!r} is unknown here ({unknown.strerror})"
        started = "`rtml dispatcher --listen ADDRESS`, or rtml.connect(listen=ADDRESS)"
        keys = "with the other half of our keys" if self.keys else "without keys"
        return f"{text}; is a dispatcher listening there {keys} ({started}), and does no firewall keep it from us?"

    def again(self, client: Client, peer: Peer, pause: Callable[[float], bool]) -> Link:
        """A new link, after one was lost. Say everything again on it (`Client.resume`) before using it.

        Args:
            client: whose link it is.
            peer: who else speaks on it.
            pause: waits so many seconds; False ends the attempts.

        Raises:
            ConnectionLost: no success in time, told to stop, or there is nothing to connect to any more.
        """
        deadline = time.monotonic() + self._reconnect_timeout
        reason: BaseException = ConnectionLost("closed")
        wait = 0.0
        while (left := deadline - time.monotonic()) > 0 and pause(min(wait, left)):
            obstacle = self._obstacle() if self._obstacle is not None else ""
            if obstacle:
                raise ConnectionLost(f"the engine's processes are gone: {obstacle}")
            try:
                return self._handshake(links.connect(self.address, min(left, 1.0), self._curve), client, peer)
            except (ConnectionLost, ProtocolError) as error:
                reason = error
            wait = min(_PAUSE_MAX, max(_PAUSE_MIN, wait * 2))
        raise ConnectionLost(f"no connection to the dispatcher for {self._reconnect_timeout:g} s: {reason}")

    def _handshake(self, link: Link, client: Client, peer: Peer) -> Link:
        """Say hello and wait for the welcome."""
        try:
            hello = peer.introduce(client)
            introduction = hello[0]
            assert isinstance(introduction, Hello)
            introduction.timings = introduction.timings or self._timings
            if self.address.startswith("tcp://"):
                # A network may be cut; links on one machine break only when a process ends.
                introduction.grace = self._reconnect_timeout
            link.send(encode(hello))
            deadline = time.monotonic() + _HANDSHAKE_TIMEOUT
            while (left := deadline - time.monotonic()) > 0:
                if self._welcomed(link.recv(left), client, peer):
                    return link
            raise ConnectionLost(f"the dispatcher at {self.address} did not answer")
        except BaseException:
            link.close()
            raise

    def _welcomed(self, frames: list[bytes], client: Client, peer: Peer) -> bool:
        welcomed = False
        for frame in frames:
            for message in decode(frame):
                if isinstance(message, Refused):
                    raise ProtocolError(f"the dispatcher at {self.address} refused: {message.reason}")
                if not client.receive(message):
                    peer.receive(message)
                welcomed = welcomed or isinstance(message, Welcome)
        return welcomed


def send(link: Link, messages: list[Message]) -> None:
    """One frame, or one per message where several `Submit` say that one frame would be too long.

    Raises:
        LinkClosed: the peer is gone.
    """
    if len(messages) == 1 or sum([isinstance(message, Submit) for message in messages]) <= 1:
        link.send(encode(messages))
        return
    for message in messages:
        link.send(encode([message]))


def farewell(link: Link) -> None:
    """Before the link is closed in order: the dispatcher need not wait for this submitter to come back."""
    with contextlib.suppress(LinkClosed):
        link.send(encode([Farewell()]))


__all__ = ["Connector", "LinkClosed", "Peer", "farewell", "send"]
