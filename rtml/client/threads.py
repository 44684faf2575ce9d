"""The driver of ordinary programs: whoever waits for a result drives the link itself.

Leader and followers. `_lead` is held by the one thread that receives. A thread that blocks in `result` or `wait` takes
it if it can, and receives until its own future is resolved; so a round trip has no hand-over between threads
(measured: 23 us saved, and up to 5 ms while another thread computes, because of the interpreter's switch interval).
Other waiting threads sleep; when the leader leaves it wakes one of them to lead. Sending is separate (`_sending`): any
thread may send while another receives.

One helper thread does what nobody else does: it sends what was left in the buffer when a burst of submissions ended,
receives while no thread waits, runs user callbacks, and reconnects. It must cost nothing in a loop of submit-and-wait,
where every wake-up of it would fight for the interpreter's lock. So it watches the link only if nobody led since its
last look; else it looks every `_TICK` seconds, and during one long wait it sleeps until the leader leaves
(`_tell_helper`).

In a program that awaits, the event loop receives (`awaiting`), by a reader on the link's descriptor.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from rtml.client.connecting import Connector, Peer, farewell, send
from rtml.client.driver import Waiter
from rtml.errors import ConnectionLost
from rtml.link import Link, LinkClosed
from rtml.messages import Refused, Rehello, decode

if TYPE_CHECKING:
    import asyncio

    from rtml.client.client import Client
    from rtml.client.future import Future

#: Buffered tasks that are worth a frame (D3: throughput doubles from 8 to 64, and hardly grows beyond).
FLUSH_TASKS: Final = 64

#: Seconds after which the helper sends what is left in the buffer.
FLUSH_DELAY: Final = 0.0002

#: Seconds between the helper's looks while other threads lead.
_TICK: Final = 0.005
_LOOP_TICK: Final = 0.1

_logger = logging.getLogger("rtml.client")


class ThreadDriver:
    """See the module's text.

    Args:
        connector: where to connect.
    """

    def __init__(self, connector: Connector) -> None:
        self.lock = threading.Lock()
        self._connector = connector
        self._peer = Peer()
        self._client: Client
        #: None while there is no connection. Replaced under `_sending` and `lock`, and closed only after that.
        self._link: Link | None = None
        #: Held while receiving and applying what was received.
        self._lead = threading.Lock()
        #: Held from collecting messages until they are sent, so that they leave in order.
        self._sending = threading.Lock()
        #: Sleeping threads that want to lead, newest last. Under `lock`.
        self._followers: list[Waiter] = []
        #: Times that somebody led; the helper compares it with what it saw last.
        self._turns = 0
        self._flushes = 0
        #: The helper was asked to send what is buffered.
        self._armed = False
        #: The helper sleeps until the leader leaves.
        self._tell_helper = False
        self._callbacks: deque[Callable[[], object]] = deque()
        self._closed = False
        self._failed: BaseException | None = None
        self._pid = os.getpid()
        self._bell_read = self._bell_write = -1
        self._helper: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: The loop whose turn ends with a flush. (A loop may be closed before: then it is just not the next one.)
        self._loop_due: asyncio.AbstractEventLoop | None = None

    # --- the client's side --------------------------------------------------------------------------------------------

    def start(self, client: Client) -> None:
        """Connect; raises `ConnectionLost` or `ProtocolError` if that fails."""
        self._client = client
        self._bell_read, self._bell_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._link = self._connector.first(client, self._peer)
        except BaseException:
            os.close(self._bell_read)
            os.close(self._bell_write)
            raise
        self._helper = threading.Thread(target=self._run_helper, name="rtml-client", daemon=True)
        self._helper.start()

    def submitted(self) -> None:
        """At once if nothing is on its way; else when enough is buffered; the helper sends the rest."""
        core = self._client.core
        if core.idle:
            self.flush()
        elif core.buffered >= FLUSH_TASKS:
            self.flush()
            # In a long burst nobody waits yet, but the results must not pile up in the dispatcher.
            self._turn()
        elif not self._armed:
            self._armed = True
            self._ring()

    def flush(self) -> None:
        """Send everything that the core has; blocks while the peer's queue is full."""
        with self._sending:
            link = self._link
            if link is None:
                return
            self._flushes += 1
            try:
                messages = self._client.collect()
                if messages:
                    send(link, messages)
            except LinkClosed:
                self._lose(link)
            except KeyboardInterrupt:
                # What was collected may not have been sent: a new link is told everything again.
                self._lose(link)
                raise

    def nudge(self) -> None:
        """Have the helper send soon. From finalisers: no lock."""
        if not self._armed and self._pid == os.getpid():
            self._armed = True
            self._ring()

    def expect(self) -> None:
        """Results must be noticed though no thread waits: the helper looks at once."""
        self._ring()

    def call(self, callbacks: list[Callable[[], object]]) -> None:
        """Run callbacks in the helper thread."""
        self._callbacks.extend(callbacks)
        self._ring()

    def lead(self, future: Future[Any]) -> None:
        """Receive until this future has ended, if nobody else does."""
        if self._client.core.urgent:
            self.flush()
        if self._link is None or not self._lead.acquire(False):
            return
        try:
            self._receive_until(future.done, None)
        finally:
            self._lead.release()
            if (self._followers or self._tell_helper) and not self._is_led():
                self._promote()

    def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """Lead, or follow the thread that leads, until `waiter` is ready."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._client.core.urgent:
            self.flush()
        if timeout is not None and timeout <= 0:
            self._turn()
        try:
            while not waiter.ready and (deadline is None or not _passed(deadline)):
                if self._link is not None and self._lead.acquire(blocking=False):
                    try:
                        self._receive_until(waiter.done, deadline)
                    finally:
                        self._lead.release()
                else:
                    self._follow(waiter, deadline)
        finally:
            # This thread has led, or was chosen to lead by one that left, just when it had its result or gave up.
            if (self._followers or self._tell_helper) and not self._is_led():
                self._promote()
        return waiter.ready

    def awaiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let `loop` receive, and send what its turn has submitted."""
        if self._loop is not loop and (self._loop is None or self._loop.is_closed() or not self._loop.is_running()):
            self._detach_loop()
            with self.lock:
                if self._link is not None:
                    loop.add_reader(self._link.fileno(), self._turn)
                    self._loop = loop
            self._ring()
        if self._loop_due is not loop:
            self._loop_due = loop
            loop.call_soon(self._flush_in_loop)

    def close(self) -> None:
        """Send what is left and end the helper."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
        if self._failed is None:
            self.flush()
        self._ring()
        if self._helper is not None and self._helper is not threading.current_thread():
            self._helper.join()
        self._detach_loop()
        with self._sending, self.lock:
            link, self._link = self._link, None
        if link is not None:
            farewell(link)
            link.close()
        with self.lock:
            os.close(self._bell_read)
            os.close(self._bell_write)
            self._bell_read = self._bell_write = -1
        self._wake_followers()

    # --- receiving ----------------------------------------------------------------------------------------------------

    def _receive_until(self, ended: Callable[[], bool], deadline: float | None) -> None:
        """Receive until it has ended, the deadline has passed, or the link is lost. Holds `_lead`."""
        core = self._client.core
        self._turns += 1
        timeout = None
        while not ended():
            link = self._link
            if link is None:
                return
            if deadline is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return
            try:
                frames = link.recv(timeout)
            except LinkClosed:
                self._lose(link)
                return
            try:
                self._deliver(frames)
            except KeyboardInterrupt:
                # Some results may not have been applied: on a new link the dispatcher sends them again.
                self._lose(link)
                raise
            if core.urgent:
                self.flush()

    def _turn(self) -> None:
        """Apply what is there, if nobody else is doing that."""
        link = self._link
        if link is None or not self._lead.acquire(blocking=False):
            return
        try:
            self._turns += 1
            self._deliver(link.recv(0))
        except LinkClosed:
            self._lose(link)
        finally:
            self._resign()
        if self._client.core.urgent:
            self.flush()

    def _deliver(self, frames: list[bytes]) -> None:
        for frame in frames:
            for message in decode(frame):
                if not self._client.receive(message) and isinstance(message, Rehello | Refused):
                    self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._armed:
            self._armed = True
            self._ring()

    def _resign(self) -> None:
        """Stop leading, and have another waiting thread lead, or the helper."""
        self._lead.release()
        self._promote()

    def _promote(self) -> None:
        follower = None
        if self._followers:
            with self.lock:
                follower = next((waiter for waiter in reversed(self._followers) if not waiter.ready), None)
        if follower is not None:
            follower.wake()
        elif self._tell_helper:
            self._tell_helper = False
            self._ring()

    def _follow(self, waiter: Waiter, deadline: float | None) -> None:
        """Sleep until `waiter` is ready, this thread shall lead, or the deadline has passed."""
        waiter.arm()
        with self.lock:
            self._followers.append(waiter)
        try:
            # The leader may have left before it could see us.
            if waiter.ready or self._failed is not None or (self._link is not None and not self._lead.locked()):
                return
            waiter.sleep(None if deadline is None else deadline - time.monotonic())
        finally:
            with self.lock:
                self._followers.remove(waiter)

    def _wake_followers(self) -> None:
        with self.lock:
            followers = list(self._followers)
        for follower in followers:
            follower.wake()

    # --- the event loop -----------------------------------------------------------------------------------------------

    def _flush_in_loop(self) -> None:
        self._loop_due = None
        if self._client.core.urgent:
            self.flush()

    def _detach_loop(self) -> None:
        with self.lock:
            loop, self._loop = self._loop, None
            if loop is None or self._link is None or loop.is_closed():
                return
            fd = self._link.fileno()
        try:
            loop.call_soon_threadsafe(loop.remove_reader, fd)
        except RuntimeError:
            return  # Closed in this moment.

    # --- the helper thread --------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        try:
            os.write(self._bell_write, b"!")
        except OSError:
            return  # Full: it will wake up anyway. Closed: nobody is there.

    def _run_helper(self) -> None:
        turns = flushes = -1
        timeout: float | None = None
        while not self._closed:
            self._poll(timeout, watch=timeout is None and not self._tell_helper)
            self._run_callbacks()
            if self._link is None and not self._reconnect():
                return
            if self._armed:
                # In the midst of a burst its own thread sends; only what it leaves behind is ours.
                if flushes == self._flushes:
                    self._armed = False
                    self.flush()
                else:
                    flushes, timeout = self._flushes, FLUSH_DELAY
                    continue
            timeout = self._next_timeout(turns)
            turns = self._turns

    def _next_timeout(self, turns: int) -> float | None:
        """Seconds until the next look; None: until something happens. `turns` as of the last look."""
        if self._loop is not None:
            if not self._loop.is_closed():
                return _LOOP_TICK
            self._loop = None
        if turns != self._turns:
            return _TICK
        if self._is_led():
            self._tell_helper = True
            # The leader may have left between the two lines above; then nobody would tell.
            if not self._is_led():
                self._tell_helper = False
                return _TICK
        return None

    def _is_led(self) -> bool:
        return self._lead.locked()

    def _poll(self, timeout: float | None, *, watch: bool) -> None:
        """Wait for the bell, and with `watch` for the link, whose messages are applied."""
        poller = select.poll()
        poller.register(self._bell_read, select.POLLIN)
        with self.lock:
            link = self._link if watch else None
            if link is not None:
                poller.register(link.fileno(), select.POLLIN)
        ready = [fd for fd, _ in poller.poll(None if timeout is None else timeout * 1000)]
        if self._bell_read in ready:
            try:
                os.read(self._bell_read, 4096)
            except BlockingIOError:
                pass
        if link is not None and len(ready) > (self._bell_read in ready):
            before = self._turns
            self._turn()
            if self._turns == before:
                self._turns += 1  # Somebody else leads: look less often.

    def _run_callbacks(self) -> None:
        while self._callbacks:
            self._callbacks.popleft()()

    # --- connecting ---------------------------------------------------------------------------------------------------

    def _lose(self, link: Link) -> None:
        """The link broke: the helper makes a new one. By whoever noticed, with or without `_sending`."""
        with self.lock:
            if self._link is not link:
                return
            loop, self._loop = self._loop, None
            self._link = None
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(_leave_loop, loop, link)
            except RuntimeError:
                link.close()
        else:
            link.close()
        self._ring()

    def _reconnect(self) -> bool:
        """Connect again and say everything again; False: it is over."""
        while not self._closed:
            try:
                link = self._connector.again(self._client, self._peer, self._pause)
            except ConnectionLost as error:
                if not self._closed:
                    self._failed = error
                    self._client.fail_all(error)
                    self._run_callbacks()
                    self._wake_followers()
                return False
            with self._sending:
                try:
                    for message in self._client.resume():
                        send(link, [message])
                except LinkClosed:
                    link.close()
                    continue
                self._link = link
            _logger.warning("connected to the dispatcher again")
            self._wake_followers()
            return True
        return False

    def _pause(self, seconds: float) -> bool:
        """Wait, but not for callbacks to be run, nor after `close`."""
        end = time.monotonic() + seconds
        while not self._closed and (left := end - time.monotonic()) > 0:
            self._poll(left, watch=False)
            self._run_callbacks()
        return not self._closed


def _passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _leave_loop(loop: asyncio.AbstractEventLoop, link: Link) -> None:
    """Forget a broken link's reader, then close it (in this order, because descriptors are reused)."""
    loop.remove_reader(link.fileno())
    link.close()
