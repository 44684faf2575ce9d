"""The handle of a task's result.

A `Future` is a `concurrent.futures.Future` in every observable way, without its price: the standard one makes a
`Condition` (some 2 us and 1 KiB). Here the state is guarded by the driver's lock, and a real condition is made only
when `concurrent.futures.wait` or `as_completed` ask for one (`_condition`). The rule that makes both agree:

* a future without a condition changes its state under the driver's lock; making the condition takes the same lock;
* a future with a condition changes its state under that condition (taken first) and the driver's lock.

So the lock order is condition, then driver's lock; the driver's lock is never held while a condition is taken.

The value stays encoded until somebody asks for it: a dropped or forwarded result is never decoded.
"""

from __future__ import annotations

import concurrent.futures
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rtml.client import far
from rtml.client.driver import Waiter
from rtml.client.waiting import Bridge
from rtml.errors import ObjectLost, RtmlError, TaskCancelled
from rtml.messages import CANCELLED, OK, ErrorInfo, ObjectRef, TaskResult, Timing

if TYPE_CHECKING:
    from rtml.client.client import Client

T = TypeVar("T")

PENDING: Final = "PENDING"
FINISHED: Final = "FINISHED"
#: The standard library counts a cancelled future as done only in this state.
CANCELLED_STATE: Final = "CANCELLED_AND_NOTIFIED"

#: The value of a future that nobody has decoded yet.
UNSET: Final = object()
_logger = logging.getLogger("rtml.client")


class _Standard:
    """What `concurrent.futures.wait` and `as_completed` need of a future."""

    __slots__ = ("condition", "waiters")

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiters: list[Any] = []


class Future(concurrent.futures.Future[T]):
    """The result of a submitted task: can be blocked on, awaited, passed on as an argument, cancelled.

    Made by `submit` and its like, never directly. Wherever a future stands among the arguments of a task, at any depth
    of lists, tuples and dicts, the task gets its value; inside other objects it stays a future (see `rtml.ref`).
    """

    __slots__ = (
        "_callbacks", "_client", "_failure", "_held", "_payload", "_standard", "_state", "_timing", "_value",
        "_used", "_watchers", "id",
    )  # fmt: skip

    _state: str

    def __init__(self, client: Client, task: int) -> None:
        # The base class is deliberately not initialised: all of its attributes are replaced here.
        self.id = task
        self._client = client
        self._state = PENDING
        self._payload: bytes | ObjectRef | None = None
        self._failure: ErrorInfo | BaseException | None = None
        self._value: Any = UNSET
        self._timing: Timing | None = None
        self._used: list[int] | None = None
        #: Waiters to notify and user callbacks to call at the end; None instead of an empty list.
        self._watchers: list[Waiter] | None = None
        self._callbacks: list[Callable[[Any], object]] | None = None
        self._standard: _Standard | None = None
        #: Whatever must live as long as this future: leases of shared memory, contained futures.
        self._held: Any = None

    # --- asking -------------------------------------------------------------------------------------------------------

    def done(self) -> bool:
        """Whether the task has ended: with a value, with an error, or cancelled."""
        return self._state is not PENDING

    def cancelled(self) -> bool:
        """Whether the task was cancelled, here or elsewhere."""
        return self._state is CANCELLED_STATE

    def running(self) -> bool:
        """Whether the task was handed over for execution and has not ended.

        Where exactly a task is, only the dispatcher knows; unlike in the standard library such a task can be cancelled.
        """
        return self._state is PENDING and self._client.sent(self)

    @property
    def timing(self) -> Timing | None:
        """Where the task's time went, in seconds; None before its end, and unless `connect(timings=True)` asked."""
        return self._timing

    @property
    def contributors(self) -> list[int] | None:
        """Of `rtml.reduce` and `allreduce`: positions of the inputs that the value is made of; None before its end."""
        return self._used

    def result(self, timeout: float | None = None) -> T:
        """The task's value; waits for it.

        Args:
            timeout: seconds to wait at most; None for ever.

        Raises:
            TimeoutError: not done in time.
            TaskCancelled: the task was cancelled (also a `concurrent.futures.CancelledError`).
            Exception: what the task raised, with the remote traceback attached.
        """
        if self._state is PENDING:
            self._wait(timeout)
        value: T = self._value
        if value is not UNSET:
            return value
        if self._failure is not None:
            try:
                raise self._error()
            finally:
                self = None  # type: ignore[assignment]  # noqa: PLW0642 - no cycle of future, traceback and frame
        value = self._decode()
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the task raised, or None if it has a value; waits for the end like `result`.

        Raises:
            TimeoutError: not done in time.
            TaskCancelled: the task was cancelled.
        """
        if self._state is PENDING:
            self._wait(timeout)
        if self._failure is None:
            return None
        error = self._error()
        if self._state is CANCELLED_STATE:
            raise error
        return error

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call `fn(self)` once the task has ended; at once if it has. Errors of `fn` are logged."""
        client = self._client
        with client.lock:
            pending = self._state is PENDING
            if pending:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(fn)
        if pending:
            client.driver.expect()
        else:
            self._call(fn)

    def cancel(self) -> bool:
        """Give the task up, running or not, with all its descendants: the future ends now, the process is told.

        Returns:
            False if the task had ended before.
        """
        return self._state is PENDING and bool(self._client.cancel_all([self]))

    def __await__(self) -> Generator[Any, None, T]:
        if self._state is PENDING:
            yield from self._suspend()
        if self._value is UNSET and self._is_far():
            kept = yield from self._bring()
            try:
                return self.result()
            finally:
                del kept
        return self.result()

    def _is_far(self) -> bool:
        return self._client.store.is_far(self._payload)

    def _bring(self) -> Generator[Any, None, Any]:
        return (yield from far.brought(self._client, self._payload))

    def __repr__(self) -> str:
        state = self._state.lower().removesuffix("_and_notified")
        return f"<{type(self).__name__} {self.id:#x} {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "an rtml future can only travel inside the arguments, closures and results of rtml tasks, "
            "not through plain pickle or copy"
        )

    # --- the standard library's side ----------------------------------------------------------------------------------

    if not TYPE_CHECKING:  # The stubs of the base class declare both as variables.

        @property
        def _condition(self) -> threading.Condition:
            return self._standardise().condition

        @property
        def _waiters(self) -> list[Any]:
            return self._standardise().waiters

    def _standardise(self) -> _Standard:
        standard = self._standard
        if standard is None:
            with self._client.lock:
                if self._standard is None:
                    self._standard = _Standard()
                standard = self._standard
            self._client.driver.expect()
        return standard

    def set_running_or_notify_cancel(self) -> bool:
        """Not for rtml's futures: only the engine resolves them."""
        raise concurrent.futures.InvalidStateError("rtml resolves its futures itself")

    def set_result(self, result: T) -> None:
        """Not for rtml's futures: only the engine resolves them."""
        raise concurrent.futures.InvalidStateError("rtml resolves its futures itself")

    def set_exception(self, exception: BaseException | None) -> None:
        """Not for rtml's futures: only the engine resolves them."""
        raise concurrent.futures.InvalidStateError("rtml resolves its futures itself")

    # --- the engine's side --------------------------------------------------------------------------------------------

    def _settle(
        self, payload: bytes | ObjectRef | None, failure: ErrorInfo | BaseException | None, outcome: int
    ) -> bool:
        """Store the end. Under the driver's lock, once; True: `_announce` has to be called after releasing it."""
        self._payload = payload
        self._failure = failure
        if self._standard is None:
            self._state = CANCELLED_STATE if outcome == CANCELLED else FINISHED
            return self._watchers is not None or self._callbacks is not None
        return True

    def _announce(self, outcome: int) -> None:
        """Tell everybody who waits. Without the driver's lock, once."""
        standard = self._standard
        if standard is not None and self._state is PENDING:
            with standard.condition:
                with self._client.lock:
                    self._state = CANCELLED_STATE if outcome == CANCELLED else FINISHED
                for waiter in standard.waiters:
                    if outcome == CANCELLED:
                        waiter.add_cancelled(self)
                    elif self._failure is not None:
                        waiter.add_exception(self)
                    else:
                        waiter.add_result(self)
                standard.condition.notify_all()
        watchers = self._watchers
        if watchers is not None:
            self._watchers = None
            for watcher in watchers:
                watcher.notify(self)
        callbacks = self._callbacks
        if callbacks is not None:
            self._callbacks = None
            self._client.driver.call([lambda fn=fn: self._call(fn) for fn in callbacks])  # type: ignore[misc]

    def _attach(self, waiter: Waiter) -> bool:
        """Have `waiter.notify` called at the end; False if that is past."""
        with self._client.lock:
            if self._state is not PENDING:
                return False
            if self._watchers is None:
                self._watchers = [waiter]
            else:
                self._watchers.append(waiter)
            return True

    def _detach(self, waiter: Waiter) -> None:
        with self._client.lock:
            watchers = self._watchers
            if watchers is not None and waiter in watchers:
                watchers.remove(waiter)
                if not watchers:
                    self._watchers = None

    def _wait(self, timeout: float | None) -> None:
        driver = self._client.driver
        if timeout is None:
            driver.lead(self)
            if self._state is not PENDING:
                return
        waiter = Waiter()
        if not self._attach(waiter):
            return
        try:
            if not driver.wait(waiter, timeout):
                raise TimeoutError(f"{self!r} has not ended within {timeout} s")
        finally:
            if not waiter.ready:
                self._detach(waiter)

    def _suspend(self) -> Generator[Any, None, None]:
        # Not imported above, because programs without an event loop do without it; and an import here costs 0.3 us.
        asyncio = sys.modules["asyncio"]
        loop = asyncio.get_running_loop()
        bridge = Bridge(loop)
        if not self._attach(bridge):
            return
        self._client.driver.awaiting(loop)
        try:
            yield from bridge.future.__await__()
        except asyncio.CancelledError:
            self._detach(bridge)
            # As with any awaitable: who cancels the awaiting task gives up what it waits for.
            self.cancel()
            raise

    def _decode(self) -> Any:
        payload = self._payload
        assert payload is not None, "a future without an error has a payload"
        try:
            value = self._client.decode(payload, self)
        except ObjectLost as lost:
            value = far.again(self._client, self, lost)
        with self._client.lock:
            # Two threads may have decoded at once; all must see the same object.
            if self._value is UNSET:
                self._value = value
            return self._value

    def _error(self) -> BaseException:
        failure = self._failure
        if isinstance(failure, ErrorInfo):
            decoded = self._client.decode_error(failure)
            with self._client.lock:
                if self._failure is failure:
                    self._failure = decoded
                failure = self._failure
        assert isinstance(failure, BaseException)
        return failure

    def reduce_ended(self, leaving: bool) -> Any:
        """How an ended future is pickled: with its value, as the dispatcher may have forgotten it. Else None.

        Args:
            leaving: this process will not keep the value: what lies in its shared memory is copied.
        """
        if self._state is PENDING or not self.id:
            return None
        if leaving and isinstance(self._payload, ObjectRef):
            return ended_value, (self.id, self.result())
        return ended_handle, (self.id, self._payload, self._failure)

    def _call(self, fn: Callable[[Any], object]) -> None:
        try:
            fn(self)
        except Exception:
            _logger.exception("exception calling callback for %r", self)


class Ref:
    """Made by `rtml.ref`: passed to a task, it arrives as the future itself, not as its value."""

    __slots__ = ("future",)

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def result(self, timeout: float | None = None) -> Any:
        """The future's value, see `Future.result`."""
        return self.future.result(timeout)

    def __await__(self) -> Generator[Any, None, Any]:
        return self.future.__await__()

    def __repr__(self) -> str:
        return f"Ref({self.future!r})"

    def __reduce__(self) -> Any:
        return _referred, (self.future,)


def _referred(future: Future[Any]) -> Future[Any]:
    """What a `Ref` is where it arrives."""
    return future


def ended_handle(task: int, payload: bytes | ObjectRef | None, failure: Any) -> Future[Any]:
    """Unpickles a handle of a future that had ended."""
    from rtml.client import handles
    from rtml.client.context import current_client

    client = current_client()
    if client is None:
        raise RtmlError("a future can only be unpickled in a process that has an rtml client")
    return handles.ended(client, task, payload, failure)


def ended_value(task: int, value: Any) -> Future[Any]:
    """Unpickles a future that took its large value along."""
    from rtml.client import handles
    from rtml.client.context import current_client

    client = current_client()
    if client is None:
        raise RtmlError("a future can only be unpickled in a process that has an rtml client")
    return handles.ended_value(client, task, value)


def error_of(future: Future[Any]) -> BaseException | None:
    """The error of an ended future, cancellation included, or None."""
    return None if future._failure is None else future._error()


def outcome_of(result: TaskResult) -> ErrorInfo | BaseException | None:
    """What a future keeps of a result that is no value."""
    if result.outcome == OK:
        return None
    if result.error is not None:
        return result.error
    return TaskCancelled("the task was cancelled") if result.outcome == CANCELLED else RtmlError("no reason was given")


def remaining(deadline: float | None) -> float | None:
    """Seconds until `deadline` on the monotonic clock, not below zero; None for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
