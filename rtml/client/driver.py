"""What a client needs from whatever moves its messages.

Three drivers exist: `ThreadDriver` (ordinary programs), `AsyncDriver` (programs and executors that live on an asyncio
loop) and the sync executor's own (`rtml.workers`), in which a blocked `get` drives the executor's link and may run
other tasks.

A driver owns a link and a lock. Under the lock lie the client's core and the state of its futures; it is held for
microseconds, never while sending, receiving, decoding values or running callbacks, and it is not reentrant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio

    from rtml.client.client import Client
    from rtml.client.future import Future


class Resource(Protocol):
    """What a client closes after itself (the embedded process tree)."""

    def close(self) -> None:
        """End it, idempotently."""


class Waiter:
    """One blocked caller: becomes ready once, from any thread.

    `notify` is called by whoever resolves a future this waiter was attached to, without the driver's lock.
    """

    __slots__ = ("_block", "needed", "ready")

    def __init__(self, needed: int = 1) -> None:
        #: Notifications still missing.
        self.needed = needed
        self.ready = needed <= 0
        #: A locked lock on which a thread sleeps; made by `sleep_on`.
        self._block: threading.Lock | None = None

    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.ready

    def notify(self, future: Any) -> None:
        """One of the awaited futures is resolved."""
        self.needed -= 1
        if self.needed <= 0:
            self.ready = True
            if self._block is not None:
                self.wake()

    def arm(self) -> None:
        """Prepare `sleep`: from now on `wake` ends it, also before it began."""
        block = threading.Lock()
        block.acquire()
        self._block = block
        if self.ready:
            self.wake()

    def sleep(self, timeout: float | None) -> None:
        """Block the thread until `wake`, at most `timeout` seconds. `arm` comes first."""
        block = self._block
        assert block is not None, "arm() comes before sleep()"
        block.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
        self._block = None

    def wake(self) -> None:
        """End `sleep`, ready or not (a follower is told to lead)."""
        block = self._block
        if block is not None:
            try:
                block.release()
            except RuntimeError:
                return  # Woken twice: by its result and as the next leader.


class Driver(Protocol):
    """Moves the messages of one `Client`. All methods may be called from any thread unless said otherwise."""

    #: Guards `client.core` and the futures' states. Not reentrant.
    lock: threading.Lock

    def start(self, client: Client) -> None:
        """Called once by the client: from now on messages are to be given to `client.receive`."""

    def submitted(self) -> None:
        """The core has a new task: send now or soon, by the driver's own flush rule. Called without the lock."""

    def flush(self) -> None:
        """Send (or have sent, without delay) what the core has. Called without the lock."""

    def nudge(self) -> None:
        """There is something unhurried to send. Called from finalisers: must not take a lock, block, or raise."""

    def lead(self, future: Future[Any]) -> None:
        """Flush, then make progress until this future has ended, if the calling thread may do that.

        Then nobody has to be told of its end. Else returns at once, and the caller waits.
        """

    def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """Flush, then make progress until `waiter.ready` or `timeout` seconds have passed; returns `waiter.ready`."""

    def awaiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """Code in this running loop is about to suspend until a future resolves. Called in the loop's thread."""

    def expect(self) -> None:
        """Somebody relies on results being delivered without any thread waiting (a callback was added)."""

    def call(self, callbacks: list[Callable[[], object]]) -> None:
        """Run these user callbacks soon, in order, in a thread of the driver's choice. They do not raise."""

    def close(self) -> None:
        """Send what is left, stop, close the link. Idempotent."""
