"""Copies of other nodes' objects on this node: brought here once for all its processes, and forgotten in time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import Final

from rtml.errors import LimitExceeded, ObjectLost
from rtml.exchange import NO_ROOM
from rtml.incoming import Incoming, Piece
from rtml.messages import ObjectRef
from rtml.segment import HEADER_OFFSET
from rtml.store import Store
from rtml.transfer.counts import Counts
from rtml.transfer.pulling import Caller, pull

#: Objects that are brought here at the same time.
PULLS_MAX: Final = 4
#: Those that nobody waits for yet; others are fetched when somebody does.
_AHEAD_MAX: Final = 256
#: Names of objects that were made here, and are remembered.
_NAMES_MAX: Final = 4096


class Copy:
    """One object: here, on its way, or failed."""

    __slots__ = ("error", "grants", "growing", "incoming", "kept", "moved", "ref", "seconds", "served", "started")

    def __init__(self, ref: ObjectRef) -> None:
        self.ref = ref
        self.incoming: Incoming | None = None
        #: why it cannot be brought here
        self.error = ""
        #: processes that were told of it and have not pinned it yet
        self.grants = 0
        #: endpoints that read it from here now
        self.served = 0
        self.started = False
        #: It is no copy: a process of this node makes it.
        self.growing = False
        #: it was taken over from a node that left, and nobody else has it
        self.kept = False
        self.moved = 0
        self.seconds = 0.0

    @property
    def complete(self) -> bool:
        """Whether all of it is here."""
        return self.incoming is not None and self.incoming.complete and self.incoming.place is None


class Copies:
    """All copies of one node; for many threads.

    Args:
        store: where they lie; used by nobody else.
        caller: connects to other endpoints.
        counts: told of what happens.
    """

    def __init__(self, store: Store, caller: Caller, counts: Counts) -> None:
        self.store = store
        self._caller = caller
        self._counts = counts
        #: Guards all that follows; notified whenever a piece has arrived or something has ended.
        self.changed = threading.Condition()
        #: By object id, least recently used first.
        self._copies: OrderedDict[int, Copy] = OrderedDict()
        #: Objects that a process of this node makes now.
        self._growing: dict[int, Copy] = {}
        #: What was made here lately under a name.
        self._named: OrderedDict[int, ObjectRef] = OrderedDict()
        self._bytes = 0
        self._urgent: deque[Copy] = deque()
        self._ahead: deque[Copy] = deque()
        self._threads = 0

    @property
    def bound(self) -> int:
        """Bytes of copies beyond which those that nobody uses are forgotten."""
        memory = self.store.place.memory
        return min(self.store.capacity, memory) // 2 if memory else self.store.capacity // 2

    def fetch(self, ref: ObjectRef) -> Copy:
        """The copy of an object, once it is here, granted to the caller: say `granted` when it is pinned.

        Raises:
            ObjectLost: it cannot be had.
        """
        with self.changed:
            copy = self._wanted(ref)
            copy.grants += 1
            if not copy.started:
                if copy in self._ahead:
                    self._ahead.remove(copy)
                if copy not in self._urgent:
                    self._urgent.append(copy)
                self._work()
            try:
                while not copy.complete and not copy.error:
                    self.changed.wait()
            finally:
                if not copy.complete:
                    copy.grants -= 1
            if copy.error:
                raise ObjectLost(copy.error)
            return copy

    def granted(self, copy: Copy) -> None:
        """Whoever fetched it has pinned it, or is gone."""
        with self.changed:
            copy.grants -= 1

    def take(self, ref: ObjectRef) -> None:
        """Bring an object here for good, until `let_go`.

        Raises:
            ObjectLost: it cannot be had.
            LimitExceeded: there is no room.
        """
        copy = self.fetch(ref)
        with self.changed:
            copy.kept = True
            copy.grants -= 1

    def let_go(self, object_id: int) -> None:
        """What was taken is needed no more."""
        with self.changed:
            copy = self._copies.get(object_id)
            if copy is not None:
                copy.kept = False

    def taken(self) -> list[ObjectRef]:
        """What was taken and is still needed."""
        with self.changed:
            return [copy.ref for copy in self._copies.values() if copy.kept]

    def prefetch(self, refs: list[ObjectRef]) -> None:
        """Begin to bring these here."""
        with self.changed:
            for ref in refs:
                if ref.id not in self._copies and len(self._ahead) < _AHEAD_MAX:
                    self._ahead.append(self._wanted(ref))
                    self._work()

    def _wanted(self, ref: ObjectRef) -> Copy:
        copy = self._copies.get(ref.id)
        if copy is None:
            copy = self._copies[ref.id] = Copy(ref)
        else:
            self._copies.move_to_end(ref.id)
        return copy

    def follow(self, ref: ObjectRef) -> Copy:
        """The copy of an object, that is here or begins to arrive now; granted to the caller as by `fetch`.

        It never waits behind others: what it is needed for may be what they wait for.

        Raises:
            ObjectLost: it cannot be had.
        """
        with self.changed:
            copy = self._growing.get(ref.id) or self._wanted(ref)
            copy.grants += 1
            if not copy.started:
                copy.started = True
                for queue in (self._ahead, self._urgent):
                    if copy in queue:
                        queue.remove(copy)
                threading.Thread(target=self._pull_one, args=(copy,), name="rtml-pull", daemon=True).start()
            while copy.incoming is None and not copy.error:
                self.changed.wait()
            if copy.error:
                copy.grants -= 1
                raise ObjectLost(copy.error)
            return copy

    def forget(self, copy: Copy) -> None:
        """Whoever had it brought here knows that nobody wants it again."""
        with self.changed:
            if copy.complete and copy.grants <= 1 and not copy.served and self._copies.get(copy.ref.id) is copy:
                del self._copies[copy.ref.id]
                self._bytes -= copy.ref.size
                self.store.free(copy.ref.id)

    # --- objects that are made here

    def grow(self, ref: ObjectRef, memory: memoryview, name: int = 0) -> tuple[Copy, Piece]:
        """A process of this node begins to make an object in a segment of its own; others may read it from here."""
        copy = Copy(ref)
        copy.started = copy.growing = True
        copy.incoming = Incoming(ref.id, ref.size, ref.segment, memory)
        piece = copy.incoming.claim(ref.size)
        if piece is None:
            raise ObjectLost(f"{ref.size} bytes are no object")
        with self.changed:
            self._growing[ref.id] = copy
            if name:
                self._named[name] = ref
                if len(self._named) > _NAMES_MAX:
                    self._named.popitem(last=False)
                self.changed.notify_all()
        return copy, piece

    def named(self, name: int, seconds: float) -> ObjectRef | None:
        """The object that is made here under this name, as soon as it is begun; None after so many seconds."""
        with self.changed:
            self.changed.wait_for(lambda: name in self._named, seconds)
            return self._named.get(name)

    def grown(self, copy: Copy, piece: Piece, upto: int) -> None:
        """Everything before this offset is there."""
        with self.changed:
            if copy.incoming is not None and piece.at < upto <= piece.end:
                copy.incoming.arrived(piece, upto - piece.at)
                self.changed.notify_all()

    def ungrow(self, copy: Copy) -> None:
        """It is complete, an object like others; or it never will be."""
        with self.changed:
            if self._growing.get(copy.ref.id) is copy:
                del self._growing[copy.ref.id]
            if not copy.complete:
                copy.error = "the process that made it gave up"
            self.changed.notify_all()

    def is_growing(self, object_id: int) -> bool:
        """Whether a process of this node makes it now."""
        return object_id in self._growing

    # --- for other endpoints

    def serve(self, object_id: int) -> Copy | None:
        """The copy, if it is here or arriving; counted as read until `served`."""
        with self.changed:
            copy = self._growing.get(object_id)
            if copy is None:
                copy = self._copies.get(object_id)
                if copy is None or copy.incoming is None:
                    return None
                self._copies.move_to_end(object_id)
            copy.served += 1
            return copy

    def served(self, copy: Copy) -> None:
        """It is not read any more."""
        with self.changed:
            copy.served -= 1
            self.changed.notify_all()

    def more(self, copy: Copy, offset: int, seconds: float) -> int:
        """Where what is there ends, as soon as that is beyond `offset`, or after `seconds`; 0: it will not come."""
        with self.changed:
            incoming = copy.incoming
            if incoming is not None and incoming.upto(offset) <= offset and not copy.error:
                self.changed.wait(seconds)
                incoming = copy.incoming
            return 0 if incoming is None or copy.error else incoming.upto(offset)

    # --- the threads that pull

    def _work(self) -> None:
        if self._threads < PULLS_MAX:
            self._threads += 1
            threading.Thread(target=self._pull_all, name="rtml-pull", daemon=True).start()

    def _pull_all(self) -> None:
        while True:
            with self.changed:
                queue = self._urgent or self._ahead
                if not queue:
                    self._threads -= 1
                    return
                copy = queue.popleft()
                copy.started = True
            self._pull_one(copy)

    def _pull_one(self, copy: Copy) -> None:
        error = ""
        self._counts.began()
        begun = time.monotonic()
        try:
            self._pull(copy)
        except LimitExceeded as problem:
            error = NO_ROOM + str(problem)
        except Exception as problem:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            error = str(problem) or type(problem).__name__
        self._counts.ended(not error)
        with self.changed:
            if error:
                copy.error = error
                if self._copies.get(copy.ref.id) is copy:
                    del self._copies[copy.ref.id]  # asked again, it is tried again
                if copy.incoming is not None:
                    self._bytes -= copy.ref.size
                    self.changed.notify_all()
                    self._abandon(copy)
            else:
                copy.moved, copy.seconds = copy.ref.size, time.monotonic() - begun
            self.changed.notify_all()

    def _pull(self, copy: Copy) -> None:
        ref = copy.ref
        if ref.size <= HEADER_OFFSET:
            raise ObjectLost(f"{ref.size} bytes are no object")
        incoming = self._reserve(ref)
        with self.changed:
            copy.incoming = incoming
            self._bytes += ref.size
        pull(ref, incoming, self._caller, self._counts, self._arrived)
        self.store.publish(incoming)
        with self.changed:
            incoming.place = None

    def _arrived(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _reserve(self, ref: ObjectRef) -> Incoming:
        with self.changed:
            self._evict(max(0, self.bound - ref.size))
        try:
            return self.store.reserve(ref.id, ref.size)
        except LimitExceeded:
            with self.changed:
                self._evict(0)
            return self.store.reserve(ref.id, ref.size)

    def _abandon(self, copy: Copy) -> None:
        incoming = copy.incoming
        if incoming is None or incoming.place is None:
            return
        while copy.served:
            self.changed.wait()  # they notice the error and let go
        copy.incoming = None
        self.store.abandon(incoming)

    def _evict(self, bound: int) -> None:
        """Forget copies that nobody uses until no more than `bound` bytes are left."""
        for object_id, copy in list(self._copies.items()):
            if self._bytes <= bound:
                return
            used = copy.kept or copy.grants or copy.served
            if copy.complete and not used and not self.store.pinned(object_id):
                del self._copies[object_id]
                self._bytes -= copy.ref.size
                self.store.free(object_id)

    @property
    def held(self) -> int:
        """Bytes of all copies."""
        return self._bytes
