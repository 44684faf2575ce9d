"""Those who wait for futures other than by blocking on one: coroutines, and callers that wait for some of many."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rtml.client.driver import Waiter

if TYPE_CHECKING:
    import asyncio

    from rtml.client.client import Client
    from rtml.client.future import Future


class Bridge(Waiter):
    """Lets a future of ours wake a coroutine."""

    __slots__ = ("future", "loop", "thread")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()
        self.thread = threading.get_ident()

    def notify(self, future: Any) -> None:
        """Resume the coroutine; from the loop's own thread without a system call."""
        self.ready = True
        if threading.get_ident() == self.thread:
            self._resume()
        else:
            try:
                self.loop.call_soon_threadsafe(self._resume)
            except RuntimeError:
                return  # The loop was closed: nobody is left to be resumed.

    def _resume(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Group(Waiter):
    """Waits for `needed` of many futures of one or several clients, at a cost per call that stays in C.

    Registered with the clients, not with every future: a loop that waits for one of a thousand, a thousand times, would
    otherwise attach and detach a million times.
    """

    __slots__ = ("_lock", "finished", "stop_on_error", "wanted")

    def __init__(self, wanted: set[Future[Any]], needed: int, *, stop_on_error: bool = False) -> None:
        super().__init__(needed)
        #: Not resolved yet, as far as was offered.
        self.wanted = set(wanted)
        self.stop_on_error = stop_on_error
        #: The wanted futures that were resolved since, in that order.
        self.finished: list[Future[Any]] = []
        self._lock = threading.Lock()

    def offer(self, resolved: Sequence[Future[Any]]) -> None:
        """These have been resolved; what was offered before is ignored."""
        with self._lock:
            hits = [future for future in resolved if future in self.wanted]
            if not hits:
                return
            self.wanted.difference_update(hits)
            self.finished.extend(hits)
            failed = self.stop_on_error and any(future._failure is not None for future in hits)
            if not failed and len(self.finished) < self.needed:
                return
            self.ready = True
        self.wake()

    def expect(self, needed: int) -> None:
        """Become ready again, when `needed` have been resolved in all. By the thread that waits."""
        with self._lock:
            self.needed = needed
            self.ready = len(self.finished) >= needed


def sleep(waiter: Waiter, clients: Iterable[Client], timeout: float | None) -> bool:
    """Wait for futures of several clients; whether `waiter` is ready within `timeout` seconds.

    Their helpers deliver: a thread that led one client's link would not notice what comes by another's.
    """
    waiter.arm()
    for client in clients:
        client.driver.flush()
        client.driver.expect()
    waiter.sleep(timeout)
    return waiter.ready


class Enough(Waiter):
    """Ready when enough values are there, or when no more can come. Notified from any thread."""

    __slots__ = ("_bridge", "_lock", "_pending", "_wanted")

    def __init__(self, wanted: int, pending: int) -> None:
        super().__init__(wanted)
        self._lock = threading.Lock()
        self._wanted = wanted
        self._pending = pending
        self._bridge: Bridge | None = None
        self.ready = wanted <= 0 or pending == 0

    def notify(self, future: Any) -> None:
        """One more has ended."""
        with self._lock:
            self._pending -= 1
            self._wanted -= future._failure is None
            if self.ready or (self._wanted > 0 and self._pending > 0):
                return
            self.ready = True
            bridge = self._bridge
        self.wake()
        if bridge is not None:
            bridge.notify(None)

    def resume(self, bridge: Bridge) -> bool:
        """Have a coroutine woken; False if it need not wait."""
        with self._lock:
            self._bridge = bridge
            return not self.ready


def offer(client: Client, resolved: Sequence[Future[Any]]) -> None:
    """Tell those who wait for some of many that these futures of the client's have ended."""
    with client.lock:
        groups = list(client._groups)
    for group in groups:
        group.offer(resolved)
