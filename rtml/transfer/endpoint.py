"""A node's data endpoint: a process that serves the node's objects to others, and brings theirs here.

One thread for each connection: nearly all of their time is spent in the kernel, which moves the bytes: from mapped
segments into sockets (half the time of sendfile, which hands them over page by page), from sockets into segments.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import threading
from dataclasses import dataclass, field
from typing import Final

from rtml.errors import LimitExceeded, ObjectLost, ProtocolError, RtmlError
from rtml.exchange import (
    NO_ROOM,
    Await,
    Awaited,
    Chunk,
    Done,
    Drop,
    Fetch,
    Fetched,
    Follow,
    Give,
    Grow,
    Grown,
    Hold,
    Open,
    Opened,
    Prefetch,
    Put,
    Read,
    Stored,
    Take,
    challenge,
    receive,
    send,
    send_chunk,
)
from rtml.messages import ObjectRef
from rtml.segment import HEADER_OFFSET, unfinished
from rtml.store import Store
from rtml.transfer.copies import Copies, Copy
from rtml.transfer.counts import Counts
from rtml.transfer.giving import Giver, take
from rtml.transfer.holders import HOME, PASSED_ON_MIN, Holders, Lease
from rtml.transfer.naming import STILL_HERE, found_name
from rtml.transfer.pulling import STALLED, Caller, set_keepalive, set_timeouts
from rtml.transfer.uploads import Uploads

#: Connections at the same time, of either kind. A receiver has one to the object's home as long as it reads anywhere.
CONNECTIONS_MAX: Final = 2048
#: Descriptors, if the system allows so many: shells allow 1024.
_FILES: Final = 2 * CONNECTIONS_MAX
#: Seconds for the handshake; and for which a proven connection may be idle.
_HANDSHAKE: Final = 5.0
_IDLE: Final = 600.0
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
        self.counts = Counts(settings.shm_dir)
        self.copies = Copies(self.store, self.caller, self.counts)
        uploads = Store(settings.shm_dir, settings.uploads)
        self.uploads = Uploads(uploads, settings.earlier_uploads, self.copies.let_go)
        self.giver = Giver(self.caller, self.copies, self.uploads)
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
        self.counts.close()
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
                elif isinstance(message, Follow):
                    self._tell_growth(sock, message)
                elif isinstance(message, Grow):
                    self._hear_growth(sock, message)
                elif isinstance(message, Drop):
                    for object_id, _ in message.objects:
                        self.copies.let_go(object_id)
                elif isinstance(message, Give):
                    send(sock, self.giver.give(message))
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

    def _tell_growth(self, sock: socket.socket, message: Follow) -> None:
        """A process reads an object while it arrives."""
        try:
            ref = found_name(self.caller, self.copies, message, sock) if message.name else message.ref
            if ref.node == self._settings.address and not self.copies.is_growing(ref.id):
                self.store.whole(ref)
                send(sock, Fetched(ref.segment, ref=ref))
                send(sock, Grown(ref.size))
                receive(sock)
                return
            copy = self.copies.follow(ref)
        except RtmlError as error:
            send(sock, Fetched("", str(error)))
            return
        try:
            incoming = copy.incoming
            send(sock, Fetched("" if incoming is None else incoming.segment, copy.error, ref=ref))
            at = HEADER_OFFSET
            while at < ref.size:
                upto = self.copies.more(copy, at, STILL_HERE)
                if not upto:
                    send(sock, Grown(0, copy.error or "the copy is gone"))
                    return
                if upto > at:
                    at = upto
                    send(sock, Grown(at))
            end = receive(sock)  # it has all that it wants
            if isinstance(end, Drop) and end.objects:
                self.copies.forget(copy)
        finally:
            self.copies.granted(copy)

    def _hear_growth(self, sock: socket.socket, asked: Grow) -> None:
        """A process makes an object."""
        ref = asked.ref
        torso = ObjectRef(unfinished(ref.id), ref.size, ref.segment, ref.node)
        try:
            copy, piece = self.copies.grow(ref, self.store.whole(torso), asked.name)
        except ObjectLost as error:
            send(sock, Fetched("", str(error)))
            return
        try:
            send(sock, Fetched(ref.segment))
            while not copy.complete and isinstance(message := receive(sock), Grown):
                self.copies.grown(copy, piece, message.upto)
        finally:
            self.copies.ungrow(copy)

    # --- other endpoints, and remote clients --------------------------------------------------------------------------

    def _outside(self, sock: socket.socket) -> None:
        set_timeouts(sock, _HANDSHAKE)
        set_keepalive(sock)
        challenge(sock, self._settings.secret)
        set_timeouts(sock, _IDLE)
        session = 0
        opened: _Opened | None = None
        try:
            while (message := receive(sock)) is not None:
                if isinstance(message, Open):
                    if opened is not None and opened.ref.id != message.ref.id:
                        self._done(opened)
                        opened = None
                    opened, answer = self._open(message, opened)
                    send(sock, answer)
                elif isinstance(message, Read) and opened is not None:
                    set_timeouts(sock, STALLED * 2)
                    self._serve(sock, opened, message)
                    set_timeouts(sock, _IDLE)
                elif isinstance(message, Done):
                    if opened is not None:
                        self._done(opened, message.complete)
                    opened = None
                elif isinstance(message, Await):
                    send(sock, Awaited(self.copies.named(message.name, STILL_HERE)))
                elif isinstance(message, Hold) and not session:
                    session = message.session
                    self.uploads.joined(session, message.objects, sock)
                elif isinstance(message, Put) and session:
                    self.uploads.answer(session, sock, self._store(sock, session, message))
                elif isinstance(message, Drop) and session:
                    self.uploads.drop(session, message.objects)
                elif isinstance(message, Take):
                    send(sock, take(self.giver, self.copies, self.uploads, message))
                else:
                    raise ProtocolError(f"{type(message).__name__} makes no sense now")
                self._worked.set()
        finally:
            if opened is not None:
                self._done(opened)
            if session:
                self.uploads.left(session, sock)

    def _open(self, message: Open, opened: _Opened | None) -> tuple[_Opened | None, Opened]:
        """What the connection reads from now on, and the answer."""
        ref = message.ref
        if opened is None:
            try:
                opened = self._find(ref)
            except (ObjectLost, OSError) as error:
                return None, Opened(str(error))
        if ref.size < PASSED_ON_MIN or (opened.copy is not None and not opened.copy.growing):
            return opened, Opened("", [HOME])
        if opened.lease is None:
            opened.lease = self.holders.join(ref.id, message.data)
        return opened, Opened("", *self.holders.assign(opened.lease, ref.size, message.failed))

    def _find(self, ref: ObjectRef) -> _Opened:
        copy = self.copies.serve(ref.id)
        if copy is not None:
            return _Opened(ref, copy)
        if not _SEGMENT.fullmatch(ref.segment):
            raise ObjectLost("there is no such object")
        memory = self.store.whole(ref)
        if len(memory) < ref.size:
            raise ObjectLost(f"shared object {ref.id:#x} has {len(memory)} bytes, not {ref.size}")
        return _Opened(ref, None, memory)

    def _done(self, opened: _Opened, complete: bool = False) -> None:
        if opened.copy is not None:
            self.copies.served(opened.copy)
        if opened.lease is not None:
            self.holders.leave(opened.lease, complete)

    def _serve(self, sock: socket.socket, opened: _Opened, asked: Read) -> None:
        offset, end = asked.offset, asked.end
        if not HEADER_OFFSET <= offset <= end <= opened.ref.size:
            raise ProtocolError(f"bytes {offset} to {end} of an object of {opened.ref.size} bytes")
        if opened.copy is None:
            send_chunk(sock, opened.memory[offset:end])
            self.counts.left(end - offset)
            return
        while offset < end:
            upto = self.copies.more(opened.copy, offset, STILL_HERE)
            incoming = opened.copy.incoming
            if not upto or incoming is None:
                send(sock, Chunk(0, opened.copy.error or "the copy is gone"))
                return
            upto = min(upto, end)
            if upto == offset:
                send(sock, Chunk(0))
            elif opened.copy.growing and offset < HEADER_OFFSET + 8 <= upto:
                # Here it says that it is unfinished (`segment.unfinished`), but copies are known to be on their way.
                send_chunk(sock, memoryview(opened.ref.id.to_bytes(8, "little"))[offset - HEADER_OFFSET :])
                offset = HEADER_OFFSET + 8
            else:
                send_chunk(sock, incoming.memory[offset:upto])
                self.counts.left(upto - offset)
                offset = upto

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
            piece = incoming.claim(message.size)
            assert piece is not None, "it has a header"
            while not incoming.complete:
                count = sock.recv_into(incoming.target(piece))
                if not count:
                    raise ConnectionResetError("the connection has ended")
                incoming.arrived(piece, count)
                self.counts.arrived(count)
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
    """What a connection reads."""

    ref: ObjectRef
    copy: Copy | None
    #: The segment if it is no copy; keeps it from being used for something else.
    memory: memoryview = field(default_factory=lambda: memoryview(b""))
    #: What the caller was assigned.
    lease: Lease | None = None


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
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _FILES:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES if most < 0 else min(most, _FILES), most))
    Endpoint(settings, outside, inside).run()
    return 0
