"""The executor of an actor that does several things at a time: coroutines, or plain methods in threads.

A class that has coroutine methods runs its plain methods in the loop's thread, so that they need no locks against each
other. A class without any runs its methods in as many threads as its `concurrency` says. How many calls run at a time
is the dispatcher's business: it hands over no more.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

from rtml.client.client import Client
from rtml.client.context import enter_context_task
from rtml.messages import ASYNC_ACTOR, STOP, Attempt, Function
from rtml.workers.actors import ActorCalls
from rtml.workers.async_executor import AsyncExecutor, run_async_executor
from rtml.workers.core import WorkerCore
from rtml.workers.loop_driver import LoopDriver
from rtml.workers.setup import ExecutorSettings
from rtml.workers.threads import Threads


class ThreadedCalls(ActorCalls):
    """Methods that may run in threads."""

    #: Runs the methods of a class without coroutines.
    threads: Threads | None = None

    def resolve(self, definition: Function) -> Callable[..., Any]:
        """A method of the instance, or the class."""
        loaded = super().resolve(definition)
        if self.threads is None or not definition.method or definition.method == STOP:
            return loaded
        return _threaded(self.threads, loaded)

    def end(self) -> None:
        """The actor is not wanted any more."""
        super().end()
        if self.threads is not None:
            self.threads.end()


class AsyncActorExecutor(AsyncExecutor):
    """Runs several of an actor's calls at a time."""

    calls: ThreadedCalls

    def _begin(self, group: list[Attempt]) -> None:
        first = group[0]
        if first.creates is not None:
            self._create(first)
        else:
            super()._begin(group)

    def _create(self, attempt: Attempt) -> None:
        calls = self.calls
        loaded = None
        try:
            loaded = calls.function(attempt)
            make = calls.construct(attempt)
            if not self.core.functions[attempt.function].asynchronous:
                calls.threads = Threads(self.driver.loop, max(1, calls.options.concurrency))
            args, kwargs = calls.arguments(attempt)
            context = contextvars.copy_context()
            context.run(enter_context_task, calls.info(attempt, loaded))
            context.run(make, *args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything; it is the actor's error
            self.core.finish(calls.failure(attempt, error, 0.0, loaded))
            self.core.leave()
            self.driver.transmit_soon()
        else:
            self.core.host(attempt)

    def _finish(self, group: list[Attempt], *args: Any, **kwargs: Any) -> None:
        if self.core.hosted is not None:
            self.calls.called(len(group))
        super()._finish(group, *args, **kwargs)
        function = self.core.functions.get(group[0].function)
        if function is not None and function.method == STOP:
            self.core.leave()
            self.applied()

    def _settle(self) -> None:
        core = self.core
        if core.dismissed and len(core.running) <= 1:
            self.calls.end()


def _threaded(threads: Threads, method: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()
        value, error = await threads.run(functools.partial(context.run, method, *args, **kwargs))
        if error is not None:
            try:
                raise error
            finally:
                error = None  # no cycle of error, traceback and this frame
        return value

    return call


def run_async_actor(settings: ExecutorSettings) -> int:
    """Body of the process of an actor that does several things at a time. Returns its exit code."""

    def make(core: WorkerCore, driver: LoopDriver, client: Client) -> AsyncExecutor:
        return AsyncActorExecutor(settings, core, driver, ThreadedCalls(core, client))

    return run_async_executor(settings, ASYNC_ACTOR, make)
