"""Tensors in POSIX shared memory that clients have made: the system shared memory extension.

A client makes a file in `/dev/shm`, registers it (or a part of it) under a name, and its tensors then say only where in
that region they are. What a client names is what the gateway opens, so (and because servers have been taken over by
way of such names) it is off unless an operator allows it, and

* a key is one name directly in `/dev/shm`: no path, no link, nothing but a regular file of the gateway's own user,
* a region lies within its file, and a tensor within its region,
* regions are read and written as files, never mapped: a client that makes its file shorter meanwhile gets an error,
  where access to mapped memory would end the gateway. That is one copy, the same that a mapped tensor would need on
  its way to the engine.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Any, Final, NamedTuple

from rtml.errors import InvalidInput
from rtml.serving.bodies import Buffer
from rtml.serving.http import HttpError

_KEY: Final = re.compile(r"/?([A-Za-z0-9_][A-Za-z0-9._-]{0,253})")
#: Regions that may be registered at a time; each is an open file.
REGIONS_MAX: Final = 256
_NAME_MAX: Final = 256


class Region(NamedTuple):
    """A part of a file that tensors may lie in."""

    key: str
    offset: int
    size: int
    fd: int


class SharedMemory:
    """The registered regions.

    Args:
        size_max: Largest region, in bytes.
        directory: Where the files are.
    """

    def __init__(self, size_max: int, directory: str = "/dev/shm") -> None:
        self._size_max = size_max
        self._directory = directory
        self._regions: dict[str, Region] = {}

    # --- what clients register ----------------------------------------------------------------------------------------

    def register(self, name: str, key: object, offset: object, size: object) -> None:
        """Let tensors lie in a region.

        Args:
            name: The region's, for tensors.
            key: Of `shm_open`: "/name" or "name".
            offset: Where in the file it begins, in bytes.
            size: How long it is, in bytes.

        Raises:
            HttpError: the name is taken, the file cannot be used, or the region is not within it.
        """
        if not name or len(name) > _NAME_MAX:
            raise _refused(f"the name of a region has 1 to {_NAME_MAX} characters")
        if name in self._regions:
            raise _refused(f"region {name!r} is registered already; unregister it first")
        if len(self._regions) >= REGIONS_MAX:
            raise _refused(f"{REGIONS_MAX} regions are registered already, and no more are possible")
        found = _KEY.fullmatch(key) if isinstance(key, str) else None
        if found is None:
            shown = repr(key)[:80]
            raise _refused(
                f"key {shown} must be the name of a file in {self._directory}: letters, digits, '.', '_', '-'"
            )
        for what, number in (("offset", offset), ("byte_size", size)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise _refused(f"{what} must be a number of bytes, not {repr(number)[:40]}")
        assert isinstance(offset, int)
        assert isinstance(size, int)
        if not 0 < size <= self._size_max:
            raise _refused(f"byte_size must be from 1 to {self._size_max} (--body-max), not {size}")
        fd = self._open(found[1])
        end = os.fstat(fd).st_size
        if offset + size > end:
            os.close(fd)
            raise _refused(f"{key!r} has {end} bytes, fewer than offset {offset} and byte_size {size} together")
        self._regions[name] = Region(str(key), offset, size, fd)

    def _open(self, name: str) -> int:
        path = os.path.join(self._directory, name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _refused(f"cannot open {name!r} in {self._directory}: {error.strerror}") from None
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return fd
        os.close(fd)
        raise _refused(f"{name!r} in {self._directory} is no regular file of the user that the gateway runs as")

    def unregister(self, name: str | None) -> None:
        """Forget a region, or all (`name` None). One that is not registered is forgotten already."""
        for found in list(self._regions) if name is None else [name]:
            region = self._regions.pop(found, None)
            if region is not None:
                os.close(region.fd)

    def status(self, name: str | None) -> list[dict[str, Any]]:
        """What is registered.

        Raises:
            HttpError: there is no such region.
        """
        if name is not None and name not in self._regions:
            raise HttpError(404, f"there is no region {name!r}", "UnknownRegion")
        return [
            {"name": found, "key": region.key, "offset": region.offset, "byte_size": region.size}
            for found, region in self._regions.items()
            if name in (None, found)
        ]

    # --- tensors in them ----------------------------------------------------------------------------------------------

    def read(self, name: str, offset: int, size: int) -> Buffer:
        """A part of a region.

        Raises:
            InvalidInput: there is no such region or part.
        """
        region = self._part(name, offset, size)
        whole = bytearray(size)
        view = memoryview(whole)
        position = 0
        while position < size:
            count = os.preadv(region.fd, [view[position:]], region.offset + offset + position)
            if not count:
                raise InvalidInput(f"the file of region {name!r} has become shorter")
            position += count
        return whole

    def write(self, name: str, offset: int, size: int, data: Buffer) -> None:
        """Put a tensor into a part of a region.

        Raises:
            InvalidInput: there is no such region or part, or it is too small.
        """
        region = self._part(name, offset, size)
        view = memoryview(data)
        if len(view) > size:
            raise InvalidInput(f"an output of {len(view)} bytes does not fit into the {size} bytes of region {name!r}")
        if os.fstat(region.fd).st_size < region.offset + offset + len(view):
            # Writing would make it longer again, with memory that nobody has asked for.
            raise InvalidInput(f"the file of region {name!r} has become shorter")
        position = 0
        while position < len(view):
            position += os.pwrite(region.fd, view[position:], region.offset + offset + position)

    def _part(self, name: str, offset: int, size: int) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise InvalidInput(f"there is no shared memory region {name!r}; register it first")
        if offset + size > region.size:
            message = f"offset {offset} and byte_size {size} reach beyond the {region.size} bytes of region {name!r}"
            raise InvalidInput(message)
        return region

    def close(self) -> None:
        """Forget all regions."""
        self.unregister(None)


def _refused(message: str) -> HttpError:
    return HttpError(400, message, "InvalidInput")
