"""The supervisor's side of a node's data endpoint: its sockets, its process, and what the node's processes know of it.

The sockets are bound here, before anything is started: so the address is known, and it stays the same when the process
dies and is started again. What was on its way goes on where it stopped.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from rtml.errors import ProtocolError
from rtml.exchange import LABEL_AMOUNT, Give, Given, Place, expect, node_label, send
from rtml.link import Link
from rtml.messages import HandOver, Leavings, Moved, decode, encode
from rtml.workers.processes import killed
from rtml.workers.settings import Settings

#: A process that ends this many times in a row within so many seconds of its start is not started again.
_FAILURES_MAX: Final = 5
_UP_S: Final = 2.0
#: Objects in one message.
_REFS_MAX: Final = 4096
_LOOPBACK: Final = ("127.", "::1", "localhost")


class DataEndpoint:
    """One node's; made before the first fork.

    Args:
        settings: the command line.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: it is open to the network, and there is no secret; or it makes no sense.
    """

    def __init__(self, settings: Settings) -> None:
        from rtml.transfer.endpoint import listen_inside, listen_outside

        self._shm_dir = settings.shm_dir
        self._keys = settings.data_keys
        host, _, port = settings.data.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdigit():
            raise ValueError(f"--data {settings.data!r}: HOST:PORT is expected, port 0 picks one")
        if not self._keys and not host.startswith(_LOOPBACK):
            raise ValueError(f"--data {settings.data}: other machines need keys (rtml keys make, --keys)")
        self._outside = listen_outside(host, int(port))
        #: The Unix socket for the node's own processes.
        self.path = f"{settings.session_dir}/data.sock"
        self._inside = listen_inside(self.path)
        shown = settings.advertise or host
        #: What others know it by.
        self.address = f"{f'[{shown}]' if ':' in shown else shown}:{self._outside.getsockname()[1]}"
        #: The process; -1 while there is none.
        self.pidfd = -1
        self.pid = 0
        self._started = 0.0
        self._failures = 0
        #: Sessions of the stores of all its lives.
        self._copies: list[int] = []
        self._uploads: list[int] = []

    def place(self, settings: Settings) -> Place:
        """What the processes of the node are to know."""
        return Place(self.address, self.path, settings.object_memory, settings.spill_dir, settings.spill_max)

    @property
    def label(self) -> dict[str, float]:
        """The resource by which this node is told from all others."""
        return {node_label(self.address): LABEL_AMOUNT}

    def start(self, fork: Callable[[Callable[[], int], str], int]) -> None:
        """Start the process."""
        earlier_copies, earlier_uploads = list(self._copies), list(self._uploads)
        copies, uploads = (int.from_bytes(os.urandom(4), "big") >> 1 or 1 for _ in range(2))
        self._copies.append(copies)
        self._uploads.append(uploads)

        def run() -> int:
            from rtml.link.keys import data_secret
            from rtml.transfer.endpoint import EndpointSettings, run_endpoint

            secret = data_secret(self._keys) if self._keys else b""
            settings = EndpointSettings(
                self._shm_dir, self.address, secret, copies, uploads, earlier_copies, earlier_uploads
            )
            return run_endpoint(settings, self._outside, self._inside)

        self._started = time.monotonic()
        self.pid = fork(run, "rtml-data")
        self.pidfd = os.pidfd_open(self.pid)

    def hand_over(self, link: Link, until: float, stop: int) -> str:
        """Before the end: other nodes take what is still needed of what lies here.

        Args:
            link: to the node's dispatcher.
            until: on the monotonic clock.
            stop: a descriptor that becomes readable when nobody wants to wait any longer.

        Returns:
            What went wrong; "" if nothing was left.

        Raises:
            LinkClosed: the dispatcher is gone.
        """
        while True:
            # The answer also says that the dispatcher has passed on what was moved before.
            found = _leavings(link, until)
            if found is None:
                return "the dispatcher does not say which objects are needed: they are lost with this node"
            given = self._give(found, until, stop)
            if not given.moved:
                break
            link.send(encode([Moved(given.moved)]))
        if not given.left:
            return given.reason
        return f"{given.left} objects are lost with this node, nobody has taken them: {given.reason}"

    def _give(self, found: Leavings, until: float, stop: int) -> Given:
        given = Given([])
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(self.path)
                for first in range(0, len(found.objects) or 1, _REFS_MAX):
                    left = max(0.0, until - time.monotonic())
                    send(sock, Give(found.objects[first : first + _REFS_MAX], found.to, left))
                    if sock.fileno() not in select.select([sock.fileno(), stop], [], [], left + 1.0)[0]:
                        given.reason = "there was no time left to hand over all objects"
                        break
                    answer = expect(sock, Given)
                    given = Given(given.moved + answer.moved, given.left + answer.left, answer.reason)
        except (OSError, ProtocolError) as error:
            given.reason = f"the data endpoint does not take part in handing over objects: {error}"
        return given

    def died(self) -> bool:
        """The process was seen to end. Returns whether it is to be started again."""
        os.close(self.pidfd)
        self.pidfd = -1
        _, status = os.waitpid(self.pid, 0)
        healthy = time.monotonic() - self._started > _UP_S or killed(status)
        self._failures = 0 if healthy else self._failures + 1
        return self._failures < _FAILURES_MAX

    def close_in_child(self) -> None:
        """In any other process of the node."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self._outside.close()
            self._inside.close()


def _leavings(link: Link, until: float) -> Leavings | None:
    """What the dispatcher knows to be needed; None if it does not say so in time."""
    link.send(encode([HandOver()]))
    while (left := until - time.monotonic()) > 0:
        for frame in link.recv(left):
            for message in decode(frame):
                if isinstance(message, Leavings):
                    return message
    return None
