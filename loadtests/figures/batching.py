"""What batches gain on a model that has gains, against every fixed upper bound, at every load.

A server with each bound serves the same model. A bound is a stronger rival than a batch that waits until it is full: it
never waits. Compared are the answers a second at saturation and the p50 at parts of what one row a run can do. The
servers take turns, several rounds of each, and medians count: a slow moment of the machine is not one server's.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median
from typing import Any, Final

from loadtests import generators, measuring, messages, report, servers
from loadtests.figures.verdict import verdict
from loadtests.scenario import Poisson, Request, Scenario, scaled
from loadtests.sender import Target
from loadtests.statistics import quantile

BOUNDS: Final = (1, 4, 8, 16, 32)
#: The one that is used where nobody asks: what the others are held against.
OURS: Final = 16
#: Loads, as parts of what batches of one can do.
LOADS: Final = (0.1, 0.5, 0.9, 1.2)
TOLERANCE: Final = 1.1
#: Requests under way at saturation.
KEPT: Final = 32


def measure(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about three and a half minutes, quick or one."""
    bounds, loads, rounds, seconds = ((1, 4, OURS), (0.1, 0.9), 1, 1.5) if quick else (BOUNDS, LOADS, 3, 2.0)
    scenario = Scenario("wide", [Poisson(10, seconds)], [Request("wide", model="wide", deadline_ms=[1000])], warmup=0.3)
    rates: dict[int, list[float]] = {bound: [] for bound in bounds}
    p50: dict[float, dict[int, list[float]]] = {load: {bound: [] for bound in bounds} for load in loads}
    with ExitStack() as stack:
        targets: dict[int, Target] = {}
        for bound in bounds:
            server = stack.enter_context(servers.gateway(scenario.app, environment={"RTML_LOAD_BATCH": str(bound)}))
            targets[bound] = messages.target(messages.Site(server.url), scenario)
            generators.keep(targets[bound], KEPT, 1.0)
        for number in range(rounds):
            for bound, target in targets.items():
                found = generators.keep(target, KEPT, seconds)
                rates[bound].append(float((found.status == 200).sum()) / seconds)
            for load in loads:
                shape = scaled(scenario, load * median(rates[1]))
                for bound, target in targets.items():
                    p50[load][bound].append(_p50(target, shape, f"{load:g}, batches of {bound}, round {number + 1}"))
    middle = {load: {bound: median(taken) for bound, taken in found.items()} for load, found in p50.items()}
    speeds = {bound: median(taken) for bound, taken in rates.items()}
    lines = [
        _table(speeds, middle),
        "",
        _verdict("answers a second at saturation", max(speeds.values()) / speeds[OURS]),
    ]
    lines += [_verdict(f"p50 at {load:g} x", found[OURS] / min(found.values())) for load, found in middle.items()]
    saved = {f"{load:g}": {str(bound): taken for bound, taken in found.items()} for load, found in p50.items()}
    return lines, {"per_s": {str(bound): taken for bound, taken in rates.items()}, "p50_s": saved, "ours": OURS}


def _p50(target: Target, shape: Scenario, label: str) -> float:
    _, outcome = measuring.run(target, shape, label=label)
    good = outcome.plan.counted & (outcome.sent.status == 200)
    taken = (outcome.sent.done - outcome.plan.times)[good]
    return float(quantile(taken, 0.5) or float("inf"))


def _table(speeds: dict[int, float], p50: dict[float, dict[int, float]]) -> str:
    rows = [["batches of at most", f"answers/s at {KEPT}", *[f"p50 at {load:g}x, ms" for load in p50]]]
    rows += [
        [str(bound), f"{speed:.1f}", *[report.milliseconds(found[bound]) for found in p50.values()]]
        for bound, speed in speeds.items()
    ]
    return report.table(rows)


def _verdict(what: str, factor: float) -> str:
    text = f"batches: {what}: {factor:.2f} times the best fixed bound's (at most {TOLERANCE:g})"
    return verdict(factor <= TOLERANCE, text)
