"""The link of an async executor, and the driver through which coroutines submit and await."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from rtml.client.client import Client
from rtml.client.driver import Waiter
from rtml.client.future import Future
from rtml.link import Link, LinkClosed, connect
from rtml.messages import FRAME_MAX, Message, Refused, Rehello, decode, encode
from rtml.workers import setup
from rtml.workers.core import WorkerCore
from rtml.workers.logs import LogBuffer

#: Seconds between two looks for a dispatcher that is being started again.
_RETRY_S: Final = 0.02
#: Seconds that an attempt to connect over ZeroMQ may hold the loop up while it has lost its dispatcher.
_HANDSHAKE_S: Final = 0.05


class LoopDriver:
    """Moves the messages of the async executor, in the loop's thread (see `rtml.client.driver`).

    Args:
        core: the executor's half of the protocol; touched in the loop's thread only.
        address: where the dispatcher listens.
        loop: runs everything.
    """

    def __init__(self, core: WorkerCore, address: str, loop: asyncio.AbstractEventLoop) -> None:
        self.lock = threading.Lock()
        self.core = core
        self.address = address
        self.loop = loop
        self.logs: LogBuffer | None = None
        #: Called after messages were applied; set by the executor.
        self.applied: Callable[[], None] = lambda: None
        #: After messages were applied that ask for functions to be made ready or let go; set by the executor.
        self.look: Callable[[], None] = lambda: None
        #: Why the dispatcher does not want us.
        self.refused = ""
        self._client: Client
        self._link: Link | None = None
        self._thread = threading.get_ident()
        #: A turn of the loop that will transmit is scheduled.
        self._due = False
        #: `tidy_soon` has been called and its time has not come.
        self._tidies = False
        #: Held while sending: the watch thread sends too.
        self._sending = threading.Lock()

    # --- the client's side --------------------------------------------------------------------------------------------

    def start(self, client: Client) -> None:
        """Connect, waiting for the dispatcher."""
        self._client = client
        self._connect(setup.RECONNECT_S)

    def submitted(self) -> None:
        """Sent at once if nothing is on its way, else with everything else of this turn."""
        if self._client.core.idle and not self._due and threading.get_ident() == self._thread:
            self.transmit()
        else:
            self.transmit_soon()

    def flush(self) -> None:
        """Sent with everything else of this turn."""
        self.transmit_soon()

    def nudge(self) -> None:
        """Sent with everything else of this turn."""
        self.transmit_soon()

    def lead(self, future: Future[Any]) -> None:
        """The loop receives."""

    def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """For threads that coroutines started. The loop's own thread must await instead.

        Raises:
            RuntimeError: called in the loop's thread, which would wait for itself.
        """
        if waiter.ready:
            return True
        if threading.get_ident() == self._thread:
            if timeout is not None and timeout <= 0:
                return False
            raise RuntimeError(
                "an async task cannot block: await the future instead of calling result(), get() or wait()"
            )
        self.transmit_soon()
        waiter.arm()
        waiter.sleep(timeout)
        return waiter.ready

    def awaiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """What was submitted leaves with this turn anyhow; questions about handles that came as arguments may not."""
        if not self._due and self._client.core.urgent:
            self.transmit_soon()

    def expect(self) -> None:
        """The loop always receives."""

    def call(self, callbacks: list[Callable[[], object]]) -> None:
        """Run callbacks in the loop."""
        for callback in callbacks:
            self._soon(callback)

    def close(self) -> None:
        """User code shut its client down: nothing to do, the link is the executor's."""

    def end(self) -> None:
        """Close the link for good, after everything that was sent has left."""
        if self._link is not None:
            self.loop.remove_reader(self._link.fileno())
            self._link.close()

    # --- the loop's side ----------------------------------------------------------------------------------------------

    def transmit_soon(self) -> None:
        """Send in the next turn. From any thread."""
        if not self._due:
            self._due = True
            self._soon(self.transmit)

    def _soon(self, callback: Callable[[], object]) -> None:
        try:
            if threading.get_ident() == self._thread:
                self.loop.call_soon(callback)
            else:
                self.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return  # the loop is closed: this process is ending

    def transmit(self) -> None:
        """Sends everything that the core and the client have."""
        self._due = False
        if self._link is None:
            return  # all of it is said again on the next connection
        client = self._client
        self.core.relay(client.collect())
        if self.logs is not None and self.logs.dirty:
            self.core.relay(self.logs.take())
        messages = self.core.flush()
        if messages:
            self.send(messages)

    def send(self, messages: list[Message]) -> None:
        """Sends these, from any thread; if the link is broken the loop will notice."""
        link = self._link
        if link is None:
            return
        frame = encode(messages)
        try:
            with self._sending:
                if len(frame) <= FRAME_MAX:
                    link.send(frame)
                    return
                for message in messages:
                    link.send(encode([message]))
        except (LinkClosed, OSError):
            return

    def receive(self) -> None:
        """Applies what is there, and has the executor act on it."""
        if self.apply():
            self.applied()

    def apply(self) -> bool:
        """Applies what is there. False if the link is gone."""
        link = self._link
        if link is None:
            return False
        try:
            frames = link.recv_ready()
        except (LinkClosed, OSError):
            self._lose()
            return False
        now = time.monotonic()
        for frame in frames:
            for message in decode(frame):
                if not self.core.receive(message, now):
                    self._for_client(message)
        if self.core.wanted or self.core.forgotten:
            self.look()
        if self.core.freed:
            freed, self.core.freed = self.core.freed, []
            for number in freed:
                self._client.store.free(number)
            self.tidy_soon()
        return True

    def tidy_soon(self) -> None:
        """If nothing runs in a while, look after shared memory then."""
        if not self._tidies and self._client.store.untidy:
            self._tidies = True
            self.loop.call_later(setup.TIDY_AFTER, self._tidy)

    def _tidy(self) -> None:
        self._tidies = False
        if not self.core.running:
            self._client.store.sweep()

    def _for_client(self, message: Message) -> None:
        self._client.receive(message)
        if isinstance(message, Rehello):
            self.core.rehello(message)
            self.send([setup.hello(self.core), *self._client.collect(), *self.core.resume_link()])
        elif isinstance(message, Refused):
            self.refused = message.reason
            self.core.leave()

    def _lose(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self.loop.remove_reader(link.fileno())
            with contextlib.suppress(OSError):
                link.close()
        self._connect(self._patience)

    @property
    def _patience(self) -> float:
        """Seconds for one attempt to connect again: a handshake over ZeroMQ takes some, and there is no dispatcher."""
        return 0.0 if self.address.startswith("unix:") else _HANDSHAKE_S

    def _connect(self, timeout: float) -> None:
        """Connects, or tries again soon without holding the loop up."""
        try:
            link = connect(self.address, timeout)
        except LinkClosed:
            self.loop.call_later(_RETRY_S, self._connect, self._patience)
            return
        self._link = link
        self.loop.add_reader(link.fileno(), self.receive)
        self.send([setup.hello(self.core), *self._client.resume(), *self.core.resume_link()])
