"""What processes say to data endpoints: frames, the proof of a shared secret, and how a process asks its own endpoint.

A node's data endpoint (`rtml.transfer`) listens on tcp for other endpoints and remote clients, and on a Unix socket for
the processes of its node. Both carry the messages below, each behind its length (4 bytes), and after some of them raw
bytes, which are never copied into messages.

    tcp    <- Challenge   -> Proof   <- Accepted         both sides have the same secret; nothing is encrypted
           -> Open        <- Opened                      is it there, and from whom should it be read
           -> Read        <- Chunk + bytes, Chunk + ...  a part of it, as the bytes become available; several ahead
           -> Done                                       the caller reads it no more, and has a copy or not
           -> Await       <- Awaited                     which object got this name, when somebody makes it there
           -> Put + bytes <- Stored      -> Hold, Drop   a client's own objects, kept while it is there
                          <- Elsewhere                   they were given to another endpoint
           -> Take        <- Taken                       an object of a node that leaves, to be kept here
    unix   -> Fetch       <- Fetched     -> Drop         the local copy of an object; kept until the next message
           -> Prefetch                                   the same, nobody waits
           -> Follow  <- Fetched, Grown, ...  -> Drop    the local copy, while it arrives
           -> Grow    <- Fetched  -> Grown, ...          an object that is made here, read by others meanwhile
           -> Drop                                       what was taken is needed no more
           -> Give        <- Given                       the node leaves: what is needed goes to others

What an object's bytes are: its segment from `rtml.segment.HEADER_OFFSET` on, so that a copy is a segment again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec

from rtml.errors import ObjectLost, ProtocolError, RtmlError
from rtml.messages import ObjectRef

VERSION: Final = 2
#: Longest message, without the bytes behind it.
_MESSAGE_MAX: Final = 1024 * 1024
_NONCE: Final = 32
_LENGTH: Final = struct.Struct("<I")
#: Seconds for a connection to be made and for its handshake; and without any byte, afterwards.
CONNECT_TIMEOUT: Final = 3.0
IDLE_TIMEOUT: Final = 15.0
#: Seconds for which a node's endpoint may be away: its supervisor starts it again.
_AWAY: Final = 5.0
#: Bytes from which on a transfer says something about bandwidth, and seconds of each that say nothing about it.
_TELLING: Final = 64 * 1024
_OVERHEAD: Final = 1e-3

#: A label is a resource of which there is enough for everybody.
LABEL_AMOUNT: Final = 1e9

#: Moved objects that are remembered.
_MOVED_MAX: Final = 65_536

#: The file in a node's directory of shared memory that says what the node is.
PLACE_FILE: Final = ".place"


class Challenge(msgspec.Struct, array_like=True, tag=1):
    """The endpoint's first message."""

    version: int
    nonce: bytes


class Proof(msgspec.Struct, array_like=True, tag=2):
    """The caller knows the secret, and has a nonce too."""

    nonce: bytes
    mac: bytes


class Accepted(msgspec.Struct, array_like=True, tag=3):
    """So does the endpoint."""

    mac: bytes


class Open(msgspec.Struct, array_like=True, tag=4):
    """Is this object (or a part of it) there? `data` is where the caller will have a copy soon, "" if nowhere.

    Asked of the endpoint where the object lies, its *home*, again and again while sources fail; what was assigned is
    the caller's until it says `Done`, opens another object or hangs up.
    """

    ref: ObjectRef
    data: str = ""
    #: Sources that were named by an earlier `Opened`, and do not have it or have stopped.
    failed: list[str] = []


class Opened(msgspec.Struct, array_like=True, tag=5):
    """`error` says why not. `sources` have all of it, or a part that grows; "" is this endpoint, on this connection."""

    error: str = ""
    sources: list[str] = []
    #: Others that have it, for the case that none of those and not even this endpoint can be reached any more.
    spare: list[str] = []


class Read(msgspec.Struct, array_like=True, tag=6):
    """The bytes of the opened object from `offset` of its segment to `end`."""

    offset: int
    end: int


class Chunk(msgspec.Struct, array_like=True, tag=7):
    """So many bytes follow; 0: there are none yet, or there will be none, for this reason."""

    count: int
    error: str = ""


class Done(msgspec.Struct, array_like=True, tag=15):
    """The caller will not read the opened object any more. `complete`: all of it is at its endpoint."""

    complete: bool = False


class Put(msgspec.Struct, array_like=True, tag=8):
    """An object of a remote client, whose `size` less `HEADER_OFFSET` bytes follow."""

    id: int
    size: int


class Stored(msgspec.Struct, array_like=True, tag=9):
    """Where it lies; or why not."""

    segment: str
    error: str = ""


class Drop(msgspec.Struct, array_like=True, tag=10):
    """The sender needs these objects no more: (id, segment)."""

    objects: list[tuple[int, str]] = []


class Hold(msgspec.Struct, array_like=True, tag=11):
    """The connection's client, and what it has put earlier and still needs."""

    session: int
    objects: list[tuple[int, str]] = []


class Fetch(msgspec.Struct, array_like=True, tag=12):
    """Bring this object here."""

    ref: ObjectRef


class Fetched(msgspec.Struct, array_like=True, tag=13):
    """The segment of the copy, or why there is none."""

    segment: str
    error: str = ""
    #: Bytes that were moved for it, and the seconds that took; 0 if it was here already.
    moved: int = 0
    seconds: float = 0.0
    #: What a name that was followed stands for.
    ref: ObjectRef | None = None


class Prefetch(msgspec.Struct, array_like=True, tag=14):
    """These will be wanted soon. Not answered."""

    refs: list[ObjectRef]


class Follow(msgspec.Struct, array_like=True, tag=16):
    """Bring this object here, and say how far it is: answered by `Fetched` at once, then by `Grown` to its end.

    With `name`, `ref` says only where it will be made, and it is waited for so many seconds.
    """

    ref: ObjectRef
    name: int = 0
    seconds: float = 0.0


class Grow(msgspec.Struct, array_like=True, tag=17):
    """The sender makes this object here: others may read what is there. Answered by `Fetched`; `Grown` follows.

    `name` is what those call it who were told of it before anybody knew its reference.
    """

    ref: ObjectRef
    name: int = 0


class Grown(msgspec.Struct, array_like=True, tag=18):
    """Everything before this offset of the segment is there; 0: it will never be complete, for this reason."""

    upto: int
    error: str = ""


class Give(msgspec.Struct, array_like=True, tag=20):
    """The node leaves: these objects of its processes, and all that the endpoint keeps itself, go to other endpoints.

    No transfer is begun when so many seconds are over.
    """

    refs: list[ObjectRef]
    to: list[str]
    seconds: float


class Given(msgspec.Struct, array_like=True, tag=21):
    """Where they are now: (id, endpoint); and how many nobody could take, with one of the reasons."""

    moved: list[tuple[int, str]]
    left: int = 0
    reason: str = ""


class Take(msgspec.Struct, array_like=True, tag=22):
    """Fetch this object and keep it: for a client's session, or (0) until a `Drop` by the receiver's dispatcher."""

    ref: ObjectRef
    session: int = 0


class Taken(msgspec.Struct, array_like=True, tag=23):
    """It is there; or why not."""

    error: str = ""


class Await(msgspec.Struct, array_like=True, tag=25):
    """Which object is this? Asked before it is made, and again while there is no answer."""

    name: int


class Awaited(msgspec.Struct, array_like=True, tag=26):
    """This one; or nobody makes it yet."""

    ref: ObjectRef | None = None


class Elsewhere(msgspec.Struct, array_like=True, tag=24):
    """Objects that the connection's client has put lie at another endpoint now."""

    address: str
    objects: list[int]


Word = (
    Challenge | Proof | Accepted | Open | Opened | Read | Chunk | Done | Put | Stored | Drop | Hold
    | Fetch | Fetched | Prefetch | Follow | Grow | Grown | Give | Given | Take | Taken | Elsewhere | Await
    | Awaited
)  # fmt: skip
_W = TypeVar("_W", bound=msgspec.Struct)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Word).decode


def send(sock: socket.socket, message: Word) -> None:
    """Send one message.

    Raises:
        OSError: the connection is lost.
    """
    sock.sendall(framed(message))


def framed(message: Word) -> bytes:
    """A message as it is sent."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


def send_chunk(sock: socket.socket, data: memoryview) -> None:
    """Send these bytes behind their `Chunk`.

    Raises:
        OSError: the connection is lost.
    """
    body = _encode(Chunk(len(data)))
    sock.sendall(_LENGTH.pack(len(body)) + body, socket.MSG_MORE)  # no packet of its own
    sock.sendall(data)


def receive(sock: socket.socket) -> Word | None:
    """The next message; None at the end of the connection.

    Raises:
        OSError: the connection is lost, or silent for too long.
        ProtocolError: what came is no message.
    """
    head = bytearray(_LENGTH.size)
    if not receive_into(sock, memoryview(head), end_allowed=True):
        return None
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= _MESSAGE_MAX:
        raise ProtocolError(f"a message of {length} bytes at a data endpoint")
    body = bytearray(length)
    receive_into(sock, memoryview(body))
    try:
        message: Word = _decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"no message for a data endpoint: {error}") from None
    return message


def expect(sock: socket.socket, kind: type[_W]) -> _W:
    """The next message, which must be of this kind.

    Raises:
        OSError: the connection is lost.
        ProtocolError: it is another one.
    """
    message = receive(sock)
    if message is None:
        raise ConnectionResetError("the data endpoint has closed the connection")
    if not isinstance(message, kind):
        raise ProtocolError(f"a data endpoint said {type(message).__name__} instead of {kind.__name__}")
    return message


def receive_into(sock: socket.socket, target: memoryview, *, end_allowed: bool = False) -> bool:
    """Fill `target`; False if the connection ended before its first byte and that is allowed.

    Raises:
        OSError: the connection is lost.
    """
    at = 0
    while at < len(target):
        count = sock.recv_into(target[at:])
        if not count:
            if end_allowed and not at:
                return False
            raise ConnectionResetError("the connection has ended in the midst of a message")
        at += count
    return True


# --- the proof --------------------------------------------------------------------------------------------------------


def challenge(sock: socket.socket, secret: bytes) -> None:
    """The endpoint's side of the handshake.

    Raises:
        ProtocolError: the caller does not know the secret.
        OSError: the connection is lost.
    """
    nonce = os.urandom(_NONCE)
    send(sock, Challenge(VERSION, nonce))
    proof = expect(sock, Proof)
    if not hmac.compare_digest(proof.mac, _mac(secret, b"caller", nonce, proof.nonce)):
        raise ProtocolError("the caller has another secret")
    send(sock, Accepted(_mac(secret, b"endpoint", nonce, proof.nonce)))


def call(address: str, secret: bytes) -> socket.socket:
    """A connection to the data endpoint at "host:port", proven from both sides.

    Raises:
        OSError: it cannot be reached.
        ProtocolError: it does not know the secret, or speaks another version.
    """
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked = expect(sock, Challenge)
        if asked.version != VERSION:
            raise ProtocolError(f"the data endpoint at {address} speaks version {asked.version}, not {VERSION}")
        nonce = os.urandom(_NONCE)
        send(sock, Proof(nonce, _mac(secret, b"caller", asked.nonce, nonce)))
        answer = receive(sock)
        if not isinstance(answer, Accepted) or not hmac.compare_digest(
            answer.mac, _mac(secret, b"endpoint", asked.nonce, nonce)
        ):
            raise ProtocolError(f"the data endpoint at {address} has another secret (data.secret of the keys)")
        sock.settimeout(IDLE_TIMEOUT)
    except BaseException:
        sock.close()
        raise
    return sock


def _mac(secret: bytes, who: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, who + first + second, hashlib.sha256)


def node_label(address: str) -> str:
    """The resource that only the node with this data endpoint has: what must run there asks for it."""
    return f"data={address}"


# --- what a node is ---------------------------------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True):
    """What the processes of a node must know about its objects; written by the supervisor."""

    #: Address of the node's data endpoint, "" if it has none, and its Unix socket.
    data: str = ""
    socket: str = ""
    #: Most bytes of shared memory for objects; 0: what the processes take by themselves.
    memory: int = 0
    #: Directory for objects that have no room there, and most bytes of it (0: half of what is free).
    spill: str = ""
    spill_max: int = 0

    def write(self, directory: str) -> None:
        """Tell it to all who have this directory of shared memory."""
        fresh = Path(directory, PLACE_FILE + ".new")
        fresh.write_bytes(msgspec.json.encode(self))
        fresh.rename(Path(directory, PLACE_FILE))

    @staticmethod
    def of(directory: str) -> Place:
        """What is written there; a place of its own without data endpoint if nothing is."""
        try:
            return msgspec.json.decode(Path(directory, PLACE_FILE).read_bytes(), type=Place)
        except OSError:
            return Place()


class Granted(Protocol):
    """Leads from the name of a local copy to something that keeps it."""

    def __call__(self, segment: str) -> list[memoryview]:
        """Map and pin the segment."""


class Asker:
    """Asks the node's own data endpoint; for all threads of a process.

    Args:
        path: of its Unix socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: list[socket.socket] = []
        self._pid = os.getpid()
        self._lock = threading.Lock()
        #: Bytes that were moved for this process, and the seconds that it waited for them.
        self.moved = 0
        self.seconds = 0.0
        #: Bytes a second at which objects came from other nodes lately; 0: none have.
        self.bandwidth = 0.0

    def observe(self, moved: int, seconds: float) -> None:
        """So much came in this time."""
        seconds = max(seconds - _OVERHEAD, seconds / 2)
        if seconds > 0 and moved >= (_TELLING if seconds >= _OVERHEAD else _TELLING * 4):
            seen = moved / seconds
            self.bandwidth = (self.bandwidth + seen) / 2 if self.bandwidth else seen

    def fetch(self, ref: ObjectRef, keep: Granted) -> list[memoryview]:
        """Have the object brought here; `keep` pins it, until then the endpoint keeps it.

        Raises:
            ObjectLost: nobody has it any more.
            RtmlError: it cannot be brought here, as there is no room or no endpoint.
        """
        until = time.monotonic() + _AWAY
        while True:
            sock = None
            try:
                sock = self.connection()
                send(sock, Fetch(ref))
                sock.settimeout(None)  # as long as it takes: the endpoint notices what is silent
                answer = expect(sock, Fetched)
                if answer.error:
                    self._idle.append(sock)
                    raise _error(answer.error)
                found = keep(answer.segment)
                send(sock, Drop())
            except OSError as error:
                _close(sock)
                if time.monotonic() > until:
                    raise RtmlError(f"the node's data endpoint does not answer: {error}") from None
                time.sleep(0.02)  # only while its supervisor starts it again
                continue
            except BaseException:
                if sock is not None and sock not in self._idle:
                    sock.close()
                raise
            self._idle.append(sock)
            with self._lock:
                self.moved += answer.moved
                self.seconds += answer.seconds
                self.observe(answer.moved, answer.seconds)
            return found

    def take(self) -> tuple[int, float]:
        """What was moved since the last call, in bytes, and the seconds."""
        with self._lock:
            taken, self.moved, self.seconds = (self.moved, self.seconds), 0, 0.0
        return taken

    def keep(self, sock: socket.socket) -> None:
        """Nothing more is said here: others may use the connection."""
        self._idle.append(sock)

    def connection(self) -> socket.socket:
        """A connection for one conversation, to be closed or given back (`keep`).

        Raises:
            OSError: there is no endpoint, at the moment.
        """
        if os.getpid() != self._pid:
            self._pid, self._idle = os.getpid(), []  # a forked child has no part in its parent's conversations
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """End the idle connections."""
        while self._idle:
            self._idle.pop().close()


class Places:
    """Where objects are whose node has left: references to them still name that. For all threads."""

    def __init__(self) -> None:
        self._moved: dict[int, str] = {}

    def moved(self, objects: list[tuple[int, str]]) -> None:
        """These (id, data endpoint) are not where references to them say."""
        if len(self._moved) > _MOVED_MAX:
            self._moved.clear()  # who needs one of them again is told when it asks the dispatcher
        self._moved.update(objects)

    def where(self, ref: ObjectRef) -> ObjectRef:
        """The reference, to where the object is now."""
        at = self._moved.get(ref.id)
        return ref if at is None else ObjectRef(ref.id, ref.size, ref.segment, at)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


#: How an endpoint marks an error as not the object's own.
NO_ROOM: Final = "no room: "


def _error(text: str) -> RtmlError:
    from rtml.errors import LimitExceeded

    return LimitExceeded(text.removeprefix(NO_ROOM)) if text.startswith(NO_ROOM) else ObjectLost(text)
