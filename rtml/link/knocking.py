"""How a dispatcher finds out that a node whose link broke is no more: it knocks at the node's data endpoint.

A broken link says of no process that it has ended. A refused connection does: the kernel there answers that nobody
listens, and the listening socket is the supervisor's, with whom all of a node's processes end. Silence says nothing (a
cut link, a host that is down), nor does an address that could never be reached from here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from typing import Final

from rtml.graph.tables import Knock
from rtml.link.hub import Hub

#: Seconds before each try: processes that are killed one after the other do not end in one moment.
_PAUSES: Final = (0.1, 0.2, 0.2, 0.5, 1.0, 1.0)
#: Refusals in a row that are believed.
_REFUSALS: Final = 2
_TIMEOUT: Final = 1.0
#: Endpoints at which is knocked at a time. A node beyond is waited for, as if nothing were known.
_AT_ONCE: Final = 64


class Knocker:
    """Knocks for one dispatcher, in threads.

    Args:
        hub: woken up when something is known.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        #: Nodes that have ended, until the dispatcher takes them.
        self.refused: deque[int] = deque()
        #: Endpoints that could be reached once: only their refusal says something.
        self._open: set[str] = set()
        self._free = threading.Semaphore(_AT_ONCE)
        self._ending = threading.Event()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        hub.add_fd(self._bell)

    def knock(self, asked: Knock) -> None:
        """Find out; returns at once."""
        if (asked.lost and asked.data not in self._open) or not self._free.acquire(blocking=False):
            return
        body = self._lost if asked.lost else self._joined
        threading.Thread(target=body, args=(asked,), name="rtml-knock", daemon=True).start()

    def take(self) -> int:
        """One of those."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return self.refused.popleft()

    def _joined(self, asked: Knock) -> None:
        with self._free_after():
            if is_refused(asked.data) is False:
                self._open.add(asked.data)

    def _lost(self, asked: Knock) -> None:
        with self._free_after():
            refusals = 0
            for pause in _PAUSES:
                if self._ending.wait(pause):
                    return
                refusals = refusals + 1 if is_refused(asked.data) else 0
                if refusals == _REFUSALS:
                    self._open.discard(asked.data)
                    self.refused.append(asked.worker)
                    with contextlib.suppress(OSError):  # the dispatcher is ending
                        os.eventfd_write(self._bell, 1)
                    return

    @contextlib.contextmanager
    def _free_after(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._free.release()

    def close(self) -> None:
        """Knock no more."""
        self._ending.set()
        os.close(self._bell)


def is_refused(address: str) -> bool | None:
    """Whether nobody listens at "host:port"; None if that cannot be known."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return None
    return False
