"""A peer of a hub behind ZeroMQ: what waits for it, and when it has to be cut off."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from rtml.link.base import BYE_PACKET, ESCAPE, OUTBOX_MAX, check_size

if TYPE_CHECKING:
    from rtml.link.zeromq import Router

#: Before a frame that looks like an escaped packet.
ESCAPED: Final = bytes((ESCAPE, 0))


def escaped(frame: bytes) -> bytes:
    """ZeroMQ carries packets of any size, so a frame needs a prefix only where it looks like an escaped one."""
    return frame if frame[0] != ESCAPE else ESCAPED + frame


class RouterPeer:
    """One DEALER that has spoken to a router."""

    def __init__(self, number: int, identity: bytes, router: Router, guest: bool = False) -> None:
        self.number = number
        self.identity = identity
        #: The key that it has shown is a client's.
        self.guest = guest
        #: The peer has sent a frame, so the hub's owner knows its number.
        self.known = False
        #: What the peer did wrong, if that ends it.
        self.violation = ""
        #: Cut off: ignored, and sent nothing but BYE.
        self.closing = False
        self.outbox: deque[bytes] = deque()
        self._queued = 0
        self._router = router

    def credentials(self) -> tuple[int, int] | None:
        """None: ZeroMQ does not know."""
        return None

    def send(self, frame: bytes) -> bool:
        """Send or queue one frame. False: the peer is gone, or (then `violation` says so) reads too slowly."""
        check_size(frame)
        packet = escaped(frame)
        if not self.outbox:
            sent = self._router.route(self, packet)
            if sent is not None:
                return sent
        elif self._queued + len(packet) > OUTBOX_MAX:
            self.violation = f"does not read: {self._queued} bytes wait"
            return False
        self.outbox.append(packet)
        self._queued += len(packet)
        self._router.waiting.add(self)
        return True

    def flush(self) -> bool:
        """Send what waits; True if nothing waits any more."""
        while self.outbox:
            if self._router.route(self, self.outbox[0]) is None:
                return False
            self._queued -= len(self.outbox.popleft())
        return True

    def close(self) -> None:
        """Tell the peer that it is cut off, and ignore it from now on."""
        self.closing = True
        self.outbox.clear()
        self._queued = 0
        if self._router.route(self, BYE_PACKET) is None:
            self.outbox.append(BYE_PACKET)
            self._router.waiting.add(self)
