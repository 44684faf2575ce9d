"""The transport on one machine: SOCK_SEQPACKET Unix sockets, addressed as "unix:/path".

The hot path of the whole product, so system calls are counted. A waiting `recv` costs poll + recv: `poll` on two
descriptors is cheaper than `epoll_wait` (9.6 against 10.6 us an echo on one core), and a blocking `recv` alone would
save another 0.5 us a hop but could not be woken by another thread. It does not ask whether there is more, which the
next `recv` will see. `recv(0)` does: `poll(0)` is cheaper (0.3 us) than provoking an EAGAIN exception (1.1 us). Sockets
stay in blocking mode; MSG_DONTWAIT says what must not block.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from rtml.errors import ProtocolError
from rtml.link.base import (
    BATCH_MAX,
    ESCAPE,
    INBOX_MAX,
    OUTBOX_MAX,
    PACKET_MAX,
    Joiner,
    LinkClosed,
    ReceivingLink,
    check_size,
    split,
)
from rtml.link.files import connected, prepare, short_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_DONTWAIT: Final = socket.MSG_DONTWAIT
#: One more than a packet may have, to notice longer ones.
_BUFFER: Final = PACKET_MAX + 1
#: Asked for; the kernel grants at most net.core.wmem_max, and 556 small packets or so with the usual value of that.
_SEND_BUFFER: Final = 1024 * 1024
#: Connections that wait to be accepted; one that finds no place waits in `connect`.
_BACKLOG: Final = 1024
_ACCEPT_MAX: Final = 64
#: Seconds between two looks for a listener that is not there yet.
_RETRY: Final = 0.002
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_INPUT: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR


def connect_unix(path: str, timeout: float) -> UnixLink:
    """Connect to the hub that listens at `path`, and wait for it up to `timeout` seconds.

    Raises:
        LinkClosed: nobody listened there in time, or access is denied.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock = connected(path, socket.SOCK_SEQPACKET)
            break
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as error:
            if time.monotonic() >= deadline:
                raise LinkClosed(f"nobody listens at unix:{path} ({error.strerror})") from None
            time.sleep(_RETRY)
        except OSError as error:
            raise LinkClosed(f"unix:{path}: {error}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    return UnixLink(sock)


class UnixLink(ReceivingLink):
    """A `Link` over a connected SOCK_SEQPACKET socket, which it owns."""

    _ends = True

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(PACKET_MAX)
        self._socket = sock
        self._fd = sock.fileno()
        self._fds = (self._fd,)
        # Never ends: at the end of the connection it yields empty packets.
        self._packets: Iterator[bytes] = iter(partial(sock.recv, _BUFFER, _DONTWAIT), None)
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        self._poll = poller.poll
        #: What it says when nothing but a packet came.
        self._usual = [(self._fd, select.POLLIN)]
        self._send = sock.send
        self._receive = sock.recv
        #: A slow `send` is on the stack; frames of a signal handler go to `_later`.
        self._sending = False
        self._later: deque[bytes] = deque()

    # --- receiving ------------------------------------------------------------------------------------------------

    def _fill(self, timeout: float | None) -> bool:
        # None first: it is the usual case and needs no arithmetic.
        ready = self._poll(None if timeout is None else timeout * 1000)
        if ready != self._usual:
            if not ready:
                return False
            if len(ready) > 1 or ready[0][0] != self._fd:
                self._clear_wake()
                if len(ready) == 1:
                    return False
        inbox = self._inbox
        try:
            inbox.extend(islice(self._packets, 1))
            if timeout == 0 and self._poll(0):
                inbox.extend(islice(self._packets, BATCH_MAX - 1))
        except BlockingIOError:
            pass
        except ConnectionResetError:
            # The peer left with unread input. The kernel says so once, before what it sent, which is still there.
            pass
        except OSError as error:
            self._end(str(error))
        return True

    def recv_ready(self) -> list[bytes]:
        """See `Link.recv_ready`."""
        held = self._input
        if self._inbox or self._over is not None or not held.acquire(False):
            return self.recv(0)
        try:
            if self._receiving:
                return self.recv(0)
            self._receiving = True
            try:
                packet = self._receive(_BUFFER, _DONTWAIT)
                if packet:
                    more = self._poll(0)
                    if not more and packet[0] != ESCAPE and len(packet) <= self._joiner.plain_max:
                        return [packet]
                    self._inbox.append(packet)
                    if more:
                        self._fill(0)
                    return self._take()
            except OSError:
                pass  # nothing: it was woken; or the end, which `recv` will find, too
            finally:
                self._receiving = False
        finally:
            held.release()
        return self.recv(0)

    # --- sending --------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """See `Link.send`."""
        if frame and frame[0] != ESCAPE and len(frame) <= PACKET_MAX and not self._sending:
            try:
                self._send(frame, _DONTWAIT)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                raise LinkClosed(self._reason(error)) from None
        self._send_slowly(frame)

    def _send_slowly(self, frame: bytes) -> None:
        check_size(frame)
        later = self._later
        later.append(frame)
        # A handler may append between the last look at the queue and the end of `_sending`: hence the outer loop.
        while later and not self._sending:
            self._sending = True
            try:
                while later:
                    for packet in split(later.popleft()):
                        self._send_packet(packet)
            finally:
                self._sending = False

    def _send_packet(self, packet: bytes) -> None:
        while True:
            try:
                self._send(packet, _DONTWAIT)
                return
            except BlockingIOError:
                self._wait_writable()
            except OSError as error:
                raise LinkClosed(self._reason(error)) from None

    def _wait_writable(self) -> None:
        """Wait until there is room for a packet, and take in what arrives, unless another thread's `recv` does."""
        # A poller of its own: `self._poll` may be in use by the code that a signal handler interrupted, and refuses
        # to nest.
        poller = select.poll()
        while True:
            drains = not self._receiving and self._over is None and len(self._inbox) < INBOX_MAX
            poller.register(self._fd, select.POLLOUT | (select.POLLIN if drains else 0))
            # The timeout lets this thread take over when the other one's `recv` has ended.
            mask = sum(events for _, events in poller.poll(None if drains else 10))
            if mask & select.POLLIN and self._input.acquire(False):
                try:
                    if not self._receiving:
                        self._inbox.extend(islice(self._packets, BATCH_MAX))
                except OSError:
                    # Nothing more, or the end, which `recv` will find too.
                    pass
                finally:
                    self._input.release()
                if self._watched:
                    self.wake()
            if mask & ~select.POLLIN:
                return

    def _reason(self, error: OSError) -> str:
        if self._over is not None:
            return self._over
        return "the peer is gone" if isinstance(error, ConnectionError) else str(error)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `Link.close`."""
        self._over = "the link is closed"
        # Not close alone: a forked child may hold a copy of the descriptor. And it ends a `recv` of another thread.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._input:
            if self._wake_fd < 0:
                return
            self._close_descriptors()
            self._socket.close()

    def close_in_child(self) -> None:
        """After a fork, in the child: let go of its copies. The connection goes on in the parent."""
        self._over = "the link is another process's"
        self._close_descriptors()
        self._socket.close()


class UnixListener:
    """A listening socket with mode 0600, and its file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._file: tuple[int, int] | None = None
        #: Given up for a moment to turn connections away when the process has no descriptor left.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def listen(self) -> None:
        """Bind and listen; a missing directory is made with mode 0700, the file of a dead listener replaced.

        Raises:
            AddressError: somebody listens there, or others could replace files in the directory.
            OSError: as `bind` says.
        """
        prepare(self.path, socket.SOCK_SEQPACKET)
        # Linux gives the mode of the socket itself to the file, so that it is never open to others, not even for a
        # moment.
        os.fchmod(self.socket.fileno(), 0o600)
        with short_name(self.path) as name:
            self.socket.bind(name)
        made = os.stat(self.path)
        self._file = (made.st_dev, made.st_ino)
        self.socket.listen(_BACKLOG)
        self.socket.setblocking(False)

    def accept(self) -> list[socket.socket]:
        """Connections that wait, at most 64."""
        accepted: list[socket.socket] = []
        while len(accepted) < _ACCEPT_MAX:
            try:
                sock, _ = self.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError:
                self._turn_away()
                break
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            accepted.append(sock)
        return accepted

    def _turn_away(self) -> None:
        """No descriptor is left: close one connection instead of being told about it for ever."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            self.socket.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop listening and remove the file, unless a successor has replaced it."""
        self.socket.close()
        if self._spare >= 0:
            os.close(self._spare)
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            if self._file == (found.st_dev, found.st_ino):
                os.unlink(self.path)


class UnixPeer:
    """One accepted connection of a hub. Never blocks."""

    def __init__(self, number: int, sock: socket.socket, epoll: select.epoll) -> None:
        self.number = number
        #: The peer has sent a frame, so the hub's owner knows its number.
        self.known = False
        #: What the peer did wrong, if that ends it.
        self.violation = ""
        #: Whoever can open the socket's directory may be anything.
        self.guest = False
        self.socket = sock
        self._epoll = epoll
        self._recv = sock.recv
        self._send = sock.send
        self._joiner = Joiner(PACKET_MAX)
        self._outbox: deque[bytes] = deque()
        self._queued = 0

    def credentials(self) -> tuple[int, int] | None:
        """(process id, user id) of the process that connected."""
        size = struct.calcsize("3i")
        pid, uid, _ = struct.unpack("3i", self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return pid, uid

    def ready(self, events: int, budget: int, out: list[tuple[int, bytes | None]]) -> bool:
        """Handle what epoll reported: write what waits, read at most `budget` packets. False: the peer is gone."""
        if events != _IN:
            if events & _OUT:
                self._flush()
            if not events & _INPUT:
                return True
        try:
            while budget:
                budget -= 1
                packet = self._recv(_BUFFER, _DONTWAIT)
                if not packet:
                    return False
                if packet[0] == ESCAPE or len(packet) > self._joiner.plain_max:
                    joined = self._joiner.add(packet)
                    if joined is None:
                        continue
                    packet = joined
                self.known = True
                out.append((self.number, packet))
        except BlockingIOError:
            pass
        except ConnectionResetError:
            # It left without reading all we sent. What it sent is still there and read next time, then its end.
            pass
        except OSError:
            return False
        except (ProtocolError, LinkClosed) as error:
            self.violation = str(error)
            return False
        return True

    def send(self, frame: bytes) -> bool:
        """Send or queue one frame. False: the peer is gone, or (then `violation` says so) reads too slowly."""
        if frame and frame[0] != ESCAPE and len(frame) <= PACKET_MAX and not self._outbox:
            try:
                self._send(frame, _DONTWAIT)
                return True
            except BlockingIOError:
                pass
            except OSError:
                # Not closed yet: what it sent before it went may still be unread. `ready` finds the end.
                return False
        return self._queue(frame)

    def _queue(self, frame: bytes) -> bool:
        check_size(frame)
        waited = bool(self._outbox)
        if waited and self._queued + len(frame) > OUTBOX_MAX:
            self.violation = f"does not read: {self._queued} bytes wait"
            return False
        packets = list(split(frame))
        self._outbox.extend(packets)
        self._queued += sum(map(len, packets))
        if not waited:
            self._flush()
            if self._outbox:
                self._epoll.modify(self.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return True

    def _flush(self) -> None:
        outbox = self._outbox
        try:
            while outbox:
                self._send(outbox[0], _DONTWAIT)
                self._queued -= len(outbox.popleft())
        except BlockingIOError:
            return
        except OSError:
            # The peer is gone, which `ready` finds when it has read the rest.
            outbox.clear()
            self._queued = 0
        self._epoll.modify(self.socket.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """End the connection; what the kernel has taken is still delivered."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self._outbox.clear()
