"""Bringing one object here: from where it lies, or from others that have it or a part of it, resumed after a failure.

The endpoint where the object lies (its home) knows who else has asked for it, and names the last one first. So when
many nodes want the same object at once they form a chain, each passes on what has arrived, and the home sends it once.
A node is only ever sent to those who asked before it, so chains have no circles. Whatever fails, the next source goes
on at the same offset; the home is the last resort.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from rtml.errors import ObjectLost, ProtocolError
from rtml.exchange import Chunk, Open, Opened, Read, call, expect, send
from rtml.incoming import Incoming
from rtml.messages import ObjectRef

#: Seconds without a byte after which a source is given up; who has nothing to send says so more often.
STALLED: Final = 5.0
#: Seconds for which an object's home may be away: a data endpoint that died is started again.
PATIENCE: Final = 3.0
_PAUSE: Final = 0.05
#: Idle connections kept for each endpoint.
_IDLE_MAX: Final = 2


class Missing(Exception):
    """An endpoint does not have the object."""


class Caller:
    """Connections to data endpoints, used again; for all threads.

    Args:
        secret: proves on both sides that one belongs here.
        own: address of the caller's own endpoint, where copies will be; "" if it has none.
    """

    def __init__(self, secret: bytes, own: str = "") -> None:
        self.secret = secret
        self.own = own
        self._idle: dict[str, list[socket.socket]] = {}
        self._lock = threading.Lock()

    def connect(self, address: str) -> tuple[socket.socket, bool]:
        """A connection, and whether it was used before (then it may be dead without knowing).

        Raises:
            OSError: the endpoint cannot be reached.
            ProtocolError: it has another secret.
        """
        with self._lock:
            idle = self._idle.get(address)
            if idle:
                return idle.pop(), True
        sock = call(address, self.secret)
        sock.settimeout(None)  # the kernel's own time-outs need no poll before each call
        set_timeouts(sock, STALLED)
        return sock, False

    def keep(self, address: str, sock: socket.socket) -> None:
        """The connection is free for others."""
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _IDLE_MAX:
                idle.append(sock)
                return
        sock.close()

    def open(self, address: str, message: Open) -> tuple[socket.socket, Opened]:
        """A connection at which the object is opened.

        Raises:
            OSError: the endpoint cannot be reached.
            ProtocolError: it has another secret.
        """
        while True:
            sock, used = self.connect(address)
            try:
                send(sock, message)
                return sock, expect(sock, Opened)
            except OSError:
                sock.close()
                if not used:
                    raise
            except BaseException:
                sock.close()
                raise

    def close(self) -> None:
        """End the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for sockets in idle.values():
            for sock in sockets:
                sock.close()


def set_timeouts(sock: socket.socket, seconds: float) -> None:
    """Have blocking calls fail after so many seconds."""
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def pull(ref: ObjectRef, incoming: Incoming, caller: Caller, arrived: Callable[[], None] = lambda: None) -> None:
    """Fill `incoming`, from where it stands.

    Args:
        ref: `ref.node` is where the object lies.
        incoming: what has arrived already stays.
        caller: connects.
        arrived: called after each piece.

    Raises:
        ObjectLost: nobody has it, or nobody who has it can be reached.
    """
    failed: list[str] = []
    reason = ""
    until = time.monotonic() + PATIENCE
    while incoming.at < incoming.size:
        before = incoming.at
        sources, reason, hopeless = _from_home(ref, incoming, caller, arrived, failed)
        for source in sources:
            problem = _from_other(source, ref, incoming, caller, arrived)
            if problem:
                failed.append(source)
            if incoming.at > before:
                break
        if incoming.at > before:
            until = time.monotonic() + PATIENCE
        elif not sources:
            if hopeless or time.monotonic() > until:
                raise ObjectLost(f"shared object {ref.id:#x} cannot be had from {ref.node}: {reason}")
            time.sleep(_PAUSE)  # its home is being started again


def _from_home(
    ref: ObjectRef, incoming: Incoming, caller: Caller, arrived: Callable[[], None], failed: list[str]
) -> tuple[list[str], str, bool]:
    """Ask where the object lies, and read it there unless others should be asked.

    Returns:
        The others; why it was not read, and whether that is final.
    """
    try:
        sock, opened = caller.open(ref.node, Open(ref, caller.own, failed))
    except OSError as error:
        return [], f"{type(error).__name__}: {error}", False
    except ProtocolError as error:
        return [], str(error), True
    sources = [source for source in opened.sources if source not in failed]
    if opened.error or sources:
        caller.keep(ref.node, sock)
        return sources, opened.error, True
    return [], _stream(sock, ref.node, incoming, caller, arrived), False


def _from_other(source: str, ref: ObjectRef, incoming: Incoming, caller: Caller, arrived: Callable[[], None]) -> str:
    try:
        sock, opened = caller.open(source, Open(ref))
    except (OSError, ProtocolError) as error:
        return f"{type(error).__name__}: {error}"
    if opened.error:
        caller.keep(source, sock)
        return opened.error
    return _stream(sock, source, incoming, caller, arrived)


def _stream(sock: socket.socket, address: str, incoming: Incoming, caller: Caller, arrived: Callable[[], None]) -> str:
    """Receive until all is there ("") or something goes wrong."""
    try:
        send(sock, Read(incoming.at))
        while not incoming.complete:
            chunk = expect(sock, Chunk)
            if chunk.error:
                caller.keep(address, sock)
                return chunk.error
            left = chunk.count
            if left > incoming.size - incoming.at:
                raise ProtocolError("more bytes than the object has")
            while left:
                target = incoming.target()[:left]
                count = sock.recv_into(target)
                if not count:
                    raise ConnectionResetError("the connection has ended")
                incoming.arrived(count)
                left -= count
                arrived()
    except (OSError, ProtocolError) as error:
        sock.close()
        return f"{type(error).__name__}: {error}"
    except BaseException:
        with contextlib.suppress(OSError):
            sock.close()
        raise
    caller.keep(address, sock)
    return ""
