"""The link of a sync executor, and the driver through which the code it runs submits and waits.

Who does what:

* The main thread owns the `WorkerCore`. It receives while it is idle or blocked in a `get`, and sends its messages and
  the client's together (`transmit`).
* While the main thread is inside user code nobody receives, because nothing needs to be received: results lie in
  the socket until somebody asks, and an urgent order comes with a signal (`Executor.on_interrupt`).
* A helper thread, started by the first need, sends what was left in a buffer (submissions, printed text, dropped
  handles). While the main thread is inside user code *and* another thread of that code waits for a result (or has a
  callback or an event loop that does), the helper also receives. What is for the worker core it leaves in `inbox` for
  the main thread.

Client messages sent by others than the main thread may overtake results that it has not sent. That is harmless for all
but one kind: dropping a handle that an unsent result contains. So such results are sent at once
(`calls.holds_futures`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from rtml.client.driver import Waiter
from rtml.link import Link, LinkClosed, connect
from rtml.messages import (
    FRAME_MAX,
    Assign,
    Attempt,
    Blocked,
    Leave,
    Message,
    Recall,
    Refused,
    Rehello,
    Resumed,
    Returned,
    Revoke,
    decode,
    encode,
)
from rtml.workers import setup
from rtml.workers.core import WorkerCore
from rtml.workers.logs import LogBuffer

if TYPE_CHECKING:
    import asyncio

    from rtml.client.client import Client
    from rtml.client.future import Future

#: Tasks in the client's buffer that are worth a frame (D3).
FLUSH_TASKS: Final = 64
#: Seconds after which the helper sends what is left in it.
FLUSH_DELAY: Final = 0.0002
#: Seconds until a signal that came at a bad moment is repeated.
_REPEAT_S: Final = 0.001
#: What a main thread inside user code must not leave for later.
_URGENT: Final = (Recall, Revoke, Leave, Rehello)


class RefusedError(Exception):
    """The dispatcher does not want this executor."""


class ExecutorDriver:
    """Moves the messages of one sync executor.

    Args:
        core: the executor's half of the protocol; touched by the main thread only.
        address: where the dispatcher listens.
    """

    def __init__(self, core: WorkerCore, address: str) -> None:
        self.lock = threading.Lock()
        self.core = core
        self.address = address
        self.logs: LogBuffer | None = None
        #: What a `get` in the main thread does; set by the executor.
        self.blocker: Callable[[Waiter, float | None], bool] | None = None
        #: After messages were applied that ask for functions to be made ready or let go; set by the executor.
        self.look: Callable[[], None] = lambda: None
        #: Worker messages that the helper received.
        self.inbox: deque[Message] = deque()
        #: The main thread receives, or is about to; it is not inside user code.
        self.main_drives = True
        #: User code has used the client since this was last reset.
        self.touched = False
        #: Whether the dispatcher is told when a task waits beside the main thread: an actor's has nothing to lend out.
        self.lends = True
        #: The running attempt while the main thread is inside user code.
        self.current: Attempt | None = None
        self._client: Client
        self._link: Link
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._main = threading.get_ident()
        self._helper: threading.Thread | None = None
        self._bell = -1
        #: When (monotonic) the helper is to flush, send printed text, signal the main thread; 0: not at all.
        self._flush_at = self._logs_at = self._signal_at = 0.0
        #: Waiting threads beside the main one, and other reasons to receive while it is inside user code.
        self._waiting = 0
        self._expecting = False
        #: The running task awaits in an event loop of its own: which, if it is the main thread's.
        self._awaiting = False
        self._loop: asyncio.AbstractEventLoop | None = None
        #: The attempt that was reported blocked because a thread beside the main one waits.
        self.blocked_beside: Attempt | None = None
        self._callbacks: deque[Callable[[], object]] = deque()
        #: The helper found the link broken.
        self._lost = False
        #: Finalisers of user code's futures have left something for `Client.collect`.
        self._nudged = False

    # --- the client's side --------------------------------------------------------------------------------------------

    def start(self, client: Client) -> None:
        """Connect and introduce this executor."""
        self._client = client
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.connect()

    def submitted(self) -> None:
        """At once if nothing is on its way; else when enough is buffered; the helper sends the rest."""
        self.touched = True
        core = self._client.core
        if core.buffered >= FLUSH_TASKS or core.idle:
            self.flush()
        elif not self._flush_at:
            self._flush_at = time.monotonic() + FLUSH_DELAY
            self._ring()

    def flush(self) -> None:
        """Send what the client has."""
        self.touched = True
        try:
            with self._sending:
                messages = self._client.collect()
                if messages:
                    self._send(messages)
        except (LinkClosed, OSError):
            return  # the main thread notices and says all of it again

    def nudge(self) -> None:
        """The main thread sends it along with its next message; if it is idle or busy for long, the helper does."""
        self._nudged = True
        if not self._flush_at and self._helper is not None:
            self._flush_at = time.monotonic() + FLUSH_DELAY
            self._ring()

    def lead(self, future: Future[Any]) -> None:
        """Not here: a task that waits is blocked, which the dispatcher is told (`wait`)."""

    def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """Block the calling thread; the main thread may run other tasks meanwhile."""
        self.touched = True
        if threading.get_ident() == self._main:
            assert self.blocker is not None, "set before the first task runs"
            return self.blocker(waiter, timeout)
        self.flush()
        with self._beside():
            waiter.arm()
            waiter.sleep(timeout)
        return waiter.ready

    def awaiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """A task runs an event loop of its own and awaits in it: it counts as blocked until it ends."""
        self.flush()
        if threading.get_ident() == self._main:
            self._loop = loop
        if not self._awaiting:
            self._awaiting = True
            self._report_beside()
            self.expect()

    def expect(self) -> None:
        """Receive also while no thread waits, until the running task ends."""
        self._expecting = self.touched = True
        self._ring()

    def call(self, callbacks: list[Callable[[], object]]) -> None:
        """Run callbacks in the helper thread."""
        self._callbacks.extend(callbacks)
        self._ring()

    def close(self) -> None:
        """User code shut its client down: nothing to do, the link is the executor's."""

    def end(self) -> None:
        """Close the link for good, after everything that was sent has left."""
        self._link.close()

    # --- the main thread ----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connects, and says who we are and what we hold. Tries for ever: if it never works, the supervisor ends us."""
        while True:
            with contextlib.suppress(LinkClosed, OSError):
                link = connect(self.address, setup.RECONNECT_S)
                self._link = link
                self._lost = False
                self._send([setup.hello(self.core), *self._client.resume(), *self.core.resume_link()])
                return

    def reconnect(self) -> None:
        """The link broke."""
        with self._sending:
            with contextlib.suppress(OSError):
                self._link.close()
            self.connect()

    def transmit(self) -> None:
        """Sends everything: the core's messages in their order, what the client has, what was printed."""
        core, client, logs = self.core, self._client, self.logs
        with self._sending:
            # What the client has and what was printed comes behind what the core has to say.
            if self._nudged or client.core.pending_output:
                self._nudged = False
                core.relay(client.collect())
            if logs is not None and logs.dirty:
                self._logs_at = 0.0
                core.relay(logs.take())
            messages = core.flush()
            if not messages:
                return
            try:
                self._send(messages)
                return
            except (LinkClosed, OSError):
                pass
        self.reconnect()

    @property
    def urgent(self) -> bool:
        """Whether the client has something that must not come after the end of the running task."""
        return self._client.core.urgent

    def receive(self, timeout: float | None) -> None:
        """Waits for messages and applies them; returns after the first frames, a wake-up, or the timeout."""
        if self.inbox:
            self._apply_inbox()
            return
        try:
            with self._receiving:
                frames = self._link.recv(timeout)
                self._apply(frames)
        except (LinkClosed, OSError):
            self.reconnect()

    def try_receive(self) -> bool:
        """From a signal handler: applies what is there. False if another thread is receiving: it will tell."""
        self._apply_inbox()
        if not self._receiving.acquire(blocking=False):
            return False
        try:
            self._apply(self._link.recv(0))
        except (LinkClosed, OSError):
            self.reconnect()
        finally:
            self._receiving.release()
        if self._loop is not None:
            # The handler may have interrupted this loop while it slept, which goes on sleeping after it (PEP 475),
            # whatever has become ready.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_nothing)
        return True

    def _apply(self, frames: list[bytes]) -> None:
        core = self.core
        for frame in frames:
            now = time.monotonic()
            for message in decode(frame):
                if not core.receive(message, now):
                    self._for_client(message)
        if core.freed:
            self._free()
        if core.wanted or core.forgotten:
            self.look()

    def _apply_inbox(self) -> None:
        inbox = self.inbox
        while inbox:
            message = inbox.popleft()
            if isinstance(message, Rehello):
                self._rehello(message)
            else:
                self.core.receive(message, time.monotonic())
        if self.core.freed:
            self._free()
        if self.core.wanted or self.core.forgotten:
            self.look()

    def _for_client(self, message: Message) -> None:
        if isinstance(message, Rehello):
            self._client.receive(message)
            self._rehello(message)
        elif isinstance(message, Refused):
            raise RefusedError(message.reason)
        else:
            self._client.receive(message)

    def _rehello(self, message: Rehello) -> None:
        self.core.rehello(message)
        with self._sending:
            self._send([setup.hello(self.core), *self._client.collect(), *self.core.resume_link()])

    def _free(self) -> None:
        freed, self.core.freed = self.core.freed, []
        for number in freed:
            self._client.store.free(number)

    def _send(self, messages: list[Message]) -> None:
        """One frame if they fit one. Under `_sending`."""
        frame = encode(messages)
        if len(frame) <= FRAME_MAX:
            self._link.send(frame)
        else:
            for message in messages:
                self._link.send(encode([message]))

    def enter(self, attempt: Attempt) -> None:
        """The main thread goes into user code."""
        self.current = attempt
        self.main_drives = False
        if self._waiting:
            self._ring()

    def leave(self) -> None:
        """It is back."""
        self.main_drives = True

    def ended(self, attempt: Attempt) -> None:
        """The attempt's function returned: what it was waited for beside the main thread is over for the dispatcher."""
        self._expecting = self._awaiting = False
        self._loop = None
        if self.blocked_beside is attempt:
            with self._sending:
                self.blocked_beside = None
                self.core.relay([Resumed(task=attempt.id, attempt=attempt.attempt)])

    def wake(self) -> None:
        """End a `receive`, from anywhere."""
        self._link.wake()

    # --- waiting beside the main thread -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """The calling thread, which is not the main one, waits."""
        with self.lock:
            self._waiting += 1
        self._report_beside()
        self._ring()
        try:
            yield
        finally:
            with self.lock:
                self._waiting -= 1
            self._report_beside()

    def _report_beside(self) -> None:
        """Says that the task in the main thread is blocked, or not any more, if that has changed.

        It waits in another way than by `get` in the main thread, so nothing can run on top of it.
        """
        if not self.lends:
            return
        with contextlib.suppress(LinkClosed, OSError), self._sending:
            attempt, reported = self.current, self.blocked_beside
            blocked = (self._waiting > 0 or self._awaiting) and attempt is not None and not self.main_drives
            if blocked and reported is None:
                assert attempt is not None
                self.blocked_beside = attempt
                self._send([Blocked(task=attempt.id, attempt=attempt.attempt, inline=False)])
            elif reported is not None and not blocked:
                self.blocked_beside = None
                self._send([Resumed(task=reported.id, attempt=reported.attempt)])
        if self.blocked_beside is not None and (self.core.queue or self.inbox):
            signal.pthread_kill(self._main, signal.SIGUSR1)  # what is unstarted is to be returned

    def send_beside(self, messages: list[Message]) -> None:
        """Sends from another thread than the main one. If the link is broken, a new one is told how things are then."""
        with contextlib.suppress(LinkClosed, OSError), self._sending:
            self._send(messages)

    # --- the helper thread --------------------------------------------------------------------------------------------

    def logs_soon(self) -> None:
        """Text was printed."""
        self._logs_at = time.monotonic() + setup.LOGS_DELAY
        self._ring()

    def signal_soon(self) -> None:
        """Repeat the signal to the main thread in a moment: it came while the client's own code was running."""
        self._signal_at = time.monotonic() + _REPEAT_S
        self._ring()

    def _ring(self) -> None:
        if self._helper is None and not self._start_helper():
            return
        os.eventfd_write(self._bell, 1)

    def _start_helper(self) -> bool:
        helper = threading.Thread(target=self._run_helper, name="rtml-executor", daemon=True)
        self._helper = helper
        try:
            helper.start()
        except RuntimeError:
            self._helper = None  # no more threads: the main thread sends when its task ends
            return False
        return True

    def _run_helper(self) -> None:
        while True:
            poller = select.poll()
            poller.register(self._bell, select.POLLIN)
            watched = -1
            if (self._waiting or self._expecting) and not self.main_drives and not self._lost:
                with contextlib.suppress(LinkClosed):  # another thread connects again
                    watched = self._link.fileno()
                    poller.register(watched, select.POLLIN)
            due = [at for at in (self._flush_at, self._logs_at, self._signal_at) if at]
            timeout = max(0.0, min(due) - time.monotonic()) * 1000 if due else None
            ready = [fd for fd, _ in poller.poll(timeout)]
            if self._bell in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
            self._run_due(time.monotonic())
            while self._callbacks:
                self._callbacks.popleft()()
            if watched in ready and not self.main_drives:
                self._receive_beside()

    def _run_due(self, now: float) -> None:
        if self._signal_at and now >= self._signal_at:
            self._signal_at = 0.0
            signal.pthread_kill(self._main, signal.SIGUSR1)
        if self._flush_at and now >= self._flush_at:
            self._flush_at = 0.0
            self.flush()
        if self._logs_at and now >= self._logs_at:
            self._logs_at = 0.0
            logs = self.logs
            if logs is not None and logs.dirty:
                self.send_beside([*logs.take()])

    def _receive_beside(self) -> None:
        """Receives for the main thread, which is inside user code."""
        if not self._receiving.acquire(blocking=False):
            return
        urgent = False
        try:
            for frame in self._link.recv(0):
                for message in decode(frame):
                    if isinstance(message, Assign) and self.blocked_beside is not None:
                        # Assigned before the dispatcher knew; nothing can be started here now.
                        keys = [(attempt.id, attempt.attempt) for attempt in message.attempts]
                        self.send_beside([Returned(keys)])
                    elif not self._client.receive(message):
                        self.inbox.append(message)
                        urgent = urgent or isinstance(message, _URGENT) or self.blocked_beside is not None
        except (LinkClosed, OSError):
            # The signal makes the main thread connect again.
            self._lost = urgent = True
        finally:
            self._receiving.release()
        if urgent:
            signal.pthread_kill(self._main, signal.SIGUSR1)


def _nothing() -> None:
    """Wakes an event loop."""
