"""The HotOS'17 workload on Spark, as it is meant to be used: every round is two jobs, states travel through the driver.

Spark's tasks keep nothing, so a simulation's state goes in and comes out with each; nothing is shuffled, Python
workers are used again, the policy's weights are in each worker. `partitions` says how many tasks a round's simulations
make: one for each simulation is what the workload is made of, one for each core the fewest that use both.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from benchmarks.workloads import atari, turns

CORES = 2


def _turn(item: tuple[atari.Packed, Any], mean: float) -> atari.Packed:
    return atari.simulate(item[0], item[1], mean)


class Rounds:
    """Rounds of simulations in one Spark context."""

    def __init__(self) -> None:
        from pyspark import SparkConf, SparkContext

        os.environ["PYSPARK_PYTHON"] = sys.executable
        settings = {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.python.worker.reuse": "true",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.memory": "1g",
            "spark.eventLog.enabled": "false",
            "spark.locality.wait": "0",
        }
        conf = SparkConf().setMaster(f"local[{CORES}]").setAppName("hotos").setAll(list(settings.items()))
        self.context = SparkContext(conf=conf)
        self.context.setLogLevel("ERROR")

    def run(self, mean: float, rounds: int, simulations: int, partitions: int) -> dict[str, Any]:
        """As `hotos_single.run`, with so many tasks for a round's simulations."""
        context = self.context
        now = [atari.first(number) for number in range(simulations)]
        taken, thinking = [], []
        for _ in range(rounds):
            begun = time.perf_counter()
            screens = context.parallelize([atari.screens(now)], 1)
            weights = screens.map(atari.policy).collect()[0]
            thought = time.perf_counter()
            pairs = context.parallelize(list(zip(now, weights, strict=True)), partitions)
            now = pairs.map(lambda pair: _turn(pair, mean)).collect()
            taken.append(time.perf_counter() - begun)
            thinking.append(thought - begun)
        return {"rounds": taken, "policy": thinking, "fingerprint": atari.fingerprint_of(now)}

    def empty(self) -> float:
        """Seconds of a job with one task that does nothing."""
        begun = time.perf_counter()
        self.context.parallelize([0], 1).map(lambda one: one).collect()
        return time.perf_counter() - begun


def main() -> None:
    """Answers questions of `turns.Process`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--warm", type=int, default=20, help="rounds before the first answer")
    warm = parser.parse_args().warm
    rounds = Rounds()
    try:
        rounds.run(20, warm, 16, 16)
        empty = sorted(rounds.empty() for _ in range(warm))
        turns.serve(rounds.run, version=rounds.context.version, empty_job_s=empty[len(empty) // 2])
    finally:
        rounds.context.stop()


if __name__ == "__main__":
    main()
