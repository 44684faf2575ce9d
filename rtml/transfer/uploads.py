"""Objects of clients that share no memory with this node: they lie here, and go with their client."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from rtml.incoming import Incoming
from rtml.store import Store

#: Seconds for which a client may be away before its objects are removed.
GRACE: Final = 30.0


class _Client:
    def __init__(self) -> None:
        self.objects: dict[int, str] = {}
        self.connections = 0
        self.timer: threading.Timer | None = None


class Uploads:
    """All of them; for many threads.

    Args:
        store: where they lie; used by nobody else.
        earlier: sessions of the stores of this endpoint's earlier lives, whose objects may still be wanted.
    """

    def __init__(self, store: Store, earlier: list[int]) -> None:
        self.store = store
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

    def joined(self, session: int, objects: list[tuple[int, str]]) -> None:
        """A connection of this client, which still needs these."""
        with self._lock:
            client = self._clients.setdefault(session, _Client())
            client.connections += 1
            if client.timer is not None:
                client.timer.cancel()
                client.timer = None
            for object_id, segment in objects:
                if segment in self._orphans:
                    self._orphans.discard(segment)
                    client.objects[object_id] = segment

    def left(self, session: int) -> None:
        """The connection has ended."""
        with self._lock:
            client = self._clients[session]
            client.connections -= 1
            if client.connections:
                return
            if not client.objects:
                del self._clients[session]
                return
            client.timer = threading.Timer(GRACE, self._give_up, (session,))
            client.timer.daemon = True
            client.timer.start()

    def stored(self, session: int, incoming: Incoming) -> str:
        """An object of the client's has arrived. Returns its segment."""
        self.store.publish(incoming)
        with self._lock:
            self._clients[session].objects[incoming.id] = incoming.segment
        return incoming.segment

    def drop(self, session: int, objects: list[tuple[int, str]]) -> None:
        """The client needs these no more."""
        with self._lock:
            client = self._clients.get(session)
            for object_id, _ in objects:
                segment = client.objects.pop(object_id, "") if client is not None else ""
                if segment:
                    self._free(object_id, segment)

    def _free(self, object_id: int, segment: str) -> None:
        if self.store.has(object_id):
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
