"""`ray microbenchmark` (ray/_private/ray_perf.py of Ray 2.60), ported line by line to rtml's public face."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy

import rtml
from benchmarks.suite.timing import Plan, Row, main

N_CPU = multiprocessing.cpu_count() // 2


class ActorClass:
    """A server."""

    def small_value(self) -> bytes:
        return b"ok"

    def small_value_arg(self, x: Any) -> bytes:
        return b"ok"

    def small_value_batch(self, n: int) -> None:
        rtml.get([small_value.submit() for _ in range(n)])


class AsyncActorClass:
    """A server with coroutines."""

    async def small_value(self) -> bytes:
        return b"ok"

    async def small_value_with_arg(self, x: Any) -> bytes:
        return b"ok"

    async def small_value_batch(self, n: int) -> None:
        await asyncio.wait([asyncio.wrap_future(small_value.submit()) for _ in range(n)])


class ClientClass:
    """Calls servers."""

    def __init__(self, servers: Any) -> None:
        self.servers = servers if isinstance(servers, list) else [servers]

    def small_value_batch(self, n: int) -> None:
        results: list[Any] = []
        for s in self.servers:
            results.extend([s.small_value.submit() for _ in range(n)])
        rtml.get(results)

    def small_value_batch_arg(self, n: int) -> None:
        x = rtml.put(0)
        results: list[Any] = []
        for s in self.servers:
            results.extend([s.small_value_arg.submit(x) for _ in range(n)])
        rtml.get(results)


# Not as decorators: type checkers do not see what a decorator makes of a class.
Actor, AsyncActor, Client = rtml.actor(ActorClass), rtml.actor(AsyncActorClass), rtml.actor(ClientClass)


@rtml.task
def small_value() -> bytes:
    return b"ok"


@rtml.task
def create_object_containing_ref() -> list[Any]:
    return [rtml.put(1) for _ in range(10_000)]


@rtml.task
def do_put_small() -> None:
    for _ in range(100):
        rtml.put(0)


@rtml.task
def do_put() -> None:
    for _ in range(10):
        rtml.put(numpy.zeros(10 * 1024 * 1024, dtype=numpy.int64))


@rtml.task
def work(actors: list[Any], n: int) -> None:
    rtml.get([actors[i % N_CPU].small_value.submit() for i in range(n)])


def objects(plan: Plan) -> Iterator[Row]:
    """Rows about `get` and `put`."""
    value = rtml.put(0)
    yield Row("single client get calls /s", lambda: rtml.get(value))
    yield Row("single client put calls /s", lambda: rtml.put(0))
    yield Row("multi client put calls /s", lambda: rtml.get([do_put_small.submit() for _ in range(10)]), 1000)
    array = numpy.zeros(100 * 1024 * 1024, dtype=numpy.int64)
    yield Row("single client put gigabytes /s", lambda: rtml.put(array), 8 * 0.1)
    yield Row("multi client put gigabytes /s", lambda: rtml.get([do_put.submit() for _ in range(10)]), 10 * 8 * 0.1)
    holder = create_object_containing_ref.submit()
    yield Row("single client get object containing 10k refs /s", lambda: rtml.get(holder))


def wait_multiple_refs() -> None:
    not_ready = [small_value.submit() for _ in range(1000)]
    for _ in range(1000):
        _ready, not_ready = rtml.wait(not_ready)


def tasks(plan: Plan) -> Iterator[Row]:
    """Rows about tasks."""
    many = lambda: rtml.get([small_value.submit() for _ in range(1000)])  # noqa: E731 - two rows of Ray's are the same
    yield Row("single client tasks and get batch /s", many)
    yield Row("single client wait 1k refs /s", wait_multiple_refs)
    yield Row("single client tasks sync /s", lambda: rtml.get(small_value.submit()))
    yield Row("single client tasks async /s", many, 1000)
    n, m = 10_000 // plan.parts, 4
    actors = [Actor.create() for _ in range(m)]
    yield Row("multi client tasks async /s", lambda: rtml.get([a.small_value_batch.submit(n) for a in actors]), n * m)


def one_actor(kind: str, a: Any) -> list[Row]:
    """Calls from one to one, one at a time and many."""
    return [
        Row(f"1:1 {kind} calls sync /s", lambda: rtml.get(a.small_value.submit())),
        Row(f"1:1 {kind} calls async /s", lambda: rtml.get([a.small_value.submit() for _ in range(1000)]), 1000),
    ]


def several(kind: str, make: Callable[[], Any], plan: Plan) -> Iterator[Row]:
    """Calls of one client actor, and of several tasks, on n actors."""
    n, m = 5000 // plan.parts, 4
    client = Client.create([make() for _ in range(N_CPU)])
    yield Row(f"1:n {kind} calls async /s", lambda: rtml.get(client.small_value_batch.submit(n)), n * N_CPU)
    a = [make() for _ in range(N_CPU)]
    yield Row(f"n:n {kind} calls async /s", lambda: rtml.get([work.submit(a, n) for _ in range(m)]), m * n)


def actors(plan: Plan) -> Iterator[Row]:
    """Rows about actors."""
    yield from one_actor("actor", Actor.create())
    a = Actor.options(concurrency=16).create()
    yield Row("1:1 actor calls concurrent /s", lambda: rtml.get([a.small_value.submit() for _ in range(1000)]), 1000)
    yield from several("actor", Actor.create, plan)
    n = 1000
    servers = [Actor.create() for _ in range(N_CPU)]
    clients = [Client.create(server) for server in servers]
    yield Row(
        "n:n actor calls with arg async /s",
        lambda: rtml.get([c.small_value_batch_arg.submit(n) for c in clients]),
        n * len(clients),
    )


def async_actors(plan: Plan) -> Iterator[Row]:
    """Rows about actors with coroutines."""
    a = AsyncActor.create()
    yield from one_actor("async-actor", a)
    yield Row(
        "1:1 async-actor calls with args async /s",
        lambda: rtml.get([a.small_value_with_arg.submit(i) for i in range(1000)]),
        1000,
    )
    yield from several("async-actor", AsyncActor.create, plan)


def through_the_network(plan: Plan) -> Iterator[Row]:
    """The rows of Ray's client: a program that is connected to an engine by its address."""
    rtml.shutdown()
    with engine() as address, rtml.connect(address):
        value, array = rtml.put(0), numpy.zeros(100 * 1024 * 1024, dtype=numpy.int64)
        yield Row("client: get calls /s", lambda: rtml.get(value))
        yield Row("client: put calls /s", lambda: rtml.put(0))
        if accepted(array):
            yield Row("client: put gigabytes /s", lambda: rtml.put(array), 8 * 0.1)
        yield Row("client: tasks and get batch /s", lambda: rtml.get([small_value.submit() for _ in range(1000)]))
        yield Row("client: tasks and put batch /s", lambda: rtml.get([do_put_small.submit() for _ in range(10)]), 1000)
        a, b = Actor.create(), Actor.options(concurrency=16).create()
        yield Row("client: 1:1 actor calls sync /s", lambda: rtml.get(a.small_value.submit()))
        for name, one in (("async", a), ("concurrent", b)):
            yield Row(
                f"client: 1:1 actor calls {name} /s",
                lambda one=one: rtml.get([one.small_value.submit() for _ in range(1000)]),  # type: ignore[misc]
                1000,
            )


def accepted(array: Any) -> bool:
    """Whether large values may travel through the network."""
    try:
        rtml.put(array)
    except rtml.errors.LimitExceeded as error:
        print(f"left out: client: put gigabytes: {error}", file=sys.stderr)
        return False
    return True


@contextmanager
def engine() -> Iterator[str]:
    """An engine of its own that listens on a port; its address."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        address, http = f"tcp://127.0.0.1:{one.getsockname()[1]}", other.getsockname()[1]
    command = [sys.executable, "-m", "rtml", "up", "--listen", address, "--port", str(http), "--workers", "2"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


def start() -> Callable[[], str]:
    """Starts an engine with two workers."""
    rtml.connect(workers=2)
    return lambda: version("rtml")


if __name__ == "__main__":
    main("rtml", [objects, tasks, actors, async_actors, through_the_network], start, rtml.shutdown)
