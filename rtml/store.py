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
"""

from __future__ import annotations

import collections
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rtml.errors import LimitExceeded, ObjectLost, RtmlError
from rtml.messages import INLINE_MAX, ObjectRef, task_id
from rtml.segment import HEADER_OFFSET, Mapping, Presence, header, is_alive, layout, presence_path

Buffer = bytes | bytearray | memoryview | pickle.PickleBuffer

#: Smallest segment, in bytes.
SEGMENT_MIN: Final = 128 * 1024

#: Most bytes that idle segments of one process keep from the system.
IDLE_MAX: Final = 1024 * 1024 * 1024

#: Copies from this size on let other threads run meanwhile, in bytes.
_LONG_COPY: Final = 1024 * 1024

#: Segments still pinned after `free` that one `put` looks at; `sweep` looks at all.
_CHECKS_PER_PUT: Final = 8

#: Mappings of foreign segments are checked for removed files after this many new ones, or this many new bytes.
_PRUNE_COUNT: Final = 64
_PRUNE_BYTES: Final = 256 * 1024 * 1024


class _Segment:
    """A file of this owner. In exactly one of: `_live` (holds an object), `_pinned` (freed, still read), `_idle`."""

    __slots__ = ("capacity", "mapping", "name", "populated")

    def __init__(self, name: str, capacity: int, mapping: Mapping, populated: int) -> None:
        self.name = name
        self.capacity = capacity
        self.mapping = mapping
        #: The bytes from the start on whose pages are mapped here.
        self.populated = populated


class Store:
    """Puts and gets objects; one per process, safe for threads.

    Args:
        directory: exists already, in tmpfs (see `Store.make`).
        session: this process's session, 1..SESSION_MAX; it names the files.
        capacity: most bytes this process may occupy; by default half of the file system.
        node: what `ObjectRef.node` says.
    """

    def __init__(self, directory: str, session: int, capacity: int | None = None, node: str = "") -> None:
        self.directory = directory
        self.session = session
        self.node = node
        self._capacity = capacity
        self._presence = Presence(directory, session)
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        #: Bytes of all segment files of this owner, those being made included.
        self._allocated = 0
        self._files = 0
        self._objects = 0
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
        _remove_segments(directory, session)
        Path(presence_path(directory, session)).unlink(missing_ok=True)

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
        flat = [_flat(part) for part in parts]
        table, offsets, size = layout([len(part) for part in flat])
        with self._lock:
            self._settle(_CHECKS_PER_PUT)
            self._objects += 1
            object_id = task_id(self.session, self._objects)
            segment = self._recycle(size)
        if segment is None:
            segment = self._create(size, header(object_id, table), flat, offsets)
        else:
            try:
                self._rewrite(segment, header(object_id, table), flat, offsets)
            except BaseException:
                self._pinned.append(segment)
                raise
        self._live[object_id] = segment
        return ObjectRef(object_id, size, segment.name, self.node)

    def _rewrite(self, segment: _Segment, head: bytes, parts: list[memoryview], offsets: list[int]) -> None:
        memory = segment.mapping.memory
        end = offsets[-1] + len(parts[-1]) if parts else HEADER_OFFSET + len(head)
        if segment.populated < end:
            segment.mapping.populate(end)
            segment.populated = end
        memory[HEADER_OFFSET : HEADER_OFFSET + len(head)] = head
        for part, offset in zip(parts, offsets):
            _copy(memory[offset : offset + len(part)], part)

    def _create(self, size: int, head: bytes, parts: list[memoryview], offsets: list[int]) -> _Segment:
        """A new segment with this content.

        Written through the file and not through the mapping: half the time, since no page is cleared and none faults.
        """
        capacity = _size_class(size)
        with self._lock:
            if not self._make_room(capacity):
                raise self._full(size)
            self._allocated += capacity
            self._files += 1
            name = f"{self.session:08x}-{self._files}"
        path = f"{self.directory}/{name}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._allocate(fd, capacity, size)
                _write(fd, memoryview(head), HEADER_OFFSET)
                for part, offset in zip(parts, offsets):
                    _write(fd, part, offset)
                mapping = Mapping.open(fd, capacity, self.session, owner=True)
            finally:
                os.close(fd)
        except BaseException as error:
            with self._lock:
                self._allocated -= capacity
            Path(path).unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                raise ObjectLost(f"the shared memory of this session is gone: {self.directory}") from None
            raise
        return _Segment(name, capacity, mapping, 0)

    def _allocate(self, fd: int, capacity: int, size: int) -> None:
        try:
            os.posix_fallocate(fd, 0, capacity)
        except OSError:
            with self._lock:
                self._settle(None)
                self._drop_idle(0)
            try:
                os.posix_fallocate(fd, 0, capacity)
            except OSError as error:
                raise self._full(size, error.strerror or "") from None

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes fit the capacity, after giving idle memory back if need be."""
        if self._allocated + size <= self.capacity:
            return True
        self._settle(None)
        self._drop_idle(self.capacity - size - self._allocated + self._idle_bytes)
        return self._allocated + size <= self.capacity

    def _full(self, size: int, reason: str = "") -> LimitExceeded:
        held = self._allocated - self._idle_bytes
        about = os.statvfs(self.directory)
        return LimitExceeded(
            f"no shared memory for an object of {_mib(size)}: this process holds {_mib(held)} of its"
            f" {_mib(self.capacity)} in {len(self._live)} objects ({len(self._pinned)} more are freed but still read);"
            f" {self.directory} has {_mib(about.f_bavail * about.f_frsize)} left of"
            f" {_mib(about.f_blocks * about.f_frsize)}{' (' + reason + ')' if reason else ''}. Drop futures and arrays"
            " that are no longer needed, or enlarge the tmpfs (docker: --shm-size, Kubernetes: emptyDir in Memory)."
        )

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
            if segment.mapping.live or segment.mapping.pinners():
                self._pinned.append(segment)
            else:
                self._retire(segment)
        thorough = checks is None
        alive: dict[int, bool] = {}
        for _ in range(len(self._pinned) if checks is None else min(checks, len(self._pinned))):
            segment = self._pinned.popleft()
            if segment.mapping.live or self._is_pinned(segment.mapping, alive, thorough=thorough):
                self._pinned.append(segment)
            else:
                self._retire(segment)

    def _is_pinned(self, mapping: Mapping, alive: dict[int, bool], *, thorough: bool) -> bool:
        pinners = mapping.pinners()
        if not thorough:
            return bool(pinners)
        pinned = False
        for entry, session in pinners:
            if session not in alive:
                alive[session] = is_alive(self.directory, session)
            if alive[session]:
                pinned = True
            else:
                mapping.clear(entry)
        return pinned

    def _retire(self, segment: _Segment) -> None:
        self._idle.setdefault(segment.capacity, []).append(segment)
        self._idle_bytes += segment.capacity
        # Some may lie idle: enough for a steady stream, while a burst gives its memory back.
        keep = min(self.capacity // 2, IDLE_MAX)
        if self._idle_bytes > keep:
            self._drop_idle(keep)

    def _recycle(self, size: int) -> _Segment | None:
        """An idle segment of the size's class, or of the next ones up to twice that."""
        wanted = _size_class(size)
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
        segment = self._live.get(ref.id)
        if segment is not None:
            mapping = segment.mapping
        else:
            found = self._foreign.get(ref.segment)
            mapping = found if found is not None else self._map(ref)
        if not mapping.pinnable:
            return [memoryview(bytes(mapping.memory[at : at + size])) for at, size in mapping.parts(ref.id)]
        everything = mapping.export()
        return [everything[at : at + size] for at, size in mapping.parts(ref.id)]

    def _map(self, ref: ObjectRef) -> Mapping:
        if "/" in ref.segment:
            raise ObjectLost(f"no segment name: {ref.segment!r}")
        count, size = self._foreign_new
        if count >= _PRUNE_COUNT or size >= _PRUNE_BYTES:
            self._prune()
            count = size = 0
        try:
            fd = os.open(f"{self.directory}/{ref.segment}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ObjectLost(f"shared object {ref.id:#x} is gone: no segment {ref.segment} on this node") from None
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
            _remove_segments(self.directory, self.session)
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


class NoStore(Store):
    """The store of a process that shares no memory with the engine: refuses what would not fit a message.

    Args:
        session: this process's session.
        address: of the engine, for messages.
    """

    def __init__(self, session: int, address: str) -> None:
        super().__init__("", session, 0)
        self._address = address

    def put(self, parts: Sequence[Buffer]) -> ObjectRef:
        """Refuse.

        Raises:
            LimitExceeded: always.
        """
        raise self._refusal("a function, argument or value", sum([len(_flat(part)) for part in parts]))

    def get(self, ref: ObjectRef) -> list[memoryview]:
        """Refuse. The object can still be an argument of tasks.

        Raises:
            LimitExceeded: always.
        """
        raise self._refusal("a result", ref.size)

    def free(self, object_id: int) -> None:
        """There is nothing to free."""

    def close(self, *, unlink: bool = True) -> None:
        """There is nothing to close."""

    def _refusal(self, what: str, size: int) -> LimitExceeded:
        return LimitExceeded(
            f"{what} of {size} bytes cannot travel through {self._address}: for now, values above"
            f" {INLINE_MAX // 1024} KiB need a unix: or ipc: address on the engine's own machine"
        )


def _remove_segments(directory: str, session: int) -> None:
    for path in Path(directory).glob(f"{session:08x}-*"):
        path.unlink(missing_ok=True)


def _flat(part: Buffer) -> memoryview:
    view = part.raw() if isinstance(part, pickle.PickleBuffer) else memoryview(part)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


def _copy(target: memoryview, source: memoryview) -> None:
    if len(source) < _LONG_COPY:
        target[:] = source
        return
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        # As fast as a memoryview's copy, but without the interpreter lock.
        numpy.copyto(numpy.frombuffer(target, numpy.uint8), numpy.frombuffer(source, numpy.uint8))
        return
    for start in range(0, len(source), _LONG_COPY):
        target[start : start + _LONG_COPY] = source[start : start + _LONG_COPY]


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _size_class(size: int) -> int:
    """The capacity for so many bytes: 1, 1.25, 1.5, 1.75 times a power of two."""
    if size <= SEGMENT_MIN:
        return SEGMENT_MIN
    step = 1 << ((size - 1).bit_length() - 3)
    return (size + step - 1) // step * step


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
