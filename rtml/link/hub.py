"""The dispatcher's side of all links: one epoll for any number of listeners and peers of both transports.

One `poll` is one wake-up: it takes one packet of every peer that is ready. While there is more than one it looks once
more and drains those that are ready again, so that a burst is handled as one batch; a lone message costs no system call
but the one that receives it. Nothing here blocks but `poll` itself.

Invariant: every peer whose number `poll` has returned is reported gone, as (number, None), exactly once and after its
last frame, however it ended: it left, it was cut off for a violation or for not reading, or the owner closed it.
"""

from __future__ import annotations

import itertools
import select
from typing import TYPE_CHECKING, Final, Protocol

from rtml.link.base import BATCH_MAX, PEERS_MAX, WAIT_MAX, AddressError
from rtml.link.unix import UnixListener, UnixPeer

if TYPE_CHECKING:
    from rtml.link.keys import CurveKeys
    from rtml.link.zeromq import Router

_EVENTS_MAX: Final = 256


class Peer(Protocol):
    """What a hub needs of a connection."""

    number: int
    known: bool
    violation: str
    #: Its key is a client's.
    guest: bool

    def send(self, frame: bytes) -> bool:
        """Send or queue; False if the peer is gone or, with `violation` set, must be cut off."""

    def credentials(self) -> tuple[int, int] | None:
        """(process id, user id), where the transport knows."""

    def close(self) -> None:
        """End the connection."""


class Hub:
    """Listeners and peers.

    Owned by one thread, and not to be used in signal handlers: let those write to an `add_fd` descriptor.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._listeners: dict[int, UnixListener] = {}
        #: By descriptor / by number; each Unix peer is in both.
        self._unix: dict[int, UnixPeer] = {}
        self._peers: dict[int, Peer] = {}
        self._routers: list[Router] = []
        self._numbers = itertools.count(1)
        #: The last `poll` found more than one packet.
        self._burst = False
        #: Known peers that ended since the last `poll`.
        self._gone: list[int] = []
        #: How many peers were cut off for what they did, and what the last one did.
        self.violations = 0
        self.last_violation = ""

    def listen(self, address: str, keys: CurveKeys | None = None) -> str:
        """Accept peers at `address`: "unix:/path", "tcp://host:port" (port 0: any) or "ipc:///path".

        Args:
            address: where to listen.
            keys: for tcp: encrypt, and accept only the public keys in `keys.allowed`.

        Returns:
            The address with the real port.

        Raises:
            AddressError: malformed, in use, or a tcp address that is not loopback without `keys`.
        """
        try:
            if address.startswith("unix:"):
                return self._listen_unix(address)
            if address.startswith(("tcp://", "ipc://")):
                return self._listen_zeromq(address, keys)
        except OSError as error:
            raise AddressError(f"{address}: {error}") from None
        raise AddressError(f"{address!r} is no address: unix:/path, tcp://host:port or ipc:///path")

    def _listen_unix(self, address: str) -> str:
        listener = UnixListener(address[len("unix:") :])
        try:
            listener.listen()
        except BaseException:
            listener.close()
            raise
        self._listeners[listener.socket.fileno()] = listener
        self._epoll.register(listener.socket.fileno(), select.EPOLLIN)
        return address

    def _listen_zeromq(self, address: str, keys: CurveKeys | None) -> str:
        # Not at the top: most processes never need ZeroMQ, and none may load it before a fork.
        from rtml.link.zeromq import Router

        router = Router(self._peers, self._numbers)
        try:
            actual = router.listen(address, keys)
        except BaseException:
            router.close()
            raise
        self._routers.append(router)
        for fd in router.filenos():
            self._epoll.register(fd, select.EPOLLIN)
        return actual

    def poll(self, timeout: float | None) -> list[tuple[int, bytes | None]]:
        """Frames as (peer number, frame), and (peer number, None) for peers that are gone.

        A new peer appears with its first frame; numbers are never used again. At most 256 packets per peer.

        Args:
            timeout: seconds to wait for the first, rounded up to whole milliseconds; None waits for ever.

        Returns:
            In order per peer, perhaps not all that are there; [] after the timeout, when an `add_fd` descriptor is
            readable, or when only a connection came.
        """
        out: list[tuple[int, bytes | None]] = []
        if self._gone:
            timeout = 0
        routers = self._routers
        if routers:
            for router in routers:
                timeout = router.wait_limit(timeout)
        events = self._epoll.poll(-1 if timeout is None else min(timeout, WAIT_MAX), _EVENTS_MAX)
        budget = 1
        while True:
            found = False
            for fd, mask in events:
                peer = self._unix.get(fd)
                if peer is not None:
                    found = True
                    if not peer.ready(mask, budget, out):
                        self._drop(peer)
                elif fd in self._listeners:
                    found = True
                    self._accept(self._listeners[fd])
            if not found or budget > 1 or not (self._burst or len(events) > 1):
                break
            budget = BATCH_MAX - 1
            events = self._epoll.poll(0, _EVENTS_MAX)
        self._burst = len(out) > 1
        if routers:
            for router in routers:
                for number in router.service(out):
                    self._drop(self._peers[number])
        if self._gone:
            out.extend((number, None) for number in self._gone)
            self._gone = []
        return out

    def _accept(self, listener: UnixListener) -> None:
        for sock in listener.accept():
            if len(self._peers) >= PEERS_MAX:
                self._count(f"more than {PEERS_MAX} connections")
                sock.close()
                continue
            peer = UnixPeer(next(self._numbers), sock, self._epoll)
            self._unix[sock.fileno()] = peer
            self._peers[peer.number] = peer
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def send(self, peer: int, frame: bytes) -> bool:
        """Send one frame, or queue it while the peer's socket is full. Never blocks.

        Returns:
            False if the peer is unknown or gone, or if it was cut off now because more than 64 MiB wait for it.
            `poll` reports that too.

        Raises:
            ValueError: the frame is empty or longer than `FRAME_MAX`.
        """
        target = self._peers.get(peer)
        if target is None:
            return False
        if target.send(frame):
            return True
        if target.violation:
            self._drop(target)
        return False

    def credentials(self, peer: int) -> tuple[int, int] | None:
        """(process id, user id) of a Unix peer, as the kernel knows them; None for other and unknown peers."""
        target = self._peers.get(peer)
        return None if target is None else target.credentials()

    def is_guest(self, peer: int) -> bool:
        """Whether a peer has shown the key of a client, and so may only submit."""
        target = self._peers.get(peer)
        return target is not None and target.guest

    def close_peer(self, peer: int) -> None:
        """End a connection; what was sent and not queued is still delivered. The next `poll` reports it gone."""
        target = self._peers.get(peer)
        if target is not None:
            self._drop(target)

    def _drop(self, peer: Peer) -> None:
        if peer.violation:
            self._count(peer.violation)
        del self._peers[peer.number]
        if isinstance(peer, UnixPeer):
            fd = peer.socket.fileno()
            del self._unix[fd]
            # Explicitly: a forked child's copy of the descriptor would keep it in the epoll.
            self._epoll.unregister(fd)
        peer.close()
        if peer.known:
            self._gone.append(peer.number)

    def _count(self, violation: str) -> None:
        self.violations += 1
        self.last_violation = violation

    def add_fd(self, fd: int) -> None:
        """Make `poll` return while `fd` is readable; reading it is the owner's business."""
        self._epoll.register(fd, select.EPOLLIN)

    def remove_fd(self, fd: int) -> None:
        """Undo `add_fd`."""
        self._epoll.unregister(fd)

    def close(self) -> None:
        """End all connections, stop listening, remove the socket files. May be called twice."""
        for peer in list(self._peers.values()):
            peer.close()
        for listener in self._listeners.values():
            listener.close()
        for router in self._routers:
            router.close()
        self._peers.clear()
        self._unix.clear()
        self._listeners.clear()
        self._routers.clear()
        self._epoll.close()
