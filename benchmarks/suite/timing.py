"""How the rows of the suite are timed, for all systems alike. Runs in the peers' environments too.

The way is that of Ray's `timeit`: warm up, count how often the row's function runs in a time, several windows. The
pauses before each row are left out, and a window is shorter: systems alternate, several times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import processes


class Row(NamedTuple):
    """One row: `action` does `amount` of what `name` says, which ends with ' /s' as all of them are rates."""

    name: str
    action: Callable[[], object]
    amount: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    warm_s: float = 1.0  # as Ray
    window_s: float = 1.0  # Ray: 2
    windows: int = 3  # Ray: 4
    budget_s: float = 12.0  # for a row's windows, if one call of its function takes longer than a window
    parts: int = 1  # how many times smaller than Ray's the bursts of thousands of calls are


FULL = Plan()
QUICK = Plan(warm_s=0.3, window_s=0.5, windows=1, budget_s=3.0, parts=10)

#: A group of rows: what they need exists while the generator lives.
Group = Callable[[Plan], Iterator[Row]]


def rate(row: Row, plan: Plan, mark: str = "") -> float:
    """The row's value: the median of the windows' rates; with a mark per second of CPU time of its processes."""
    begin = time.perf_counter()
    rounds = 0
    while not rounds or time.perf_counter() - begin < plan.warm_s:
        row.action()
        rounds += 1
    step = rounds // 10 + 1
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < plan.windows and (not rates or time.perf_counter() - begin < plan.budget_s):
        before = processes.cpu_by_process(processes.tree(mark)) if mark else {}
        rounds, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < plan.window_s:
            for _ in range(step):
                row.action()
            rounds += step
        if mark:
            after = processes.cpu_by_process(processes.tree(mark))
            taken = sum(max(0.0, used - before.get(pid, 0.0)) for pid, used in after.items())
        rates.append(row.amount * rounds / taken if taken else 0.0)
    return sorted(rates)[len(rates) // 2]


def main(system: str, groups: list[Group], start: Callable[[], Callable[[], str]], stop: Callable[[], None]) -> None:
    """The command line of a system's suite: prints `{"system", "version", "rows"}` on stdout, progress on stderr.

    Args:
        system: its name.
        groups: its rows.
        start: starts the system; what it returns gives the version.
        stop: ends it.
    """
    parser = argparse.ArgumentParser(description=f"the rows of `ray microbenchmark` with {system}")
    parser.add_argument("--quick", action="store_true", help="shorter, and smaller bursts")
    parser.add_argument("--only", default="", help="only rows with this text in their names")
    parser.add_argument("--cpu", action="store_true", help="per second of CPU time of all processes: for busy machines")
    options = parser.parse_args()
    mark = processes.mark() if options.cpu else ""
    plan = QUICK if options.quick else FULL
    version = start()
    rows: dict[str, float] = {}
    try:
        for group in groups:
            for row in group(plan):
                if options.only in row.name:
                    rows[row.name] = rate(row, plan, mark)
                    print(f"row {row.name} {rows[row.name]:,.2f}", file=sys.stderr, flush=True)
        found = version()
    finally:
        stop()
    print(json.dumps({"system": system, "version": found, "rows": rows}), flush=True)
