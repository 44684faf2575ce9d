"""The page of the HotOS'17 workload: what its measurements mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.workloads import report
from benchmarks.workloads.hotos_rtml import GROUP

SIMULATIONS = 16
#: The length of a task in the paper, in milliseconds.
PAPER_MS = 7.0

ONE = "one thread"
BSP = "rtml, BSP"
WAIT = "rtml, wait"
SPARK = ("spark, a task each", "spark, a task a core")
IDEAL = "spark, idealised"


@dataclass
class Cell:
    """What one system did with tasks of one length."""

    rounds: list[float] = field(default_factory=list)  # seconds of one, the mean of a repetition
    policy: list[float] = field(default_factory=list)  # of these
    cpu_s: list[float] = field(default_factory=list)  # of all processes, a round

    def add(self, answer: dict[str, Any]) -> None:
        """One repetition."""
        self.rounds.append(mean(answer["rounds"]))
        if "policy" in answer:
            self.policy.append(mean(answer["policy"]))
        self.cpu_s.append(answer["cpu_s"] / len(answer["rounds"]))


Cells = dict[float, dict[str, Cell]]


def idealise(row: dict[str, Cell]) -> None:
    """Adds Spark as the paper reports it: its policy as if perfectly parallel on both cpus, at no overhead."""
    if SPARK[0] in row:
        spark, thinking = row[SPARK[0]], median(row[ONE].policy) / 2
        row[IDEAL] = Cell(rounds=[whole - job + thinking for whole, job in zip(spark.rounds, spark.policy)])


def speedups(row: dict[str, Cell]) -> dict[str, float]:
    """Of each system over the one thread: the median of ratios within repetitions, as the machine's speed drifts."""
    base = row[ONE].rounds
    return {name: median(one / other for one, other in zip(base, cell.rounds)) for name, cell in row.items()}


def bars(cells: Cells) -> list[dict[str, Any]]:
    """What was to be reached at the paper's length of a task."""
    found = speedups(cells[PAPER_MS])
    verdicts = [
        report.verdict(f"{name}: at least 1.7 times one thread (2 cpus)", found[name] >= 1.7, f"{found[name]:.2f}")
        for name in (BSP, WAIT)
    ]
    verdicts += [
        report.verdict(f"{name}: slower than one thread", found[name] < 1, f"{1 / found[name]:.1f} times slower")
        for name in (SPARK[0], IDEAL)
        if name in found
    ]
    return verdicts


def plot(cells: Cells, path: Path) -> None:
    """Speed over one thread, by the length of a task."""
    made, ((left, right),) = report.figure((11, 4.2), 2)
    lengths = sorted(cells)
    names = list(cells[PAPER_MS])
    for number, name in enumerate(names[1:]):
        values = [speedups(cells[ms])[name] for ms in lengths]
        left.plot(lengths, values, f"C{number}", marker="o", ls="--" if name == IDEAL else "-", label=name)
    left.axhline(1, color="grey", linewidth=0.8)
    left.axhline(2, color="grey", linewidth=0.8, linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="a simulation's task, ms", ylabel="times as fast as one thread")
    left.legend(fontsize=8)
    times = [median(cell.rounds) * 1e3 for cell in cells[PAPER_MS].values()]
    colors = ["grey", *(f"C{number}" for number in range(len(names) - 1))]
    bars_ = right.barh(range(len(names)), times, color=colors)
    right.bar_label(bars_, [f"{ms:.0f} ms" for ms in times], padding=3, fontsize=8)
    right.set(yticks=range(len(names)), yticklabels=names, xlabel="ms a round, tasks of 7 ms")
    right.invert_yaxis()
    right.margins(x=0.15)
    report.save(made, path)


TEXT = """# Atari simulations and a policy (HotOS'17)

`make hotos` (`python -m benchmarks.workloads.hotos`) writes this page.

{conditions}

{simulations} simulations of Breakout and Pong (ale-py). In each round all of them play a turn, whose length varies
between half and one and a half of the mean; then a convolutional network looks at their screens and says what they do
next. The network runs in a lane of two declared gpus; there are none here, cpus compute it. All systems play the same
trajectories: their fingerprints are compared in every repetition.

The paper: with tasks of 7 ms Spark is 9 times slower than one thread, the prototype 7 times faster, 63 times faster
than Spark, whose policy is charged as if perfectly parallel. This machine has two cpus: **2 is the limit of any
speed-up over one thread**, so that a ratio to Spark is Spark's overhead times at most 2.

{bars}

![speed by length of a task](hotos.png)

## Times as fast as one thread

Medians of the ratios within repetitions. The last columns: the better of rtml's two over Spark.

{ratios}

## Milliseconds a round

Medians of the repetitions.

{times}

## Milliseconds of CPU time a round, of all processes

{cpu}

## What was compared

- *one thread*: the simulations live in the process; nothing is saved, restored or moved.
- *rtml, BSP*: each turn is a task that takes the last one's future (emulator and screen, 20 KB) and the policy's. A
  barrier in each round; the policy is two tasks, each for half of the simulations.
- *rtml, wait*: `rtml.wait` gives the first {group} simulations that are done to the policy while the others run. No
  barrier: a round is the whole time by the number of turns.
- *spark, a task each*: PySpark `local[2]`, in each round a job of {simulations} tasks and a job of the policy; states
  travel through the driver, as Spark's tasks keep nothing. No shuffle, Python workers are used again. {empty}
- *spark, a task a core*: the same simulations as two tasks, the fewest that use both cpus.
- *spark, idealised*: *a task each* without the policy's job, with half of one thread's time for the policy: as the
  paper's footnote has it, perfectly parallel at no overhead.

Fingerprints: {prints}. A test kills each process of rtml in the middle of a run and compares them, too
(`tests/integration/test_workloads.py`).
"""


def _lines(cells: Cells, of: Any) -> Iterable[tuple[str, ...]]:
    return ((f"{ms:g}", *of(cells[ms])) for ms in sorted(cells))


def page(results: dict[str, Any], cells: Cells, note: str) -> str:
    """The results in Markdown."""
    names = list(cells[PAPER_MS])
    behind = [name for name in (*SPARK, IDEAL) if name in names]

    def ratios(row: dict[str, Cell]) -> list[str]:
        found = speedups(row)
        best = max(found[BSP], found[WAIT])
        return [f"{found[name]:.2f}" for name in names] + [f"{best / found[name]:.1f}" for name in behind]

    def times(row: dict[str, Cell]) -> list[str]:
        return [f"{median(row[name].rounds) * 1e3:.1f}" for name in names] + [str(len(row[ONE].rounds))]

    measured = [name for name in names if name != IDEAL]
    spark = results["systems"].get("spark")
    return TEXT.format(
        conditions=report.conditions(results["machine"], note),
        simulations=SIMULATIONS,
        group=GROUP,
        bars=report.verdicts(results["bars"]),
        ratios=report.table(("task, ms", *names, *(f"rtml / {name}" for name in behind)), _lines(cells, ratios)),
        times=report.table(("task, ms", *names, "repetitions"), _lines(cells, times)),
        cpu=report.table(
            ("task, ms", *measured),
            _lines(cells, lambda row: [f"{median(row[name].cpu_s) * 1e3:.0f}" for name in measured]),
        ),
        empty=f"An empty job takes {spark['empty_job_s'] * 1e3:.0f} ms." if spark else "**It was not there.**",
        prints=", ".join(f"{ms} `{one}`" for ms, one in results["fingerprints"].items()),
    )
