"""What batches gain on a model that has gains, against every fixed upper bound, at every load.

A server with each bound serves the same model. A bound is a stronger rival than a batch that waits until it is full: it
never waits. Compared are the answers a second at saturation and the p50 at parts of what one row a run can do.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

from loadtests import generators, measuring, messages, report, servers
from loadtests.scenario import Poisson, Request, Scenario, scaled
from loadtests.sender import Target
from loadtests.statistics import quantile

BOUNDS: Final = (1, 2, 4, 8, 16, 32)
#: The one that is used where nobody asks: what the others are held against.
OURS: Final = 16
#: Loads, as parts of what batches of one can do.
LOADS: Final = (0.1, 0.5, 0.9, 1.2)
TOLERANCE: Final = 1.1


def measure(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about three minutes, quick or one."""
    bounds, loads, seconds = ((1, 4, OURS), (0.1, 0.9), 1.5) if quick else (BOUNDS, LOADS, 6.0)
    scenario = Scenario("wide", [Poisson(10, seconds)], [Request("wide", model="wide", deadline_ms=[1000])], warmup=0.5)
    rates: dict[int, float] = {}
    p50: dict[int, dict[float, float]] = {bound: {} for bound in bounds}
    with ExitStack() as stack:
        targets: dict[int, Target] = {}
        for bound in bounds:
            server = stack.enter_context(servers.gateway(scenario.app, environment={"RTML_LOAD_BATCH": str(bound)}))
            targets[bound] = messages.target(messages.Site(server.url), scenario)
        for bound, target in targets.items():
            generators.keep(target, 32, 1.0)
            found = generators.keep(target, 32, seconds)
            rates[bound] = float((found.status == 200).sum()) / seconds
        for load in loads:
            shape = scaled(scenario, load * rates[1])
            for bound, target in targets.items():
                _, outcome = measuring.run(target, shape, label=f"{load:g}, batches of {bound}")
                good = outcome.plan.counted & (outcome.sent.status == 200)
                taken = (outcome.sent.done - outcome.plan.times)[good]
                p50[bound][load] = float(quantile(taken, 0.5) or float("inf"))
    lines = [_table(bounds, loads, rates, p50), ""]
    best = max(rates.values())
    lines.append(_verdict("answers a second at saturation", best / rates[OURS]))
    lines += [
        _verdict(f"p50 at {load:g} x", p50[OURS][load] / min(one[load] for one in p50.values())) for load in loads
    ]
    return lines, {"per_s": rates, "p50_s": {bound: list(one.items()) for bound, one in p50.items()}, "ours": OURS}


def _table(
    bounds: tuple[int, ...], loads: tuple[float, ...], rates: dict[int, float], p50: dict[int, dict[float, float]]
) -> str:
    rows = [["batches of at most", "answers/s at 32", *[f"p50 at {load:g}x, ms" for load in loads]]]
    rows += [
        [str(bound), f"{rates[bound]:.1f}", *[report.milliseconds(p50[bound][load]) for load in loads]]
        for bound in bounds
    ]
    return report.table(rows)


def _verdict(what: str, factor: float) -> str:
    mark = "reached" if factor <= TOLERANCE else "MISSED "
    return f"{mark} {what}: {factor:.2f} times the best bound's, at most {TOLERANCE:g}"
