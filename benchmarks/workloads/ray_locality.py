"""Tasks that each read another large object, placed near it or blindly (Ray, OSDI'18, figure 8a).

On two nodes, whose links are shaped, objects are made; then tasks are submitted, each with one of them as its argument.
A dispatcher that was started with `--blind` places them without regard to where the objects are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import rtml
from benchmarks.workloads import ray_start, turns
from benchmarks.workloads.cluster import Cluster, cluster

RATE = "100mbit"
#: Bytes of an object -> tasks.
FULL = {100_000: 64, 1_000_000: 48, 10_000_000: 16, 100_000_000: 4}
QUICK = {1_000_000: 8, 10_000_000: 4}
NODES = 2


def make(seed: int, size: int) -> Any:
    """An object."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@rtml.task
def look(array: Any) -> int:
    """Reads a byte of each page."""
    return int(array[::4096].sum(dtype=np.int64))


def learn(size: int = 1_000_000, transfers: int = 12) -> dict[str, Any]:
    """Fetches some objects, so that what the links carry is known."""
    for number in range(transfers):
        here, there = number % NODES + 1, (number + 1) % NODES + 1
        one = rtml.task(resources={f"at={here}": 1})(make).submit(number, size)
        look.options(resources={f"at={there}": 1}).submit(one).result(60)
    return {}


def run(size: int, tasks: int) -> dict[str, Any]:
    """So many tasks on objects of this size, half of them on each node, all submitted at once in a random order."""
    if not tasks:
        return learn()
    made = [rtml.task(resources={f"at={number % NODES + 1}": 1})(make).submit(number, size) for number in range(tasks)]
    rtml.wait(made, num_returns=tasks)
    order = np.random.default_rng(size).permutation(tasks)
    start = time.perf_counter()
    futures = [look.submit(made[number]) for number in order]
    ended = [time.perf_counter() - start for _ in rtml.as_completed(futures)]
    checksum = sum(rtml.get(futures))
    return {"mean_s": sum(ended) / tasks, "last_s": ended[-1], "checksum": checksum}


def _one(made: Cluster, ask: Callable[..., dict[str, Any]], size: int, tasks: int) -> dict[str, Any]:
    before = sum(made.received(number) for number in range(1, NODES + 1))
    answer = ask(size=size, tasks=tasks)
    after = sum(made.received(number) for number in range(1, NODES + 1))
    return {**answer, "moved": after - before, "tasks": tasks}


def measure(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Both ways of placing, in an engine of its own each: mode -> bytes of an object -> what was found."""
    found: dict[str, Any] = {}
    ways: dict[str, tuple[str, ...]] = {"near": (), "blind": ("--blind",)}
    for mode, options in ways.items():
        with (
            cluster(NODES, RATE, root=options) as made,
            made.program(mode, "benchmarks.workloads.ray_locality") as program,
        ):
            program.answer()
            program.ask(size=0, tasks=0)
            for size, tasks in (QUICK if quick else FULL).items():
                one = found.setdefault(mode, {})[size] = _one(made, program.ask, size, tasks)
                figures = f"{one['mean_s'] * 1e3:.1f} ms in the mean, {one['moved'] / 1e6:.1f} MB moved"
                say(f"locality, {mode}: {size / 1e6:g} MB, {tasks} tasks: {figures}")
    for size in QUICK if quick else FULL:
        assert found["near"][size]["checksum"] == found["blind"][size]["checksum"]
    return found


if __name__ == "__main__":
    with ray_start.connect(sys.argv[1:], NODES):
        turns.serve(run)
