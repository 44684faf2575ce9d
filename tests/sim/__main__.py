"""Run simulations: `python -m tests.sim --seeds 200`, or one seed with its log: `--seed 17 --verbose`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.run import Verdict, run_seed
from tests.sim.trees import run_tree


def main() -> int:
    """Run the seeds that the command line asks for; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument(
        "--trees", type=int, default=0, help="and so many seeds of trees of dispatchers, from --first on"
    )
    parser.add_argument("--verbose", action="store_true", help="print the log of every event")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at ten failures")
    options = parser.parse_args()
    first, count = (options.first, options.seeds) if options.seed is None else (options.seed, 1)
    failed: list[Verdict] = []
    tasks = 0
    began = time.monotonic()
    for seed in range(first, first + count):
        verdict = run_seed(seed, options.verbose)
        tasks += verdict.tasks
        if verdict.error:
            failed.append(verdict)
            print(f"seed {seed} failed: {verdict.error}", flush=True)
            if len(failed) >= 10 and not options.keep_going:
                break
    passed = seed - first + 1 - len(failed)
    print(f"simulated {tasks} planned tasks in seeds {first} to {seed}, {time.monotonic() - began:.1f} s")
    if failed:
        print(f"to see the log of one: python -m tests.sim --seed {failed[0].seed} --verbose")
    print(f"{passed} passed, {len(failed)} failed")
    fallen = run_trees(options.first, options.trees) if options.trees else 0
    return 1 if failed or fallen else 0


def run_trees(first: int, count: int) -> int:
    """Run so many seeds of trees; how many failed."""
    fallen = 0
    began = time.monotonic()
    for seed in range(first, first + count):
        error = run_tree(seed)
        if error:
            fallen += 1
            print(f"tree {seed} failed: {error}", flush=True)
    print(f"trees {first} to {first + count - 1}, {time.monotonic() - began:.1f} s: {fallen} failed")
    return fallen


if __name__ == "__main__":
    sys.exit(main())
