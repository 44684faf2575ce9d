"""Policies and admission compared: goodput within deadlines at several loads, in virtual time (`benchmarks.virtual`).

    python -m benchmarks.policies [--quick] [--json | --markdown]

What is possible is a bound that no schedule reaches (`Simulation.possible`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from benchmarks.virtual import WORKERS, Model, Noise, Scenario, Simulation
from rtml.graph.policy import POLICIES

LOADS: Final = (0.5, 0.9, 1.2, 2.0)
#: Requests of a burst, on average.
BURST: Final = 10

QUIET: Final = Noise()
#: Run times of a busy machine: they differ by 40 %, one of a hundred takes five times as long, and the machine itself
#: becomes half as quick and quick again.
NOISY: Final = Noise(sigma=0.4, stragglers=0.01, drift=2.0)

ONE: Final = (Model("one", 1.0, 0.0, 0.01, (0.05, 0.1, 0.2)),)
MIXED: Final = (
    Model("small", 0.6, 0.0, 0.005, (0.05, 0.1)),
    Model("large", 0.4, 0.0, 0.02, (0.1, 0.25, 0.5)),
)
BATCHED: Final = (
    Model("batched", 0.7, 0.008, 0.001, (0.05, 0.1, 0.2), batch=16),
    Model("single", 0.3, 0.0, 0.005, (0.05, 0.2)),
)
SCENARIOS: Final = tuple(
    Scenario(name + (", bursts" if burst > 1 else "") + (", noise" if noise is NOISY else ""), models, burst, noise)
    for name, models in (("one model", ONE), ("mixed", MIXED), ("batches", BATCHED))
    for burst in (1, BURST)
    for noise in (QUIET, NOISY)
)


class Row(NamedTuple):
    """What one run gave."""

    scenario: str
    policy: str
    admission: bool
    load: float
    #: Executors' time at best for the answers that came within their deadlines: as a portion of what nobody can exceed,
    #: and of all that there was.
    goodput: float
    busy: float
    #: Answers within their deadlines, as a portion of what was asked; and the least that one kind of request got of it.
    met: float
    least: float
    #: Of all requests those that were refused; of those that were let in, those that missed.
    shed: float
    missed: float
    #: Seconds until an answer that was one, in time or not.
    p50: float
    p99: float
    batch: float


def row(scenario: Scenario, policy: str, admission: bool, load: float, seconds: float, seed: int = 1) -> Row:
    """One run of so many seconds."""
    simulation = Simulation(scenario, policy, load, admission, seed)
    simulation.run(seconds)
    ordered = sorted(simulation.latencies) or [0.0]
    useful, asked = simulation.work(simulation.in_time), len(simulation.asked)
    kinds, in_time = simulation.kinds(), simulation.kinds(simulation.in_time)
    return Row(
        scenario.name, policy, admission, load, useful / simulation.possible(), useful / (WORKERS * seconds),
        len(simulation.in_time) / asked, min(in_time[kind] / count for kind, count in kinds.items()),
        len(simulation.shed) / asked, simulation.missed, ordered[len(ordered) // 2],
        ordered[int(0.99 * (len(ordered) - 1))], simulation.items / max(1, simulation.calls),
    )  # fmt: skip


def measure(seconds: float) -> Iterator[Row]:
    """All rows: each policy with admission, and FIFO without, as others do."""
    for scenario in SCENARIOS:
        for load in LOADS:
            yield row(scenario, "fifo", False, load, seconds)
            for policy in POLICIES:
                yield row(scenario, policy, True, load, seconds)


def _line(one: Row) -> str:
    policy = one.policy + (" + admission" if one.admission else "")
    return (
        f"{one.scenario:24} {one.load:4.1f} {policy:20} goodput {one.goodput:6.1%} of what is possible, "
        f"{one.busy:6.1%} of capacity, {one.met:6.1%} of requests, least {one.least:6.1%}; "
        f"refused {one.shed:6.1%}, missed {one.missed:6.1%}; "
        f"p50 {one.p50 * 1e3:6.1f} ms, p99 {one.p99 * 1e3:6.1f} ms; batch {one.batch:4.1f}\n"
    )


def table(rows: list[Row]) -> str:
    """The table of docs/deadlines.md."""
    columns = ["fifo, no admission", *[f"`{policy}`" for policy in POLICIES]]
    lines = ["| requests | load | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for start in range(0, len(rows), len(columns)):
        group = rows[start : start + len(columns)]
        cells = [f"{100 * one.goodput:.0f} / {100 * one.missed:.1f}" for one in group]
        lines.append(f"| {group[0].scenario} | {group[0].load} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints a line for each run, a table with `--markdown`, or with `--json` a list of objects."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="four simulated seconds instead of twenty")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--markdown", action="store_true", help="as in docs/deadlines.md")
    options = parser.parse_args()
    rows = []
    for one in measure(4.0 if options.quick else 20.0):
        rows.append(one)
        if not options.json and not options.markdown:
            sys.stdout.write(_line(one))
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps([one._asdict() for one in rows]) + "\n")
    if options.markdown:
        sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
