"""Objects of clients that share no memory with this node: they lie here, and go with their client."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from rtml.errors import ObjectLost
from rtml.exchange import Elsewhere, Stored, send
from rtml.incoming import Incoming
from rtml.messages import ObjectRef
from rtml.store import Store

#: Seconds for which a client may be away before its objects are removed.
GRACE: Final = 30.0
#: In the place of a segment: it was taken over from another endpoint, and lies among the copies.
_TAKEN: Final = "taken"


class _Client:
    def __init__(self) -> None:
        #: segments by object id
        self.objects: dict[int, str] = {}
        self.connections: list[socket.socket] = []
        self.timer: threading.Timer | None = None
        #: whoever has it may send to the connections
        self.speaking = threading.Lock()


class Uploads:
    """All of them; for many threads.

    Args:
        store: where they lie; used by nobody else.
        earlier: sessions of the stores of this endpoint's earlier lives, whose objects may still be wanted.
        let_go: told of objects that were taken over and are needed no more.
    """

    def __init__(
        self, store: Store, earlier: list[int], let_go: Callable[[int], None] = lambda object_id: None
    ) -> None:
        self.store = store
        self._let_go = let_go
        self._lock = threading.Lock()
        self._clients: dict[int, _Client] = {}
        #: Segments of earlier lives that no client has claimed yet.
        self._orphans = {
            path.name
            for directory in filter(None, (store.directory, store.place.spill))
            for session in earlier
            for path in Path(directory).glob(f"{session:08x}-*")
            if path.suffix not in (".alive", ".new")
        }
        if self._orphans:
            timer = threading.Timer(GRACE, self._give_up_orphans)
            timer.daemon = True
            timer.start()

    def joined(self, session: int, objects: list[tuple[int, str]], sock: socket.socket) -> None:
        """A connection of this client, which still needs these."""
        with self._lock:
            client = self._clients.setdefault(session, _Client())
            client.connections.append(sock)
            if client.timer is not None:
                client.timer.cancel()
                client.timer = None
            for object_id, segment in objects:
                if segment in self._orphans:
                    self._orphans.discard(segment)
                    client.objects[object_id] = segment

    def left(self, session: int, sock: socket.socket) -> None:
        """The connection has ended."""
        with self._lock:
            client = self._clients[session]
            client.connections.remove(sock)
            if client.connections:
                return
            if not client.objects:
                del self._clients[session]
                return
            self._wait_for(session, client)

    def _wait_for(self, session: int, client: _Client) -> None:
        client.timer = threading.Timer(GRACE, self._give_up, (session,))
        client.timer.daemon = True
        client.timer.start()

    def stored(self, session: int, incoming: Incoming) -> str:
        """An object of the client's has arrived. Returns its segment."""
        self.store.publish(incoming)
        with self._lock:
            self._clients[session].objects[incoming.id] = incoming.segment
        return incoming.segment

    def answer(self, session: int, sock: socket.socket, message: Stored) -> None:
        """Tell the client that an object has arrived, or not.

        Raises:
            OSError: the connection is lost.
        """
        with self._clients[session].speaking:
            send(sock, message)

    def drop(self, session: int, objects: list[tuple[int, str]]) -> None:
        """The client needs these no more."""
        with self._lock:
            client = self._clients.get(session)
            for object_id, _ in objects:
                segment = client.objects.pop(object_id, "") if client is not None else ""
                if segment:
                    self._free(object_id, segment)

    # --- from one endpoint to another

    def take(self, session: int, object_id: int) -> None:
        """A client's object has come from a node that leaves; the client will come, too."""
        with self._lock:
            client = self._clients.setdefault(session, _Client())
            client.objects[object_id] = _TAKEN
            if not client.connections and client.timer is None:
                self._wait_for(session, client)

    def needed(self) -> list[tuple[int, ObjectRef]]:
        """Sessions and references of all objects that clients still need."""
        with self._lock:
            objects = [
                (s, number, name) for s, client in self._clients.items() for number, name in client.objects.items()
            ]
        found = []
        for session, object_id, segment in objects:
            with contextlib.suppress(ObjectLost):
                ref = ObjectRef(object_id, 0, segment)
                found.append((session, ref if segment == _TAKEN else replace(ref, size=len(self.store.whole(ref)))))
        return found

    def given(self, session: int, address: str, objects: list[int]) -> None:
        """The client's objects lie there from now on."""
        with self._lock:
            client = self._clients.get(session)
            if client is None:
                return
            for object_id in objects:
                client.objects.pop(object_id, None)  # what is being read there goes with this process
        with client.speaking:
            for sock in list(client.connections):
                with contextlib.suppress(OSError):
                    send(sock, Elsewhere(address, objects))

    # --- the end of objects

    def _free(self, object_id: int, segment: str) -> None:
        if segment == _TAKEN:
            self._let_go(object_id)
        elif self.store.has(object_id):
            self.store.free(object_id)
        else:
            self._remove(segment)

    def _remove(self, segment: str) -> None:
        Path(self.store.directory, segment).unlink(missing_ok=True)
        self.store.disk.remove(segment)

    def _give_up(self, session: int) -> None:
        with self._lock:
            client = self._clients.get(session)
            if client is None or client.connections:
                return
            del self._clients[session]
            for object_id, segment in client.objects.items():
                self._free(object_id, segment)

    def _give_up_orphans(self) -> None:
        with self._lock:
            orphans, self._orphans = self._orphans, set()
        for segment in orphans:
            self._remove(segment)
