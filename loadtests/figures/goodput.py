"""Goodput at parts and multiples of the capacity, Poisson and bursts, mixed deadlines; a plain FIFO server beside it.

The plain server is the same gateway with `--policy fifo` that is told of no deadline, so that nothing is refused: what
servers without deadlines do. Capacity is what the server answers if always `KEPT` requests are under way, however long
they take. It is taken before and after each run at twice of it, and the run compared with the mean: what the machine
does meanwhile hits both. The middle one of three such comparisons counts.

Generator, gateway, dispatcher and executors share the machine. What each of them used is shown, and what others did: a
run beside busy programs says little.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from loadtests import generators, measuring, messages, report, servers
from loadtests.figures.verdict import verdict
from loadtests.scenario import Bursts, Poisson, Scenario, read
from loadtests.sender import Target
from loadtests.where import where

#: Loads that are not judged: of the model's capacity, and of the gateway's.
LOADS: Final = (0.9, 1.2)
#: The one that is judged, and what it takes: goodput as part of the capacity, and misses of those that were let in.
OVERLOAD: Final = 2.0
GOODPUT_LEAST: Final = 0.9
MISSED_MOST: Final = 0.01
#: The model's CPU time is to be so many times the gateway's.
WORK_LEAST: Final = 20.0
#: Requests under way while the capacity is taken.
KEPT: Final = 8
KINDS: Final = ("poisson", "bursts")
#: Seconds after which an answer of the plain server is not waited for: long after all deadlines.
PATIENCE: Final = 2.0
#: Seconds of a run that is not judged.
BRIEF: Final = 3.0
#: Part of the machine that other programs may use until a run is called disturbed.
DISTURBED: Final = 0.05


class Overload(Struct):
    """One run at twice the capacity, and the capacities before and after it, in requests a second.

    Attributes:
        missed: Where those that missed lost their time (`loadtests.where`), and how many for each reason.
        others: Part of the machine that other programs used.
    """

    run: measuring.Run
    before: float
    after: float
    missed: dict[str, int] = {}
    others: float = 0.0

    @property
    def part(self) -> float:
        """Goodput, as part of the capacity."""
        return self.run.all.goodput / max(1e-9, (self.before + self.after) / 2)


class Pair:
    """Both servers, and the same load for either."""

    def __init__(self, stack: ExitStack, scenario: Scenario, seconds: float) -> None:
        self.scenario = scenario
        self.seconds = seconds
        self.ours = stack.enter_context(servers.gateway(scenario.app))
        self.beside = stack.enter_context(servers.gateway(scenario.app, ["--policy", "fifo"]))
        self.target = messages.target(messages.Site(self.ours.url), scenario)
        self.target.timed = True
        self.untold = messages.target(messages.Site(self.ours.url), scenario, None)
        self.plain = messages.target(messages.Site(self.beside.url), scenario, None)
        self.plain.timeout = PATIENCE
        for target in (self.untold, self.plain):
            generators.keep(target, KEPT, 1.0)

    def capacity(self) -> float:
        """Answers a second."""
        seconds = max(1.5, self.seconds / 2.5)
        found = generators.keep(self.untold, KEPT, seconds)
        return float((found.status == 200).sum()) / seconds

    def run(self, target: Target, kind: str, rate: float, seed: int, label: str, seconds: float = BRIEF) -> Overload:
        """So many requests a second; without the capacities."""
        phase = Bursts(rate, seconds, 10.0) if kind == "bursts" else Poisson(rate, seconds)
        shape = msgspec.structs.replace(self.scenario, name=kind, phases=[phase], seed=seed, warmup=1.0)
        start, busy, own = time.monotonic(), _busy(), self._own()
        run, outcome = measuring.run(target, shape, label=f"{label}{kind}, {rate:.0f}/s")
        taken = time.monotonic() - start
        others = _busy() - busy - (self._own() - own) - run.cpu * taken
        part = max(0.0, others / taken / (os.cpu_count() or 1))
        return Overload(run, 0.0, 0.0, dict(where(outcome)), part)

    def _own(self) -> float:
        """Seconds of CPU of the servers and of this process."""
        return self.ours.cpu() + self.beside.cpu() + time.process_time()

    def work(self) -> tuple[float, float]:
        """Seconds of CPU of a request at capacity: in the gateway, and elsewhere in the engine."""
        front = servers.gateway_pids(self.ours)
        before = self.ours.cpu(front), self.ours.cpu()
        found = generators.keep(self.untold, KEPT, self.seconds / 2)
        gateway, whole = self.ours.cpu(front) - before[0], self.ours.cpu() - before[1]
        count = max(1, int((found.status == 200).sum()))
        return gateway / count, (whole - gateway) / count


def measure(quick: bool, name: str = "poisson") -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes some two minutes, quick one.

    Args:
        quick: Three seconds for each run instead of five, one round instead of three, no other loads.
        name: A scenario; all but "poisson" are bound by the gateway: shorter, and reported instead of judged.
    """
    judged = name == "poisson"
    seconds = 3.0 if quick or not judged else 5.0
    scenario = read(name)
    rows: list[list[str]] = [[*report.COLUMNS, "of capacity"]]
    found: dict[str, list[Overload]] = {kind: [] for kind in KINDS}
    beside: dict[str, Overload] = {}
    with ExitStack() as stack:
        pair = Pair(stack, scenario, seconds)
        last = pair.capacity()
        if not last:
            return [verdict(False, f"goodput {name}: the server answers nothing")], {}
        work = pair.work()
        memory = pair.ours.memory()
        for number in range(1 if quick else 3):
            for kind in KINDS:
                run = pair.run(pair.target, kind, OVERLOAD * last, scenario.seed + number, "", seconds)
                run.before, run.after = last, pair.capacity()
                last = run.after
                found[kind].append(run)
        usual = statistics.median(one.after for runs in found.values() for one in runs)
        for kind in KINDS:
            beside[kind] = pair.run(pair.plain, kind, OVERLOAD * usual, scenario.seed, "fifo ")
        if not quick:
            rows += _others(pair, usual)
        growth = memory, pair.ours.memory()
    for kind in KINDS:
        rows += [_row(f"{kind} {OVERLOAD:g}x", one.run, one.part) for one in found[kind]]
        rows.append(_row(f"fifo {kind} {OVERLOAD:g}x", beside[kind].run, beside[kind].run.all.goodput / usual))
    label = "goodput" if judged else "gateway-bound" + (f" ({name})" if name != "json" else "")
    lines = [report.table(rows), "", *_lines(label, judged, found, usual, work)]
    lines.append(f"memory before and after overload: {growth[0]:.0f} and {growth[1]:.0f} MiB")
    document = {"scenario": scenario, "capacity": usual, "gateway_s": work[0], "engine_s": work[1], "fifo": beside}
    return lines, document | {"memory_mib": growth, "overload": found}


def _others(pair: Pair, capacity: float) -> list[list[str]]:
    """Rows of the loads that are not judged: ours, and the plain server's."""
    rows = []
    for label, target in (("", pair.target), ("fifo ", pair.plain)):
        for load in LOADS:
            run = pair.run(target, "poisson", load * capacity, pair.scenario.seed, label).run
            rows.append(_row(f"{label}poisson {load:g}x", run, run.all.goodput / capacity))
    return rows


def _row(label: str, run: measuring.Run, part: float) -> list[str]:
    return [*report.cells(label, run.all), f"{part:.1%}"]


def _busy() -> float:
    """Seconds of CPU that the whole machine has used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def _lines(
    name: str, judged: bool, found: dict[str, list[Overload]], capacity: float, work: tuple[float, float]
) -> list[str]:
    gateway, engine = work
    lines = [
        f"capacity {capacity:.1f}/s; CPU of a request: gateway {gateway * 1e6:.0f} us, engine and model "
        f"{engine * 1e6:.0f} us: {engine / max(gateway, 1e-9):.1f} times that"
        + (f" (asked: {WORK_LEAST:g})" if judged else "")
    ]
    for kind, runs in found.items():
        part = statistics.median(one.part for one in runs)
        missed = statistics.median(one.run.all.missed_of_admitted for one in runs)
        text = f"{name}: {kind} at {OVERLOAD:g} x capacity: {part:.1%} of it is goodput"
        if judged:
            text += (
                f" (at least {GOODPUT_LEAST:.0%}), of what was let in {missed:.2%} missed (at most {MISSED_MOST:.0%})"
            )
            lines.append(verdict(part >= GOODPUT_LEAST and missed <= MISSED_MOST, text))
        else:
            lines.append(f"reported: {text}, of what was let in {missed:.2%} missed")
        reasons: Counter[str] = sum((Counter(one.missed) for one in runs), Counter())
        if reasons:
            lines.append(f"{kind}: missed because: " + ", ".join(f"{why} {count}" for why, count in reasons.items()))
        refusal = statistics.median(one.run.all.shed_p99 or 0.0 for one in runs)
        lines.append(
            f"{kind}: p99 of a refusal {refusal * 1e3:.1f} ms; the generator used "
            f"{statistics.median(one.run.cpu for one in runs):.2f} of a cpu"
        )
    others = max(one.others for runs in found.values() for one in runs)
    lines.append(f"other programs used at most {others:.0%} of the machine" + (": DISTURBED" * (others > DISTURBED)))
    return lines
