"""What both transports share: the interface, the packet format and the receiving half of a link.

Theory of operation. A link carries *frames*: non-empty byte strings of at most `FRAME_MAX` bytes, in order, each
delivered once or not at all. A transport carries *packets*. A frame that fits one packet *is* that packet, unchanged
and uncopied, unless its first byte is `ESCAPE`, which msgpack never uses. A packet that starts with `ESCAPE` has a
second byte that says what follows:

    MORE   a piece of a frame, not its last
    LAST   the last (or only) piece of a frame
    BYE    nothing: the sender has cut the receiver off

An empty packet is a keepalive on ZeroMQ, and the end of the connection on Unix sockets.

Threads and signals. One thread may be in `recv` while another is in `send`; two threads in `send` need the callers'
lock, two in `recv` are served one after the other. `wake` may be called from anywhere. A signal handler may call
`recv(0)` and `send` on the link whose method it interrupted:

* Inside `recv` of the same thread, the handler's `recv` returns [] and makes the interrupted `recv` return at once;
  that one delivers whatever arrived. So frames never overtake each other, and a loop around the interrupted `recv`
  sees every frame.
* Inside `send` of the same thread, the handler's `recv` works as always. The handler's `send` queues its frame behind
  the interrupted one.
* Outside of both it works as always. What the link cannot know is whether the interrupted code still holds frames
  from an earlier `recv` that it has not processed: a handler that processes frames must keep off then (executors
  drain only while user code runs).
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from rtml.errors import ConnectionLost, ProtocolError, RtmlError
from rtml.messages import FRAME_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Largest packet in bytes. Below glibc's mmap threshold, so that a receive buffer of this size costs no page faults
#: (measured: 2.8 us instead of 15-18 us per packet with 128 KiB), and well below the largest packet of a default
#: socket buffer (212,960).
PACKET_MAX: Final = 64 * 1024

#: Bytes that may wait for a peer in this process, beyond what its socket takes. A peer that reads this slowly is cut
#: off.
OUTBOX_MAX: Final = 64 * 1024 * 1024

#: Seconds that one wait for input lasts at most, whatever was asked: the kernel counts milliseconds in 32 bits.
WAIT_MAX: Final = 24 * 3600.0

#: Frames that one `recv` returns at most, and packets that one `poll` takes from one peer.
BATCH_MAX: Final = 256

#: Packets that a blocked `send` takes in meanwhile, at most.
INBOX_MAX: Final = 4096

#: Connections that a hub holds at the same time.
PEERS_MAX: Final = 4096

ESCAPE: Final = 0xC1
LAST: Final = 0
MORE: Final = 1
BYE: Final = 2

BYE_PACKET: Final = bytes((ESCAPE, BYE))
_LAST_PREFIX: Final = bytes((ESCAPE, LAST))
_MORE_PREFIX: Final = bytes((ESCAPE, MORE))
_PIECE: Final = PACKET_MAX - 2


class LinkClosed(ConnectionLost):
    """The peer is gone, cut this side off, or never appeared; the message says which."""


class KeyRefused(LinkClosed):
    """The dispatcher does not know the key that this side has."""


class AddressError(RtmlError, ValueError):
    """An address cannot be used: its form, its owner, or it is open to the network without keys."""


class Link(Protocol):
    """One side of a connection to a dispatcher. For threads and signal handlers see the module's text."""

    def fileno(self) -> int:
        """A descriptor for epoll or `add_reader`, level-triggered: while it is readable, call `recv(0)`.

        Raises:
            LinkClosed: after `close`.
        """

    def send(self, frame: bytes) -> None:
        """Send one frame.

        Blocks while the peer's queue is full, and takes in meanwhile what arrives (a later `recv` returns it).

        Raises:
            LinkClosed: the peer is gone. What it sent before can still be received.
            ValueError: the frame is empty or longer than `FRAME_MAX`.
        """

    def recv(self, timeout: float | None) -> list[bytes]:
        """Frames that have arrived, at most 256; the first of them is waited for.

        Args:
            timeout: seconds, rounded up to whole milliseconds; None waits for ever, 0 not at all. Only with 0 all
                frames that are there now are returned.

        Returns:
            Frames in order; [] after the timeout or a `wake`.

        Raises:
            LinkClosed: the peer is gone and all its frames were returned before.
        """

    def recv_ready(self) -> list[bytes]:
        """`recv(0)`, for loops that say that there is something: takes the shortest way for a lone frame.

        Raises:
            LinkClosed: as `recv`.
        """

    def wake(self) -> None:
        """Make a `recv` that is blocked now, or else the next that would block, return at once.

        For any thread or signal handler.
        """

    def close(self) -> None:
        """End the connection. What was sent is still delivered if the peer reads. May be called twice."""


def check_size(frame: bytes) -> None:
    """Refuse what is no frame.

    Raises:
        ValueError: the frame is empty or longer than `FRAME_MAX`.
    """
    if not 0 < len(frame) <= FRAME_MAX:
        raise ValueError(f"a frame has 1 to {FRAME_MAX} bytes, not {len(frame)}")


def split(frame: bytes) -> Iterator[bytes]:
    """The packets of a frame of valid size."""
    size = len(frame)
    if size <= PACKET_MAX and frame[0] != ESCAPE:
        yield frame
        return
    view = memoryview(frame)
    last = (size - 1) // _PIECE * _PIECE
    for start in range(0, last, _PIECE):
        yield b"".join((_MORE_PREFIX, view[start : start + _PIECE]))
    yield b"".join((_LAST_PREFIX, view[last:]))


class Joiner:
    """Makes frames of escaped packets: the inverse of `split` for all but plain packets, which need no call."""

    __slots__ = ("_packet_max", "_pieces", "_size", "plain_max")

    def __init__(self, packet_max: int) -> None:
        self._packet_max = packet_max
        #: Plain packets may be this long, too. While pieces of an unfinished frame are held, a plain packet is a
        #: violation, and this below zero.
        self.plain_max = packet_max
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, packet: bytes) -> bytes | None:
        """The frame that this packet completes, if it does.

        Called for packets that are escaped, or longer than `plain_max`.

        Raises:
            ProtocolError: the packet is malformed or out of place, or the frame longer than `FRAME_MAX`.
            LinkClosed: the packet says that the peer has cut us off.
        """
        if packet[0] != ESCAPE or not 2 <= len(packet) <= self._packet_max:
            raise ProtocolError(f"a packet of {len(packet)} bytes where none may be")
        kind = packet[1]
        if kind == BYE:
            raise LinkClosed("closed by the peer")
        if kind not in (LAST, MORE):
            raise ProtocolError(f"a packet of unknown kind {kind}")
        self._size += len(packet) - 2
        if self._size > FRAME_MAX:
            raise ProtocolError(f"a frame of more than {FRAME_MAX} bytes")
        self._pieces.append(packet)
        if kind == MORE:
            self.plain_max = -1
            return None
        self.plain_max = self._packet_max
        frame = b"".join([memoryview(piece)[2:] for piece in self._pieces])
        self._pieces = []
        self._size = 0
        if not frame:
            raise ProtocolError("an empty frame")
        return frame


class ReceivingLink:
    """The receiving half of a `Link`: order, wake-ups, re-entrance. A transport adds `_fill` and the sending half."""

    #: An empty packet is the end of the connection, not a keepalive.
    _ends = False

    #: What `fileno` watches for the transport.
    _fds: tuple[int, ...]

    def __init__(self, packet_max: int) -> None:
        #: Packets taken from the transport and not yet returned. Only C code extends it, so that no signal handler
        #: can run between taking a packet and storing it.
        self._inbox: deque[bytes] = deque()
        self._joiner = Joiner(packet_max)
        #: Held by whoever takes packets. Re-entrant: a signal handler must not deadlock with the code it interrupted.
        self._input = threading.RLock()
        #: A `recv` of the thread that holds `_input` is on the stack.
        self._receiving = False
        #: Why nothing will arrive any more.
        self._over: str | None = None
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        #: Made by `fileno`, for those who want to wait for several things.
        self._epoll: select.epoll | None = None
        #: Held while the descriptors are made for `fileno`, or closed: that may be two threads' business at once.
        self._descriptors = threading.Lock()
        #: Somebody waits on `fileno()`, which must be readable whenever `recv(0)` would return frames.
        self._watched = False

    def fileno(self) -> int:
        """See `Link.fileno`."""
        with self._descriptors:
            if self._wake_fd < 0:
                raise LinkClosed("the link is closed")
            epoll = self._epoll
            if epoll is None:
                epoll = self._epoll = select.epoll()
                for fd in (*self._fds, self._wake_fd):
                    epoll.register(fd, select.EPOLLIN)
                self._watched = True
                self.wake()
            return epoll.fileno()

    def _close_descriptors(self) -> None:
        """Before the transport closes its own, so that `fileno` finds either all or none."""
        with self._descriptors:
            if self._epoll is not None:
                self._epoll.close()
            wake_fd, self._wake_fd = self._wake_fd, -1
            os.close(wake_fd)
        self._inbox.clear()

    def _fill(self, timeout: float | None) -> bool:
        """Wait for input and move packets to the inbox; at the end call `_end`. False after the timeout or a wake."""
        raise NotImplementedError

    def recv(self, timeout: float | None) -> list[bytes]:
        """See `Link.recv`."""
        if timeout is not None and timeout > WAIT_MAX:
            timeout = WAIT_MAX
        held = self._input
        if not held.acquire(False) and (timeout == 0 or not held.acquire(timeout=-1 if timeout is None else timeout)):
            return []
        if self._receiving:
            held.release()
            self.wake()
            return []
        self._receiving = True
        try:
            if self._inbox:
                frames = self._take()
                if frames:
                    return frames
            deadline = time.monotonic() + timeout if timeout else None
            while self._over is None:
                if not self._fill(timeout):
                    return []
                frames = self._take()
                if frames:
                    return frames
                if deadline is not None:
                    timeout = max(0.0, deadline - time.monotonic())
            raise LinkClosed(self._over)
        finally:
            self._receiving = False
            held.release()

    def recv_ready(self) -> list[bytes]:
        """See `Link.recv_ready`."""
        return self.recv(0)

    def _take(self) -> list[bytes]:
        """Frames from the inbox: the packets as they are, but for escaped ones."""
        inbox = self._inbox
        joiner = self._joiner
        frames: list[bytes] = []
        while inbox:
            packet = inbox.popleft()
            if not packet:
                if self._ends:
                    self._end("the peer is gone")
                    inbox.clear()
                    break
                continue
            if packet[0] == ESCAPE or len(packet) > joiner.plain_max:
                try:
                    frame = joiner.add(packet)
                except (ProtocolError, LinkClosed) as error:
                    self._end(str(error))
                    inbox.clear()
                    break
                if frame is None:
                    continue
                packet = frame
            frames.append(packet)
            if len(frames) == BATCH_MAX:
                break
        if self._watched and inbox:
            self.wake()
        return frames

    def _end(self, reason: str) -> None:
        """Nothing will arrive any more. The first reason counts."""
        if self._over is None:
            self._over = reason
            # Stays set, because nobody waits again: whoever watches `fileno()` calls `recv(0)` until that raises.
            self.wake()

    def wake(self) -> None:
        """See `Link.wake`."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
