"""Asynchronous SGD: a parameter server on host 0's node, workers on the others, real gradients.

    python -m benchmarks.workloads.hoplite_sgd ADDRESS KEYS HOSTS STEPS ROUNDS

In each step the server takes the first half of the workers' gradients that are there, and gives those workers the new
parameters; the others go on with the old ones. With collectives a step is one `rtml.reduce(..., num=k)` and one object
that receivers pass on; naively the server fetches each gradient, and each worker fetches parameters of its own from it.
Prints {"collective": [{"seconds": ..., "loss": [before, after]}, ...], "naive": [...]} as JSON.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import sys
import time
from typing import Any

import numpy as np

import rtml
from benchmarks.workloads.collectives_rtml import at
from benchmarks.workloads.ray_start import nodes_there

#: Units of each layer: 462,592 weights, 1.85 MB.
LAYERS = (64, 1024, 384, 10)
BATCH = 16
RATE = 0.03


def split(flat: Any) -> list[Any]:
    """The layers' weights of a vector of parameters."""
    found, at = [], 0
    for height, width in itertools.pairwise(LAYERS):
        found.append(flat[at : at + height * width].reshape(height, width))
        at += height * width
    return found


def examples(seed: int, count: int) -> tuple[Any, Any]:
    """Inputs, and the classes that a fixed random layer gives them."""
    inputs = np.random.default_rng(seed).standard_normal((count, LAYERS[0]), np.float32)
    teacher = np.random.default_rng(0).standard_normal((LAYERS[0], LAYERS[-1]), np.float32)
    return inputs, (inputs @ teacher).argmax(1)


def forward(weights: list[Any], inputs: Any) -> tuple[list[Any], Any]:
    """Every layer's inputs, and the probabilities of the classes."""
    seen = [inputs]
    for layer in weights[:-1]:
        seen.append(np.maximum(seen[-1] @ layer, 0))
    scores = seen[-1] @ weights[-1]
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return seen, odds / odds.sum(1, keepdims=True)


@rtml.task
def gradient(flat: Any, seed: int) -> Any:
    """Of the mean cross-entropy of a batch, as one vector."""
    weights = split(flat)
    inputs, classes = examples(seed, BATCH)
    seen, odds = forward(weights, inputs)
    error = odds
    error[np.arange(BATCH), classes] -= 1
    error /= BATCH
    found: list[Any] = []
    for number in reversed(range(len(weights))):
        found.append((seen[number].T @ error).ravel())
        if number:
            error = (error @ weights[number].T) * (seen[number] > 0)
    return np.concatenate(found[::-1])


def loss(flat: Any) -> float:
    """Mean cross-entropy of examples that nobody learns from."""
    inputs, classes = examples(1, 256)
    _, odds = forward(split(flat), inputs)
    return float(-np.log(odds[np.arange(len(classes)), classes] + 1e-9).mean())


class Workers:
    """The gradients on their way.

    Args:
        count: workers; they are on hosts 1 to `count`.
        quota: gradients that a step takes.
    """

    def __init__(self, count: int, quota: int) -> None:
        self._tasks = {number: gradient.options(resources=at(number)) for number in range(1, count + 1)}
        self._quota = quota
        self._seed = 1
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Queue[int] = asyncio.Queue()
        self.running: dict[int, Any] = {}

    def start(self, numbers: list[int], parameters: list[Any]) -> None:
        """A gradient of each of these workers, of the parameters beside."""
        for number, given in zip(numbers, parameters, strict=True):
            self._seed += 1
            future = self.running[number] = self._tasks[number].submit(given, self._seed)
            future.add_done_callback(functools.partial(self._has_ended, number))

    def _has_ended(self, number: int, _: Any) -> None:
        self._loop.call_soon_threadsafe(self._ended.put_nowait, number)

    async def reduced(self) -> tuple[Any, list[int]]:
        """The sum of the first ones, made on the way, and whose they are."""
        order = list(self.running)
        future = rtml.reduce([self.running[number] for number in order], num=self._quota)
        total = await future
        return total, [order[position] for position in future.contributors or []]

    async def fetched(self) -> tuple[Any, list[int]]:
        """The same, all of them fetched to here."""
        used = [await self._ended.get() for _ in range(self._quota)]
        arrays = await rtml.gather(*[self.running[number] for number in used])
        return np.sum(arrays, axis=0), used


@rtml.task
async def train(hosts: int, steps: int, collective: bool) -> dict[str, Any]:
    """The server. The first step is not in the time: then connections are made."""
    generator = np.random.default_rng(7)
    flat = np.concatenate(
        [
            generator.standard_normal(height * width, np.float32) * np.float32((2 / height) ** 0.5)
            for height, width in itertools.pairwise(LAYERS)
        ]
    )
    quota = max(1, (hosts - 1) // 2)
    workers = Workers(hosts - 1, quota)
    before = loss(flat)
    free = list(range(1, hosts))
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        given = [rtml.put(flat)] * len(free) if collective else [rtml.put(flat.copy()) for _ in free]
        workers.start(free, given)
        total, free = await (workers.reduced() if collective else workers.fetched())
        flat = flat - np.float32(RATE / quota) * total
    taken = time.perf_counter() - start
    for future in workers.running.values():
        future.cancel()
    return {"seconds": taken, "loss": [before, loss(flat)]}


def main() -> None:
    """Both ways in turn."""
    address, keys = sys.argv[1:3]
    hosts, steps, rounds = map(int, sys.argv[3:])
    found: dict[str, list[Any]] = {"collective": [], "naive": []}
    with rtml.connect(address, keys=keys) as client:
        while nodes_there(client) < hosts:
            time.sleep(0.05)
        bound = train.options(resources=at(0))
        for name in ("collective", "naive"):  # functions are loaded
            bound.submit(hosts, 1, name == "collective").result(120)
        for _ in range(rounds):
            for name, taken in found.items():
                taken.append(bound.submit(hosts, steps, name == "collective").result(300))
                print(f"{name}: {taken[-1]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
