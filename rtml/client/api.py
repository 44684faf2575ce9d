"""The functions of the module `rtml`: those of a client, applied to the current one."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, TypeVar, overload

from rtml.client import context
from rtml.client.anytime import Anytime, anytime
from rtml.client.client import Client, as_future
from rtml.client.embedded import connect as _connect
from rtml.client.functions import RemoteFunction
from rtml.client.future import PENDING, Future, Ref, error_of, remaining
from rtml.client.gathered import Gathered
from rtml.client.waiting import Group, sleep

T = TypeVar("T")

_first: Final = threading.Lock()


def connect(
    address: str | None = None,
    *,
    workers: int | None = None,
    link: Literal["unix", "zmq"] = "unix",
    logs: bool = True,
    **settings: Any,
) -> Client:
    """Connect to an engine and make it the current client, see `rtml.client.embedded.connect`."""
    client = _connect(address, workers=workers, link=link, logs=logs, **settings)
    if not context.is_executor():
        atexit.register(client.close_at_exit)
    return client


def client() -> Client:
    """The current client; the first use starts an engine of this program's own."""
    found = context.current_client()
    if found is None or found.closed:
        with _first:
            found = context.current_client()
            if found is None or found.closed:
                found = connect()
    return found


def submit(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
    """Run `fn(*args, **kwargs)` on a worker, see `Client.submit`."""
    return client().submit(fn, *args, **kwargs)


def map(
    fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
) -> Iterator[T]:
    """The built-in `map` on the workers, see `Client.map`."""
    return client().map(fn, *iterables, timeout=timeout, chunksize=chunksize)


def put(value: T) -> Future[T]:
    """Store a value once that many tasks shall use; returns a future that has ended."""
    return client().put(value)


@overload
def get(futures: Future[T], timeout: float | None = None) -> T: ...
@overload
def get(futures: Sequence[Future[T]], timeout: float | None = None) -> list[T]: ...
def get(futures: Any, timeout: float | None = None) -> Any:
    """The value of a future, or the list of the values of several.

    Args:
        futures: one, or a sequence.
        timeout: seconds to wait for all of them together.

    Raises:
        TimeoutError: not all are there in time.
        Exception: what the first failing task raised; the others go on.
    """
    if isinstance(futures, Future | Ref):
        return futures.result(timeout)
    futures = _several(futures)
    waiting = {future for future in futures if future._state is PENDING}
    if waiting:
        group = Group(waiting, len(waiting), stop_on_error=True)
        if not _wait_for(group, timeout):
            raise TimeoutError(f"{sum(not future.done() for future in futures)} of {len(futures)} futures not ready")
        for future in group.finished:
            error = error_of(future)
            if error is not None:
                raise error
    return [future.result() for future in futures]


def wait(
    futures: Sequence[Future[T]], num_returns: int = 1, timeout: float | None = None
) -> tuple[list[Future[T]], list[Future[T]]]:
    """Wait until some of the futures have ended.

    Args:
        futures: without repetitions.
        num_returns: how many to wait for.
        timeout: seconds after which to return with fewer.

    Returns:
        (done, pending), both in the order given; `done` has at most `num_returns`, so that a loop which handles those
        misses none.

    Raises:
        ValueError: `num_returns` is not between 1 and the number of futures, or a future is there twice.
    """
    futures = futures if isinstance(futures, list) else _several(futures)
    if not 1 <= num_returns <= max(1, len(futures)):
        raise ValueError(f"num_returns={num_returns} of {len(futures)} futures")
    done, pending = _split(futures, num_returns)
    if len(done) < num_returns and pending:
        waiting = {as_future(future) for future in pending}
        _wait_for(Group(waiting, num_returns - len(done)), timeout)
        done, pending = _split(futures, num_returns)
    if len({*done, *pending}) != len(futures):
        raise ValueError("a future is given twice")
    return done, pending


def _split(futures: list[Future[T]], most: int) -> tuple[list[Future[T]], list[Future[T]]]:
    """At most so many that have ended, and the others; looks at no more than it must, as loops call it often."""
    done: list[Future[T]] = []
    pending: list[Future[T]] = []
    for position, future in enumerate(futures):
        if future._state is PENDING:
            pending.append(future)
        else:
            done.append(future)
            if len(done) == most:
                pending += futures[position + 1 :]
                break
    return done, pending


def as_completed(futures: Iterable[Future[T]], timeout: float | None = None) -> Iterator[Future[T]]:
    """The futures in the order in which they end.

    Args:
        futures: repetitions are dropped.
        timeout: seconds from the first `next` for all of them.

    Raises:
        TimeoutError: while iterating, when the next one is not there in time.
    """
    futures = list(dict.fromkeys(_several(futures)))
    deadline = None if timeout is None else time.monotonic() + timeout
    waiting = {future for future in futures if future._state is PENDING}
    ended = [future for future in futures if future not in waiting]
    group = Group(waiting, min(1, len(waiting)))
    clients = _register(group)
    try:
        given = 0
        yield from ended
        while given < len(waiting):
            if len(group.finished) == given:
                group.expect(given + 1)
                if not group.ready and not _drive(group, clients, remaining(deadline)):
                    raise TimeoutError(f"{len(waiting) - given} of {len(futures)} futures unfinished")
            future = group.finished[given]
            given += 1
            yield future
    finally:
        for one in clients:
            one.unregister(group)


def gather(*futures: Future[Any], return_exceptions: bool = False) -> Gathered:
    """One future of the list of all results: `await rtml.gather(...)`, or `.result()`, see `Client.gather`."""
    owner = futures[0]._client if futures and isinstance(futures[0], Future) else client()
    return owner.gather(*futures, return_exceptions=return_exceptions)


def reduce(
    futures: Iterable[Future[Any]],
    op: str | Callable[[Any, Any], Any] = "add",
    *,
    num: int | None = None,
    elementwise: bool = False,
) -> Future[Any]:
    """One value of the values of many futures, see `rtml.client.collectives.Collectives.reduce`."""
    return client().reduce(futures, op, num=num, elementwise=elementwise)


def allreduce(
    futures: Iterable[Future[Any]],
    op: str | Callable[[Any, Any], Any] = "add",
    *,
    num: int | None = None,
    elementwise: bool = False,
) -> Future[Any]:
    """The same, and all nodes that gave inputs get it, see `rtml.client.collectives.Collectives.allreduce`."""
    return client().allreduce(futures, op, num=num, elementwise=elementwise)


def broadcast(future: Future[Any], nodes: Iterable[str] | None = None) -> Future[list[str]]:
    """Have a large value on many nodes before it is needed there, see `rtml.client.collectives`."""
    return client().broadcast(future, nodes)


def cancel(*futures: Future[Any]) -> int:
    """Cancel futures that have not ended, running or not; returns how many those were."""
    return sum([as_future(future).cancel() for future in futures])


def ref(future: Future[T]) -> Ref:
    """Pass a future to a task as a future, not as its value: the task can wait for it in every way."""
    return Ref(as_future(future))


def shutdown(wait: bool = True, *, cancel_futures: bool = False) -> None:
    """Shut the current client down, if there is one, see `Client.shutdown`."""
    found = context.current_client()
    if found is not None and not context.is_executor():
        found.shutdown(wait, cancel_futures=cancel_futures)


def _several(futures: Any) -> list[Future[Any]]:
    """The futures of a sequence or any other iterable."""
    if isinstance(futures, Future) or not isinstance(futures, Iterable):
        one = "one future" if isinstance(futures, Future) else type(futures).__name__
        raise TypeError(f"expected a list of rtml futures, got {one}")
    return [as_future(future) for future in futures]


def _register(group: Group) -> list[Client]:
    """Register with all clients of the group's futures, and count what has ended before."""
    clients = list({future._client for future in group.wanted})
    for one in clients:
        one.register(group)
    return clients


def _wait_for(group: Group, timeout: float | None) -> bool:
    clients = _register(group)
    try:
        return group.ready or _drive(group, clients, timeout)
    finally:
        for one in clients:
            one.unregister(group)


def _drive(group: Group, clients: list[Client], timeout: float | None) -> bool:
    return clients[0].driver.wait(group, timeout) if len(clients) == 1 else sleep(group, clients, timeout)


__all__ = [
    "Anytime",
    "anytime",
    "RemoteFunction",
    "allreduce",
    "as_completed",
    "broadcast",
    "cancel",
    "client",
    "connect",
    "gather",
    "get",
    "map",
    "put",
    "reduce",
    "ref",
    "shutdown",
    "submit",
    "wait",
]
