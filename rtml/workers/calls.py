"""From an attempt to a result, without any idea of links: functions, arguments, batches, errors."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, Final

from rtml import codec
from rtml.client.client import Client
from rtml.client.context import TaskInfo, process, take_missing
from rtml.client.functions import RETRY_ON, RemoteFunction
from rtml.client.future import Future
from rtml.codec import decode_call, encode_value
from rtml.errors import BatchError, ProtocolError, SerializationError
from rtml.messages import CANCELLED, ERROR, OK, Attempt, ErrorInfo, Function, ObjectRef, TaskResult
from rtml.workers.core import WorkerCore

#: Seconds that a function may have run in the past to be called quick.
QUICK: Final = 100e-6

#: One call's arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Loaded:
    """A function that is ready to be called here."""

    __slots__ = ("batch", "call", "name", "retry_on", "slow")

    def __init__(self, definition: Function, call: Callable[..., Any]) -> None:
        self.call = call
        self.name = definition.options.name or definition.name
        self.batch = bool(definition.options.batch)
        self.retry_on: tuple[type[BaseException], ...] = getattr(call, RETRY_ON, ())
        #: An upper estimate of its run time in seconds; a fresh function is not quick.
        self.slow = QUICK * 2

    def ran(self, run: float) -> None:
        """Learn from one run."""
        self.slow = run if run > self.slow else 0.9 * self.slow + 0.1 * run


class Calls:
    """Functions by id, and how attempts become results.

    Args:
        core: knows the definitions.
        client: its store holds arguments and results; its futures are the handles.
    """

    def __init__(self, core: WorkerCore, client: Client) -> None:
        self._core = core
        self._client_core = client.core
        self.store = client.store
        self._handle = client.handle
        self._loaded: dict[int, Loaded] = {}
        #: One loads, others wait: the main thread, and the thread that makes functions ready before they are called.
        self._loading: dict[int, threading.Lock] = {}

    def function(self, attempt: Attempt) -> Loaded:
        """The function of an attempt; imported or unpickled, and its model loaded, the first time.

        Raises:
            BaseException: whatever that raises; it is the attempt's error.
        """
        loaded = self._loaded.get(attempt.function)
        if loaded is None:
            definition = self._core.functions.get(attempt.function)
            if definition is None:
                raise ProtocolError(f"function {attempt.function:x} was not defined before its first use")
            loaded = self.load(definition)
        return loaded

    def load(self, definition: Function) -> Loaded:
        """Imports or unpickles a function and loads its model, unless that is done. From any thread.

        Raises:
            BaseException: whatever that raises.
        """
        with self._loading.setdefault(definition.id, threading.Lock()):
            loaded = self._loaded.get(definition.id)
            if loaded is None:
                loaded = self._loaded[definition.id] = Loaded(definition, self.resolve(definition))
        self._loading.pop(definition.id, None)
        return loaded

    def resolve(self, definition: Function) -> Callable[..., Any]:
        """What a definition describes, ready to be called."""
        call: Any = codec.load_function(definition, self.store, self._handle)
        if isinstance(call, RemoteFunction):
            call = call.function
        load = getattr(call, "__rtml_load__", None)
        if load is not None:
            load()
        return call  # type: ignore[no-any-return]

    def forget(self, functions: list[int]) -> None:
        """Let go of functions, and of the models that they hold."""
        for number in functions:
            self._loaded.pop(number, None)
        self._client_core.forget(functions)

    def arguments(self, attempt: Attempt) -> Call:
        """The arguments, dependencies filled in."""
        deps = attempt.deps
        if not deps:
            return decode_call(attempt.args, (), self.store, self._handle)
        values = [codec.decode_value(payload, self.store, self._handle) for payload in deps]
        return decode_call(attempt.args, values, self.store, self._handle)

    def is_far(self, attempts: list[Attempt]) -> bool:
        """Whether something that these need lies on another node."""
        far = self.store.is_far
        return any(far(one.args) or (one.deps is not None and any(map(far, one.deps))) for one in attempts)

    def fetch(self, attempts: list[Attempt]) -> list[object]:
        """Bring that here, and keep it for as long as the returned list is. From any thread.

        Raises:
            RtmlError: it cannot be had.
        """
        store, payloads = self.store, [payload for one in attempts for payload in (one.args, *(one.deps or ()))]
        return [store.get(payload) for payload in payloads if isinstance(payload, ObjectRef) and store.is_far(payload)]

    def info(self, attempt: Attempt, loaded: Loaded) -> TaskInfo:
        """The task as the code inside it sees it."""
        chain = attempt.chain
        return TaskInfo(
            attempt.id,
            attempt.attempt,
            loaded.name,
            [loaded.name] if chain is None else [*chain, loaded.name],
            None if attempt.budget is None else self._core.deadline(attempt),
            attempt.graph,
            self._core.functions.get(attempt.context) if attempt.context else None,
        )

    # --- results ----------------------------------------------------------------------------------------------------

    def success(self, attempt: Attempt, value: Any, run: float, loaded: Loaded) -> TaskResult:
        """The result of a call that returned `value`, or the error that it cannot be sent."""
        try:
            if attempt.data_only:
                encoded = codec.encode_data(value, self.store)
            else:
                encoded = encode_value(value, self.store, Future, leaving=True)
        except BaseException as caught:  # noqa: BLE001 - runs the user's __reduce__; what goes wrong is the task's error
            error = caught
            if inspect.isgenerator(value) or inspect.isasyncgen(value):
                text = f"the result of {loaded.name} is a generator: use .stream(...) instead of .submit(...)"
                error = SerializationError(text)
            return self.failure(attempt, error, run, loaded)
        missing = take_missing(attempt.id) if process.missed else None
        moved, moving = self.store.fetched()
        if encoded.handles or encoded.batch_key or missing or moved or encoded.folded is not None:
            return TaskResult(
                attempt.id,
                attempt.attempt,
                OK,
                encoded.payload,
                None,
                run,
                handles=list(encoded.handles) or None,
                batch_key=encoded.batch_key,
                items=encoded.items,
                missing=missing,
                moved=moved,
                moving=moving,
                folded=encoded.folded,
            )
        return TaskResult(attempt.id, attempt.attempt, OK, encoded.payload, None, run)

    def failure(
        self, attempt: Attempt, error: BaseException, run: float = 0.0, loaded: Loaded | None = None
    ) -> TaskResult:
        """The result of a call that raised."""
        take_missing(attempt.id)
        if loaded is None:
            definition = self._core.functions.get(attempt.function)
            name = definition.name if definition is not None else f"{attempt.function:x}"
        else:
            name = loaded.name
        chain = [*(attempt.chain or ()), name]
        retryable = loaded is not None and bool(loaded.retry_on) and isinstance(error, loaded.retry_on)
        try:
            info = codec.encode_error(error, chain, pickle=not attempt.data_only)
        except BaseException as problem:  # noqa: BLE001 - MemoryError, RecursionError, a class that fights back
            info = ErrorInfo(type(error).__name__, f"(details are lost: {type(problem).__name__})", chain=chain)
        return TaskResult(attempt.id, attempt.attempt, ERROR, b"", info, run, retryable)

    def cancelled(self, attempt: Attempt, run: float, loaded: Loaded) -> TaskResult:
        """The result of a call that was interrupted because nobody wants it any more."""
        take_missing(attempt.id)
        chain = [*(attempt.chain or ()), loaded.name]
        info = ErrorInfo("TaskCancelled", "the task was cancelled while it ran", chain=chain)
        return TaskResult(attempt.id, attempt.attempt, CANCELLED, b"", info, run)

    # --- batches ----------------------------------------------------------------------------------------------------

    def batch(self, group: list[Attempt]) -> tuple[Loaded | None, list[tuple[list[Attempt], Call]], list[TaskResult]]:
        """Joins the calls of a batch.

        Returns:
            The function, the joined calls (one for each shape of call: usually a single one), and the errors of those
            whose function or arguments cannot be read.
        """
        failed: list[TaskResult] = []
        loaded: Loaded | None = None
        shapes: dict[tuple[Any, ...], tuple[list[Attempt], list[Call]]] = {}
        for attempt in group:
            try:
                loaded = self.function(attempt)
                args, kwargs = self.arguments(attempt)
            except BaseException as error:  # noqa: BLE001 - user code: this call's error
                failed.append(self.failure(attempt, error, 0.0, loaded))
                continue
            members, calls = shapes.setdefault((len(args), *sorted(kwargs)), ([], []))
            members.append(attempt)
            calls.append((args, kwargs))
        return loaded, [(members, _columns(calls)) for members, calls in shapes.values()], failed

    def batch_results(self, group: list[Attempt], values: Any, run: float, loaded: Loaded) -> list[TaskResult]:
        """One result per call out of what the batch function returned."""
        if isinstance(values, str | bytes | dict) or not (
            hasattr(values, "__len__") and hasattr(values, "__getitem__")
        ):
            return self._wrong(group, f"not {type(values).__name__}", run, loaded)
        if len(values) != len(group):
            return self._wrong(group, f"not {len(values)} of them", run, loaded)
        return [
            self.failure(attempt, value, run, loaded)
            if isinstance(value, BaseException)
            else self.success(attempt, value, run, loaded)
            for attempt, value in zip(group, values)
        ]

    def _wrong(self, group: list[Attempt], what: str, run: float, loaded: Loaded) -> list[TaskResult]:
        error = BatchError(
            f"{loaded.name} is a batch function: called with lists of {len(group)} it must return a list of "
            f"{len(group)} results, {what}"
        )
        return [self.failure(attempt, error, run, loaded) for attempt in group]


def _columns(calls: list[Call]) -> Call:
    """Calls of one shape as one call with lists: one entry per call in each parameter."""
    args = tuple([call[0][index] for call in calls] for index in range(len(calls[0][0])))
    kwargs = {name: [call[1][name] for call in calls] for name in calls[0][1]}
    return args, kwargs


def run_coroutine(coroutine: Any) -> Any:
    """The value of a coroutine made by a function that does not look asynchronous (an async method, a lambda)."""
    import asyncio

    return asyncio.run(coroutine)


def holds_futures(result: TaskResult) -> bool:
    """Whether the result must be sent before the futures in it may be dropped here."""
    return result.handles is not None or result.payload.__class__ is not bytes
