"""How a dispatcher tells its node's data endpoint what will be wanted, and what not any more."""

from __future__ import annotations

import socket

from rtml.exchange import Drop, Prefetch, Word, framed
from rtml.messages import ObjectRef


class Announcer:
    """Tells the node's data endpoint what will be wanted soon; never waits, and forgets what cannot be said.

    Args:
        path: of its Unix socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._sock: socket.socket | None = None

    def announce(self, refs: list[ObjectRef]) -> None:
        """These objects will be wanted soon."""
        self._say(Prefetch(refs))

    def let_go(self, objects: list[int]) -> None:
        """What was taken over from a node that left is needed no more."""
        self._say(Drop([(object_id, "") for object_id in objects]))

    def _say(self, message: Word) -> None:
        frame = framed(message)
        try:
            if self._sock is None:
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._sock.setblocking(False)
                self._sock.connect(self._path)
            if self._sock.send(frame) == len(frame):
                return
        except OSError:
            pass  # full, or being started again: whoever wants the objects will ask for them
        self.close()

    def close(self) -> None:
        """End the connection."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None
