"""The async executor: one process, one event loop, many coroutines (D7). Graph programs that mostly await live here.

Every attempt is an asyncio task with a context of its own, so that `rtml.current()` and captured output know it.
Messages are sent once per turn of the loop. `Revoke` cancels the asyncio task; if the loop is stuck inside that very
task's code, the signal that comes with the message raises `CancelledError` there.

`_Steps` wraps each coroutine and enters its task into the running page while a step of it runs: after a crash only that
one is suspected, all others on the loop are innocent. The same entry tells the watch thread whose step holds the loop
up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from types import FrameType, TracebackType
from typing import Any, Final

from rtml.client.client import Client
from rtml.client.context import enter_context_task
from rtml.client.driver import Waiter
from rtml.link import Link, LinkClosed, connect
from rtml.messages import ASYNC_EXECUTOR, FRAME_MAX, Attempt, LoopLag, Message, Refused, Rehello, decode, encode
from rtml.workers import setup
from rtml.workers.calls import Calls, Loaded
from rtml.workers.core import Key, WorkerCore
from rtml.workers.interrupt import in_our_code
from rtml.workers.logs import LogBuffer
from rtml.workers.page import COUNT, FIRST, LEFT, STATE
from rtml.workers.setup import Child, ExecutorSettings

#: A step longer than this, in seconds, is a lag: the loop gets no new work until it is over.
LAG_S: Final = 0.05
_WATCH_S: Final = LAG_S / 2
_RETRY_S: Final = 0.02


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
        #: Why the dispatcher does not want us.
        self.refused = ""
        self._client: Client
        self._link: Link | None = None
        self._thread = threading.get_ident()
        #: A turn of the loop that will transmit is scheduled.
        self._due = False
        #: Held while sending: the watch thread sends too.
        self._sending = threading.Lock()

    # --- the client's side --------------------------------------------------------------------------------------------

    def start(self, client: Client) -> None:
        """Connect, waiting for the dispatcher."""
        self._client = client
        self._connect(setup.RECONNECT_S)

    def submitted(self) -> None:
        """Sent with everything else of this turn."""
        self.transmit_soon()

    def flush(self) -> None:
        """Sent with everything else of this turn."""
        self.transmit_soon()

    def nudge(self) -> None:
        """Sent with everything else of this turn."""
        self.transmit_soon()

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
        """Sent with everything else of this turn."""
        self.transmit_soon()

    def expect(self) -> None:
        """The loop always receives."""

    def call(self, callbacks: list[Callable[[], object]]) -> None:
        """Run callbacks in the loop."""
        for callback in callbacks:
            self._soon(callback)

    def close(self) -> None:
        """User code shut its client down: nothing to do, the link is the executor's."""

    # --- the loop's side ----------------------------------------------------------------------------------------------

    def transmit_soon(self) -> None:
        """Send in the next turn. From any thread."""
        if not self._due:
            self._due = True
            self._soon(self.transmit)

    def _soon(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: this process is ending
            if threading.get_ident() == self._thread:
                self.loop.call_soon(callback)
            else:
                self.loop.call_soon_threadsafe(callback)

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
        frames = [frame] if len(frame) <= FRAME_MAX else [encode([message]) for message in messages]
        with contextlib.suppress(LinkClosed, OSError), self._sending:
            for frame in frames:
                link.send(frame)

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
            frames = link.recv(0)
        except (LinkClosed, OSError):
            self._lose()
            return False
        now = time.monotonic()
        for frame in frames:
            for message in decode(frame):
                if not self.core.receive(message, now):
                    self._for_client(message)
        freed, self.core.freed = self.core.freed, []
        for number in freed:
            self._client.store.free(number)
        return True

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
        self._connect(0.0)

    def _connect(self, timeout: float) -> None:
        """Connects, or tries again soon without holding the loop up."""
        try:
            link = connect(self.address, timeout)
        except LinkClosed:
            self.loop.call_later(_RETRY_S, self._connect, 0.0)
            return
        self._link = link
        self.loop.add_reader(link.fileno(), self.receive)
        self.send([setup.hello(self.core), *self._client.resume(), *self.core.resume_link()])


class _CarriedError(Exception):
    """Takes an exception through the loop that would otherwise end it (SystemExit, KeyboardInterrupt)."""


class _Steps(Coroutine[Any, Any, Any]):
    """A coroutine that shows in the running page whenever it runs."""

    __slots__ = ("_coroutine", "_id", "_page", "_watch")

    def __init__(self, coroutine: Any, task: int, page: memoryview, watch: _Watch) -> None:
        self._coroutine = coroutine
        self._id = task
        self._page = page
        self._watch = watch

    def send(self, value: Any) -> Any:
        page, watch = self._page, self._watch
        page[FIRST] = self._id
        page[COUNT] = 1
        watch.step += 1
        try:
            return self._coroutine.send(value)
        except (SystemExit, KeyboardInterrupt) as error:
            raise _CarriedError from error
        finally:
            page[COUNT] = 0
            if watch.lagging:
                watch.turned()

    def throw(self, *error: Any) -> Any:
        page = self._page
        page[FIRST] = self._id
        page[COUNT] = 1
        self._watch.step += 1
        try:
            return self._coroutine.throw(*error)
        except (SystemExit, KeyboardInterrupt) as carried:
            raise _CarriedError from carried
        finally:
            page[COUNT] = 0

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("made for the event loop alone")


class _Watch:
    """Notices from a thread of its own that a step of a coroutine holds the loop up. Sleeps while nothing runs."""

    def __init__(self, page: memoryview, report: Callable[[LoopLag], None]) -> None:
        self._page = page
        self._report = report
        #: Steps begun so far.
        self.step = 0
        #: The task whose step was reported, 0 if the loop turns.
        self.lagging = 0
        self._active = threading.Event()
        self._started = False

    def busy(self) -> None:
        """There are coroutines."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="rtml-watch", daemon=True).start()
        self._active.set()

    def idle(self) -> None:
        """There are none."""
        self._active.clear()

    def turned(self) -> None:
        """The step that was reported is over."""
        task, self.lagging = self.lagging, 0
        self._report(LoopLag(task=task, lag=0.0))

    def _run(self) -> None:
        seen, since = 0, 0.0
        while True:
            self._active.wait()
            time.sleep(_WATCH_S)
            now = time.monotonic()
            if not self._page[COUNT] or self.step != seen:
                seen, since = self.step, now
            elif not self.lagging and now - since >= LAG_S:
                self.lagging = task = self._page[FIRST]
                self._report(LoopLag(task=task, lag=now - since))
                if self.step != seen and self.lagging:
                    self.turned()  # it ended while it was being reported


class AsyncExecutor:
    """Runs the coroutines that the dispatcher assigns.

    Args:
        settings: from the supervisor.
        core: the protocol's state.
        driver: the link.
        calls: decodes, encodes, knows the functions.
    """

    def __init__(self, settings: ExecutorSettings, core: WorkerCore, driver: LoopDriver, calls: Calls) -> None:
        self.core = core
        self.driver = driver
        self.calls = calls
        self.child = Child()
        self._page = settings.page
        self._watch = _Watch(settings.page, lambda lag: driver.send([lag]))
        #: Running asyncio tasks with the attempts that each is (several for a batch), by the first one's key.
        self._running: dict[Key, tuple[asyncio.Task[Any], list[Attempt]]] = {}
        self._told: set[Key] = set()
        self._look = False
        self._done = asyncio.Event()

    async def run(self) -> None:
        """Serve until told to leave."""
        self.applied()
        await self._done.wait()
        self.driver.transmit()

    def leave(self) -> None:
        """Finish what runs, then end."""
        self.core.leave()
        self.applied()
        self.driver.transmit_soon()

    def applied(self) -> None:
        """Messages were applied: start what is new, cancel what is revoked."""
        core = self.core
        now = time.monotonic()
        while group := core.take(now):
            self._begin(group)
        self._cancel_revoked()
        if core.dirty:
            self.driver.transmit_soon()
        if core.leaving and not core.running:
            self._done.set()

    def _cancel_revoked(self) -> None:
        revoked = self.core.revoked
        if revoked:
            for key, (task, attempts) in list(self._running.items()):
                if key not in self._told and all((one.id, one.attempt) in revoked for one in attempts):
                    self._told.add(key)
                    task.cancel()

    def _begin(self, group: list[Attempt]) -> None:
        first = group[0]
        calls = self.calls
        try:
            loaded = calls.function(first)
            if not first.batch and not loaded.batch:
                args, kwargs = calls.arguments(first)
                self._start([first], loaded, args, kwargs)
                return
        except BaseException as error:  # noqa: BLE001 - user code: imports, __setstate__; the task's error
            for member in group:
                self.core.finish(calls.failure(member, error))
            self.driver.transmit_soon()
            return
        _, joined, failed = calls.batch(group)
        for result in failed:
            self.core.finish(result)
        for members, (args, kwargs) in joined:
            self._start(members, loaded, args, kwargs, batch=True)

    def _start(
        self,
        group: list[Attempt],
        loaded: Loaded,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        batch: bool = False,
    ) -> None:
        first = group[0]
        context = contextvars.copy_context()
        context.run(enter_context_task, self.calls.info(first, loaded))
        start = time.perf_counter()
        try:
            awaitable = context.run(loaded.call, *args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self._finish(group, loaded, None, error, start, batch=batch)
            return
        if not asyncio.iscoroutine(awaitable):
            self._finish(group, loaded, awaitable, None, start, batch=batch)
            return
        steps = _Steps(awaitable, first.id, self._page, self._watch)
        task = self.driver.loop.create_task(steps, name=loaded.name, context=context)
        key = (first.id, first.attempt)
        self._running[key] = (task, group)
        self._watch.busy()

        def done(task: asyncio.Task[Any]) -> None:
            del self._running[key]
            self._told.discard(key)
            if not self._running:
                self._watch.idle()
            value, error = _outcome(task)
            self._finish(group, loaded, value, error, start, batch=batch)

        task.add_done_callback(done)

    def _finish(
        self,
        group: list[Attempt],
        loaded: Loaded,
        value: Any,
        error: BaseException | None,
        start: float,
        *,
        batch: bool,
    ) -> None:
        calls, core = self.calls, self.core
        run = time.perf_counter() - start
        if error is None:
            if batch:
                results = calls.batch_results(group, value, run, loaded)
            else:
                results = [calls.success(group[0], value, run, loaded)]
        elif isinstance(error, asyncio.CancelledError):
            results = [calls.cancelled(member, run, loaded) for member in group]
        else:
            results = [calls.failure(member, error, run, loaded) for member in group]
        client = self.driver._client
        if client.core.urgent:
            core.relay(client.collect())  # what the task submitted comes before its end
        logs = self.driver.logs
        if logs is not None:
            for member in group:
                logs.end_lines(member.id)
            if logs.dirty:
                core.relay(logs.take())
        for result in results:
            core.finish(result)
        self.driver.transmit_soon()
        if core.leaving and not core.running:
            self._done.set()

    # --- signals ------------------------------------------------------------------------------------------------------

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR1: if a step of user code holds the loop up, look at the messages in its place."""
        if self.child.forked or not self._page[COUNT] or in_our_code(frame, _Steps.send.__code__):
            return
        stuck = self._page[FIRST]
        before = set(self._told)
        self.driver.apply()
        self._cancel_revoked()
        self.driver.loop.call_soon(self.applied)
        if any(key[0] == stuck for key in self._told - before):
            raise asyncio.CancelledError

    def on_leave(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: finish what runs, then end."""
        if self.child.forked:
            os._exit(128 + number)
        self.driver.loop.call_soon_threadsafe(self.leave)


def _outcome(task: asyncio.Task[Any]) -> tuple[Any, BaseException | None]:
    """What a finished asyncio task returned or raised."""
    if task.cancelled():
        return None, asyncio.CancelledError()
    error = task.exception()
    if error is None:
        return task.result(), None
    if isinstance(error, _CarriedError):
        return None, error.__cause__
    return None, _without_frame(error)


def _without_frame(error: BaseException) -> BaseException:
    trace: TracebackType | None = error.__traceback__
    return error.with_traceback(None if trace is None else trace.tb_next)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run_async_executor(settings: ExecutorSettings) -> int:
    """Body of the async executor's process. Returns its exit code."""
    setup.settle_process()
    loop = _new_loop()
    asyncio.set_event_loop(loop)
    core = WorkerCore(settings.worker, setup.new_session(), ASYNC_EXECUTOR, os.getpid())
    driver = LoopDriver(core, settings.address, loop)

    def logs_soon() -> None:
        driver._soon(lambda: loop.call_later(setup.LOGS_DELAY, driver.transmit_soon))

    if settings.logs:
        driver.logs, _, _ = setup.capture_output(logs_soon)
    else:
        setup.discard_output()
    client = setup.make_client(core, driver, settings.shm_dir)
    executor = AsyncExecutor(settings, core, driver, Calls(core, client))
    driver.applied = executor.applied
    executor.child.watch()
    signal.signal(signal.SIGUSR1, executor.on_interrupt)
    signal.signal(signal.SIGTERM, executor.on_leave)
    loop.run_until_complete(executor.run())
    if driver.refused:
        os.write(2, f"rtml executor {settings.worker}: refused: {driver.refused}\n".encode())
        return 1
    settings.page[STATE] = LEFT
    client.store.close(unlink=not client.store.objects)
    return 0
