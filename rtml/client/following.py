"""Arrays that are read while they arrive from another node, and arrays that others read while they are made here.

Both are conversations with the node's own data endpoint (`rtml.exchange`), which moves the bytes between nodes; here
they lie in shared memory. Each is used by one thread, and may be ended by another one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Final

from rtml.client.folding import UnlikeError
from rtml.codec.arrays import TENSOR, decode_tensor
from rtml.errors import LimitExceeded, ObjectLost, RtmlError
from rtml.exchange import NO_ROOM, Drop, Fetched, Follow, Grow, Grown, expect, send
from rtml.incoming import Incoming, Piece
from rtml.messages import ObjectRef
from rtml.segment import HEADER_OFFSET, unfinished
from rtml.store import Store

#: Bytes behind a segment's header in which everything lies that says what the array is.
_HEAD: Final = 2048
#: Seconds for which the node's endpoint may be away: its supervisor starts it again.
_AWAY: Final = 5.0


class EndpointGoneError(RtmlError):
    """This node's own data endpoint died: nothing is wrong with what was read."""


class Following:
    """An array that arrives (a `Feed`).

    Args:
        store: of this process.
        ref: the array, on another node or being made on this one.
        keep: others on this node may want the copy.
        name: what is meant is what will be made under this name at `ref.node`; the rest of `ref` says nothing.
        seconds: how long to wait for that to begin.
        began: is given this before it waits, to be able to `stop` it.

    Raises:
        ObjectLost: it cannot be had.
        EndpointGoneError: this node's data endpoint died meanwhile.
        UnlikeError: it is no array.
    """

    def __init__(
        self,
        store: Store,
        ref: ObjectRef,
        keep: bool = True,
        name: int = 0,
        seconds: float = 0.0,
        began: Callable[[Following], object] | None = None,
    ) -> None:
        self._asker = store.asker
        self._sock: socket.socket | None = _connected(store)
        sock = self._sock
        self._upto = HEADER_OFFSET
        #: When the first bytes were there, and how far they went.
        self._since, self._from = 0.0, 0
        if began is not None:
            began(self)
        try:
            send(sock, Follow(store.places.where(ref), name, seconds))
            sock.settimeout(None)  # as long as it takes: the endpoint notices what is silent
            answer = expect(sock, Fetched)
            segment = _checked(answer)
            ref = answer.ref or ref
            self._size = ref.size
            self._left = [] if keep else [(ref.id, "")]
            while self._upto < min(ref.size, HEADER_OFFSET + _HEAD):
                self._hear(sock)
            # The views pin the segment; what has not arrived yet is written there by the endpoint.
            head, *parts = _mapped(store, ObjectRef(ref.id, ref.size, segment, store.place.data))
            if bytes(head[:1]) != TENSOR or len(parts) != 1:
                raise UnlikeError
            self.array = decode_tensor(head, parts[0])
        except OSError as error:
            self.stop()
            raise EndpointGoneError(f"the node's data endpoint died: {error}") from None
        except BaseException:
            self.stop()
            raise
        self.flat = self.array.reshape(-1)
        #: Where the data begins.
        self._start = ref.size - parts[0].nbytes
        #: The rest will not come.
        self.lost = False

    def wait(self, at: int) -> int:
        """See `Feed`.

        Raises:
            ObjectLost: the rest will not come.
            EndpointGoneError: this node's data endpoint died.
        """
        sock = self._sock
        size = self.flat.itemsize
        while (there := (self._upto - self._start) // size) <= at:
            self.lost = True
            if sock is None:
                raise ObjectLost("nobody waits for it any more")
            try:
                self._hear(sock)
            except OSError as error:
                if self._sock is None:
                    raise ObjectLost("nobody waits for it any more") from None
                raise EndpointGoneError(f"the node's data endpoint died: {error}") from None
            self.lost = False
        return int(min(there, self.flat.size))

    def _hear(self, sock: socket.socket) -> None:
        news = expect(sock, Grown)
        if not news.upto:
            raise ObjectLost(news.error)
        if not self._since:
            self._since, self._from = time.monotonic(), news.upto
        self._upto = news.upto
        if news.upto >= self._size:
            self._asker.observe(news.upto - self._from, time.monotonic() - self._since)

    def close(self) -> None:
        """No more of it is read; if all of it was, others may use the connection."""
        if self._sock is not None and self._upto < self._size:
            self.stop()
        sock, self._sock = self._sock, None
        if sock is not None:
            try:
                send(sock, Drop(self._left))
            except OSError:
                sock.close()
            else:
                self._asker.keep(sock)

    def stop(self) -> None:
        """No more of it is wanted. From any thread: whoever waits gets an error."""
        sock, self._sock = self._sock, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class Growing:
    """An object of this process's store that is filled from front to back, while others read it.

    Args:
        store: of this process.
        incoming: the object, with its header.
        head: bytes of it that are there.
        name: others may have been told that it will be made under this name.
    """

    def __init__(self, store: Store, incoming: Incoming, head: int, name: int = 0) -> None:
        piece = incoming.claim(incoming.size)
        assert piece is not None, "it has a header"
        self._incoming = incoming
        self._piece: Piece = piece
        self._sock: socket.socket | None = None
        self.ref = ObjectRef(incoming.id, incoming.size, incoming.segment, store.place.data)
        if not store.place.socket:
            return
        try:
            self._sock = store.asker.connection()
            send(self._sock, Grow(self.ref, name))
            _checked(expect(self._sock, Fetched))
        except (OSError, ObjectLost):
            self.stop()  # others read it when it is there
        self.grown(head)

    @property
    def shown(self) -> bool:
        """Whether others can read what there is of it."""
        return self._sock is not None

    def grown(self, upto: int) -> None:
        """Everything before this offset is there."""
        if upto >= self._piece.end:
            self._incoming.finished()
        if upto > self._piece.at:
            self._incoming.arrived(self._piece, upto - self._piece.at)
            if self._sock is not None:
                try:
                    send(self._sock, Grown(upto))
                except OSError:
                    self.stop()

    def stop(self) -> None:
        """Tell nobody any more; what is not complete never will be."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()


def _mapped(store: Store, ref: ObjectRef) -> list[memoryview]:
    made = ObjectRef(unfinished(ref.id), ref.size, ref.segment, ref.node)
    for one in (ref, made):
        with contextlib.suppress(ObjectLost):
            return store.get(one)
    return store.get(ref)  # it was finished in this moment


def _connected(store: Store) -> socket.socket:
    """A connection to the node's data endpoint, which may just be started again."""
    until = time.monotonic() + _AWAY
    while True:
        try:
            return store.asker.connection()
        except OSError as error:
            if not store.place.socket or time.monotonic() > until:
                raise EndpointGoneError(f"no data endpoint on this node: {error}") from None
            time.sleep(0.02)  # only while its supervisor starts it again


def _checked(answer: Fetched) -> str:
    if answer.error:
        if answer.error.startswith(NO_ROOM):
            raise LimitExceeded(answer.error.removeprefix(NO_ROOM))
        raise ObjectLost(answer.error)
    return answer.segment
