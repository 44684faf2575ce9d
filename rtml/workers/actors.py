"""Executors of actors: a process with one instance of a user's class, whose methods are what it runs.

The first attempt of such a process creates the instance and then goes on, as far as the protocol is concerned, until
the actor ends: so it is among what the executor holds when a new dispatcher asks. Everything else is as in the sync
executor. A call that blocks in `get` just waits: nothing runs on top of it, and what was handed over for later stays.
(`rtml.workers.async_actors` has the executor that does several things at a time.)
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

from rtml import codec
from rtml.client.actors import ActorClass
from rtml.client.client import Client
from rtml.client.driver import Waiter
from rtml.client.future import Future
from rtml.messages import ACTOR, OK, STOP, ActorOptions, Attempt, Function, ObjectRef, TaskResult
from rtml.workers.calls import Calls, Loaded
from rtml.workers.core import WorkerCore
from rtml.workers.driver import ExecutorDriver
from rtml.workers.executor import Executor, run_executor
from rtml.workers.setup import ExecutorSettings

#: Hooks of a user's class: its state as a value; and taking it back, after the constructor ran again.
SAVE = "__rtml_save__"
RESTORE = "__rtml_restore__"
#: On a node, checkpoints of at most so many bytes are carried to other dispatchers, and survive the node.
CARRIED_MAX: Final = 1024 * 1024


class ActorCalls(Calls):
    """Methods by id, the instance that they belong to, and its checkpoints.

    Args:
        core: the executor's half of the protocol.
        client: its store holds arguments, results and checkpoints.
    """

    def __init__(self, core: WorkerCore, client: Client) -> None:
        super().__init__(core, client)
        self.instance: Any = None
        self.options = ActorOptions()
        self._calls = 0
        self._saved_at = 0.0

    def resolve(self, definition: Function) -> Callable[..., Any]:
        """A method of the instance, or the class."""
        if definition.method == STOP:
            return _nothing
        if definition.method:
            method: Callable[..., Any] = getattr(self.instance, definition.method)
            return method
        found: Any = codec.load_function(definition, self.store, self._handle)
        return found.function if isinstance(found, ActorClass) else found

    def construct(self, attempt: Attempt) -> Callable[..., Any]:
        """What makes the instance when it is called with the attempt's arguments."""
        cls = self.function(attempt).call
        assert attempt.creates is not None
        self.options = attempt.creates.hosts or ActorOptions()

        def make(*args: Any, **kwargs: Any) -> None:
            self.instance = cls(*args, **kwargs)
            if attempt.checkpoint is not None:
                state = codec.decode_value(attempt.checkpoint, self.store, self._handle)
                getattr(self.instance, RESTORE)(state)
            self._saved_at = time.monotonic()

        return make

    def called(self, count: int) -> None:
        """So many calls have run, their results are not on their way yet: take a checkpoint if it is time."""
        options = self.options
        if not options.checkpoint_calls and not options.checkpoint_seconds:
            return
        self._calls += count
        due = options.checkpoint_calls and self._calls >= options.checkpoint_calls
        if not due and options.checkpoint_seconds:
            due = time.monotonic() >= self._saved_at + options.checkpoint_seconds
        if due:
            self._calls = 0
            self._saved_at = time.monotonic()
            try:
                state = getattr(self.instance, SAVE)()
                payload = codec.encode_value(state, self.store, Future, "the checkpoint").payload
                if isinstance(payload, ObjectRef) and payload.node and payload.size <= CARRIED_MAX:
                    self.store.free(payload.id)
                    payload = codec.encode_value(state, None, Future, "the checkpoint").payload
            except Exception:  # noqa: BLE001 - user code; the calls are not to blame, and the last checkpoint stays
                sys.stderr.write(f"rtml: {SAVE} of {type(self.instance).__qualname__} failed\n{traceback.format_exc()}")
            else:
                self._core.save(payload)

    def end(self) -> None:
        """The actor is not wanted any more: its instance goes, and the attempt that made it ends."""
        core = self._core
        hosted, core.hosted = core.hosted, None
        core.leave()
        self._loaded.clear()
        self.instance = None
        if hosted is not None:
            core.finish(TaskResult(hosted.id, hosted.attempt, OK, codec.encode_value(None, None).payload))


class ActorExecutor(Executor):
    """Runs an actor's calls one after the other."""

    calls: ActorCalls

    def _run(self, group: list[Attempt]) -> None:
        if group[0].creates is not None:
            self._create(group[0])
            return
        super()._run(group)
        function = self.core.functions.get(group[0].function)
        if function is not None and function.method == STOP:
            self.core.leave()

    def _create(self, attempt: Attempt) -> None:
        shown = self._show([attempt])
        calls = self.calls
        loaded = None
        run = 0.0
        try:
            loaded = calls.function(attempt)
            make = Loaded(self.core.functions[attempt.function], calls.construct(attempt))
            args, kwargs = calls.arguments(attempt)
        except BaseException as error:  # noqa: BLE001 - user code: imports, __setstate__; the actor's error
            raised: BaseException | None = error
        else:
            _, raised, run = self._call([attempt], make, args, kwargs)
        self._shown = shown
        if raised is None:
            self.core.host(attempt)
        else:
            self._finish(attempt, calls.failure(attempt, raised, run, loaded))
            self.core.leave()

    def _finish(self, attempt: Attempt, result: TaskResult) -> None:
        if self.core.hosted is not None:
            self.calls.called(1)
        super()._finish(attempt, result)

    def _settle(self) -> None:
        if self.core.dismissed:
            self.calls.end()

    def _block(self, waiter: Waiter, deadline: float | None) -> bool:
        driver = self.driver
        while True:
            driver.transmit()
            left = None if deadline is None else deadline - time.monotonic()
            if waiter.ready or self._unwanted() or (left is not None and left <= 0):
                break
            driver.receive(left)
        self._raise_if_unwanted()
        return waiter.ready


def _nothing() -> None:
    """The method `STOP`."""


def run_actor(settings: ExecutorSettings) -> int:
    """Body of the process of an actor that does one thing at a time. Returns its exit code."""

    def make(core: WorkerCore, driver: ExecutorDriver, client: Client) -> Executor:
        driver.lends = False
        return ActorExecutor(settings, core, driver, ActorCalls(core, client))

    return run_executor(settings, ACTOR, make)
