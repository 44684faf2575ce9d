"""Bringing one object here: from where it lies, or from others that have it or a part of it, resumed after a failure.

The endpoint where the object lies (its home) assigns the sources (`rtml.transfer.holders`). From one source everything
that is missing is read in one go; several at once each take the next piece that nobody brings, and have two under way,
so that no source ever waits for a request. Whatever fails, what has arrived stays, and the rest comes from others: from
those that are left, from whom the home names next, and if the home is gone from complete copies that it named before.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from rtml.errors import ObjectLost, ProtocolError
from rtml.exchange import Chunk, Done, Open, Opened, Read, Word, call, expect, send
from rtml.incoming import Incoming, Piece
from rtml.messages import ObjectRef
from rtml.transfer.counts import Counts
from rtml.transfer.holders import HOME

#: Seconds without a byte after which a source is given up; who has nothing to send says so more often.
STALLED: Final = 5.0
#: Seconds for which an object's home may be away: a data endpoint that died is started again.
PATIENCE: Final = 3.0
_PAUSE: Final = 0.05
#: Seconds for which nobody waits again for one that was away so long, and how many of them are remembered.
_AWAY_FOR: Final = 10.0
_AWAY_MAX: Final = 1024
#: Seconds after which a source that only says that it has nothing yet is given up.
STUCK: Final = 15.0
#: Bytes of one piece where several sources are read, into how many pieces an object is divided, and how many of them
#: are asked of one source ahead.
_PIECE_MIN: Final = 1024 * 1024
_PIECE_MAX: Final = 8 * 1024 * 1024
_PIECES: Final = 16
_AHEAD: Final = 2
#: Bytes that are received at least before others hear of them: of a small object less, as it is passed on in pieces,
#: of which each waits for its first hop, and each takes time to be told of.
_LEAST_MIN: Final = 12 * 1024
_LEAST_MAX: Final = 64 * 1024
_PORTIONS: Final = 24
#: Idle connections kept for each endpoint.
_IDLE_MAX: Final = 2

_W = TypeVar("_W", bound=msgspec.Struct)


class Missing(Exception):
    """An endpoint does not have the object."""


def portion(size: int) -> int:
    """Bytes of an object of this size that are worth to be passed on by themselves."""
    return min(_LEAST_MAX, max(_LEAST_MIN, size // _PORTIONS))


class _Stopped(ConnectionError):
    """A source gives no more."""


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
        self._closed = False
        self._lock = threading.Lock()
        #: Endpoints that could not be reached for `PATIENCE`, and until when nobody waits for them again.
        self._away: dict[str, float] = {}

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

    def patience(self, address: str) -> float:
        """Seconds for which an object's home may be away."""
        return 0.0 if self._away.get(address, 0.0) > time.monotonic() else PATIENCE

    def reached(self, address: str, success: bool) -> None:
        """Whether an endpoint gave anything in the end."""
        if success:
            self._away.pop(address, None)
        else:
            if len(self._away) > _AWAY_MAX:
                self._away.clear()
            self._away[address] = time.monotonic() + _AWAY_FOR

    def keep(self, address: str, sock: socket.socket) -> None:
        """The connection is free for others."""
        with self._lock:
            idle = self._idle.setdefault(address, [])
            if len(idle) < _IDLE_MAX and not self._closed:
                idle.append(sock)
                return
        sock.close()

    def open(self, address: str, message: Open) -> tuple[socket.socket, Opened]:
        """A connection at which the object is opened; raises as `ask`."""
        return self.ask(address, message, Opened)

    def ask(self, address: str, message: Word, kind: type[_W]) -> tuple[socket.socket, _W]:
        """A connection, and the endpoint's answer there.

        Raises:
            OSError: the endpoint cannot be reached.
            ProtocolError: it has another secret.
        """
        while True:
            sock, used = self.connect(address)
            try:
                send(sock, message)
                return sock, expect(sock, kind)
            except OSError:
                sock.close()
                if not used:
                    raise
            except BaseException:
                sock.close()
                raise

    def close(self) -> None:
        """End the idle connections, and those in use when they are done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for sockets in idle.values():
            for sock in sockets:
                sock.close()


def set_timeouts(sock: socket.socket, seconds: float) -> None:
    """Have blocking calls fail after so many seconds."""
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def set_keepalive(sock: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone, if nothing is said; send small words at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def pull(
    ref: ObjectRef, incoming: Incoming, caller: Caller, counts: Counts, arrived: Callable[[], None] = lambda: None
) -> None:
    """Bring what is missing of an object.

    Args:
        ref: `ref.node` is where the object lies.
        incoming: what has arrived already stays.
        caller: connects.
        counts: told of what happens.
        arrived: called after each portion, by any thread.

    Raises:
        ObjectLost: nobody has it, or nobody who has it can be reached.
    """
    if ref.node == caller.own:
        raise ObjectLost(f"shared object {ref.id:#x} is not here any more")
    Pull(ref, incoming, caller, counts, arrived).run()


class Pull:
    """One object on its way here; see `pull`."""

    def __init__(
        self, ref: ObjectRef, incoming: Incoming, caller: Caller, counts: Counts, arrived: Callable[[], None]
    ) -> None:
        self._ref = ref
        self._incoming = incoming
        self._caller = caller
        self._counts = counts
        self._arrived = arrived
        self._least = portion(ref.size)
        #: The conversation with the home, as long as it lasts: it stands for what was assigned.
        self._home: socket.socket | None = None
        #: Sources that failed, and why the last one did.
        self._failed: list[str] = []
        self._reason = ""
        self._spare: list[str] = []

    def run(self) -> None:
        """Bring it."""
        incoming = self._incoming
        home = self._ref.node
        until = time.monotonic() + self._caller.patience(home)
        try:
            while not incoming.complete:
                before = incoming.left, len(self._failed)
                hopeless = self._round()
                if (incoming.left, len(self._failed)) != before:
                    until = time.monotonic() + PATIENCE
                elif hopeless or time.monotonic() > until:
                    if not hopeless:
                        self._caller.reached(home, False)
                    where = f"shared object {self._ref.id:#x} cannot be had from {home}"
                    raise ObjectLost(f"{where}: {self._reason}")
            self._caller.reached(home, True)
        finally:
            self._leave(incoming.complete)

    def _round(self) -> bool:
        """Read from the sources that the home names now until all have ended; whether there is no hope of any."""
        opened, final = self._ask()
        if opened is None:
            spare = [address for address in self._spare if address not in self._failed]
            if spare:
                self._from_all(spare[:1])
            elif not final:
                time.sleep(_PAUSE)  # its home is being started again
            return final and not spare
        self._spare = opened.spare
        self._from_all([source for source in opened.sources if source not in self._failed] or [HOME])
        return False

    def _ask(self) -> tuple[Opened | None, bool]:
        """The sources; None if there are none, and whether that is final."""
        message = Open(self._ref, self._caller.own, self._failed)
        try:
            if self._home is None:
                self._home, opened = self._caller.open(self._ref.node, message)
            else:
                send(self._home, message)
                opened = expect(self._home, Opened)
        except (OSError, ProtocolError) as error:
            self._reason = str(error) if isinstance(error, ProtocolError) else f"{type(error).__name__}: {error}"
            self._hang_up()
            return None, isinstance(error, ProtocolError)
        if opened.error:
            self._reason = opened.error
            return None, True
        return opened, False

    def _from_all(self, sources: list[str]) -> None:
        most = self._incoming.size
        if len(sources) > 1:
            most = min(_PIECE_MAX, max(_PIECE_MIN, self._incoming.size // _PIECES))
        others = [threading.Thread(target=self._from, args=(one, most), daemon=True) for one in sources[1:]]
        for thread in others:
            thread.start()
        self._from(sources[0], most)
        for thread in others:
            thread.join()

    def _from(self, source: str, most: int) -> None:
        """Read from one source for as long as it gives something and something is missing."""
        incoming, before = self._incoming, self._incoming.left
        sock = None
        try:
            if source == HOME:
                sock = self._home
                assert sock is not None, "it has just answered"
            else:
                sock, opened = self._caller.open(source, Open(self._ref))
                if opened.error:
                    self._caller.keep(source, sock)
                    raise Missing(opened.error)
            self._stream(sock, most)
        except Exception as error:  # noqa: BLE001 - in a thread of its own; whatever it is, others are asked
            plain = isinstance(error, (Missing, ProtocolError))
            self._reason = str(error) if plain else f"{type(error).__name__}: {error}"
            if source == HOME:
                self._hang_up()
            else:
                self._failed.append(source)
                if sock is not None and not isinstance(error, Missing):
                    sock.close()
            self._counts.source_failed(incoming.left < before)
        else:
            if source != HOME:
                with contextlib.suppress(OSError):
                    send(sock, Done())
                    self._caller.keep(source, sock)

    def _stream(self, sock: socket.socket, most: int) -> None:
        """Receive piece after piece until nothing is left to ask for."""
        incoming = self._incoming
        ahead: deque[Piece] = deque()
        try:
            while True:
                while len(ahead) < _AHEAD and (piece := incoming.claim(most)) is not None:
                    ahead.append(piece)
                    send(sock, Read(piece.at, piece.end))
                if not ahead:
                    return
                self._receive(sock, ahead[0])
                ahead.popleft()
        finally:
            for piece in ahead:
                incoming.give_up(piece)

    def _receive(self, sock: socket.socket, piece: Piece) -> None:
        incoming = self._incoming
        until = time.monotonic() + STUCK
        while piece.at < piece.end:
            chunk = expect(sock, Chunk)
            if chunk.error:
                raise _Stopped(chunk.error)
            left = chunk.count
            if left > piece.end - piece.at:
                raise ProtocolError("more bytes than were asked for")
            if left:
                until = time.monotonic() + STUCK
            elif time.monotonic() > until:
                raise _Stopped(f"no byte for {STUCK:g} s")
            while left:
                target = incoming.target(piece)[:left]
                count = sock.recv_into(target)
                if 0 < count < min(self._least, len(target)):  # it is slower than we are: larger portions cost less
                    count += sock.recv_into(target[count : self._least], 0, socket.MSG_WAITALL)
                if not count:
                    raise ConnectionResetError("the connection has ended")
                incoming.arrived(piece, count)
                left -= count
                self._counts.arrived(count)
                self._arrived()

    def _hang_up(self) -> None:
        if self._home is not None:
            self._home.close()
            self._home = None

    def _leave(self, complete: bool) -> None:
        """Give back what was assigned."""
        if self._home is None:
            return
        try:
            send(self._home, Done(complete))
        except OSError:
            self._hang_up()
        else:
            self._caller.keep(self._ref.node, self._home)
            self._home = None
