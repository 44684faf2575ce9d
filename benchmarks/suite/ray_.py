"""`ray microbenchmark` (ray/_private/ray_perf.py of Ray 2.60) with this project's timing: definitions are Ray's own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import ray

from benchmarks.suite.timing import Plan, Row, main

N_CPU = multiprocessing.cpu_count() // 2


def remote(function: Callable[..., Any]) -> Any:
    """`@ray.remote`, typed."""
    return ray.remote(function)


class ActorClass:
    """A server."""

    def small_value(self) -> bytes:
        return b"ok"

    def small_value_arg(self, x: Any) -> bytes:
        return b"ok"

    def small_value_batch(self, n: int) -> None:
        ray.get([small_value.remote() for _ in range(n)])


class AsyncActorClass:
    """A server with coroutines."""

    async def small_value(self) -> bytes:
        return b"ok"

    async def small_value_with_arg(self, x: Any) -> bytes:
        return b"ok"

    async def small_value_batch(self, n: int) -> None:
        await asyncio.wait([small_value.remote() for _ in range(n)])


class ClientClass:
    """Calls servers."""

    def __init__(self, servers: Any) -> None:
        self.servers = servers if isinstance(servers, list) else [servers]

    def small_value_batch(self, n: int) -> None:
        results = []
        for s in self.servers:
            results.extend([s.small_value.remote() for _ in range(n)])
        ray.get(results)

    def small_value_batch_arg(self, n: int) -> None:
        x = ray.put(0)
        results = []
        for s in self.servers:
            results.extend([s.small_value_arg.remote(x) for _ in range(n)])
        ray.get(results)


# Not as decorators: type checkers do not see what a decorator makes of a class or function.
Actor: Any = ray.remote(num_cpus=0)(ActorClass)
AsyncActor: Any = ray.remote(AsyncActorClass)
Client: Any = ray.remote(num_cpus=0)(ClientClass)


@remote
def small_value() -> bytes:
    return b"ok"


@remote
def create_object_containing_ref() -> list[Any]:
    return [ray.put(1) for _ in range(10_000)]


@remote
def do_put_small() -> None:
    for _ in range(100):
        ray.put(0)


@remote
def do_put() -> None:
    for _ in range(10):
        ray.put(numpy.zeros(10 * 1024 * 1024, dtype=numpy.int64))


@remote
def work(actors: list[Any], n: int) -> None:
    ray.get([actors[i % N_CPU].small_value.remote() for i in range(n)])


def objects(plan: Plan) -> Iterator[Row]:
    """Rows about `get` and `put`."""
    value = ray.put(0)
    yield Row("single client get calls /s", lambda: ray.get(value))
    yield Row("single client put calls /s", lambda: ray.put(0))
    yield Row("multi client put calls /s", lambda: ray.get([do_put_small.remote() for _ in range(10)]), 1000)
    array = numpy.zeros(100 * 1024 * 1024, dtype=numpy.int64)
    yield Row("single client put gigabytes /s", lambda: ray.put(array), 8 * 0.1)
    yield Row("multi client put gigabytes /s", lambda: ray.get([do_put.remote() for _ in range(10)]), 10 * 8 * 0.1)
    holder = create_object_containing_ref.remote()
    yield Row("single client get object containing 10k refs /s", lambda: ray.get(holder))


def wait_multiple_refs() -> None:
    not_ready = [small_value.remote() for _ in range(1000)]
    fetch_local = True
    for _ in range(1000):
        _ready, not_ready = ray.wait(not_ready, fetch_local=fetch_local)
        fetch_local = False


def tasks(plan: Plan) -> Iterator[Row]:
    """Rows about tasks."""
    many = lambda: ray.get([small_value.remote() for _ in range(1000)])  # noqa: E731 - two rows of Ray's are the same
    yield Row("single client tasks and get batch /s", many)
    yield Row("single client wait 1k refs /s", wait_multiple_refs)
    yield Row("single client tasks sync /s", lambda: ray.get(small_value.remote()))
    yield Row("single client tasks async /s", many, 1000)
    n, m = 10_000 // plan.parts, 4
    actors = [Actor.remote() for _ in range(m)]
    yield Row("multi client tasks async /s", lambda: ray.get([a.small_value_batch.remote(n) for a in actors]), n * m)


def one_actor(kind: str, a: Any) -> list[Row]:
    """Calls from one to one, one at a time and many."""
    return [
        Row(f"1:1 {kind} calls sync /s", lambda: ray.get(a.small_value.remote())),
        Row(f"1:1 {kind} calls async /s", lambda: ray.get([a.small_value.remote() for _ in range(1000)]), 1000),
    ]


def several(kind: str, make: Callable[[], Any], plan: Plan) -> Iterator[Row]:
    """Calls of one client actor, and of several tasks, on n actors."""
    n, m = 5000 // plan.parts, 4
    client = Client.remote([make() for _ in range(N_CPU)])
    yield Row(f"1:n {kind} calls async /s", lambda: ray.get(client.small_value_batch.remote(n)), n * N_CPU)
    a = [make() for _ in range(N_CPU)]
    yield Row(f"n:n {kind} calls async /s", lambda: ray.get([work.remote(a, n) for _ in range(m)]), m * n)


def actors(plan: Plan) -> Iterator[Row]:
    """Rows about actors."""
    yield from one_actor("actor", Actor.remote())
    a = Actor.options(max_concurrency=16).remote()
    yield Row("1:1 actor calls concurrent /s", lambda: ray.get([a.small_value.remote() for _ in range(1000)]), 1000)
    yield from several("actor", Actor.remote, plan)
    n = 1000
    clients = [Client.remote(Actor.remote()) for _ in range(N_CPU)]
    yield Row(
        "n:n actor calls with arg async /s",
        lambda: ray.get([c.small_value_batch_arg.remote(n) for c in clients]),
        n * len(clients),
    )


def async_actors(plan: Plan) -> Iterator[Row]:
    """Rows about actors with coroutines."""
    a = AsyncActor.remote()
    yield from one_actor("async-actor", a)
    yield Row(
        "1:1 async-actor calls with args async /s",
        lambda: ray.get([a.small_value_with_arg.remote(i) for i in range(1000)]),
        1000,
    )
    yield from several("async-actor", AsyncActor.remote, plan)


def through_the_network(plan: Plan) -> Iterator[Row]:
    """The rows of Ray's client: a program that is connected to a cluster by its address."""
    from ray.util.client.ray_client_helpers import ray_start_client_server

    ray.shutdown()
    with ray_start_client_server(ray_connect_handler=lambda job_config=None, **_: start_locally()) as client:

        def put_small_values() -> None:
            for _ in range(100):
                client.put(0)

        small_value = client.remote(lambda: b"ok")
        do_put_small = client.remote(put_small_values)
        actor = client.remote(num_cpus=0)(ActorClass)

        value, array = client.put(0), numpy.zeros(100 * 1024 * 1024, dtype=numpy.int64)
        yield Row("client: get calls /s", lambda: client.get(value))
        yield Row("client: put calls /s", lambda: client.put(0))
        yield Row("client: put gigabytes /s", lambda: client.put(array), 8 * 0.1)
        yield Row("client: tasks and get batch /s", lambda: client.get([small_value.remote() for _ in range(1000)]))
        yield Row(
            "client: tasks and put batch /s", lambda: client.get([do_put_small.remote() for _ in range(10)]), 1000
        )
        a, b = actor.remote(), actor.options(max_concurrency=16).remote()
        yield Row("client: 1:1 actor calls sync /s", lambda: client.get(a.small_value.remote()))
        for name, one in (("async", a), ("concurrent", b)):
            yield Row(
                f"client: 1:1 actor calls {name} /s",
                lambda one=one: client.get([one.small_value.remote() for _ in range(1000)]),  # type: ignore[misc]
                1000,
            )


def start_locally() -> None:
    """Two CPUs, no dashboard, no usage report; object store and all else as Ray's default."""
    from ray._private.client_mode_hook import disable_client_hook

    with disable_client_hook():
        if not ray.is_initialized():
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _node_ip_address="127.0.0.1",
            )


def start() -> Callable[[], str]:
    """Starts Ray."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    start_locally()
    return lambda: str(ray.__version__)


if __name__ == "__main__":
    main("ray", [objects, tasks, actors, async_actors, through_the_network], start, ray.shutdown)
