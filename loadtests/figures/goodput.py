"""Goodput at parts and multiples of the capacity, Poisson and bursts, mixed deadlines; a plain FIFO server beside it.

The plain server is the same gateway with `--policy fifo` that is told of no deadline, so that nothing is refused: what
servers without deadlines do. Capacity is what the server answers if always `KEPT` requests are under way, however long
they take. It is taken before and after each run at twice of it, and the run compared with the mean: what the machine
does meanwhile hits both. The middle one of three such comparisons counts.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any, Final

import msgspec
from msgspec import Struct

from loadtests import generators, measuring, messages, report, servers
from loadtests.figures.verdict import verdict
from loadtests.scenario import Bursts, Poisson, Scenario, read, scaled
from loadtests.sender import Target

LOADS: Final = (0.5, 0.9, 1.2)
#: The one that is judged, and what it takes: goodput as part of the capacity, and misses of those that were let in.
OVERLOAD: Final = 2.0
GOODPUT_LEAST: Final = 0.9
MISSED_MOST: Final = 0.01
#: The model's CPU time is to be so many times the gateway's.
WORK_LEAST: Final = 20.0
#: Requests under way while the capacity is taken.
KEPT: Final = 8
KINDS: Final = ("poisson", "bursts")


class Overload(Struct):
    """One run at twice the capacity, and the capacities before and after it, in requests a second."""

    run: measuring.Run
    before: float
    after: float

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
        plain = stack.enter_context(servers.gateway(scenario.app, ["--policy", "fifo"]))
        self.target = messages.target(messages.Site(self.ours.url), scenario)
        self.untold = messages.target(messages.Site(self.ours.url), scenario, None)
        self.plain = messages.target(messages.Site(plain.url), scenario, None)
        for target in (self.untold, self.plain):
            generators.keep(target, KEPT, 1.0)

    def capacity(self) -> float:
        """Answers a second."""
        seconds = max(1.5, self.seconds / 3)
        found = generators.keep(self.untold, KEPT, seconds)
        return float((found.status == 200).sum()) / seconds

    def run(self, target: Target, kind: str, rate: float, seed: int, label: str) -> measuring.Run:
        """So many requests a second."""
        phase = Bursts(rate, self.seconds, 10.0) if kind == "bursts" else Poisson(rate, self.seconds)
        shape = msgspec.structs.replace(self.scenario, name=kind, phases=[phase], seed=seed, warmup=1.0)
        return measuring.run(target, shape, label=f"{label}{kind}, {rate:.0f}/s")[0]

    def work(self, rate: float) -> tuple[float, float]:
        """Seconds of CPU of a request: in the gateway, and elsewhere in the engine."""
        front = servers.gateway_pids(self.ours)
        before = self.ours.cpu(front), self.ours.cpu()
        shape = msgspec.structs.replace(scaled(self.scenario, rate), phases=[Poisson(rate, self.seconds)], warmup=0.0)
        found = measuring.run(self.target, shape, label="work of a request")[0].all
        gateway, whole = self.ours.cpu(front) - before[0], self.ours.cpu() - before[1]
        count = max(1, found.requests)
        return gateway / count, (whole - gateway) / count


def measure(quick: bool, name: str = "poisson") -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about four minutes, quick or one.

    Args:
        quick: Three seconds for each run instead of eight, one round instead of three, no other loads.
        name: A scenario; "tiny" is bound by the gateway itself: shorter, and reported instead of judged.
    """
    judged = name != "tiny"
    seconds = 3.0 if quick else 8.0 if judged else 4.0
    scenario = read(name)
    rows: list[list[str]] = [[*report.COLUMNS, "of capacity"]]
    found: dict[str, list[Overload]] = {kind: [] for kind in KINDS}
    beside: dict[str, measuring.Run] = {}
    with ExitStack() as stack:
        pair = Pair(stack, scenario, seconds)
        first = last = pair.capacity()
        if not first:
            return [verdict(False, f"goodput {name}: the server answers nothing")], {}
        gateway, engine = pair.work(0.5 * first)
        memory = pair.ours.memory()
        for number in range(1 if quick else 3):
            for kind in KINDS:
                run = pair.run(pair.target, kind, OVERLOAD * last, scenario.seed + number, "")
                before, last = last, pair.capacity()
                found[kind].append(Overload(run, before, last))
                if not number:
                    beside[kind] = pair.run(pair.plain, kind, OVERLOAD * last, scenario.seed, "fifo ")
        usual = statistics.median(one.after for runs in found.values() for one in runs)
        if judged and not quick:
            rows += _others(pair, usual)
        growth = memory, pair.ours.memory()
    for kind in KINDS:
        rows += [_row(f"{kind} {OVERLOAD:g}x", one.run, one.part) for one in found[kind]]
        rows.append(_row(f"fifo {kind} {OVERLOAD:g}x", beside[kind], beside[kind].all.goodput / usual))
    lines = [
        report.table(rows),
        "",
        *_lines("goodput" if judged else "gateway-bound", judged, found, usual, (gateway, engine)),
    ]
    lines.append(f"memory before and after overload: {growth[0]:.0f} and {growth[1]:.0f} MiB")
    document = {"scenario": scenario, "capacity": usual, "gateway_s": gateway, "engine_s": engine, "fifo": beside}
    return lines, document | {"memory_mib": growth, "overload": found}


def _others(pair: Pair, capacity: float) -> list[list[str]]:
    """Rows of the loads that are not judged: ours, and the plain server's."""
    rows = []
    for kind in KINDS:
        for label, target in (("", pair.target), ("fifo ", pair.plain)):
            for load in LOADS:
                run = pair.run(target, kind, load * capacity, pair.scenario.seed, label)
                rows.append(_row(f"{label}{kind} {load:g}x", run, run.all.goodput / capacity))
    return rows


def _row(label: str, run: measuring.Run, part: float) -> list[str]:
    return [*report.cells(label, run.all), f"{part:.1%}"]


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
    return lines
