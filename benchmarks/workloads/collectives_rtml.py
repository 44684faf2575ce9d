"""rtml's side of `benchmarks.workloads.collectives`: a program on host 0, whose measuring task runs on host 0's node.

    python -m benchmarks.workloads.collectives_rtml ADDRESS KEYS HOSTS BYTES... REPETITIONS

Prints {"op bytes": [seconds, ...]} as JSON. The nodes are labelled at=0, at=1, ...
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

import rtml

#: Seconds between two arrivals where they are staggered.
STEP = 0.1


def at(number: int) -> dict[str, float]:
    """The resource of one host."""
    return {f"at={number}": 1.0}


@rtml.task
def make(number: int, size: int, seconds: float = 0.0) -> Any:
    """An input."""
    time.sleep(seconds)
    return np.full(size // 4, number, np.float32)


@rtml.task
def add_all(*arrays: Any) -> Any:
    """A naive reduction: one node fetches everything."""
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


@rtml.task
async def keep(value: Any) -> None:
    """Its value is here."""


@rtml.task
def endpoint() -> str:
    """The data endpoint of the node."""
    client = rtml.current()
    return client.store.place.data


async def ended(futures: list[Any]) -> float:
    """Wait for their ends, not for their values; returns when that was."""
    loop = asyncio.get_running_loop()
    events = []
    for future in futures:
        event = asyncio.Event()
        future.add_done_callback(lambda _, event=event: loop.call_soon_threadsafe(event.set))
        events.append(event.wait())
    await asyncio.gather(*events)
    now = time.perf_counter()
    for future in futures:
        assert future.exception() is None
    return now


def inputs(hosts: int, size: int, seconds: float = 0.0) -> list[Any]:
    """One on each host."""
    return [make.options(resources=at(number)).submit(number, size, seconds * number) for number in range(hosts)]


async def check(total: Any, hosts: int) -> None:
    """It is the sum."""
    assert bool((await total == sum(range(hosts))).all())


async def _collected(hosts: int, size: int, collect: Callable[[list[Any]], Any]) -> float:
    """Seconds from when all inputs are there."""
    given = inputs(hosts, size)
    await ended(given)
    start = time.perf_counter()
    total = collect(given)
    taken = await ended([total]) - start
    await check(total, hosts)
    return taken


async def reduce(hosts: int, size: int, nodes: list[str]) -> float:
    """To host 0."""
    return await _collected(hosts, size, rtml.reduce)


async def allreduce(hosts: int, size: int, nodes: list[str]) -> float:
    """To all hosts."""
    return await _collected(hosts, size, rtml.allreduce)


async def staggered(hosts: int, size: int, nodes: list[str]) -> float:
    """To host 0, from inputs that come one after the other: seconds since the last one."""
    given = inputs(hosts, size, STEP)
    total = rtml.reduce(given)
    last = await ended(given)
    taken = await ended([total]) - last
    await check(total, hosts)
    return taken


async def broadcast(hosts: int, size: int, nodes: list[str]) -> float:
    """From host 0."""
    (given,) = inputs(1, size)
    await ended([given])
    start = time.perf_counter()
    held = rtml.broadcast(given, nodes[1:])
    taken = await ended([held]) - start
    assert len(await held) == hosts - 1
    return taken


async def naive_broadcast(hosts: int, size: int, nodes: list[str]) -> float:
    """Everybody fetches from host 0: an array each, so that nobody can pass it on."""
    given = [make.options(resources=at(0)).submit(number, size) for number in range(1, hosts)]
    await ended(given)
    start = time.perf_counter()
    kept = [keep.options(resources=at(number)).submit(one) for number, one in enumerate(given, 1)]
    return await ended(kept) - start


async def naive_reduce(hosts: int, size: int, nodes: list[str]) -> float:
    """Host 0 fetches everything and adds."""
    return await _collected(hosts, size, lambda given: add_all.options(resources=at(0)).submit(*given))


Measured = Callable[[int, int, list[str]], Coroutine[Any, Any, float]]
OPERATIONS: dict[str, Measured] = {
    "broadcast": broadcast,
    "reduce": reduce,
    "allreduce": allreduce,
    "staggered": staggered,
    "naive broadcast": naive_broadcast,
    "naive reduce": naive_reduce,
}


@rtml.task
async def measure(name: str, hosts: int, size: int, nodes: list[str], repetitions: int) -> list[float]:
    """One operation, a few times."""
    return [await OPERATIONS[name](hosts, size, nodes) for _ in range(repetitions)]


def main() -> None:
    """Measures everything."""
    address, keys, hosts = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sizes, repetitions = [int(text) for text in sys.argv[4:-1]], int(sys.argv[-1])
    found: dict[str, list[float]] = {}
    with rtml.connect(address, keys=keys) as client:
        while sum(bool(one["cpu"]) for one in json.loads(client.query("status"))["dispatchers"]) < hosts:
            time.sleep(0.05)
        where = [endpoint.options(resources=at(number)) for number in range(hosts)]
        nodes = rtml.get([one.submit() for one in where], timeout=120)
        bound = measure.options(resources=at(0))
        for name in ("reduce", "broadcast", "naive reduce"):  # functions are loaded, connections made
            bound.submit(name, hosts, 200_000, nodes, 1).result(120)
        for size in sizes:
            for name in OPERATIONS:
                found[f"{name} {size}"] = bound.submit(name, hosts, size, nodes, repetitions).result(300)
                print(f"{name} {size}: {found[f'{name} {size}']}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
