"""The HotOS'17 workload in one thread: the simulations live in it, nothing is moved."""

from __future__ import annotations

import functools
import hashlib
import time
from typing import Any

from ale_py import ALEInterface

from benchmarks.workloads import atari, turns


@functools.cache
def _kept(number: int) -> ALEInterface:
    return atari.emulator(number)


def run(mean: float, rounds: int, simulations: int) -> dict[str, Any]:
    """So many rounds of so many simulations, each turn of `mean` frames in the mean."""
    emulators = [_kept(number) for number in range(simulations)]
    for ale in emulators:
        ale.reset_game()
    digests = [b""] * simulations
    screens = [atari.observe(ale) for ale in emulators]
    taken: list[float] = []
    thinking: list[float] = []
    for turn in range(rounds):
        start = time.perf_counter()
        weights = atari.policy(screens)
        thinking.append(time.perf_counter() - start)
        for number, ale in enumerate(emulators):
            happened, _ = atari.play(ale, number, turn, weights[number], mean)
            digests[number] = hashlib.sha256(digests[number] + happened).digest()
            screens[number] = atari.observe(ale)
        taken.append(time.perf_counter() - start)
    return {"rounds": taken, "policy": thinking, "fingerprint": atari.fingerprint(digests)}


if __name__ == "__main__":
    run(20, 2, 16)
    turns.serve(run, version="")
