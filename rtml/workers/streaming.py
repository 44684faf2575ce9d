"""Generators as tasks in a sync executor: one step after the other, each item sent before the next step may take long.

The generator runs in the executor's main thread like any call, and its process is its own until it ends. When the
consumer is a window behind, the task counts as blocked: its cpu is lent to others, and it goes on as soon as an item is
taken, whether the cpu is free or not (as after a `get`). A window is bounded work for a process that would else have to
be kept with the generator's frame anyway.
"""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any, Final

from rtml import codec
from rtml.client.future import Future
from rtml.errors import SubmitError
from rtml.messages import Attempt, Item, TaskResult
from rtml.workers.calls import QUICK, Calls, Loaded
from rtml.workers.outlets import Outlet

if TYPE_CHECKING:
    from rtml.workers.executor import Executor

#: Seconds that an item may wait while quick steps follow each other.
_AGE_MAX: Final = 200e-6

_END: Final = object()


class Steps(Loaded):
    """A generator as a function that is called again and again."""

    __slots__ = ()

    def __init__(self, loaded: Loaded, call: Any) -> None:
        self.call = call
        self.name = loaded.name
        self.batch = False
        self.retry_on = loaded.retry_on
        self.slow = loaded.slow


def encode_item(calls: Calls, attempt: Attempt, value: Any) -> Item:
    """A yielded value, ready to be sent. Raises what `codec.encode_value` raises."""
    if attempt.data_only:
        return Item(codec.encode_data(value, calls.store, "the item").payload)
    encoded = codec.encode_value(value, calls.store, Future, "the item", leaving=True)
    return Item(encoded.payload, list(encoded.handles) or None)


def is_generator(value: Any) -> bool:
    """Whether a call gave something whose items are the stream."""
    return inspect.isgenerator(value) or inspect.isasyncgen(value)


def no_generator(loaded: Loaded, value: Any) -> SubmitError:
    """The error of a stream that is none."""
    return SubmitError(f"{loaded.name} is no generator function: it returned {type(value).__name__}; use submit")


def run_stream(executor: Executor, attempt: Attempt, loaded: Loaded, generator: Any) -> TaskResult:
    """Run a generator to its end, or to where nobody wants it any more. Returns the task's result."""
    core, calls = executor.core, executor.calls
    if not is_generator(generator):
        return calls.failure(attempt, no_generator(loaded, generator), 0.0, loaded)
    outlet = core.open(attempt)
    step = Steps(loaded, lambda: next(generator, _END))
    total, sent_at = 0.0, 0.0
    result: TaskResult | None = None
    while result is None:
        if outlet.full and not _await_room(executor, attempt, outlet):
            # GeneratorExit, where the generator has stopped: what it does then is not to be interrupted in its turn by
            # the signal that comes behind the message.
            executor.told(attempt)
            _, raised, run = executor._call([attempt], Steps(loaded, generator.close), (), {})
            result = calls.cancelled(attempt, total + run, loaded)
            break
        if outlet.unsent and (step.slow > QUICK or time.monotonic() - sent_at > _AGE_MAX):
            _send(executor, outlet)
            sent_at = time.monotonic()
        value, raised, run = executor._call([attempt], step, (), {})
        total += run
        step.slow = run if run > step.slow else 0.5 * (step.slow + run)
        if raised is not None:
            interrupted = executor.is_interruption(raised)
            result = calls.cancelled(attempt, total, loaded) if interrupted else None
            result = result or calls.failure(attempt, raised, total, loaded)
        elif value is _END:
            result = calls.success(attempt, None, total, loaded)
        elif outlet.skips:
            outlet.skip()
        else:
            try:
                item = encode_item(calls, attempt, value)
                outlet.put(item)
                if item.handles:
                    # Before anything is received: once a future is known to have ended, it may be forgotten elsewhere.
                    _send(executor, outlet)
            except BaseException as error:  # noqa: BLE001 - the user's __reduce__; it is the task's error
                generator.close()
                result = calls.failure(attempt, error, total, loaded)
        del value
    core.close(outlet, result)
    return result


def _send(executor: Executor, outlet: Outlet) -> None:
    """Send the unsent items, behind all that was said so far."""
    driver = executor.driver
    if driver.touched and driver.urgent:
        driver.transmit()  # what was submitted comes before the items that refer to it
    executor.core.relay([outlet.send()])
    driver.transmit()


def _await_room(executor: Executor, attempt: Attempt, outlet: Outlet) -> bool:
    """Wait until the consumer has taken an item; False if nobody wants the stream any more."""
    core, driver = executor.core, executor.driver
    key = (attempt.id, attempt.attempt)
    lends = driver.lends
    if outlet.unsent:
        _send(executor, outlet)
    driver.receive(0)
    if not outlet.full or key in core.revoked:
        return key not in core.revoked
    if lends:
        core.block(attempt, inline=False)
    try:
        while outlet.full and key not in core.revoked:
            driver.transmit()
            driver.receive(None)
    finally:
        if lends:
            core.resume(attempt)
        driver.transmit()
    return key not in core.revoked
