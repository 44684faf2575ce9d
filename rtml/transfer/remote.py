"""The store of a process that shares no memory with any node: it puts objects at a data endpoint, and pulls results.

What it puts lies at an endpoint of the engine, and is removed there when it is freed, or when this process is gone for
`rtml.transfer.uploads.GRACE` seconds. A connection to each endpoint that has something stands for the process's life; a
thread watches them, makes new ones when an endpoint was started again, and hears where objects went whose node left.
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
from rtml.exchange import NO_ROOM, Drop, Elsewhere, Hold, Put, Stored, call, receive, send
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
        #: Guards the connections: whoever has it may speak and listen.
        self._speaking = threading.Lock()
        self._socks: dict[str, socket.socket] = {}
        self._dropped: deque[int] = deque()
        self._bell = -1
        self._thread: threading.Thread | None = None

    def endpoints(self, addresses: list[str]) -> None:
        """The dispatcher says where objects may be put."""
        first = self._endpoints[:1]
        # The one in use stays the first, for as long as it is named.
        self._endpoints = sorted(addresses, key=lambda one: one not in first)

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
                    self._hang_up(address)
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
        while isinstance(answer := self._hear(address, sock), Elsewhere):
            pass
        if not isinstance(answer, Stored):
            raise ProtocolError(f"a data endpoint said {type(answer).__name__} instead of Stored")
        return answer

    def _connected(self, address: str) -> socket.socket:
        sock = self._socks.get(address)
        if sock is not None:
            return sock
        sock = self._socks[address] = call(address, self._secret)
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

    def _hear(self, address: str, sock: socket.socket) -> Stored | Elsewhere:
        """The next word of an endpoint; what it says of objects that went elsewhere is seen to."""
        message = receive(sock)
        if message is None:
            raise ConnectionResetError("the data endpoint has closed the connection")
        if isinstance(message, Elsewhere):
            self.places.moved([(object_id, message.address) for object_id in message.objects])
            freed = []
            for object_id in message.objects:
                if object_id in self._held:
                    self._held[object_id] = message.address, ""
                else:
                    freed.append((object_id, ""))
            if address in self._endpoints and message.address != address:
                self._endpoints.remove(address)
            self._drop_at(message.address, freed)
        elif not isinstance(message, Stored):
            raise ProtocolError(f"a data endpoint said {type(message).__name__} unasked")
        return message

    def _hang_up(self, address: str) -> None:
        sock = self._socks.pop(address, None)
        if sock is not None:
            sock.close()

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
        ref = self.places.where(ref)
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
        """The thread: says what is dropped, hears what has moved, and connects again when a connection ends."""
        pause = 0.05
        while True:
            socks = dict(self._socks)
            poller = select.poll()
            poller.register(self._bell, select.POLLIN)
            for sock in socks.values():
                with contextlib.suppress(OSError, ValueError):
                    poller.register(sock.fileno(), select.POLLIN)
            lost = any(at not in socks for at, _ in list(self._held.values()))
            poller.poll(pause * 1000 if lost else None)
            with contextlib.suppress(OSError):
                os.eventfd_read(self._bell)
            if self._closed:
                return
            with self._speaking:
                pause = 0.05 if self._look() else min(_PAUSE_MAX, pause * 2)

    def _look(self) -> bool:
        """Whether all endpoints that have something of ours are connected."""
        for address, sock in list(self._socks.items()):
            try:
                while _has_news(sock):
                    self._hear(address, sock)
            except (OSError, ProtocolError):
                self._hang_up(address)
        dropped: dict[str, list[tuple[int, str]]] = {}
        for object_id in self._take_dropped():
            address, segment = self._held.pop(object_id)
            dropped.setdefault(address, []).append((object_id, segment))
        for address in {at for at, _ in self._held.values()} | dropped.keys():
            self._drop_at(address, dropped.get(address, []))
        return all(at in self._socks for at, _ in self._held.values())

    def _drop_at(self, address: str, objects: list[tuple[int, str]]) -> None:
        """Connect to an endpoint that has something of ours, and say what is dropped.

        What lies at one that cannot be reached goes when that notices that we do not come back.
        """
        try:
            sock = self._connected(address)
            if objects:
                send(sock, Drop(objects))
        except (OSError, ProtocolError):
            self._hang_up(address)

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
            for address, sock in list(self._socks.items()):
                held = [(number, segment) for number, (at, segment) in self._held.items() if at == address]
                if unlink:
                    with contextlib.suppress(OSError):
                        send(sock, Drop(held))
                self._hang_up(address)
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


def _has_news(sock: socket.socket) -> bool:
    """Whether something has arrived, the end of the connection included."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True
