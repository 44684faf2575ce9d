"""The transport between machines: ZeroMQ, ROUTER at the hub and DEALER at its peers. The only file that imports zmq.

Both transports look the same from outside, which takes some care here:

* The descriptor of a ZeroMQ socket is edge-triggered, and any call on the socket may swallow the edge. So `EVENTS` is
  asked before every wait and after every send that could have swallowed one.
* A DEALER sees its hub vanish by a monitor socket (and ZMTP heartbeats, which ZeroMQ's own thread answers even while
  a task computes). It does not reconnect by itself: a new connection is a new peer, and says so.
* A ROUTER does not say which peer vanished, but refuses to route to it: after a disconnection (and every few seconds)
  the hub sends every peer an empty keepalive, and those it cannot route to are gone.
* A ROUTER cannot disconnect a peer. One that is cut off is sent a BYE packet, and ignored from then on.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from rtml.link.addresses import check_peer, check_port, is_loopback
from rtml.link.base import (
    BATCH_MAX,
    BYE_PACKET,
    INBOX_MAX,
    PEERS_MAX,
    AddressError,
    KeyRefused,
    LinkClosed,
    ReceivingLink,
    check_size,
)
from rtml.link.files import prepare
from rtml.link.keys import CurveKeys
from rtml.link.routed import ESCAPED, RouterPeer, escaped
from rtml.messages import FRAME_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

    from rtml.link.hub import Peer

#: Packets that wait inside ZeroMQ per direction and peer, at most.
_HIGH_WATER: Final = 256
_HEARTBEAT_MS: Final = 1000
#: Silence after which a connection counts as dead.
_SILENCE_MS: Final = 10_000
#: What was sent before `close` may take this long to leave.
_LINGER_MS: Final = 500
#: Seconds between two attempts to connect.
_RETRY: Final = 0.01

#: Seconds after a disconnection at which peers are probed: ZeroMQ reports it a little before it stops routing.
_PROBES: Final = (0.001, 0.02, 0.2)
#: Seconds between probes without a reason.
_PROBE_EVERY: Final = 5.0
#: What ZeroMQ calls peers that have shown the key of a node.
_NODE: Final = "node"
#: Seconds between two attempts to send what waits: ROUTER does not say which peer reads again.
_RESEND: Final = 0.01

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

_EVENT: Final = struct.Struct("=HI")
_REFUSED: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def new_pair() -> tuple[str, str]:
    """New keys: (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_of(secret: str) -> str:
    """The other half of a secret key."""
    return zmq.curve_public(secret.encode()).decode()


def _set_options(sock: Socket, address: str) -> None:
    sock.setsockopt(zmq.SNDHWM, _HIGH_WATER)
    sock.setsockopt(zmq.RCVHWM, _HIGH_WATER)
    sock.setsockopt(zmq.MAXMSGSIZE, FRAME_MAX + len(ESCAPED))
    sock.setsockopt(zmq.LINGER, _LINGER_MS)
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
    sock.setsockopt(zmq.HEARTBEAT_TTL, _SILENCE_MS)
    sock.setsockopt(zmq.IPV6, int("[" in address))


def _readable(sock: Socket) -> bool:
    return bool(int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _fd(sock: Socket) -> int:
    return int(sock.getsockopt(zmq.FD))


def _monitor_events(monitor: Socket) -> int:
    """All events that the monitor reports now, or-ed."""
    seen = 0
    while _readable(monitor):
        event, _ = _EVENT.unpack(monitor.recv_multipart()[0])
        seen |= event
    return seen


# --- the peer's side ---------------------------------------------------------------------------------------------


def connect_zeromq(address: str, timeout: float, keys: CurveKeys | None) -> ZmqLink:
    """Connect to the hub at `address`, and wait for it up to `timeout` seconds.

    Raises:
        LinkClosed: nobody answered there in time, or the keys were refused.
        AddressError: the address is malformed.
    """
    check_peer(address)
    deadline = time.monotonic() + timeout
    context = zmq.Context()
    try:
        while True:
            left = deadline - time.monotonic()
            link = _attempt(context, address, max(left, 0.0), keys)
            if link is not None:
                return link
            if left <= 0:
                hint = "" if is_loopback(address) else " with these keys" if keys else "; it may want keys"
                raise LinkClosed(f"nobody answers at {address}{hint}")
            time.sleep(min(_RETRY, left))
    except BaseException:
        context.destroy(linger=0)
        raise


def _attempt(context: Context, address: str, timeout: float, keys: CurveKeys | None) -> ZmqLink | None:
    sock = context.socket(zmq.DEALER)
    _set_options(sock, address)
    sock.setsockopt(zmq.RECONNECT_IVL, -1)
    if keys is not None:
        sock.curve_publickey = keys.public.encode()
        sock.curve_secretkey = keys.secret.encode()
        sock.curve_serverkey = keys.server.encode()
    monitor = sock.get_monitor_socket(_REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    deadline = time.monotonic() + timeout
    try:
        sock.connect(address)
        while True:
            seen = _monitor_events(monitor)
            if seen & zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise KeyRefused(f"{address} refuses our key")
            if seen & zmq.EVENT_HANDSHAKE_SUCCEEDED and not seen & _REFUSED:
                return ZmqLink(context, sock, monitor)
            left = deadline - time.monotonic()
            if seen & _REFUSED or left <= 0:
                break
            monitor.poll(int(left * 1000) + 1)
    except zmq.ZMQError as error:
        _discard(sock, monitor)
        raise AddressError(f"{address}: {error}") from None
    except BaseException:
        _discard(sock, monitor)
        raise
    _discard(sock, monitor)
    return None


def _discard(sock: Socket, monitor: Socket) -> None:
    sock.disable_monitor()
    monitor.close(0)
    sock.close(0)


class ZmqLink(ReceivingLink):
    """A `Link` over a connected DEALER socket, which it owns together with its context."""

    def __init__(self, context: Context, sock: Socket, monitor: Socket) -> None:
        super().__init__(FRAME_MAX + len(ESCAPED))
        self._context = context
        self._socket = sock
        self._monitor = monitor
        #: ZeroMQ sockets are for one thread at a time; re-entrant for signal handlers (which never interrupt ZeroMQ
        #: itself).
        self._calls = threading.RLock()
        self._packets: Iterator[bytes] = iter(partial(sock.recv, zmq.NOBLOCK), None)
        self._fds = (_fd(sock), _fd(monitor))
        #: A blocked `send` is on the stack; frames of a signal handler go to `_later`.
        self._sending = False
        self._later: deque[bytes] = deque()
        #: The connection is gone; frames that arrived before may still be unread.
        self._lost = False

    # --- receiving ------------------------------------------------------------------------------------------------

    def _fill(self, timeout: float | None) -> bool:
        try:
            if self._drain():
                return True
            if self._lost:
                self._end("the peer is gone")
                return True
            poller = select.poll()
            for fd in (*self._fds, self._wake_fd):
                poller.register(fd, select.POLLIN)
            ready = poller.poll(None if timeout is None else timeout * 1000)
            self._look_at_monitor()
            if any(fd == self._wake_fd for fd, _ in ready):
                self._clear_wake()
                return self._drain() or self._lost
        except zmq.ZMQError as error:
            self._end(str(error))
            return True
        return bool(ready) or self._lost

    def _drain(self) -> bool:
        """Move packets to the inbox without waiting; False if there are none."""
        with self._calls:
            if not _readable(self._socket):
                return False
            with contextlib.suppress(zmq.Again):
                self._inbox.extend(islice(self._packets, BATCH_MAX))
            self._keep_readable()
        return True

    def _keep_readable(self) -> None:
        """Wake whoever waits for input that the last call on the socket has hidden from the descriptor."""
        if (self._watched or self._receiving) and _readable(self._socket):
            self.wake()

    def _look_at_monitor(self) -> None:
        with self._calls:
            if _monitor_events(self._monitor) & _REFUSED and not self._lost:
                self._lost = True
                # A `send` may have found it: then nothing else would tell whoever waits for input.
                self.wake()

    # --- sending --------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """See `Link.send`."""
        check_size(frame)
        packet = escaped(frame)
        if not self._sending and self._try(packet):
            return
        later = self._later
        later.append(packet)
        # A handler may append between the last look at the queue and the end of `_sending`: hence the outer loop.
        while later and not self._sending:
            self._sending = True
            try:
                while later:
                    self._send_slowly(later.popleft())
            finally:
                self._sending = False

    def offer(self, frame: bytes) -> bool:
        """Send one frame if that is possible at once; False if the peer's queue is full. Raises as `send`."""
        check_size(frame)
        return not self._sending and self._try(escaped(frame))

    def _try(self, packet: bytes) -> bool:
        with self._calls:
            if self._over is not None:
                raise LinkClosed(self._over)
            try:
                self._socket.send(packet, zmq.NOBLOCK)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                raise LinkClosed(str(error)) from None
            self._keep_readable()
        return True

    def _send_slowly(self, packet: bytes) -> None:
        poller = select.poll()
        for fd in self._fds:
            poller.register(fd, select.POLLIN)
        while not self._try(packet):
            # A timeout, because the edge may have been swallowed by another thread's `recv`.
            poller.poll(10)
            self._look_at_monitor()
            if self._lost:
                raise LinkClosed("the peer is gone")
            if self._input.acquire(False):
                try:
                    if not self._receiving and len(self._inbox) < INBOX_MAX:
                        # ZeroMQ runs signal handlers inside of its `recv`, which then holds a packet: a `recv` of
                        # the handler must not get those after it.
                        self._receiving = True
                        try:
                            self._drain()
                        finally:
                            self._receiving = False
                finally:
                    self._input.release()
                if self._watched and self._inbox:
                    self.wake()

    def close(self) -> None:
        """See `Link.close`. Waits up to half a second for what was sent to leave."""
        self._end("the link is closed")
        self.wake()
        with self._input, self._calls:
            if self._wake_fd < 0:
                return
            self._close_descriptors()
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close()
            self._context.term()


# --- the hub's side ----------------------------------------------------------------------------------------------


class Router:
    """A ROUTER socket bound to one address, with its peers. Never blocks."""

    def __init__(self, peers: MutableMapping[int, Peer], numbers: Iterator[int]) -> None:
        self._peers = peers
        self._numbers = numbers
        self._context: Context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._monitor: Socket | None = None
        self._access: Socket | None = None
        self._allowed: frozenset[bytes] = frozenset()
        self._nodes: frozenset[bytes] = frozenset()
        self._file = ""
        self._identities: dict[bytes, RouterPeer] = {}
        #: Peers with a non-empty outbox.
        self.waiting: set[RouterPeer] = set()
        #: Instants at which to probe, soonest last.
        self._probes: list[float] = []
        self._next_probe = 0.0

    def listen(self, address: str, keys: CurveKeys | None) -> str:
        """Bind; returns the address with the real port.

        Raises:
            AddressError: malformed, in use, or open to the network without keys.
        """
        if keys is None and address.startswith("tcp://") and not is_loopback(address):
            raise AddressError(
                f"{address} can be reached from other machines: give CURVE keys (rtml keys make), or use 127.0.0.1"
            )
        if address.startswith("ipc://"):
            prepare(address[len("ipc://") :], socket.SOCK_STREAM)
        check_port(address)
        sock = self._socket
        _set_options(sock, address)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            self._check_access(keys)
        self._monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            sock.bind(address)
        except zmq.ZMQError as error:
            raise AddressError(f"{address}: {error}") from None
        actual = str(sock.getsockopt_string(zmq.LAST_ENDPOINT))
        if actual.startswith("ipc://"):
            self._file = actual[len("ipc://") :]
            os.chmod(self._file, 0o600)
        return actual

    def _check_access(self, keys: CurveKeys) -> None:
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.public.encode()
        self._socket.curve_secretkey = keys.secret.encode()
        # Without this service ZeroMQ would accept every key.
        self._socket.zap_domain = b"rtml"
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._allowed = frozenset(key.encode() for key in keys.allowed)
        self._nodes = frozenset(key.encode() for key in keys.nodes)
        self._access = self._context.socket(zmq.ROUTER)
        self._access.bind("inproc://zeromq.zap.01")

    def filenos(self) -> list[int]:
        """Descriptors to watch; after any of them became readable, call `service`."""
        return [_fd(sock) for sock in (self._socket, self._monitor, self._access) if sock is not None]

    def wait_limit(self, timeout: float | None) -> float | None:
        """How long the hub may wait at most, given that it wants to wait for `timeout`."""
        if _readable(self._socket):
            return 0.0
        limit = _RESEND if self.waiting else None
        if self._identities:
            now = time.monotonic()
            due = self._probes[-1] if self._probes else self._next_probe
            limit = max(0.0, due - now) if limit is None else min(limit, max(0.0, due - now))
        if limit is None or timeout is None:
            return timeout if limit is None else limit
        return min(limit, timeout)

    def service(self, out: list[tuple[int, bytes | None]]) -> list[int]:
        """Read at most 256 packets, send what waits; returns the numbers of peers that are gone."""
        gone: list[int] = []
        if self._monitor is not None and _monitor_events(self._monitor):
            now = time.monotonic()
            self._probes = sorted((now + delay for delay in _PROBES), reverse=True)
        if self._access is not None:
            self._grant(self._access)
        more = True
        for _ in range(BATCH_MAX):
            more = _readable(self._socket)
            if not more:
                break
            guest = False
            if self._access is None:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            else:
                sender = self._socket.recv(zmq.NOBLOCK, copy=False)
                parts = [sender.bytes, *self._socket.recv_multipart()]
                guest = parts[0] not in self._identities and sender.get("User-Id") != _NODE
            self._receive(parts, guest, out, gone)
        for peer in [peer for peer in self.waiting if peer.flush()]:
            self.waiting.discard(peer)
        # Not while there is more: what it says comes before its sender's end.
        if self._identities and not more:
            self._probe(gone)
        return gone

    def _receive(self, parts: list[bytes], guest: bool, out: list[tuple[int, bytes | None]], gone: list[int]) -> None:
        peer = self._identities.get(parts[0])
        if peer is None:
            peer = RouterPeer(next(self._numbers), parts[0], self, guest)
            self._identities[parts[0]] = peer
            self._peers[peer.number] = peer
            self._next_probe = time.monotonic() + _PROBE_EVERY
        if peer.closing or peer.violation:
            return
        frame = parts[-1]
        if len(parts) != 2:
            peer.violation = f"a message of {len(parts)} parts"
        elif len(self._peers) > PEERS_MAX:
            peer.violation = f"more than {PEERS_MAX} connections"
        elif frame[:1] == BYE_PACKET[:1]:
            if frame[:2] != ESCAPED or len(frame) == 2:
                peer.violation = "a malformed packet"
            frame = frame[2:]
        if peer.violation:
            gone.append(peer.number)
        elif frame:
            peer.known = True
            out.append((peer.number, frame))

    def _grant(self, access: Socket) -> None:
        """Answer ZeroMQ's questions whether a key may connect (RFC 27)."""
        while _readable(access):
            route, _, version, request, _, _, _, mechanism, *credentials = access.recv_multipart()
            key = z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
            status = (b"200", b"OK") if key in self._allowed else (b"400", b"key not allowed")
            user = _NODE.encode() if key in self._nodes else b"client"
            access.send_multipart([route, b"", version, request, *status, user, b""])

    def _probe(self, gone: list[int]) -> None:
        now = time.monotonic()
        due = self._next_probe <= now
        while self._probes and self._probes[-1] <= now:
            self._probes.pop()
            due = True
        if not due:
            return
        self._next_probe = now + _PROBE_EVERY
        for peer in list(self._identities.values()):
            if self.route(peer, b"") is False:
                del self._identities[peer.identity]
                self.waiting.discard(peer)
                if not peer.closing and not peer.violation:
                    gone.append(peer.number)

    def route(self, peer: RouterPeer, packet: bytes) -> bool | None:
        """Send to a peer: True if it was taken, False if the peer is gone, None if its queue is full."""
        try:
            self._socket.send(peer.identity, zmq.NOBLOCK | zmq.SNDMORE)
            self._socket.send(packet, zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            # Reported when all it sent has been read.
            self._probes.append(0.0)
            return False
        return True

    def close(self) -> None:
        """Close the socket and remove its file. Waits up to half a second for what was sent to leave."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
        self._socket.close()
        if self._access is not None:
            self._access.close(0)
        self._context.term()
        if self._file:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file)
