"""Compares rtml with other servers: the same model, the same load, each in turn.

    python -m loadtests.peers [--quick] [--model four|mlp|wide] [--only rtml,mosec] [--repetitions 3]

For each server: closed-loop throughput and latency at 1, 8 and 64 requests under way; its capacity (the highest Poisson
rate of which 99 % is answered within the deadline); then goodput at 0.5, 0.9, 1.2 and 2 times that. Only rtml is told
of deadlines: the others have no way to be told by a request. Servers take turns; medians over the repetitions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import run as benchmarks
from loadtests import generators, measuring, report
from loadtests.peers import systems
from loadtests.peers.systems import SYSTEMS, System
from loadtests.scenario import Poisson, Request, Scenario
from loadtests.sender import Target
from loadtests.statistics import quantile

RESULTS: Final = Path(__file__).resolve().parent.parent / "results"
HISTORY: Final = RESULTS.parent / "history.jsonl"
CONCURRENCIES: Final = (1, 8, 64)
#: The budget of a request, by model.
DEADLINES_MS: Final = {"four": 50.0, "mlp": 50.0, "wide": 100.0}


def closed(target: Target, seconds: float) -> dict[str, float]:
    """Throughput and latencies at each concurrency."""
    rows: dict[str, float] = {}
    for concurrency in CONCURRENCIES:
        generators.keep(target, concurrency, 0.3 * seconds)
        found = generators.keep(target, concurrency, seconds)
        good = found.status == 200
        taken = (found.done - found.sent)[good]
        rows[f"c{concurrency}_per_s"] = float(good.sum()) / seconds
        rows[f"c{concurrency}_p50_ms"] = 1e3 * (quantile(taken, 0.5) or math.nan)
        rows[f"c{concurrency}_p99_ms"] = 1e3 * (quantile(taken, 0.99) or math.nan)
        rows[f"c{concurrency}_failed"] = float((~good).sum())
    return rows


def opened(target: Target, model: str, guess: float, seconds: float, probes: int) -> dict[str, float]:
    """Capacity, and goodput at its multiples as parts of it."""
    request = Request("row", path="/", deadline_ms=[DEADLINES_MS[model]])
    scenario = Scenario(model, [Poisson(max(1.0, guess), seconds)], [request], warmup=0.5)
    found = measuring.capacity(target, scenario, seconds=seconds, start=max(1.0, guess), probes=probes)
    rows = {"capacity_per_s": found.rate}
    if found.rate:
        loads = measuring.at_loads(target, scenario, found.rate, seconds)
        rows["client_cpu"] = max(one.cpu for one in loads.values())
        for load, one in loads.items():
            rows[f"goodput_{load:g}x"] = one.all.goodput / found.rate
            rows[f"missed_{load:g}x"] = one.all.missed_of_admitted
            if one.all.p99 is not None:
                rows[f"p99_{load:g}x_ms"] = one.all.p99 * 1e3
    return rows


def measure(system: System, model: str, quick: bool) -> tuple[dict[str, float], list[float]]:
    """All rows of one server, and its answer to the first request."""
    seconds, probes = (0.7, 4) if quick else (4.0, 7)
    with systems.serving(system, model) as (target, process, answer):
        generators.keep(target, 8, 0.5 if quick else 2.0)
        rows = closed(target, seconds)
        rows["memory_mib"] = process.memory()
        rows |= opened(target, model, 0.6 * rows["c64_per_s"], seconds, probes)
    return rows, answer


def merged(samples: list[dict[str, float]]) -> dict[str, float]:
    """Medians of each row."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    found = {name: statistics.median([sample[name] for sample in samples if name in sample]) for name in names}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def run(
    chosen: list[System], model: str, quick: bool, repetitions: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Medians by server, and why the others have none."""
    samples: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    expected: list[float] = []
    for repetition in range(repetitions):
        for system in chosen:
            if not system.ready:
                failed[system.name] = f"no environment: make .venv-serve-{system.name}/.installed"
                continue
            start = time.perf_counter()
            try:
                rows, answer = measure(system, model, quick)
                expected = expected or answer
                if not np.allclose(answer, expected, rtol=1e-3, atol=1e-4):
                    raise RuntimeError(f"{system.title} answers {answer[:4]}..., others {expected[:4]}...")
            except (RuntimeError, ConnectionError) as error:
                failed[system.name] = str(error)
                report.say(f"  {system.title} failed: {error}")
                continue
            samples.setdefault(system.name, []).append(rows)
            taken = time.perf_counter() - start
            report.say(
                f"  {repetition + 1}/{repetitions} {system.title:<10} {taken:6.1f} s  {rows['c64_per_s']:,.0f}/s at 64"
            )
    return {name: merged(found) for name, found in samples.items()}, failed


def keep(document: dict[str, Any]) -> Path:
    """Writes the results to their file, and a line of them to the history."""
    RESULTS.mkdir(exist_ok=True)
    told = document["run"]
    path = RESULTS / f"peers-{told['model']}-{told['date'][:10]}-{told['commit']}.json"
    report.save(path, document)
    line = {**told, "machine": document["machine"], "versions": document["versions"], "rows": document["rows"]}
    with HISTORY.open("a") as history:
        history.write(json.dumps(line, separators=(",", ":")) + "\n")
    return path


def main() -> int:
    """The command line; 1 if a server that is installed could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repetition, 0.7 seconds for each figure")
    parser.add_argument("--model", choices=sorted(DEADLINES_MS), default="four")
    parser.add_argument("--only", default="", help="names of servers, comma-separated")
    parser.add_argument("--repetitions", type=int, default=0, help="default 3, quick 1")
    parser.add_argument("--no-history", action="store_true", help="do not add a line to the history")
    options = parser.parse_args()
    from loadtests.peers import table

    wanted = [name for name in options.only.split(",") if name]
    chosen = [system for system in SYSTEMS if not wanted or system.name in wanted]
    repetitions = options.repetitions or (1 if options.quick else 3)
    machine = benchmarks.machine()
    rows, failed = run(chosen, options.model, options.quick, repetitions)
    document: dict[str, Any] = {
        "machine": machine,
        "versions": {system.name: systems.version(system) for system in chosen if system.name in rows},
        "rows": rows,
        "failed": failed,
        "run": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": benchmarks.commit(),
            "quick": options.quick,
            "model": options.model,
            "deadline_ms": DEADLINES_MS[options.model],
            "repetitions": repetitions,
        },
    }
    print(table.text(document))
    for name, why in failed.items():
        print(f"{name} was not measured: {why.splitlines()[0]}")
    if not options.no_history:
        print(f"kept in {keep(document)}")
    return 1 if any("no environment" not in why for why in failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
