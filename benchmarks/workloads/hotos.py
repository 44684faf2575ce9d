"""Parallel Atari simulations in turn with a policy, from "Real-Time Machine Learning: The Missing Pieces" (HotOS'17).

One thread, rtml with a barrier in each round (BSP), rtml with `wait`, and PySpark `local[2]` play the same trajectories
in turn, for several lengths of a simulation's task; their fingerprints must be equal. Needs `ale-py`, and for Spark an
environment with pyspark and a Java runtime (`make workloads` makes it).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.workloads import hotos_page, report
from benchmarks.workloads.hotos_page import BSP, ONE, SIMULATIONS, SPARK, WAIT, Cell, Cells
from benchmarks.workloads.report import ROOT, say
from benchmarks.workloads.turns import Process, SystemFailed

#: Milliseconds of a task -> rounds of one repetition, repetitions.
FULL = {7.0: (10, 5), 0.2: (10, 3), 1.0: (10, 3), 50.0: (3, 3), 200.0: (2, 2)}
QUICK = {7.0: (4, 2), 1.0: (4, 1)}
#: Seconds after which no further repetition begins. Starting Spark takes 10 to 25.
BUDGET_S = {False: 270.0, True: 22.0}


@contextlib.contextmanager
def systems(python: Path, quick: bool) -> Iterator[tuple[dict[str, tuple[Process, dict[str, Any]]], dict[str, Any]]]:
    """All systems that can be started: name -> process and what its questions have in addition; and what they said."""
    with contextlib.ExitStack() as stack:
        about: dict[str, Any] = {}
        found: dict[str, tuple[Process, dict[str, Any]]] = {}
        for name, module, *arguments in (
            (ONE, "benchmarks.workloads.hotos_single"),
            (BSP, "benchmarks.workloads.hotos_rtml", "bsp"),
            (WAIT, "benchmarks.workloads.hotos_rtml", "wait"),
        ):
            process = stack.enter_context(Process(name, module, *arguments))
            about[name] = process.answer()
            found[name] = process, {}
        if python.exists():
            say("starting Spark (10 to 25 s)")
            warm = ("--warm", "3" if quick else "20")
            spark = Process("spark", "benchmarks.workloads.hotos_spark", *warm, python=str(python), pause=True)
            try:
                about["spark"] = stack.enter_context(spark).answer()
            except SystemFailed as error:
                say(f"{error}\nwithout Spark")
            else:
                for name, partitions in zip(SPARK, (SIMULATIONS, 2), strict=True):
                    found[name] = spark, {"partitions": partitions}
        else:
            say(f"no {python}: without Spark (make workloads makes it)")
        yield found, about


def measure(
    plan: dict[float, tuple[int, int]], python: Path, quick: bool
) -> tuple[Cells, dict[str, str], dict[str, Any]]:
    """All cells, the fingerprint that all systems agreed on for each length, and what systems said of themselves."""
    from benchmarks.workloads import atari

    begin = time.monotonic()
    rate = atari.frames_per_ms()
    say(f"{rate:.1f} frames of an emulator take a millisecond")
    cells: Cells = {}
    prints: dict[str, str] = {}
    with systems(python, quick) as (found, about):
        about["frames_per_ms"] = rate
        for repetition in itertools.count():
            left = {ms: rounds for ms, (rounds, repetitions) in plan.items() if repetition < repetitions}
            if not left:
                break
            for ms, rounds in left.items():
                if repetition and time.monotonic() - begin > BUDGET_S[quick]:
                    continue
                for name, (process, more) in found.items():
                    answer = process.ask(mean=round(ms * rate), rounds=rounds, simulations=SIMULATIONS, **more)
                    agreed = prints.setdefault(f"{ms:g} ms", answer["fingerprint"])
                    if answer["fingerprint"] != agreed:
                        raise SystemExit(f"{name} played other trajectories: {answer['fingerprint']}, not {agreed}")
                    cell = cells.setdefault(ms, {}).setdefault(name, Cell())
                    cell.add(answer)
                    say(f"{repetition + 1}: tasks of {ms:g} ms, {name}: {cell.rounds[-1] * 1e3:.1f} ms a round")
    for row in cells.values():
        hotos_page.idealise(row)
    return cells, prints, about


def main() -> None:
    """Measures, writes the page."""
    parser = report.arguments(__doc__)
    parser.add_argument("--spark", type=Path, default=ROOT / ".venv-spark/bin/python", help="a Python with pyspark")
    options = parser.parse_args()
    results: dict[str, Any] = {"workload": "hotos", "machine": report.machine()}
    cells, prints, about = measure(QUICK if options.quick else FULL, options.spark, options.quick)
    results |= {
        "systems": about,
        "fingerprints": prints,
        "bars": hotos_page.bars(cells),
        "speedups": {f"{ms:g}": hotos_page.speedups(row) for ms, row in cells.items()},
        "cells": {f"{ms:g}": {name: vars(cell) for name, cell in row.items()} for ms, row in cells.items()},
    }
    directory = report.target(options)
    hotos_page.plot(cells, directory / "hotos.png")
    report.write(directory, "hotos", hotos_page.page(results, cells, options.note), results, options.json)


if __name__ == "__main__":
    main()
