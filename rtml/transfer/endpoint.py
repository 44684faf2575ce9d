"""A node's data endpoint: a process that serves the node's objects to others, and brings theirs here.

One thread for each connection: nearly all of their time is spent in the kernel, which moves the bytes. What is served
goes from the file in shared memory to the socket without passing through this process.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from typing import Final

from rtml.errors import LimitExceeded, ObjectLost, ProtocolError, RtmlError
from rtml.exchange import (
    NO_ROOM,
    Chunk,
    Drop,
    Fetch,
    Fetched,
    Hold,
    Open,
    Opened,
    Prefetch,
    Put,
    Read,
    Stored,
    challenge,
    receive,
    send,
)
from rtml.messages import ObjectRef
from rtml.segment import HEADER_OFFSET
from rtml.store import Store
from rtml.transfer.copies import Copies, Copy
from rtml.transfer.holders import Holders
from rtml.transfer.pulling import STALLED, Caller, set_timeouts
from rtml.transfer.uploads import Uploads

#: Connections at the same time, of either kind.
CONNECTIONS_MAX: Final = 512
#: Seconds for the handshake; and for which a proven connection may be idle.
_HANDSHAKE: Final = 5.0
_IDLE: Final = 600.0
#: Seconds after which one that waits for bytes hears that there are none yet.
_STILL_HERE: Final = STALLED / 3
#: Bytes for one call of sendfile.
_SENDFILE_MAX: Final = 8 * 1024 * 1024
#: Seconds of rest before memory is tidied up.
_TIDY_AFTER: Final = 1.0

_SEGMENT: Final = re.compile(r"[0-9a-f]{8}-[0-9]{1,18}")


@dataclass(frozen=True)
class EndpointSettings:
    """What the supervisor tells the process."""

    shm_dir: str
    #: Its own name for others, "host:port".
    address: str
    secret: bytes
    #: Sessions of its two stores: copies, and what clients put.
    copies: int
    uploads: int
    #: Those of its earlier lives.
    earlier_copies: list[int] = field(default_factory=list)
    earlier_uploads: list[int] = field(default_factory=list)


class Endpoint:
    """The process's parts.

    Args:
        settings: from the supervisor.
        outside: listens on tcp.
        inside: listens on a Unix socket.
    """

    def __init__(self, settings: EndpointSettings, outside: socket.socket, inside: socket.socket) -> None:
        self._settings = settings
        self._listeners = (outside, inside)
        for session in settings.earlier_copies:
            Store.remove_session(settings.shm_dir, session)
        self.caller = Caller(settings.secret, settings.address)
        #: Reads what the processes of this node have stored.
        self.store = Store(settings.shm_dir, settings.copies)
        self.copies = Copies(self.store, self.caller)
        self.uploads = Uploads(Store(settings.shm_dir, settings.uploads), settings.earlier_uploads)
        self.holders = Holders()
        self._connections = threading.Semaphore(CONNECTIONS_MAX)
        self._worked = threading.Event()
        self._closed = False

    def close(self) -> None:
        """Let nobody in any more, and leave `run`. Conversations go on until the callers end them."""
        self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.caller.close()
        self.store.close()
        self.uploads.store.close()
        self._worked.set()

    def run(self) -> None:
        """Serve until `close`."""
        outside, inside = self._listeners
        threading.Thread(target=self._accept, args=(inside, self._inside), daemon=True).start()
        threading.Thread(target=self._accept, args=(outside, self._outside), daemon=True).start()
        while not self._closed:
            self._worked.wait()
            self._worked.clear()
            threading.Event().wait(_TIDY_AFTER)
            self.store.sweep()
            self.uploads.store.sweep()

    def _accept(self, listener: socket.socket, body: object) -> None:
        while True:
            self._connections.acquire()
            try:
                sock, _ = listener.accept()
            except OSError:
                self._connections.release()
                if self._closed:
                    return
                threading.Event().wait(0.1)  # out of descriptors, for the moment
                continue
            threading.Thread(target=self._converse, args=(sock, body), daemon=True).start()

    def _converse(self, sock: socket.socket, body: object) -> None:
        try:
            body(sock)  # type: ignore[operator]
        except (OSError, ProtocolError):
            pass  # whoever called notices that the connection has ended
        finally:
            sock.close()
            self._connections.release()
            self._worked.set()

    # --- processes of this node ---------------------------------------------------------------------------------------

    def _inside(self, sock: socket.socket) -> None:
        granted: Copy | None = None
        try:
            while (message := receive(sock)) is not None:
                if granted is not None:
                    self.copies.granted(granted)
                    granted = None
                if isinstance(message, Fetch):
                    answer, granted = self._fetch(message.ref)
                    send(sock, answer)
                elif isinstance(message, Prefetch):
                    self.copies.prefetch(message.refs)
                self._worked.set()
        finally:
            if granted is not None:
                self.copies.granted(granted)

    def _fetch(self, ref: ObjectRef) -> tuple[Fetched, Copy | None]:
        try:
            copy = self.copies.fetch(ref)
        except RtmlError as error:
            return Fetched("", str(error)), None
        assert copy.incoming is not None, "it is complete"
        moved, copy.moved = copy.moved, 0
        return Fetched(copy.incoming.segment, "", moved, copy.seconds), copy

    # --- other endpoints, and remote clients --------------------------------------------------------------------------

    def _outside(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        set_timeouts(sock, _HANDSHAKE)
        challenge(sock, self._settings.secret)
        set_timeouts(sock, _IDLE)
        session = 0
        opened: _Opened | None = None
        try:
            while (message := receive(sock)) is not None:
                if isinstance(message, Open):
                    opened = None
                    opened, answer = self._open(message)
                    send(sock, answer)
                elif isinstance(message, Read) and opened is not None:
                    set_timeouts(sock, STALLED * 2)
                    self._serve(sock, opened, message.offset)
                    opened = None
                    set_timeouts(sock, _IDLE)
                elif isinstance(message, Hold) and not session:
                    session = message.session
                    self.uploads.joined(session, message.objects)
                elif isinstance(message, Put) and session:
                    send(sock, self._store(sock, session, message))
                elif isinstance(message, Drop) and session:
                    self.uploads.drop(session, message.objects)
                else:
                    raise ProtocolError(f"{type(message).__name__} makes no sense now")
                self._worked.set()
        finally:
            if session:
                self.uploads.left(session)

    def _open(self, message: Open) -> tuple[_Opened | None, Opened]:
        ref = message.ref
        copy = self.copies.serve(ref.id)
        if copy is not None:
            self.copies.served(copy)  # counted again when it is read
            return _Opened(ref, copy, []), Opened()
        if not _SEGMENT.fullmatch(ref.segment):
            return None, Opened("there is no such object")
        try:
            # The views keep the segment from being used for something else until it is sent.
            views = self.store.get(ObjectRef(ref.id, ref.size, ref.segment, self.store.place.data))
        except (ObjectLost, OSError) as error:
            return None, Opened(str(error))
        sources = self.holders.joins(ref.id, ref.size, message.data, message.failed)
        if sources:
            return None, Opened("", sources)  # it comes again if they fail: nothing is kept for it meanwhile
        return _Opened(ref, None, views), Opened()

    def _serve(self, sock: socket.socket, opened: _Opened, offset: int) -> None:
        ref = opened.ref
        if not HEADER_OFFSET <= offset <= ref.size:
            raise ProtocolError(f"offset {offset} of an object of {ref.size} bytes")
        if opened.copy is not None:
            self._serve_copy(sock, ref, offset)
            return
        try:
            fd = self.store.open_segment(ref)
        except ObjectLost as error:
            send(sock, Chunk(0, str(error)))
            return
        try:
            size = min(ref.size, os.fstat(fd).st_size)
            if size < ref.size:
                raise ProtocolError("the object is shorter than was said")
            send(sock, Chunk(size - offset))
            _send_file(sock, fd, offset, size)
        finally:
            os.close(fd)

    def _serve_copy(self, sock: socket.socket, ref: ObjectRef, offset: int) -> None:
        copies = self.copies
        copy = copies.serve(ref.id)
        if copy is None:
            send(sock, Chunk(0, "the copy is gone"))
            return
        try:
            while offset < ref.size:
                end = copies.more(copy, offset, _STILL_HERE)
                incoming = copy.incoming
                if not end or incoming is None:
                    send(sock, Chunk(0, copy.error or "the copy is gone"))
                    return
                send(sock, Chunk(max(0, end - offset)))
                if end > offset:
                    sock.sendall(incoming.memory[offset:end])
                    offset = end
        finally:
            copies.served(copy)

    def _store(self, sock: socket.socket, session: int, message: Put) -> Stored:
        store = self.uploads.store
        if message.size <= HEADER_OFFSET or message.size > store.capacity:
            raise ProtocolError(f"an object of {message.size} bytes")
        try:
            incoming = store.reserve(message.id, message.size)
        except LimitExceeded as error:
            _discard(sock, message.size - HEADER_OFFSET)
            return Stored("", NO_ROOM + str(error))
        set_timeouts(sock, STALLED * 2)
        try:
            while not incoming.complete:
                count = sock.recv_into(incoming.target())
                if not count:
                    raise ConnectionResetError("the connection has ended")
                incoming.arrived(count)
            segment = self.uploads.stored(session, incoming)
        except BaseException as error:
            store.abandon(incoming)
            if isinstance(error, ObjectLost):
                raise ProtocolError("what was put is no object") from None
            raise
        set_timeouts(sock, _IDLE)
        return Stored(segment)


@dataclass
class _Opened:
    """What a connection is about to read."""

    ref: ObjectRef
    copy: Copy | None
    #: Keeps the segment pinned.
    views: list[memoryview]


def _send_file(sock: socket.socket, fd: int, offset: int, end: int) -> None:
    while offset < end:
        sent = os.sendfile(sock.fileno(), fd, offset, min(_SENDFILE_MAX, end - offset))
        if not sent:
            raise ConnectionResetError("the file has ended")
        offset += sent


def _discard(sock: socket.socket, count: int) -> None:
    """Read what nobody wants, so that the answer can be read."""
    scratch = memoryview(bytearray(256 * 1024))
    while count:
        received = sock.recv_into(scratch[:count])
        if not received:
            raise ConnectionResetError("the connection has ended")
        count -= received


def listen_outside(host: str, port: int) -> socket.socket:
    """A listening socket for other machines.

    Raises:
        OSError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def listen_inside(path: str) -> socket.socket:
    """A listening Unix socket in a private directory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock.bind(path)
    sock.listen(128)
    return sock


def run_endpoint(settings: EndpointSettings, outside: socket.socket, inside: socket.socket) -> int:
    """Body of the process. Returns its exit code."""
    Endpoint(settings, outside, inside).run()
    return 0
