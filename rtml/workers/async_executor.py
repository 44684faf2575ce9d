"""The async executor: one process, one event loop, many coroutines (D7). Graph programs that mostly await live here.

Every attempt is an asyncio task with a context of its own, so that `rtml.current()` and captured output know it. Its
first step is taken as soon as it arrives (`rtml.workers.eager`). Messages are sent once per turn of the loop. `Revoke`
cancels the asyncio task; if the loop is stuck inside that very task's code, the signal that comes with the message
raises `CancelledError` there.

`Steps` wraps each coroutine and enters its task into the running page while a step of it runs: after a crash only that
one is suspected, all others on the loop are innocent. The same entry tells the watch thread whose step holds the loop
up.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from rtml.client.client import Client
from rtml.client.context import enter_context_task
from rtml.messages import ASYNC_EXECUTOR, Attempt
from rtml.workers import setup
from rtml.workers.async_streaming import run_async_stream
from rtml.workers.calls import Calls, Loaded
from rtml.workers.core import Key, WorkerCore
from rtml.workers.eager import make_task
from rtml.workers.interrupt import in_our_code
from rtml.workers.loop_driver import LoopDriver
from rtml.workers.page import FIRST, LEFT, STATE
from rtml.workers.preparer import Preparer
from rtml.workers.setup import Child, ExecutorSettings
from rtml.workers.steps import CarriedError, Steps, Watch


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
        self._watch = Watch(settings.page, lambda lag: driver.send([lag]))
        #: Running asyncio tasks with the attempts that each is (several for a batch), by the first one's key.
        self._running: dict[Key, tuple[asyncio.Task[Any], list[Attempt]]] = {}
        self._told: set[Key] = set()
        #: Set when the consumer of a stream may have taken something, by task.
        self.credits: dict[int, asyncio.Event] = {}
        #: What arrived is being begun; what ends meanwhile is sent after all of it.
        self._applying = False
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
        applying, self._applying = self._applying, True
        while group := core.take(now):
            self._watch.enter(group[0].id)
            self._begin(group)
            self._watch.leave()
        self._applying = applying
        if core.revoked:
            self._cancel_revoked()
        if self.credits:
            for event in self.credits.values():
                event.set()
        self._settle()
        if core.dirty:
            self._send()
        if core.leaving and not core.running:
            self._done.set()

    def _settle(self) -> None:
        """All messages were acted on."""

    def _cancel_revoked(self) -> None:
        revoked = self.core.revoked
        if revoked:
            for key, (task, attempts) in list(self._running.items()):
                if key not in self._told and all((one.id, one.attempt) in revoked for one in attempts):
                    self._told.add(key)
                    task.cancel()

    def _begin(self, group: list[Attempt]) -> None:
        if self.calls.is_far(group):
            fetching = self.driver.loop.run_in_executor(None, self.calls.fetch, group)
            fetching.add_done_callback(lambda done: self._fetched(group, done))
        else:
            self._begin_here(group)

    def _fetched(self, group: list[Attempt], done: asyncio.Future[list[object]]) -> None:
        error = done.exception()
        if error is None:
            self._watch.enter(group[0].id)
            self._begin_here(group)  # while `done` keeps what was fetched
            self._watch.leave()
            self._cancel_revoked()
        else:
            for member in group:
                self.core.finish(self.calls.failure(member, error))
        self.driver.transmit_soon()

    def _begin_here(self, group: list[Attempt]) -> None:
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
            self._send()
            return
        if first.stream:
            awaitable = run_async_stream(self, first, loaded, awaitable)
        if not asyncio.iscoroutine(awaitable):
            self._finish(group, loaded, awaitable, None, start, batch=batch)
            self._send()
            return
        loop = self.driver.loop
        key = (first.id, first.attempt)

        def returned(value: Any) -> None:
            if not task.cancelling():
                end(value, None)

        def done(task: asyncio.Task[Any]) -> None:
            if key in self._running:
                end(*_outcome(task))

        def end(value: Any, error: BaseException | None) -> None:
            del self._running[key]
            self._told.discard(key)
            if not self._running:
                self._watch.idle()
                self.driver.tidy_soon()
            self._watch.enter(first.id)
            self._finish(group, loaded, value, error, start, batch=batch)
            self._watch.leave()
            self._send()

        task, step = make_task(loop, Steps(awaitable, first.id, self._watch, returned), loaded.name, context)
        self._running[key] = (task, group)
        self._watch.busy()
        if asyncio.current_task(loop) is None:
            step()
            if task.done():
                done(task)
                return
        else:
            loop.call_soon(step)
        task.add_done_callback(done)

    def _send(self) -> None:
        """Something ended."""
        if self._applying:
            return  # it is sent with what ends meanwhile
        if self._running:
            self.driver.transmit_soon()
        else:
            self.driver.transmit()  # there is nobody to wait for

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
            if group[0].stream:
                results = [calls.success(group[0], None, run, loaded)]
            elif batch:
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
        outlet = core.outlets.get(group[0].id) if core.outlets else None
        if outlet is not None:
            core.close(outlet, results[0])
        for result in results:
            core.finish(result)
        if core.leaving and not core.running:
            self._done.set()

    # --- signals ------------------------------------------------------------------------------------------------------

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR1: if a step of user code holds the loop up, look at the messages in its place."""
        if self.child.forked or in_our_code(frame, Steps.run.__code__):
            return  # the loop looks by itself
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
    if isinstance(error, CarriedError):
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


#: Makes the executor of a process out of its core, driver and client.
Make = Callable[[WorkerCore, LoopDriver, Client], AsyncExecutor]


def run_async_executor(settings: ExecutorSettings, role: str = ASYNC_EXECUTOR, make: Make | None = None) -> int:
    """Body of the async executor's process. Returns its exit code."""
    setup.settle_process()
    loop = _new_loop()
    asyncio.set_event_loop(loop)
    core = WorkerCore(settings.worker, setup.new_session(), role, os.getpid())
    core.devices = settings.devices
    driver = LoopDriver(core, settings.address, loop)

    def logs_soon() -> None:
        driver._soon(lambda: loop.call_later(setup.LOGS_DELAY, driver.transmit_soon))

    if settings.logs:
        driver.logs, _, _ = setup.capture_output(logs_soon)
    else:
        setup.discard_output()
    client = setup.make_client(core, driver, settings.shm_dir)
    if make is None:
        executor = AsyncExecutor(settings, core, driver, Calls(core, client))
    else:
        executor = make(core, driver, client)
    driver.applied = executor.applied
    driver.look = Preparer(core, executor.calls, driver.send).look
    executor.child.watch()
    signal.signal(signal.SIGUSR1, executor.on_interrupt)
    signal.signal(signal.SIGTERM, executor.on_leave)
    os.nice(settings.nice)
    serving = loop.create_task(executor.run())
    serving.add_done_callback(lambda _: loop.stop())
    while not serving.done():
        loop.run_forever()  # again, if a task's code stopped the loop
    serving.result()
    if driver.refused:
        os.write(2, f"rtml executor {settings.worker}: refused: {driver.refused}\n".encode())
        return 1
    driver.end()
    settings.page[STATE] = LEFT
    client.store.close(unlink=not client.store.objects)
    return 0
