"""Socket files: where they may lie, what may be replaced, and names that fit a socket address."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from rtml.link.base import AddressError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUN_PATH_MAX: Final = 107


@contextlib.contextmanager
def short_name(path: str) -> Iterator[str]:
    """`path`, or another name of the same file where it is longer than a socket address can be."""
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        yield path
        return
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def connected(path: str, kind: socket.SocketKind) -> socket.socket:
    """A socket connected to the listener at `path`.

    Raises:
        OSError: as `connect` says.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with short_name(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


def prepare(path: str, kind: socket.SocketKind) -> None:
    """Make `path` free for a listener: a missing directory is made with mode 0700, the file of a dead listener removed.

    Raises:
        AddressError: somebody listens there, the file is no socket, or others could replace files in the directory.
        OSError: the directory cannot be made.
    """
    directory = os.path.dirname(path) or "."
    os.makedirs(directory, mode=0o700, exist_ok=True)
    mode = os.stat(directory).st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        raise AddressError(f"{path}: the directory can be written by other users")
    try:
        connected(path, kind).close()
    except FileNotFoundError:
        return
    except OSError:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise AddressError(f"{path} is a file, and not a socket") from None
        os.unlink(path)
        return
    raise AddressError(f"{path}: somebody listens there already")
