"""Objects in the shared memory of one node: written once, read by every process without a copy.

A store is one process's hand on a directory in tmpfs (`/dev/shm/rtml-...`, made and removed by the supervisor). What
it puts lies in segment files of its own, `<session>-<n>`, which it keeps mapped and recycles: a fresh 64 MiB segment
costs five times a recycled one and more, since the kernel must find its pages. A segment is free again once its owner
was told so (`free`) and no process pins it (`rtml.segment`).

Rules:

* One object per segment, several parts per object (a pickle and its large buffers), immutable once `put` returned.
* Sizes are rounded up to four classes per doubling, so that segments fit again; a fit may waste up to half.
* Memory is allocated before it is written (`posix_fallocate`): a full tmpfs is an error here, not a SIGBUS later.
* `free` takes no lock, so that a signal handler may call it; whoever holds the lock does the work.
* What has no room is written to a disk, oldest objects first (`rtml.spilling`), if the node has one for that.
* An object of another node is brought here by the node's data endpoint, once for all processes (`rtml.exchange`).
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rtml.errors import LimitExceeded, ObjectLost, RtmlError
from rtml.exchange import Asker, Place, Places
from rtml.incoming import Incoming
from rtml.messages import ObjectRef, task_id
from rtml.parts import Buffer, copy, flat
from rtml.segment import HEADER_OFFSET, Mapping, Presence, header, layout, presence_path, size_class
from rtml.spilling import Disk, limits, mib, remove_segments, used, write_at

#: Most bytes that idle segments of one process keep from the system.
IDLE_MAX: Final = 1024 * 1024 * 1024

#: Segments still pinned after `free` that one `put` looks at; `sweep` looks at all.
_CHECKS_PER_PUT: Final = 8

#: Mappings of foreign segments are checked for removed files after this many new ones, or this many new bytes.
_PRUNE_COUNT: Final = 64
_PRUNE_BYTES: Final = 256 * 1024 * 1024


class _Segment:
    """A file of this owner. In exactly one of: `_live` (holds an object), `_pinned` (freed, still read), `_idle`.

    `mapping` is None if it lies on the disk: it is in `_live` then, and nowhere afterwards.
    """

    __slots__ = ("capacity", "mapping", "name", "populated")

    def __init__(self, name: str, capacity: int, mapping: Mapping | None, populated: int = 0) -> None:
        self.name = name
        self.capacity = capacity
        self.mapping = mapping
        #: The bytes from the start on whose pages are mapped here.
        self.populated = populated

    def populate(self, end: int) -> None:
        """Have the pages of so many bytes mapped."""
        if self.mapping is not None and self.populated < end:
            self.mapping.populate(end)
            self.populated = end


class Store:
    """Puts and gets objects; one per process, safe for threads.

    Args:
        directory: exists already, in tmpfs (see `Store.make`).
        session: this process's session, 1..SESSION_MAX; it names the files.
        capacity: most bytes of shared memory that this process may occupy; by default half of the file system.
        place: what the node is; by default what its supervisor has written into the directory.
    """

    #: Whether `put` sends over a network.
    distant = False

    def __init__(self, directory: str, session: int, capacity: int | None = None, place: Place | None = None) -> None:
        self.directory = directory
        self.session = session
        self._capacity = capacity
        self._place = place
        self._disk: Disk | None = None
        self._asker: Asker | None = None
        self.places = Places()
        self._presence = Presence(directory, session)
        self._pid = os.getpid()
        self._closed = False
        #: Why the file system had no room, last time.
        self._problem = ""
        self._lock = threading.Lock()
        #: Bytes of all segment files of this owner, those being made included.
        self._allocated = 0
        self._files = 0
        self._numbers = itertools.count(1)
        self._live: dict[int, _Segment] = {}
        self._freed: collections.deque[int] = collections.deque()
        self._pinned: collections.deque[_Segment] = collections.deque()
        #: By capacity; the last one is the warmest.
        self._idle: dict[int, list[_Segment]] = {}
        self._idle_bytes = 0
        #: Segments of others, by name, and what was mapped since they were last checked for removed files.
        self._foreign: dict[str, Mapping] = {}
        self._foreign_new = (0, 0)

    @staticmethod
    def make(directory: str) -> None:
        """Create the directory of a node's stores, for this user only."""
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)

    @staticmethod
    def remove(directory: str) -> None:
        """Remove the directory with all that is in it. What is still mapped stays readable there."""
        shutil.rmtree(directory, ignore_errors=True)

    @staticmethod
    def remove_session(directory: str, session: int) -> None:
        """Remove what a dead process left. Its objects are lost to those who have not mapped them yet."""
        remove_segments(directory, session)
        Disk(Place.of(directory).spill).remove_session(session)
        Path(presence_path(directory, session)).unlink(missing_ok=True)

    @property
    def place(self) -> Place:
        """What the node is."""
        if self._place is None:
            self._place = Place.of(self.directory)
        return self._place

    @property
    def disk(self) -> Disk:
        """Where objects go that have no room."""
        if self._disk is None:
            self._disk = Disk(self.place.spill, self.place.spill_max)
        return self._disk

    def endpoints(self, addresses: list[str]) -> None:
        """The dispatcher says where objects may be put by those that share no memory with it; others need not know."""

    @property
    def asker(self) -> Asker:
        """Asks the node's data endpoint."""
        if self._asker is None:
            self._asker = Asker(self.place.socket)
        return self._asker

    def fetched(self) -> tuple[int, float]:
        """Bytes that were brought here from other nodes since the last call, and the seconds that took."""
        return (0, 0.0) if self._asker is None else self._asker.take()

    @property
    def capacity(self) -> int:
        """Most bytes that this process may occupy."""
        if self._capacity is None:
            about = os.statvfs(self.directory)
            self._capacity = about.f_blocks * about.f_frsize // 2
        return self._capacity

    @property
    def allocated(self) -> int:
        """Bytes that this process occupies: objects and idle segments."""
        return self._allocated

    @property
    def objects(self) -> int:
        """Objects of this owner that are not freed, as of the last `put`, `free` or `sweep`."""
        return len(self._live)

    # --- writing --------------------------------------------------------------------------------------------------

    def put(self, parts: Sequence[Buffer]) -> ObjectRef:
        """Copy the parts into shared memory, as one object that `get` gives back as so many views.

        The caller frees it (`free`) once nobody needs it any more.

        Raises:
            LimitExceeded: neither the capacity nor the file system has the room.
            RtmlError: the store is closed, or belongs to the process that this one was forked from.
        """
        self._check_usable()
        pieces = [flat(part) for part in parts]
        table, offsets, size = layout([len(piece) for piece in pieces])
        with self._lock:
            self._settle(_CHECKS_PER_PUT)
            segment = self._recycle(size)
        object_id = self.new_id()
        if segment is None:
            segment = self._create(size, header(object_id, table), pieces, offsets)
        else:
            try:
                self._rewrite(segment, header(object_id, table), pieces, offsets)
            except BaseException:
                self._pinned.append(segment)
                raise
        self._live[object_id] = segment
        return ObjectRef(object_id, size, segment.name, self.place.data)

    def new_id(self) -> int:
        """The name of an object that will be made here."""
        return task_id(self.session, next(self._numbers))

    def _rewrite(self, segment: _Segment, head: bytes, parts: list[memoryview], offsets: list[int]) -> None:
        mapping = _mapped(segment)
        memory = mapping.memory
        segment.populate(offsets[-1] + len(parts[-1]) if parts else HEADER_OFFSET + len(head))
        memory[HEADER_OFFSET : HEADER_OFFSET + len(head)] = head
        for part, offset in zip(parts, offsets):
            copy(memory[offset : offset + len(part)], part)

    def _create(self, size: int, head: bytes, parts: list[memoryview], offsets: list[int]) -> _Segment:
        """A new segment with this content.

        Written through the file, not through the mapping: half the time, since no page is cleared and none faults.
        """
        content = [(HEADER_OFFSET, memoryview(head)), *zip(offsets, parts)]
        made = self._file(size)
        if made is None:
            with self._lock:
                self._files += 1
                name = f"{self.session:08x}-{self._files}"
            if not self.disk.write(name, content, size):
                raise self._full(size)
            return _Segment(name, 0, None)
        fd, segment = made
        try:
            for offset, part in content:
                write_at(fd, part, offset)
        except BaseException:
            self._forget(segment)
            raise
        finally:
            os.close(fd)
        return segment

    def _file(self, size: int) -> tuple[int, _Segment] | None:
        """A new mapped segment for so many bytes, and its descriptor; None if there is no room."""
        capacity = size_class(size)
        with self._lock:
            if not self._make_room(capacity):
                return None
            self._allocated += capacity
            self._files += 1
            name = f"{self.session:08x}-{self._files}"
        segment = _Segment(name, capacity, None)
        try:
            fd = os.open(f"{self.directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            self._forget(segment)
            raise ObjectLost(f"the shared memory of this session is gone: {self.directory}") from None
        try:
            if self._allocate(fd, capacity):
                segment.mapping = Mapping.open(fd, capacity, self.session, owner=True)
                return fd, segment
        except BaseException:
            os.close(fd)
            self._forget(segment)
            raise
        os.close(fd)
        self._forget(segment)
        return None

    def _forget(self, segment: _Segment) -> None:
        """Undo `_file`."""
        with self._lock:
            self._allocated -= segment.capacity
        Path(f"{self.directory}/{segment.name}").unlink(missing_ok=True)

    def _allocate(self, fd: int, capacity: int) -> bool:
        for attempt in range(3):
            try:
                os.posix_fallocate(fd, 0, capacity)
                return True
            except OSError as error:
                self._problem = error.strerror or ""
                with self._lock:
                    self._settle(None)
                    self._drop_idle(0)
                    if attempt:
                        self._spill(2 * capacity)
        return False

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes fit, after giving idle memory back and spilling old objects if need be."""
        if self._has_room(size):
            return True
        self._settle(None)
        self._drop_idle(self.capacity - size - self._allocated + self._idle_bytes)
        if self._has_room(size):
            return True
        self._drop_idle(0)
        return self._has_room(size) or (self._spill(size) and self._has_room(size))

    def _has_room(self, size: int) -> bool:
        if self._allocated + size > self.capacity:
            return False
        most = self.place.memory
        return not most or used(self.directory) + size <= most

    def _spill(self, size: int) -> bool:
        """Move objects that nobody reads to the disk, oldest first, until so many bytes are given back."""
        for object_id, segment in list(self._live.items()):
            mapping = segment.mapping
            if mapping is None or mapping.live or mapping.pinners():
                continue
            end = max([HEADER_OFFSET, *(at + length for at, length in mapping.parts(object_id))])
            # With an empty pin table. Readers that have mapped the old file keep it, as it is.
            content = [(HEADER_OFFSET, mapping.memory[HEADER_OFFSET : min(end, segment.capacity)])]
            if not self.disk.write(segment.name, content, min(end, segment.capacity)):
                return False
            del mapping, content
            Path(f"{self.directory}/{segment.name}").unlink(missing_ok=True)
            self._live[object_id] = _Segment(segment.name, 0, None)
            self._allocated -= segment.capacity
            size -= segment.capacity
            if size <= 0:
                return True
        return False

    # --- copies of what is stored elsewhere ---------------------------------------------------------------------------

    def reserve(self, object_id: int, size: int) -> Incoming:
        """Room for an object of another store, whose bytes are about to arrive.

        Raises:
            LimitExceeded: there is none.
        """
        self._check_usable()
        with self._lock:
            self._settle(_CHECKS_PER_PUT)
            segment = self._recycle(size)
        fd = -1
        if segment is None:
            made = self._file(size)
            if made is None:
                raise self._full(size)
            fd, segment = made
        segment.populate(size if fd < 0 else 0)
        return Incoming(object_id, size, segment.name, _mapped(segment).memory, fd, segment)

    def publish(self, incoming: Incoming) -> None:
        """All of it has arrived: from now on it is an object of this store like those that were put."""
        incoming.close()
        _mapped(incoming.place).parts(incoming.id)
        self._live[incoming.id] = incoming.place

    def abandon(self, incoming: Incoming) -> None:
        """It will not arrive."""
        incoming.close()
        with self._lock:
            self._pinned.append(incoming.place)

    def has(self, object_id: int) -> bool:
        """Whether this is an object of this owner."""
        return object_id in self._live

    def pinned(self, object_id: int) -> bool:
        """Whether a process reads this object of ours."""
        segment = self._live.get(object_id)
        mapping = None if segment is None else segment.mapping
        return mapping is not None and bool(mapping.live or mapping.pinners())

    def _full(self, size: int) -> LimitExceeded:
        held = self._allocated - self._idle_bytes
        about = os.statvfs(self.directory)
        return LimitExceeded(
            f"no shared memory for an object of {mib(size)}: this process holds {mib(held)} of its"
            f" {mib(self.capacity)} in {len(self._live)} objects ({len(self._pinned)} more are freed but still read);"
            f" {self.directory} has {mib(about.f_bavail * about.f_frsize)} left of"
            f" {mib(about.f_blocks * about.f_frsize)}{self._limits()}. Drop futures and arrays that are no longer"
            " needed, or enlarge the tmpfs (docker: --shm-size, Kubernetes: emptyDir in Memory)."
        )

    def _limits(self) -> str:
        text = f" ({self._problem})" if self._problem else ""
        self._problem = ""
        return text + limits(self.directory, self.place.memory, self.disk)

    # --- recycling ------------------------------------------------------------------------------------------------

    def free(self, object_id: int) -> None:
        """Nobody needs this object of ours any more; its memory is used again once nobody reads it.

        Unknown ids are ignored. May be called from a signal handler.
        """
        self._freed.append(object_id)
        if self._lock.acquire(blocking=False):
            try:
                self._settle(0)
            finally:
                self._lock.release()

    @property
    def untidy(self) -> bool:
        """Whether `sweep` may find something to do."""
        return bool(self._pinned or self._freed or self._foreign)

    def sweep(self) -> None:
        """Look after everything that is freed, or mapped here and gone, also after processes that died reading.

        For the owner's idle moments.
        """
        with self._lock:
            self._settle(None)
        self._prune()

    def _settle(self, checks: int | None) -> None:
        """Move freed objects on; look at so many of those still pinned (None: at all, and drop pins of the dead)."""
        while self._freed:
            segment = self._live.pop(self._freed.popleft(), None)
            if segment is None:
                continue
            if segment.mapping is None:
                self.disk.remove(segment.name)
            elif segment.mapping.live or segment.mapping.pinners():
                self._pinned.append(segment)
            else:
                self._retire(segment)
        thorough = checks is None
        alive: dict[int, bool] = {}
        for _ in range(len(self._pinned) if checks is None else min(checks, len(self._pinned))):
            segment = self._pinned.popleft()
            mapping = _mapped(segment)
            pinned = mapping.held(self.directory, alive) if thorough else bool(mapping.pinners())
            if mapping.live or pinned:
                self._pinned.append(segment)
            else:
                self._retire(segment)

    def _retire(self, segment: _Segment) -> None:
        self._idle.setdefault(segment.capacity, []).append(segment)
        self._idle_bytes += segment.capacity
        # Some may lie idle: enough for a steady stream, while a burst gives its memory back.
        keep = min(self.capacity // 2, IDLE_MAX)
        if self._idle_bytes > keep:
            self._drop_idle(keep)

    def _recycle(self, size: int) -> _Segment | None:
        """An idle segment of the size's class, or of the next ones up to twice that."""
        wanted = size_class(size)
        fitting = [capacity for capacity in self._idle if wanted <= capacity <= 2 * wanted]
        if not fitting:
            return None
        capacity = min(fitting)
        segments = self._idle[capacity]
        segment = segments.pop()
        if not segments:
            del self._idle[capacity]
        self._idle_bytes -= capacity
        return segment

    def _drop_idle(self, keep: int) -> None:
        """Give idle segments back to the system, coldest of the largest class first, until `keep` bytes are left."""
        while self._idle and self._idle_bytes > keep:
            capacity = max(self._idle)
            segments = self._idle[capacity]
            segment = segments.pop(0)
            if not segments:
                del self._idle[capacity]
            self._idle_bytes -= capacity
            self._allocated -= capacity
            Path(self.directory, segment.name).unlink(missing_ok=True)

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, ref: ObjectRef) -> list[memoryview]:
        """The parts of an object as read-only views of the shared memory.

        The memory stays as it is for as long as any view, or anything made of one, lives.

        Raises:
            ObjectLost: it is gone: freed, or lost with its owner.
        """
        if ref.node and ref.node != self.place.data:
            return self._bring(ref)
        try:
            return self._views(ref)
        except ObjectLost:
            if ref.node and self.place.socket:
                # Under this name it lay on a node that left, and now among the copies of the endpoint.
                with contextlib.suppress(RtmlError):
                    return self._bring(ref)
            raise

    def _views(self, ref: ObjectRef) -> list[memoryview]:
        everything, parts = self._pin(ref)
        return [everything[at : at + size] for at, size in parts]

    def whole(self, ref: ObjectRef) -> memoryview:
        """All of an object that lies on this node, from the start of its segment; pinned like `get`'s views.

        Raises:
            ObjectLost: it is gone.
        """
        everything, parts = self._pin(ref)
        return everything[: max(at + size for at, size in parts)] if parts else everything

    def _pin(self, ref: ObjectRef) -> tuple[memoryview, list[tuple[int, int]]]:
        segment = self._live.get(ref.id)
        mapping = None if segment is None else segment.mapping
        if mapping is None:
            found = self._foreign.get(ref.segment)
            mapping = found if found is not None else self._map(ref)
        everything = mapping.export() if mapping.pinnable else memoryview(bytes(mapping.memory))
        return everything, mapping.parts(ref.id)

    def is_far(self, payload: Any) -> bool:
        """Whether this is an object of another node: to `get` it may take a while."""
        return payload.__class__ is ObjectRef and payload.node not in ("", self.place.data)

    def _bring(self, ref: ObjectRef) -> list[memoryview]:
        """The parts of an object of another node: its copy here."""
        here = self.place
        if not here.socket:
            raise ObjectLost(f"shared object {ref.id:#x} lies at {ref.node}, and this process has no data endpoint")
        ref = self.places.where(ref)
        return self.asker.fetch(ref, lambda segment: self._views(ObjectRef(ref.id, ref.size, segment)))

    def _map(self, ref: ObjectRef) -> Mapping:
        if "/" in ref.segment:
            raise ObjectLost(f"no segment name: {ref.segment!r}")
        count, size = self._foreign_new
        if count >= _PRUNE_COUNT or size >= _PRUNE_BYTES:
            self._prune()
            count = size = 0
        fd = self.open_segment(ref)
        try:
            with self._lock:
                self._presence.enter()
            length = os.fstat(fd).st_size
            mapping = Mapping.open(fd, length, self.session, owner=False)
        finally:
            os.close(fd)
        self._foreign_new = (count + 1, size + length)
        # Two threads may have mapped it at once; each mapping has its own pin entry, so either may stay.
        return self._foreign.setdefault(ref.segment, mapping)

    def open_segment(self, ref: ObjectRef) -> int:
        """A descriptor of an object's file.

        Raises:
            ObjectLost: it is gone.
        """
        for path in (f"{self.directory}/{ref.segment}", self.disk.path(ref.segment)):
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        raise ObjectLost(f"shared object {ref.id:#x} is gone: no segment {ref.segment} on this node")

    def _prune(self) -> None:
        """Forget mappings of files that their owner removed, which would otherwise keep the memory."""
        for name in list(self._foreign):
            if not Path(self.directory, name).exists():
                self._foreign.pop(name, None)

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self, *, unlink: bool = True) -> None:
        """Let go of everything; `put` is refused from now on. Views given out stay valid, and keep their pins.

        Args:
            unlink: remove the files too; False leaves the objects to others until the directory goes.
        """
        in_use = any(mapping.live for mapping in list(self._foreign.values()))
        self._foreign.clear()
        self._closed = True
        if os.getpid() != self._pid:
            return
        if unlink:
            remove_segments(self.directory, self.session)
            self.disk.remove_session(self.session)
        if self._asker is not None:
            self._asker.close()
        self._live.clear()
        self._pinned.clear()
        self._idle.clear()
        self._allocated = self._idle_bytes = 0
        if not in_use:
            # Else the lock is held until the process ends: without it the pins of those views would not count.
            self._presence.leave()

    def _check_usable(self) -> None:
        if self._closed:
            raise RtmlError("this process has left rtml: its shared memory is closed")
        if os.getpid() != self._pid:
            raise RtmlError("this process was forked from one that uses rtml: connect anew in the child")


def _mapped(segment: _Segment) -> Mapping:
    assert segment.mapping is not None, "not on the disk"
    return segment.mapping
