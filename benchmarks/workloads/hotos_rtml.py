"""The HotOS'17 workload on rtml: simulations on two cpus, the policy in a lane of two declared gpus.

`bsp`: the policy looks at all simulations of a round, then all of them go on. `wait`: it looks at those that were done
first, while the others still run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import rtml
from benchmarks.workloads import atari, turns

CPUS = 2
GPUS = 2

#: Simulations whose screens are looked at together by `wait`.
GROUP = 8


@rtml.task(cpu=1)
def begin(number: int) -> atari.Packed:
    """A new simulation."""
    return atari.first(number)


@rtml.task(cpu=1)
def simulate(before: atari.Packed, weights: Any, row: int, mean: float) -> atari.Packed:
    """A turn."""
    return atari.simulate(before, weights[row], mean)


@rtml.task(cpu=0, gpu=1)
def think(simulations: list[atari.Packed]) -> Any:
    """The policy, in the gpu's lane (a cpu computes it: nothing here has one)."""
    return atari.policy(atari.screens(simulations))


@rtml.task(cpu=0)
def make_ready() -> None:
    """What an executor does only once, so long that each gets one."""
    atari.make_ready()
    time.sleep(0.3)


def start() -> rtml.Client:
    """An engine for it: an executor for each cpu and each gpu, which have the games and the network."""
    client = rtml.connect(workers=CPUS + GPUS, cpu=CPUS, gpu=GPUS)
    rtml.get([make_ready.submit() for _ in range(CPUS + GPUS)])
    return client


def go_on(group: list[Any], weights: Any, mean: float) -> list[Any]:
    """The next turn of these simulations, at which the policy has looked."""
    return [simulate.submit(one, weights, row, mean) for row, one in enumerate(group)]


def bsp(mean: float, rounds: int, simulations: int) -> dict[str, Any]:
    """Rounds with a barrier: the policy looks at simulations, a part of them on each gpu, when all are done."""
    now = [begin.submit(number) for number in range(simulations)]
    rtml.wait(now, num_returns=simulations)
    part = -(-simulations // GPUS)
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        parts = [now[first : first + part] for first in range(0, simulations, part)]
        weights = [think.submit(one) for one in parts]  # all of them first, as the others wait for them
        now = [after for one, likely in zip(parts, weights) for after in go_on(one, likely, mean)]
        rtml.wait(now, num_returns=simulations)
        taken.append(time.perf_counter() - begun)
    return {"rounds": taken, "fingerprint": atari.fingerprint_of(rtml.get(now))}


def pipelined(mean: float, rounds: int, simulations: int) -> dict[str, Any]:
    """As many turns of each simulation, without a barrier. A round's time is the whole time by the number of turns."""
    running = [begin.submit(number) for number in range(simulations)]
    rtml.wait(running, num_returns=simulations)
    begun = time.perf_counter()
    turn = dict.fromkeys(running, 0)
    ended = []
    while running:
        done, running = rtml.wait(running, num_returns=min(GROUP, len(running)))
        ended += [one for one in done if turn[one] == rounds]
        group = [one for one in done if turn[one] < rounds]
        if group:
            for one, after in zip(group, go_on(group, think.submit(group), mean)):
                turn[after] = turn.pop(one) + 1
                running.append(after)
    taken = (time.perf_counter() - begun) / rounds
    return {"rounds": [taken] * rounds, "fingerprint": atari.fingerprint_of(rtml.get(ended))}


class Runs:
    """Runs on an engine that may be killed.

    Whichever of its processes dies, rtml goes on; without its supervisor all of it ends, and the run begins again on
    another.

    Args:
        run: `bsp` or `pipelined`.
    """

    def __init__(self, run: Callable[[float, int, int], dict[str, Any]]) -> None:
        self._run = run
        self._client = start()

    def __call__(self, mean: float, rounds: int, simulations: int) -> dict[str, Any]:
        """A run, from its beginning to its end."""
        try:
            return self._run(mean, rounds, simulations)
        except rtml.errors.ConnectionLost:
            self.close()
            self._client = start()
            return self._run(mean, rounds, simulations)

    def close(self) -> None:
        """End the engine."""
        self._client.shutdown()


def main() -> None:
    """Answers questions of `turns.Process`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("how", choices=("bsp", "wait"))
    runs = Runs({"bsp": bsp, "wait": pipelined}[parser.parse_args().how])
    try:
        runs(20, 4, 16)
        turns.serve(runs, version=rtml.__version__)
    finally:
        runs.close()


if __name__ == "__main__":
    main()
