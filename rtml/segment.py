"""One file of shared memory, mapped into this process: its layout, its pin table, and views that keep it pinned.

Layout of a segment file (little endian, one object at a time):

    0      CLAIMS   1024 x int32   which process may write the same entry of PINS: its session number, 0 = nobody
    4096   PINS     1024 x int32   non-zero while that process holds views of the object
    8192   header   object id, number of parts (u64 each), then the size of each part (u64)
    ...    the parts, each aligned to 64 bytes

A reader claims an entry once, when it maps the segment (under `flock`, so two readers never share one), and from then
on pins and unpins by a plain store into memory: no message, no system call. Its first view of an object sets the entry,
the end of its last view (a slice of a memoryview, a numpy array, a tensor made of that) clears it.

Why a plain store is enough: a reader only learns of an object from a task that still holds it, so the pin is written
while the owner's hold lasts, and the owner looks at the table only after that hold is gone.

A process that dies leaves its entries set. Whether it lives is told by a lock file (`Presence`): the kernel drops the
lock when the process ends, whatever the reason, also for a zombie, and across pid namespaces; pids would not tell.

Mapping goes through ctypes for two reasons: the `mmap` module keeps a file descriptor for each mapping (a thousand
objects would be a thousand descriptors), and a view's lifetime can be seen only at the object that exports the buffer,
which here is a class of ours with a finaliser. Unmapping is left to an `mmap` object, in whose place the file is
mapped: it goes when nothing refers to it, while finalisers run in any order where views are part of a garbage cycle.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import struct
from pathlib import Path
from typing import Any, Final

from rtml.errors import ObjectLost

ENTRIES: Final = 1024
CLAIMS_OFFSET: Final = 0
PINS_OFFSET: Final = 4 * ENTRIES
HEADER_OFFSET: Final = 8 * ENTRIES
ALIGNMENT: Final = 64
#: Smallest segment, in bytes.
SEGMENT_MIN: Final = 128 * 1024

_NO_PINS: Final = bytes(4 * ENTRIES)
_HEADER: Final = struct.Struct("<QQ")

_PROT_READ: Final = 1
_PROT_WRITE: Final = 2
_MAP_SHARED: Final = 1
_MAP_FIXED: Final = 16
#: Linux 5.14. Reading suffices (the pages exist) and maps 16 pages a fault, which writing does not: 6 against 17 ms.
_MADV_POPULATE_READ: Final = 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def layout(sizes: list[int]) -> tuple[bytes, list[int], int]:
    """The header for parts of these sizes, the offset of each part, and the bytes the segment must have at least."""
    offset = HEADER_OFFSET + _HEADER.size + 8 * len(sizes)
    offsets = []
    for size in sizes:
        offset = (offset + ALIGNMENT - 1) & -ALIGNMENT
        offsets.append(offset)
        offset += size
    return struct.pack(f"<{len(sizes)}Q", *sizes), offsets, offset


def unfinished(object_id: int) -> int:
    """What the header says instead of the object's id while that is being made: nobody takes a torso for an object."""
    return object_id | 1 << 63


def header(object_id: int, table: bytes) -> bytes:
    """What lies at `HEADER_OFFSET` for this object; `table` is from `layout`."""
    return _HEADER.pack(object_id, len(table) // 8) + table


def parts_of(memory: memoryview, object_id: int) -> list[tuple[int, int]]:
    """Offset and size of each part of the object in a segment.

    Raises:
        ObjectLost: it holds another object, or something that is none.
    """
    found, count = _HEADER.unpack_from(memory, HEADER_OFFSET)
    if found != object_id:
        raise ObjectLost(f"shared object {object_id:#x} is gone: its memory was recycled for {found:#x}")
    if count > (len(memory) - HEADER_OFFSET) // 8:
        raise ObjectLost(f"shared object {object_id:#x} is damaged: it claims {count} parts")
    sizes = struct.unpack_from(f"<{count}Q", memory, HEADER_OFFSET + _HEADER.size)
    offset = HEADER_OFFSET + _HEADER.size + 8 * count
    parts = []
    for size in sizes:
        offset = (offset + ALIGNMENT - 1) & -ALIGNMENT
        parts.append((offset, size))
        offset += size
    if offset > len(memory):
        raise ObjectLost(f"shared object {object_id:#x} is damaged: its parts are longer than its segment")
    return parts


def size_class(size: int) -> int:
    """The capacity for so many bytes: 1, 1.25, 1.5, 1.75 times a power of two."""
    if size <= SEGMENT_MIN:
        return SEGMENT_MIN
    step = 1 << ((size - 1).bit_length() - 3)
    return (size + step - 1) // step * step


class Mapping:
    """A mapped segment. `live` has one entry per exported view that is still reachable in this process."""

    __slots__ = (
        "__weakref__",
        "_area",
        "_entry",
        "_forgotten",
        "_pid",
        "_pins",
        "address",
        "live",
        "memory",
        "session",
    )

    def __init__(self, area: mmap.mmap, session: int, entry: int) -> None:
        self._area = area
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        #: What is written into the pin table.
        self.session = session
        #: This process's position in the tables; -1 for the owner, who looks at `live` instead.
        self._entry = entry
        # A forked child inherits the mapping, but the parent's pin is not the child's to take back.
        self._pid = os.getpid()
        self._pins = (ctypes.c_int32 * ENTRIES).from_buffer(area, PINS_OFFSET)
        #: All bytes. Views of it pin nothing: only for use inside this package.
        self.memory = memoryview(area)
        self.live: list[None] = []
        #: The finaliser has run: the last view gives the entry back.
        self._forgotten = False

    @classmethod
    def open(cls, fd: int, size: int, session: int, *, owner: bool) -> Mapping:
        """Map the segment behind `fd` (which may be closed afterwards), and claim a pin entry unless it is the owner's.

        A mapping without an entry (the table is full) must not export views: see `pinnable`.
        """
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        if _libc.mmap(address, size, _PROT_READ | _PROT_WRITE, _MAP_SHARED | _MAP_FIXED, fd, 0) == _MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"mmap of {size} bytes of shared memory: {os.strerror(error)}")
        if owner:
            return cls(area, session, -1)
        # What is shared is immutable: C code that ignores the read-only flag shall crash, not corrupt other processes.
        _libc.mprotect(address + HEADER_OFFSET, size - HEADER_OFFSET, _PROT_READ)
        claims = (ctypes.c_int32 * ENTRIES).from_buffer(area, CLAIMS_OFFSET)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            taken = list(claims)
            entry = taken.index(0) if 0 in taken else -2
            if entry >= 0:
                claims[entry] = session
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
        return cls(area, session, entry)

    @property
    def pinnable(self) -> bool:
        """Whether views may be exported by this process."""
        return self._entry != -2 and os.getpid() == self._pid

    def parts(self, object_id: int) -> list[tuple[int, int]]:
        """Offset and size of each part.

        Raises:
            ObjectLost: the segment holds another object by now.
        """
        return parts_of(self.memory, object_id)

    def export(self) -> memoryview:
        """A read-only view of everything; the segment stays pinned until it and all that is made of it are gone."""
        self.live.append(None)
        try:
            exporter: Any = _exporter_type(len(self._area)).from_buffer(self._area)
            exporter.mapping = self
        except BaseException:
            self.live.pop()
            raise
        self._show()
        return memoryview(exporter).cast("B").toreadonly()

    def unpin(self) -> None:
        """One exported view is gone (called by its finaliser, in any thread)."""
        if os.getpid() == self._pid:
            self.live.pop()
            self._show()
            if self._forgotten and not self.live:
                self._leave()

    def _leave(self) -> None:
        """Give the entry back; nothing may be written to it from now on."""
        entry, self._entry = self._entry, -1
        if entry >= 0:
            self.clear(entry)

    def _show(self) -> None:
        # No lock: finalisers run inside any other code, also inside this function. List operations are atomic, and
        # whoever writes last looks once more afterwards, so that the table ends up true.
        if self._entry < 0:
            return
        while True:
            alive = bool(self.live)
            self._pins[self._entry] = self.session if alive else 0
            if alive == bool(self.live):
                return

    def pinners(self) -> list[tuple[int, int]]:
        """(entry, session) of all processes that pin the object, seen by the owner."""
        if ctypes.string_at(self.address + PINS_OFFSET, 4 * ENTRIES) == _NO_PINS:
            return []
        return [(entry, session) for entry, session in enumerate(self._pins) if session]

    def held(self, directory: str, alive: dict[int, bool]) -> bool:
        """Whether a living process pins the object, seen by the owner; the pins of dead ones are cleared.

        Args:
            directory: of the processes' lock files.
            alive: what is known of sessions; more is added.
        """
        pinned = False
        for entry, session in self.pinners():
            if session not in alive:
                alive[session] = is_alive(directory, session)
            if alive[session]:
                pinned = True
            else:
                self.clear(entry)
        return pinned

    def clear(self, entry: int) -> None:
        """Take back the claim and the pin of a dead process."""
        self._pins[entry] = 0
        (ctypes.c_int32 * ENTRIES).from_buffer(self._area, CLAIMS_OFFSET)[entry] = 0

    def populate(self, size: int) -> None:
        """Map the pages of the first `size` bytes in one call, which beats a page fault for each. A mere hint."""
        _libc.madvise(self.address, min(size, len(self._area)), _MADV_POPULATE_READ)

    def __del__(self) -> None:
        # Exporters refer to their mapping, so none is alive, except in a garbage cycle that has not come to them yet.
        self._forgotten = True
        if os.getpid() == self._pid and not self.live:
            self._leave()


@functools.cache
def _exporter_type(size: int) -> Any:
    # One class per segment size (there are few): ctypes arrays have their length in their type.
    def finalise(exporter: Any) -> None:
        # The attribute is missing if the constructor of `Mapping.export` was interrupted.
        mapping = getattr(exporter, "mapping", None)
        if mapping is not None:
            mapping.unpin()

    return type("SharedBytes", (ctypes.c_ubyte * size,), {"__del__": finalise})


class Presence:
    """The lock file by which others see that a process lives. `enter` before the first claim."""

    def __init__(self, directory: str, session: int) -> None:
        self.path = presence_path(directory, session)
        self._fd = -1

    def enter(self) -> None:
        """Create the file, locked from the first moment that it can be seen under its name."""
        if self._fd >= 0:
            return
        fresh = f"{self.path}.new"
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        Path(fresh).rename(self.path)
        self._fd = fd

    def leave(self) -> None:
        """Remove the file."""
        if self._fd >= 0:
            Path(self.path).unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def presence_path(directory: str, session: int) -> str:
    """The lock file of a session."""
    return f"{directory}/{session:08x}.alive"


def is_alive(directory: str, session: int) -> bool:
    """Whether the process of this session still runs. The file of a dead one is removed."""
    path = presence_path(directory, session)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    Path(path).unlink(missing_ok=True)
    return False
