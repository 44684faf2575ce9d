"""Objects that have no room in shared memory: files in a directory on a disk, with a limit.

A spilled segment is the same file with the same name in another directory. Whoever looks for a segment looks there too,
and maps it from there: nothing is brought back, the kernel keeps in memory what is read. Nothing there is recycled, so
nobody needs to know who reads: a file that is removed stays as it is for those who have mapped it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Disk:
    """The directory of one node's spilled objects.

    Args:
        directory: made and removed by the supervisor; "" if nothing may be spilled.
        limit: most bytes in it; 0: half of what is free on its file system when first asked.
    """

    def __init__(self, directory: str, limit: int = 0) -> None:
        self.directory = directory
        self._limit = limit

    @property
    def limit(self) -> int:
        """Most bytes of all objects in it."""
        if not self._limit and self.directory:
            with contextlib.suppress(OSError):
                about = os.statvfs(self.directory)
                self._limit = used(self.directory) + about.f_bavail * about.f_frsize // 2
        return self._limit

    def has_room(self, size: int) -> bool:
        """Whether so many more bytes may be written."""
        return bool(self.directory) and used(self.directory) + size <= self.limit

    def write(self, name: str, parts: list[tuple[int, memoryview]], size: int) -> bool:
        """A file with these parts at these offsets; seen under its name once it is complete. False: no room."""
        if not self.has_room(size):
            return False
        fresh = f"{self.directory}/{name}.new"
        try:
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                for offset, part in parts:
                    write_at(fd, part, offset)
            finally:
                os.close(fd)
            Path(fresh).rename(self.path(name))
        except OSError:
            with contextlib.suppress(OSError):
                Path(fresh).unlink(missing_ok=True)
            return False
        return True

    def path(self, name: str) -> str:
        """Of a spilled segment."""
        return f"{self.directory}/{name}"

    def remove(self, name: str) -> None:
        """Nobody needs it any more."""
        if self.directory:
            Path(self.path(name)).unlink(missing_ok=True)

    def remove_session(self, session: int) -> None:
        """Remove what one process has spilled."""
        if self.directory:
            remove_segments(self.directory, session)


def limits(directory: str, memory: int, disk: Disk) -> str:
    """What a node's processes use together of what they may use, for an error message."""
    text = ""
    if memory:
        text = f", and all processes of the node use {mib(used(directory))} of {mib(memory)} (object_memory)"
    if disk.directory:
        text += f"; {disk.directory} has {mib(used(disk.directory))} of {mib(disk.limit)} (spill_max)"
    return text


def used(directory: str) -> int:
    """Bytes of all files in a directory."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def remove_segments(directory: str, session: int) -> None:
    """Remove all files of one process."""
    for path in Path(directory).glob(f"{session:08x}-*"):
        path.unlink(missing_ok=True)


def mib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.1f} MiB"


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of it."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written
