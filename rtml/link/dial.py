"""A dispatcher's own connection to the dispatcher above it: made, and made again, without ever blocking its loop.

A thread connects and closes, which may take long; sending and receiving is the loop's. `bell` is readable when the
thread has something for the loop.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from rtml.link.addresses import check_peer
from rtml.link.base import OUTBOX_MAX, AddressError, LinkClosed

if TYPE_CHECKING:
    from rtml.link.hub import Hub
    from rtml.link.keys import CurveKeys
    from rtml.link.zeromq import ZmqLink

#: The number of this connection, beside those that a hub gives to its peers.
UPLINK: Final = 0
#: Seconds for one attempt to connect, and between two of them.
_ATTEMPT: Final = 2.0
_PAUSE: Final = 0.1
#: A connection that was lost so soon was refused: the next one comes as much later.
_SHORT: Final = 1.0
#: Seconds between two attempts to send what waits.
RESEND: Final = 0.01


class Dialler:
    """Keeps one connection to `address`.

    Args:
        address: "tcp://host:port" or "ipc:///path".
        keys: for tcp with encryption.
        hub: whose `poll` is to return when something happens here.
    """

    def __init__(self, address: str, keys: CurveKeys | None, hub: Hub) -> None:
        if not address.startswith(("tcp://", "ipc://")):
            raise AddressError(f"{address!r} is no address of a dispatcher above: tcp://host:port or ipc:///path")
        check_peer(address)
        self.address = address
        self._keys = keys
        self._hub = hub
        self._link: ZmqLink | None = None
        self._fd = -1
        self._outbox: deque[bytes] = deque()
        self._queued = 0
        self._lost = False
        #: Between the loop and the thread: new links for the one, old ones for the other.
        self._new: deque[ZmqLink] = deque()
        self._old: deque[ZmqLink] = deque()
        #: Why there is no connection, if that is news; see `trouble`.
        self._trouble = ""
        #: Held while something is handed to the loop or taken by it, together with the bell: else a ring that comes
        #: after what it is for has been taken would keep the loop awake for ever.
        self._handing = threading.Lock()
        self._wanted = threading.Event()
        self._closed = False
        self._ended = threading.Event()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._dial, name="rtml-uplink", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._hub.add_fd(self._bell)
        self._wanted.set()
        self._thread.start()

    @property
    def waiting(self) -> bool:
        """Something could not be sent at once: call `poll` again after `RESEND` seconds."""
        return bool(self._outbox)

    def trouble(self) -> str:
        """Why no connection could be made so far, said once for each reason; "" otherwise."""
        trouble, self._trouble = self._trouble, ""
        return trouble

    def poll(self) -> tuple[bool, list[bytes], bool]:
        """What happened since the last call.

        Returns:
            Whether the connection was lost; frames that came; and whether there is a new connection, of which nothing
            was received yet.
        """
        frames: list[bytes] = []
        link = self._link
        if link is not None:
            try:
                frames = link.recv(0)
                while self._outbox and link.offer(self._outbox[0]):
                    self._queued -= len(self._outbox.popleft())
            except LinkClosed:
                self._lose()
        lost, self._lost = self._lost, False
        fresh = False
        if self._link is None:
            with self._handing:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
                self._link = self._new.popleft() if self._new else None
            if self._link is not None:
                self._fd = self._link.fileno()
                self._hub.add_fd(self._fd)
                fresh = True
        return lost, frames, fresh

    def send(self, frame: bytes) -> None:
        """Send one frame, or queue it; without a connection it is dropped (the next introduction says all)."""
        link = self._link
        if link is None:
            return
        try:
            if not self._outbox and link.offer(frame):
                return
        except LinkClosed:
            self._lose()
            return
        self._outbox.append(frame)
        self._queued += len(frame)
        if self._queued > OUTBOX_MAX:
            self._lose()  # it does not read: say everything again later, instead of remembering without bound

    def hang_up(self) -> None:
        """The connection is not wanted; make another one."""
        if self._link is not None:
            self._lose()

    def _lose(self) -> None:
        assert self._link is not None
        self._hub.remove_fd(self._fd)
        self._old.append(self._link)
        self._link = None
        self._outbox.clear()
        self._queued = 0
        self._lost = True
        self._wanted.set()

    def close(self) -> None:
        """End the connection, after what was sent has left."""
        self._closed = True
        self._ended.set()
        if self._link is not None:
            self._lose()
        self._wanted.set()
        if self._thread.ident is not None:
            self._thread.join(_ATTEMPT + 1.0)
        os.close(self._bell)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        from rtml.link.zeromq import connect_zeromq

        said = ""
        made = -_SHORT
        while True:
            self._wanted.wait()
            if time.monotonic() < made + _SHORT:
                self._ended.wait(_SHORT)
            while self._old:
                self._old.popleft().close()
            if self._closed:
                while self._new:
                    self._new.popleft().close()
                return
            self._wanted.clear()
            try:
                link = connect_zeromq(self.address, _ATTEMPT, self._keys)
            except (LinkClosed, AddressError) as error:
                self._wanted.set()
                if str(error) != said and not self._closed:
                    said = str(error)
                    self._ring(trouble=said)
                threading.Event().wait(_PAUSE)
                continue
            said = ""
            made = time.monotonic()
            self._ring(link)

    def _ring(self, link: ZmqLink | None = None, trouble: str = "") -> None:
        """Hand something to the loop, and wake it."""
        with self._handing:
            if link is not None:
                self._new.append(link)
            if trouble:
                self._trouble = trouble
            if not self._closed:
                os.eventfd_write(self._bell, 1)
