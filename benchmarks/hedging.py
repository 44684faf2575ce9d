"""Second attempts beside stragglers: the tail with and without, and their cost, in virtual time (`benchmarks.virtual`).

    python -m benchmarks.hedging [--quick] [--json | --markdown]

Calls of 10 ms that differ by 30 %, of which one in a hundred takes five times as long; a second attempt of the same
call is as likely to be slow as any. Python functions: an attempt that is not wanted any more is interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from benchmarks.virtual import Model, Noise, Scenario, Simulation

LOADS: Final = (0.1, 0.3, 0.5, 0.7)
#: Above which portion of the runs a second attempt begins; None: never.
QUANTILES: Final = (None, 0.95)


class Row(NamedTuple):
    """What one run gave."""

    load: float
    hedge: float | None
    #: Seconds from a request to its answer.
    p50: float
    p99: float
    p999: float
    #: Second attempts, as a portion of all first ones; and executors' time, compared with that of none.
    seconds: float
    work: float


def row(load: float, hedge: float | None, seconds: float, seed: int = 1) -> Row:
    """One run of so many seconds."""
    model = Model("call", 1.0, 0.0, 0.01, (10.0,), hedge=hedge, native=False)
    simulation = Simulation(Scenario("hedging", (model,), 1, Noise(0.3, 0.01)), "edf", load, False, seed)
    simulation.run(seconds)
    ordered, count = sorted(simulation.latencies), len(simulation.asked)
    p50, p99, p999 = (ordered[int(portion * (len(ordered) - 1) + 0.5)] for portion in (0.5, 0.99, 0.999))
    return Row(load, hedge, p50, p99, p999, simulation.core.hedging.spares / count, simulation.worked / (count * 0.01))


def measure(seconds: float) -> Iterator[Row]:
    """All rows."""
    for load in LOADS:
        plain = row(load, None, seconds)
        for hedge in QUANTILES:
            one = plain if hedge is None else row(load, hedge, seconds)
            yield one._replace(work=one.work / plain.work)


def _cells(one: Row) -> list[str]:
    times = [f"{1e3 * value:.1f}" for value in (one.p50, one.p99, one.p999)]
    hedge = "-" if one.hedge is None else str(one.hedge)
    return [str(one.load), hedge, *times, f"{100 * one.seconds:.1f}", f"{100 * (one.work - 1):+.1f}"]


def main() -> None:
    """Prints a line for each run, a table with `--markdown`, or with `--json` a list of objects."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="20 simulated seconds instead of 100")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--markdown", action="store_true", help="as in docs/deadlines.md")
    options = parser.parse_args()
    rows = list(measure(20.0 if options.quick else 100.0))
    titles = ["load", "hedge", "p50 ms", "p99 ms", "p99.9 ms", "second attempts %", "more work %"]
    if options.json:
        sys.stdout.write(json.dumps([one._asdict() for one in rows]) + "\n")
    elif options.markdown:
        lines = [titles, ["---"] * len(titles), *[_cells(one) for one in rows]]
        sys.stdout.write("".join("| " + " | ".join(line) + " |\n" for line in lines))
    else:
        for one in rows:
            sys.stdout.write("  ".join(f"{title} {cell}" for title, cell in zip(titles, _cells(one))) + "\n")


if __name__ == "__main__":
    main()
