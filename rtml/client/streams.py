"""Streams: what a generator on a worker yields, item by item.

    for item in pages.stream(document): ...
    async for item in pages.stream(document): ...

`Inlet` is the client's end of a stream: it puts items into their order, whatever connections and attempts they came
over, and drops what came again. `Stream` is the program's hand on it; when that is closed or gone, the generator ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from msgspec.structs import replace

from rtml.client import handles
from rtml.client.driver import Waiter
from rtml.client.future import Future, error_of
from rtml.client.waiting import Bridge
from rtml.messages import Function, Item, Items, ObjectRef, Options, Task, TaskResult

if TYPE_CHECKING:
    from rtml.client.actors import ActorRef
    from rtml.client.client import Client

T = TypeVar("T")

#: Items that a generator may be ahead of its consumer, if nothing is said.
WINDOW: Final = 16


class Inlet:
    """Items that have come and were not taken. All of it under the driver's lock.

    Args:
        client: whose stream it is.
        task: of the generator.
        window: items that it may be ahead.
    """

    __slots__ = ("_client", "ended", "expected", "items", "taken", "task", "told", "waiter", "window")

    def __init__(self, client: Client, task: int, window: int) -> None:
        self._client = client
        self.task = task
        self.window = window
        #: (payload, futures inside)
        self.items: deque[tuple[bytes | ObjectRef, list[Future[Any]]]] = deque()
        #: Number of the next item that is new.
        self.expected = 0
        #: Items that the program has; and how many of them the producer was told of.
        self.taken = self.told = 0
        self.ended = False
        self.waiter: Waiter | None = None

    def receive(self, first: int, items: list[Item]) -> Waiter | None:
        """Items came. Returns who waits for them, to be told without the lock."""
        core = self._client.core
        new = items[max(0, self.expected - first) :]
        if first > self.expected:
            return None  # some are missing: they come again before these
        for item in items[: len(items) - len(new)]:
            if isinstance(item.payload, ObjectRef) and item.payload.id not in core.objects:
                core.release([item.payload.id])
        core.received([item.payload.id for item in new if isinstance(item.payload, ObjectRef)])
        self.items.extend(
            (item.payload, [handles.handle(self._client, one) for one in item.handles or ()]) for item in new
        )
        self.expected += len(new)
        if items and not new and not self.ended:
            core.taken(self.task, self.taken)  # its producer does not know how far we are
        return self._wake() if new else None

    def end(self) -> Waiter | None:
        """The task has ended."""
        self.ended = True
        self._client.core.forget_stream(self.task)
        return self._wake()

    def _wake(self) -> Waiter | None:
        waiter, self.waiter = self.waiter, None
        return waiter

    def take(self) -> tuple[bytes | ObjectRef, list[Future[Any]]] | None:
        """The next item, if it is there."""
        if not self.items:
            return None
        item = self.items.popleft()
        self.taken += 1
        if not self.ended and (self.taken - self.told >= max(1, self.window // 2) or not self.items):
            self.told = self.taken
            self._client.core.taken(self.task, self.taken)
        return item


def start(
    client: Client,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options | None,
    actor: ActorRef | None = None,
    root: tuple[str, int] = ("", 0),
) -> Stream[Any]:
    """Submit a call of a generator. It is tried again only if its options say so.

    `root` is the trace and the context of a root submission, see `Task`.
    """
    given = options or Options()
    window = given.window or function.options.window or WINDOW
    if given.retries is None and function.options.retries is None:
        given = replace(given, retries=0)
    future = client.call(function, args, kwargs, given, *root, special=_Opening(window, actor))
    inlet = client._streams.get(future.id)
    if inlet is None:  # it has failed already
        inlet = Inlet(client, future.id, window)
        inlet.ended = True
    return Stream(future, inlet)


class _Opening:
    """The task is a stream."""

    __slots__ = ("_actor", "_window")

    def __init__(self, window: int, actor: ActorRef | None) -> None:
        self._window = window
        self._actor = actor

    def prepare(self, client: Client, task: Task) -> None:
        task.stream = self._window
        client._streams[task.id] = Inlet(client, task.id, self._window)
        client.core.taken(task.id, 0)
        if self._actor is not None:
            self._actor.prepare(client, task)


def receive(client: Client, message: Items) -> None:
    """Items have come."""
    with client.lock:
        inlet = client._streams.get(message.task)
        if inlet is None:  # closed: nobody wants them
            client.core.release([item.payload.id for item in message.items if isinstance(item.payload, ObjectRef)])
            return
        waiter = inlet.receive(message.first, message.items)
    if waiter is not None:
        waiter.notify(None)


def ended(client: Client, results: list[TaskResult]) -> list[Waiter]:
    """Tasks have ended. Returns who waits for their streams. Under the lock."""
    waiters: list[Waiter | None] = []
    for result in results:
        inlet = client._streams.pop(result.id, None)
        if inlet is not None:
            tail = result.tail or []
            inlet.ended = True
            waiters += [inlet.receive(result.made - len(tail), tail), inlet.end()]
    return [waiter for waiter in waiters if waiter is not None]


def abandon(client: Client, futures: list[Future[Any]]) -> None:
    """These have ended here, and no result will come."""
    if client._streams:
        with client.lock:
            inlets = [inlet for future in futures if (inlet := client._streams.pop(future.id, None)) is not None]
            waiters = [inlet.end() for inlet in inlets]
        for waiter in waiters:
            if waiter is not None:
                waiter.notify(None)


class Stream(Generic[T]):
    """What a generator yields, in order, each item once. Can be iterated in one place, synchronously or not.

    It cannot be sent to another process. Closing it, or dropping it, ends the generator (`GeneratorExit`).
    """

    def __init__(self, future: Future[Any], inlet: Inlet) -> None:
        self._future = future
        self._inlet = inlet
        self._client = future._client

    @property
    def future(self) -> Future[None]:
        """Of the end: None, or the generator's error."""
        return self._future

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        client = self._client
        while True:
            with client.lock:
                item = self._inlet.take()
                waiter = None
                if item is None and not self._inlet.ended:
                    waiter = self._inlet.waiter = Waiter()
            if item is not None:
                self._tell()
                return self._value(item)
            if waiter is None:
                self._raise_end(StopIteration())
            else:
                client.driver.wait(waiter, None)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        return self._value(await self.next_payload())

    async def next_payload(self) -> tuple[bytes | ObjectRef, list[Future[Any]]]:
        """The next item as it came. Raises `StopAsyncIteration`, or the generator's error, at the end."""
        import asyncio

        client = self._client
        while True:
            with client.lock:
                item = self._inlet.take()
                bridge = None
                if item is None and not self._inlet.ended:
                    bridge = self._inlet.waiter = Bridge(asyncio.get_running_loop())
            if item is not None:
                self._tell()
                return item
            if bridge is None:
                self._raise_end(StopAsyncIteration())
            else:
                client.driver.awaiting(bridge.loop)
                await bridge.future

    def close(self) -> None:
        """End the generator, if it has not ended: what it yielded and was not taken is dropped."""
        with self._client.lock:
            self._client._streams.pop(self._inlet.task, None)
            self._client.core.forget_stream(self._inlet.task)
            self._inlet.ended = True
            self._inlet.items.clear()
        self._future.cancel()

    async def aclose(self) -> None:
        """The same as `close`, for `contextlib.aclosing`."""
        self.close()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        inlet = getattr(self, "_inlet", None)
        if inlet is not None and not inlet.ended:
            self._client.drop("end", inlet.task)

    def __reduce__(self) -> Any:
        raise TypeError("a stream has one consumer: it cannot be sent to another process; send its items")

    def __repr__(self) -> str:
        inlet = self._inlet
        return f"<Stream of task {inlet.task:#x}, {inlet.taken} taken{', ended' if inlet.ended else ''}>"

    def _tell(self) -> None:
        if self._client.core.urgent:
            self._client.driver.flush()

    def _value(self, item: tuple[bytes | ObjectRef, list[Future[Any]]]) -> T:
        payload, _ = item
        try:
            value: T = self._client.decode(payload)
        finally:
            if isinstance(payload, ObjectRef):
                # What is mapped stays mapped: its owner looks for readers before it writes there again.
                self._client.drop("release", payload.id)
        return value

    def _raise_end(self, end: Exception) -> None:
        error = error_of(self._future)
        raise end if error is None else error
