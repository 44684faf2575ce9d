"""The driver of programs that live on one asyncio loop: the gateway, the async executor.

The loop's thread does everything: a reader on the link's descriptor receives. What is submitted leaves at once if
nothing is on its way, else as one frame with all that this turn of the loop submits. No helper thread, no hand-over.
Other threads may submit and wait; they ask the loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from rtml.client.connecting import Connector, Peer, farewell, send
from rtml.client.driver import Waiter
from rtml.errors import ConnectionLost
from rtml.link import Link, LinkClosed
from rtml.messages import decode

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.future import Future

#: Buffered tasks that are sent in the middle of a turn.
FLUSH_TASKS: Final = 64

#: Seconds after which unhurried messages (acknowledgements, dropped handles) are sent.
_LATER: Final = 0.01

_logger = logging.getLogger("rtml.client")


class AsyncDriver:
    """See the module's text. `start` has to be called in the running loop, and blocks it until connected.

    Args:
        connector: where to connect.
        peer: who else speaks on the link (executors); None for a plain submitter.
    """

    def __init__(self, connector: Connector, peer: Peer | None = None) -> None:
        self.lock = threading.Lock()
        self._connector = connector
        self._peer = peer or Peer()
        self._client: Client
        self._loop: asyncio.AbstractEventLoop
        self._thread = 0
        #: None while there is no connection. Touched by the loop's thread only.
        self._link: Link | None = None
        self._flush_due = False
        self._later_due = False
        self._closed = False
        #: Called in the loop when the attempts to reconnect have ended without success: nothing follows.
        self.on_lost: Callable[[], None] | None = None

    def start(self, client: Client) -> None:
        """Connect; raises `ConnectionLost` or `ProtocolError` if that fails."""
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._adopt(self._connector.first(client, self._peer))

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._link is not None

    def submitted(self) -> None:
        """Send at the end of the loop's turn; at once if that is much, or if there is nothing to wait with."""
        if threading.get_ident() != self._thread:
            self._from_thread()
        elif self._client.core.idle or self._client.core.buffered >= FLUSH_TASKS:
            self._flush()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def flush(self) -> None:
        """Send at the end of the loop's turn."""
        if threading.get_ident() != self._thread:
            self._from_thread()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def nudge(self) -> None:
        """Send soon. From finalisers: no lock."""
        if not self._later_due and not self._closed:
            self._later_due = True
            try:
                self._loop.call_soon_threadsafe(self._loop.call_later, _LATER, self._flush_later)
            except RuntimeError:
                return  # The loop is closed; so is the link.

    def expect(self) -> None:
        """Nothing to do: the loop always receives."""

    def awaiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing to do: what was submitted leaves at the end of the turn."""

    def call(self, callbacks: list[Callable[[], object]]) -> None:
        """Run callbacks in the loop's thread."""
        for callback in callbacks:
            if threading.get_ident() == self._thread:
                self._loop.call_soon(callback)
            else:
                self._loop.call_soon_threadsafe(callback)

    def lead(self, future: Future[Any]) -> None:
        """The loop receives."""

    def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """Block a thread beside the loop's.

        Raises:
            RuntimeError: called in the loop's own thread, which would stand still for ever.
        """
        if waiter.ready:
            return True
        if threading.get_ident() == self._thread:
            raise RuntimeError(
                "this would block the event loop: await the future (or rtml.gather of several) instead of result(), "
                "get() or wait()"
            )
        self._from_thread()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not waiter.ready:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            waiter.arm()
            waiter.sleep(left)
        return waiter.ready

    def close(self) -> None:
        """Send what is left and close the link; in the loop's thread, or after its end."""
        if self._closed:
            return
        self._flush()
        self._closed = True
        link, self._link = self._link, None
        if link is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(link.fileno())
            farewell(link)
            link.close()

    # --- in the loop's thread -----------------------------------------------------------------------------------------

    def _from_thread(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._flush)
        except RuntimeError as error:
            raise ConnectionLost("the event loop that this client lives on is closed") from error

    def _flush(self) -> None:
        self._flush_due = False
        link = self._link
        if link is None:
            return
        messages = self._peer.collect() + self._client.collect()
        if not messages:
            return
        try:
            send(link, messages)
        except LinkClosed:
            self._lose(link)

    def _flush_later(self) -> None:
        self._later_due = False
        self._flush()

    def _readable(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            frames = link.recv_ready()
        except LinkClosed:
            self._lose(link)
            return
        client, peer = self._client, self._peer
        for frame in frames:
            for message in decode(frame):
                if not client.receive(message):
                    peer.receive(message)
        if client.core.urgent:
            self._flush()
        elif not self._later_due and client.core.pending_output:
            self._later_due = True
            self._loop.call_later(_LATER, self._flush_later)

    def _adopt(self, link: Link) -> None:
        self._link = link
        self._loop.add_reader(link.fileno(), self._readable)

    def _lose(self, link: Link) -> None:
        if self._link is not link:
            return
        self._link = None
        self._loop.remove_reader(link.fileno())
        link.close()
        # Connecting blocks (and for ZeroMQ takes a moment), so it has a thread for as long as that takes.
        threading.Thread(target=self._reconnect, name="rtml-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        stop = threading.Event()
        try:
            link = self._connector.again(
                self._client, self._peer, lambda seconds: not stop.wait(seconds) and not self._closed
            )
        except ConnectionLost as error:
            lost = error
            self._in_loop(lambda: self._give_up(lost))
        else:
            self._in_loop(lambda: self._resume(link))

    def _give_up(self, error: ConnectionLost) -> None:
        self._client.fail_all(error)
        if self.on_lost is not None and not self._closed:
            self.on_lost()

    def _resume(self, link: Link) -> None:
        if self._closed:
            link.close()
            return
        self._adopt(link)
        try:
            for message in self._client.resume():
                send(link, [message])
        except LinkClosed:
            self._lose(link)
            return
        _logger.warning("connected to the dispatcher again")

    def _in_loop(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return  # The program ended meanwhile.
