"""The store of a process that shares no memory with any node: it puts objects at a data endpoint, and pulls results.

What it puts lies at one endpoint of the engine, and is removed there when it is freed, or when this process is gone for
`rtml.transfer.uploads.GRACE` seconds. One connection stands for the process's life; a thread watches it, and makes a
new one when the endpoint was started again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from rtml.errors import LimitExceeded, ObjectLost, ProtocolError
from rtml.exchange import NO_ROOM, Drop, Hold, Put, Stored, call, expect, send
from rtml.incoming import Incoming
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.parts import Buffer, flat
from rtml.segment import HEADER_OFFSET, header, layout, parts_of
from rtml.store import Store
from rtml.transfer.counts import Counts
from rtml.transfer.pulling import Caller, pull, set_timeouts

#: Seconds without progress after which a connection is given up.
_STALLED: Final = 10.0
#: Seconds between attempts to connect again, at most.
_PAUSE_MAX: Final = 2.0


class RemoteStore(Store):
    """Puts and gets objects over the network; for many threads.

    Args:
        session: this process's session.
        address: of the engine, for messages.
        secret: of the data endpoints; b"" without keys.
    """

    distant = True

    def __init__(self, session: int, address: str, secret: bytes = b"") -> None:
        super().__init__("", session, 0)
        self._address = address
        self._secret = secret
        self._caller = Caller(secret)
        self._counts = Counts()
        #: Data endpoints that the dispatcher named, the one in use first.
        self._endpoints: list[str] = []
        #: Where objects of ours lie: id -> (endpoint, segment).
        self._held: dict[int, tuple[str, str]] = {}
        #: Guards the connection for puts: whoever has it may speak.
        self._speaking = threading.Lock()
        self._sock: socket.socket | None = None
        self._at = ""
        self._dropped: deque[int] = deque()
        self._bell = -1
        self._thread: threading.Thread | None = None

    def endpoints(self, addresses: list[str]) -> None:
        """The dispatcher says where objects may be put."""
        at = self._at
        self._endpoints = [at, *(one for one in addresses if one != at)] if at in addresses else list(addresses)

    # --- putting ------------------------------------------------------------------------------------------------------

    def put(self, parts: Sequence[Buffer]) -> ObjectRef:
        """Send the parts to a data endpoint, as one object.

        Raises:
            LimitExceeded: there is no endpoint, or no room at any.
            RtmlError: none of them can be reached, or the store is closed.
        """
        self._check_usable()
        flat_parts = [flat(part) for part in parts]
        table, offsets, size = layout([len(part) for part in flat_parts])
        if not self._endpoints:
            raise self._refusal("a function, argument or value", sum(map(len, flat_parts)))
        with self._speaking:
            object_id = self.new_id()
            pieces = _pieces(header(object_id, table), flat_parts, offsets)
            problems: list[str] = []
            for address in [endpoint for endpoint in list(self._endpoints) for _ in range(2)]:
                try:
                    stored = self._put_at(address, object_id, size, pieces)
                except (OSError, ProtocolError) as error:
                    self._hang_up()
                    problems.append(f"{address}: {error}")
                    continue
                if not stored.error:
                    self._held[object_id] = (address, stored.segment)
                    return ObjectRef(object_id, size, stored.segment, address)
                problems.append(f"{address}: {stored.error.removeprefix(NO_ROOM)}")
        raise LimitExceeded(f"an object of {size} bytes finds no place: {'; '.join(dict.fromkeys(problems))}")

    def _put_at(self, address: str, object_id: int, size: int, pieces: list[memoryview]) -> Stored:
        sock = self._connected(address)
        send(sock, Put(object_id, size))
        for piece in pieces:
            sock.sendall(piece)
        return expect(sock, Stored)

    def _connected(self, address: str) -> socket.socket:
        if self._sock is not None and self._at == address:
            return self._sock
        self._hang_up()
        sock = call(address, self._secret)
        self._sock, self._at = sock, address
        sock.settimeout(None)
        set_timeouts(sock, _STALLED)
        held = [(object_id, segment) for object_id, (at, segment) in list(self._held.items()) if at == address]
        send(sock, Hold(self.session, held))
        if self._thread is None:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._watch, name="rtml-objects", daemon=True)
            self._thread.start()
        self._ring()
        return sock

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    # --- getting ------------------------------------------------------------------------------------------------------

    def get(self, ref: ObjectRef) -> list[memoryview]:
        """The parts of an object, brought here.

        Raises:
            ObjectLost: it is gone, or where it lies cannot be reached.
            LimitExceeded: it lies where nobody else can read it; it can still be an argument of tasks.
        """
        if not ref.node:
            raise self._refusal("a result", ref.size)
        if ref.size <= HEADER_OFFSET:
            raise ObjectLost(f"{ref.size} bytes are no object")
        memory = memoryview(mmap.mmap(-1, ref.size))
        pull(ref, Incoming(ref.id, ref.size, "", memory), self._caller, self._counts)
        return [memory[at : at + size].toreadonly() for at, size in parts_of(memory, ref.id)]

    def is_far(self, payload: object) -> bool:
        """Every object is."""
        return payload.__class__ is ObjectRef

    def _refusal(self, what: str, size: int) -> LimitExceeded:
        return LimitExceeded(
            f"{what} of {size} bytes cannot travel through {self._address}: values above {INLINE_MAX // 1024} KiB need"
            " a node with a data endpoint there (rtml worker --data, see Operations), or a unix: address on its machine"
        )

    # --- freeing ------------------------------------------------------------------------------------------------------

    def free(self, object_id: int) -> None:
        """Nobody needs this object of ours any more. May be called from a signal handler."""
        self._dropped.append(object_id)
        self._ring()

    def _ring(self) -> None:
        if self._bell >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._bell, 1)

    def _watch(self) -> None:
        """The thread: says what is dropped, and connects again when the connection ends."""
        pause = 0.05
        while True:
            sock = self._sock
            poller = select.poll()
            poller.register(self._bell, select.POLLIN)
            if sock is not None:
                with contextlib.suppress(OSError, ValueError):
                    poller.register(sock.fileno(), select.POLLIN)
            lost = sock is None and bool(self._held)
            poller.poll(pause * 1000 if lost else None)
            with contextlib.suppress(OSError):
                os.eventfd_read(self._bell)
            if self._closed:
                return
            with self._speaking:
                pause = 0.05 if self._look() else min(_PAUSE_MAX, pause * 2)

    def _look(self) -> bool:
        """Whether there is a connection, or none is needed."""
        dropped = [(object_id, self._held.pop(object_id)) for object_id in self._take_dropped()]
        sock = self._sock
        try:
            if sock is not None and _has_ended(sock):
                self._hang_up()
            if self._sock is None and self._held:
                self._connected(self._at)
            if self._sock is not None and dropped:
                # What lies at an endpoint that was left goes when that notices that we do not come back.
                gone = [(object_id, segment) for object_id, (at, segment) in dropped if at == self._at]
                send(self._sock, Drop(gone))
        except (OSError, ProtocolError):
            self._hang_up()
        return self._sock is not None or not self._held

    def _take_dropped(self) -> list[int]:
        taken = []
        while self._dropped:
            object_id = self._dropped.popleft()
            if object_id in self._held:
                taken.append(object_id)
        return taken

    def close(self, *, unlink: bool = True) -> None:
        """Drop all that is held, and end the connections."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._ring()
        if self._thread is not None:
            self._thread.join(_STALLED)
        with self._speaking:
            if self._sock is not None and unlink:
                with contextlib.suppress(OSError):
                    send(self._sock, Drop([(number, segment) for number, (_, segment) in self._held.items()]))
            self._hang_up()
        self._caller.close()
        self._held.clear()
        bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)


def _pieces(head: bytes, parts: list[memoryview], offsets: list[int]) -> list[memoryview]:
    """All bytes of an object from `HEADER_OFFSET` on, in order."""
    pieces = [memoryview(head)]
    at = HEADER_OFFSET + len(head)
    for part, offset in zip(parts, offsets):
        if offset > at:
            pieces.append(memoryview(bytes(offset - at)))
        pieces.append(part)
        at = offset + len(part)
    return pieces


def _has_ended(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
