"""The sync executor: one process that runs one task at a time, inline in its main thread (D7).

The way of an attempt: `receive` (driver) -> `WorkerCore.take` -> `_run` (decode, call, encode) -> `WorkerCore.finish`
-> `transmit`.

Results are sent when the queue is empty, when enough have come together, or before a function is begun that is not
known to be quick. So a result never waits behind a long task, except one that was quick until then; for that case the
dispatcher recalls what it prefetched, and the signal that comes with it sends the results too.

Interruption. SIGUSR1 means: look at your messages. Its handler acts only while the main thread is inside user code and
not in code of ours that user code called (the client's, the codec's): it applies what has arrived, returns unstarted
work, and if the running attempt was revoked it raises `Interrupted` there. A task that blocks in `get` runs assigned
descendants on top of itself; these nest. Revoking an attempt ends what runs on top of it too, innermost first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import CoroutineType, FrameType
from typing import Any, Final

from rtml.client.client import Client
from rtml.client.context import process
from rtml.client.driver import Waiter
from rtml.client.waiting import Group
from rtml.messages import EXECUTOR, Attempt, TaskResult
from rtml.workers import setup
from rtml.workers.calls import QUICK, Calls, Loaded, holds_futures, run_coroutine
from rtml.workers.core import WorkerCore
from rtml.workers.driver import ExecutorDriver, RefusedError
from rtml.workers.interrupt import in_our_code
from rtml.workers.page import COUNT, FIRST, IDS_MAX, LEFT, STATE
from rtml.workers.preparer import Preparer
from rtml.workers.setup import Child, ExecutorSettings
from rtml.workers.streaming import run_stream

#: Results that are worth a frame while there is more to run.
RESULTS_MAX: Final = 64
#: Seconds that the oldest unsent result may wait while quick tasks follow each other.
RESULT_AGE_MAX: Final = 200e-6
#: Tasks that may run on top of each other in one process; beyond it a blocked task's children run elsewhere.
NESTED_MAX: Final = 32
#: Stack frames of ours between two nested tasks, for the recursion limit.
_FRAMES_PER_LEVEL: Final = 12


class Interrupted(BaseException):
    """Raised inside a running task that nobody wants any more."""


class Executor:
    """Runs what the dispatcher assigns.

    Args:
        settings: from the supervisor.
        core: the protocol's state.
        driver: the link.
        calls: decodes, encodes, knows the functions.
    """

    def __init__(self, settings: ExecutorSettings, core: WorkerCore, driver: ExecutorDriver, calls: Calls) -> None:
        self.core = core
        self.driver = driver
        self.calls = calls
        self.child = Child()
        self._page = settings.page
        #: Ids in the running page, those of all nested levels.
        self._shown = 0
        #: Attempts of each level that has begun, outermost first.
        self._levels: list[list[Attempt]] = []
        #: The main thread is inside user code, where `Interrupted` may be raised. The handler resets it before it
        #: raises.
        self._user = False
        #: A signal came; look at the link before anything else is begun.
        self._look = False
        #: SIGTERM came.
        self._ending = False
        #: Groups that `Interrupted` was raised in, or that end because of one.
        self._told: set[tuple[int, int]] = set()
        self._oldest_unsent = 0.0
        #: Shared memory was tidied since the last message.
        self._tidied = False
        self._stdout = sys.stdout
        self._stderr = sys.stderr

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to leave."""
        core, driver = self.core, self.driver
        while True:
            try:
                if core.queue:
                    group = core.take(time.monotonic())
                    if group:
                        self._run(group)
                        if self._look:
                            self._look_at_messages()
                        continue
                if self._ending:
                    core.leave()
                self._settle()
                driver.transmit()
                if core.leaving and not core.running:
                    return
                self._look = False
                self._wait()
            except Interrupted:
                # Raised in the last moment of a task, caught between two lines of ours.
                self._settle_interrupted()

    def _settle(self) -> None:
        """Nothing is to be run now."""

    def _wait(self) -> None:
        """Blocks until there are messages; when that takes long, shared memory is tidied meanwhile, once."""
        store = self.calls.store
        if self._tidied or not store.untidy:
            self._tidied = False
            self.driver.receive(None)
            return
        limit = time.monotonic() + setup.TIDY_AFTER
        self.driver.receive(setup.TIDY_AFTER)
        if time.monotonic() >= limit:
            store.sweep()
            self._tidied = True

    def leave(self) -> None:
        """Everything is sent: announce the end, for which no task is to blame."""
        self.driver.end()
        self._page[COUNT] = 0
        self._page[STATE] = LEFT

    def _look_at_messages(self) -> None:
        self._look = False
        self.driver.receive(0)

    def _settle_interrupted(self) -> None:
        self._user = False
        self.driver.leave()
        for attempt in self._levels.pop() if self._levels else ():
            if (attempt.id, attempt.attempt) in self.core.running:
                self.core.finish(self.calls.cancelled(attempt, 0.0, self.calls.function(attempt)))
        self._shown = 0

    # --- running ------------------------------------------------------------------------------------------------------

    def _run(self, group: list[Attempt]) -> None:
        """Runs one call to its results."""
        before = self._show(group)
        attempt = group[0]
        core, calls = self.core, self.calls
        try:
            loaded = calls.function(attempt)
            batched = attempt.batch or loaded.batch
            if not batched:
                args, kwargs = calls.arguments(attempt)
        except BaseException as error:  # noqa: BLE001 - user code: imports, __setstate__, __rtml_load__; the task's error
            for member in group:
                self._finish(member, calls.failure(member, error))
            self._shown = before
            return
        if core.results and (loaded.slow > QUICK or time.monotonic() - self._oldest_unsent > RESULT_AGE_MAX):
            self.driver.transmit()
        if batched:
            self._run_batch(group)
            self._shown = before
            return
        value, raised, run = self._call(group, loaded, args, kwargs)
        del args, kwargs
        loaded.ran(run)
        if raised is None:
            if attempt.stream:
                result = run_stream(self, attempt, loaded, value)
            else:
                result = calls.success(attempt, value, run, loaded)
        elif isinstance(raised, Interrupted):
            result = calls.cancelled(attempt, run, loaded)
        else:
            result = calls.failure(attempt, raised, run, loaded)
        self._finish(attempt, result)
        self._shown = before

    def _run_batch(self, group: list[Attempt]) -> None:
        calls = self.calls
        loaded, joined, failed = calls.batch(group)
        by_key = {(attempt.id, attempt.attempt): attempt for attempt in group}
        for result in failed:
            self._finish(by_key[result.id, result.attempt], result)
        for members, (args, kwargs) in joined:
            assert loaded is not None
            values, raised, run = self._call(members, loaded, args, kwargs)
            loaded.ran(run)
            if raised is None:
                results = calls.batch_results(members, values, run, loaded)
            elif isinstance(raised, Interrupted):
                results = [calls.cancelled(member, run, loaded) for member in members]
            else:
                results = [calls.failure(member, raised, run, loaded) for member in members]
            for member, result in zip(members, results):
                self._finish(member, result)

    def _call(
        self, group: list[Attempt], loaded: Loaded, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, BaseException | None, float]:
        """Calls user code. Returns its value, or what it raised, and the seconds that it took."""
        attempt = group[0]
        driver = self.driver
        self._levels.append(group)
        before, process.task = process.task, self.calls.info(attempt, loaded)
        outer = driver.current
        driver.enter(attempt)
        value: Any = None
        raised: BaseException | None = None
        start = time.perf_counter()
        try:
            self._user = True
            value = loaded.call(*args, **kwargs)
            if value.__class__ is CoroutineType:
                value = run_coroutine(value)
            self._user = False
        except BaseException as error:  # noqa: BLE001 - user code may raise anything, SystemExit and KeyboardInterrupt included
            self._user = False
            # Without our own frame, which refers to the error: a cycle would keep the arguments alive.
            trace = error.__traceback__
            raised = error.with_traceback(None if trace is None else trace.tb_next)
        run = time.perf_counter() - start
        if self.child.forked:
            # User code forked and its child came out here. It is not the executor.
            os._exit(0 if raised is None else 1)
        driver.main_drives = True
        driver.current = outer
        process.task = before
        self._levels.pop()
        if sys.stdout is not self._stdout or sys.stderr is not self._stderr:
            sys.stdout, sys.stderr = self._stdout, self._stderr
        return value, raised, run

    def told(self, attempt: Attempt) -> None:
        """It knows already that nobody wants it any more: no signal is to tell it again."""
        self._told.add((attempt.id, attempt.attempt))

    def is_interruption(self, error: BaseException) -> bool:
        """Whether it was raised here, because nobody wants the task any more."""
        return isinstance(error, Interrupted)

    def _show(self, group: list[Attempt]) -> int:
        """Enters the attempts into the running page, on top of blocked ones; returns how many these are.

        They stay there until the next ones begin: a process may also die of a task's result, or of what it left behind.
        Once the dispatcher has the result, the entry means nothing to it.
        """
        page, before = self._page, self._shown
        shown = before
        for attempt in group:
            if shown < IDS_MAX:
                page[FIRST + shown] = attempt.id
                shown += 1
        page[COUNT] = self._shown = shown
        return before

    def _finish(self, attempt: Attempt, result: TaskResult) -> None:
        core, driver = self.core, self.driver
        if driver.touched:
            driver.touched = False
            driver.ended(attempt)
            if driver.urgent:
                driver.transmit()  # what the task submitted comes before its end
        logs = driver.logs
        if logs is not None:
            if logs.partial:
                logs.end_lines(attempt.id)
            if logs.dirty:
                core.relay(logs.take())
        if not core.results:
            self._oldest_unsent = time.monotonic()
        core.finish(result)
        if self._told:
            self._told.discard((attempt.id, attempt.attempt))
        if len(core.results) >= RESULTS_MAX or holds_futures(result):
            driver.transmit()

    # --- a task that waits --------------------------------------------------------------------------------------------

    def block(self, waiter: Waiter, timeout: float | None) -> bool:
        """`get` in the main thread: waits, and runs assigned descendants meanwhile."""
        user, self._user = self._user, False
        driver = self.driver
        driver.leave()
        try:
            return self._block(waiter, None if timeout is None else time.monotonic() + timeout)
        finally:
            if self._levels:
                driver.enter(self._levels[-1][0])
            self._user = user

    def _block(self, waiter: Waiter, deadline: float | None) -> bool:
        core, driver = self.core, self.driver
        driver.receive(0)
        if waiter.ready or not self._levels or (deadline is not None and time.monotonic() >= deadline):
            driver.transmit()
            return self._without_block(waiter, deadline)
        attempt = self._levels[-1][0]
        # A descendant may take long: who waits for a time, or for the first of many, must not be held up by it.
        patient = deadline is None and not (isinstance(waiter, Group) and waiter.needed < len(waiter.wanted))
        core.block(attempt, inline=patient and len(self._levels) < NESTED_MAX)
        try:
            while not waiter.ready and not self._unwanted():
                group = core.take(time.monotonic())
                if group:
                    self._run(group)
                    continue
                driver.transmit()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                driver.receive(left)
        finally:
            core.resume(attempt)
            driver.transmit()
        self._raise_if_unwanted()
        return waiter.ready

    def _without_block(self, waiter: Waiter, deadline: float | None) -> bool:
        """Waiting outside of any task (a leftover of one) runs nothing."""
        while not waiter.ready and not self._levels:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self.driver.receive(left)
            self.driver.transmit()
        return waiter.ready

    # --- interruption -------------------------------------------------------------------------------------------------

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR1: look at the messages now."""
        self._look = True
        if not self._user or self.child.forked:
            return
        if self.driver.lock.locked() or in_our_code(frame, Executor._call.__code__):
            self.driver.signal_soon()
            return
        self._user = False
        try:
            while self._look:
                self._look = False
                if not self.driver.try_receive():
                    self.driver.signal_soon()
            if self._ending:
                self.core.leave()
            if self.driver.blocked_beside is not None:
                self.core.give_back()
            self.driver.transmit()
        finally:
            self._user = True
        if self._unwanted():
            self._user = False
            self._raise_if_unwanted()

    def on_leave(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: finish what runs, then end."""
        if self.child.forked:
            os._exit(128 + number)
        self._ending = True
        self.driver.wake()
        self.on_interrupt(number, frame)

    def _unwanted(self) -> bool:
        """Whether all attempts of some level are revoked, and that level was not told yet."""
        revoked = self.core.revoked
        if not revoked:
            return False
        return any(all(self._is_revoked(attempt) for attempt in level) for level in self._levels)

    def _is_revoked(self, attempt: Attempt) -> bool:
        key = (attempt.id, attempt.attempt)
        return key in self.core.revoked and key not in self._told

    def _raise_if_unwanted(self) -> None:
        """Ends the innermost level if it, or one below it, is revoked. Each level is told once."""
        if not self._unwanted():
            return
        for attempt in self._levels[-1]:
            self._told.add((attempt.id, attempt.attempt))
        raise Interrupted


#: Makes the executor of a process out of its core, driver and client.
Make = Callable[[WorkerCore, ExecutorDriver, Client], Executor]


def run_executor(settings: ExecutorSettings, role: str = EXECUTOR, make: Make | None = None) -> int:
    """Body of a sync executor's process. Returns its exit code."""
    setup.settle_process()
    session = setup.new_session()
    core = WorkerCore(settings.worker, session, role, os.getpid())
    core.devices = settings.devices
    driver = ExecutorDriver(core, settings.address)
    if settings.logs:
        driver.logs, _, _ = setup.capture_output(driver.logs_soon)
    else:
        setup.discard_output()
    client = setup.make_client(core, driver, settings.shm_dir)
    executor = Executor(settings, core, driver, Calls(core, client)) if make is None else make(core, driver, client)
    driver.blocker = executor.block
    driver.look = Preparer(core, executor.calls, driver.send_beside).look
    executor.child.watch()
    sys.setrecursionlimit(sys.getrecursionlimit() + NESTED_MAX * _FRAMES_PER_LEVEL)
    signal.signal(signal.SIGUSR1, executor.on_interrupt)
    signal.signal(signal.SIGTERM, executor.on_leave)
    os.nice(settings.nice)
    try:
        executor.run()
    except RefusedError as refused:
        os.write(2, f"rtml executor {settings.worker}: refused: {refused}\n".encode())
        return 1
    executor.leave()
    client.store.close(unlink=not client.store.objects)
    return 0
