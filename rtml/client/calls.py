"""How the many kinds of Python callables become plain functions with arguments, and helpers that run on workers."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from rtml.client import progress
from rtml.client.functions import RETRY_ON, RemoteFunction, task
from rtml.client.future import Future, remaining
from rtml.client.gathered import Gathered
from rtml.codec import function_name, is_async
from rtml.codec.byvalue import CACHED
from rtml.errors import SubmitError
from rtml.messages import Options

if TYPE_CHECKING:
    from rtml.client.client import Client

#: Callables that are what they are: their definition does not change after the first submission, so it is sent once.
_CONSTANT = (types.FunctionType, types.BuiltinFunctionType, type, CACHED)


def has_identity(fn: Any) -> bool:
    """Whether the definition of `fn` may be cached by the object itself: it is constant, and weakly referenceable."""
    return isinstance(fn, _CONSTANT)


def is_one_off(fn: Any) -> bool:
    """Whether `fn` is a plain function made inside another one: perhaps one of very many, each called once."""
    return isinstance(fn, types.FunctionType) and "<" in fn.__qualname__ and not is_async(fn)


def flatten(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any], Options | None]:
    """`fn` as a function that can be sent once, what it is called with, and options that keep its name.

    Bound methods, partials and callable objects carry state, which travels as an argument: as it is now, with every
    call.
    """
    if isinstance(fn, _CONSTANT):
        owner = getattr(fn, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType):
            return fn, args, kwargs, None
        return call_method, (owner, fn.__name__, *args), kwargs, Options(name=fn.__qualname__)
    if isinstance(fn, functools.partial):
        inner, args, kwargs, options = flatten(fn.func, (*fn.args, *args), {**fn.keywords, **kwargs})
        return inner, args, kwargs, options
    if isinstance(fn, types.MethodType):
        owner = fn.__self__
        if isinstance(owner, type) or fn.__func__ is getattr(type(owner), fn.__name__, None):
            return call_method, (owner, fn.__name__, *args), kwargs, Options(name=fn.__qualname__)
    if not callable(fn):
        raise TypeError(f"expected something callable, got {type(fn).__name__}")
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return call_object, (fn, *args), kwargs, Options(name=str(name))


def call_method(owner: Any, method: str, /, *args: Any, **kwargs: Any) -> Any:
    """Runs on the worker: a bound method."""
    return getattr(owner, method)(*args, **kwargs)


def call_object(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Runs on the worker: any other callable object."""
    return fn(*args, **kwargs)


def run_chunk(fn: Callable[..., Any], rows: list[tuple[Any, ...]]) -> list[Any]:
    """Runs on the worker: several calls of `map` in one task."""
    return [fn(*row) for row in rows]


async def run_chunk_async(fn: Callable[..., Any], rows: list[tuple[Any, ...]]) -> list[Any]:
    """Runs on the worker: several calls of `map` of an async function in one task, one after the other."""
    return [await fn(*row) for row in rows]


def chunked(fn: Callable[..., Any]) -> RemoteFunction[..., Any]:
    """What runs a chunk of calls of `fn`, with the options of `fn`."""
    plain, options, retry_on = fn, {}, ()  # type: Any, dict[str, Any], Any
    if isinstance(fn, RemoteFunction):
        plain = fn.function
        for some in (fn.defaults, fn.overrides):
            if some is not None:
                values = msgspec.structs.asdict(some)
                options |= {name: value for name, value in values.items() if value is not None}
        retry_on = getattr(plain, RETRY_ON, ())
    if options.get("batch") or retry_on:
        raise SubmitError(f"{function_name(plain)}: chunksize cannot be combined with batch or retry_on")
    options.setdefault("name", function_name(plain))
    return task(**options)(run_chunk_async if is_async(plain) else run_chunk)


def ungather(value: Any) -> Any:
    """`value` with every `Gathered`, at any depth of lists, tuples and dicts, replaced by the list of its members."""
    if isinstance(value, Gathered):
        return [ungather(member) for member in value.members]
    if type(value) is dict:
        return {name: ungather(child) for name, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)([ungather(child) for child in value])
    return value


def mapped(
    client: Client, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], timeout: float | None, chunksize: int
) -> Iterator[Any]:
    """The results of `Client.map`, in order."""
    deadline = None if timeout is None else time.monotonic() + timeout
    if chunksize == 1:
        return ordered([client.submit(fn, *args) for args in zip(*iterables)], deadline, function_name(fn))
    plain = fn.function if isinstance(fn, RemoteFunction) else fn
    together = chunked(fn)
    rows = zip(*iterables)
    chunks = iter(lambda: list(itertools.islice(rows, chunksize)), [])
    return itertools.chain.from_iterable(
        ordered([client.submit(together, plain, chunk) for chunk in chunks], deadline, function_name(fn))
    )


def ordered(futures: list[Future[Any]], deadline: float | None, name: str) -> Iterator[Any]:
    """The results in order, forgetting each future as it is used; cancels what is left when abandoned."""
    futures.reverse()
    return _ordered(futures, deadline, progress.for_map(name, len(futures)))


def _ordered(futures: list[Future[Any]], deadline: float | None, shown: progress.Progress | None) -> Iterator[Any]:
    total = len(futures)
    try:
        while futures:
            if shown is not None:
                _watch(futures, total, deadline, shown)
            # No local name for the future or its value: they must not live here while the caller uses the value.
            yield _result_or_cancel(futures.pop(), deadline)
    finally:
        if shown is not None:
            shown.close()
        for client, group in itertools.groupby(futures, key=lambda future: future._client):
            client.cancel_all(list(group))


def _result_or_cancel(future: Future[Any], deadline: float | None) -> Any:
    try:
        try:
            return future.result(remaining(deadline))
        finally:
            future.cancel()
    finally:
        # An exception holds this frame, which must not hold the future that holds the exception.
        del future


def _watch(futures: list[Future[Any]], total: int, deadline: float | None, shown: progress.Progress) -> None:
    """Draw while the next future is not there."""
    while True:
        if shown.due:
            shown.draw(total - sum([not future.done() for future in futures]))
        left = remaining(deadline)
        if left == 0 or futures[-1].done():
            return
        concurrent.futures.wait(futures[-1:], progress.PERIOD if left is None else min(progress.PERIOD, left))
