"""One run of a scenario, the search for a server's capacity, and the same mix at parts and multiples of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import Struct

from loadtests import generators, report, schedule, statistics
from loadtests.generators import Outcome
from loadtests.scenario import Scenario, lasting, scaled
from loadtests.sender import Target
from loadtests.statistics import Figures

#: Of its requests a server at capacity answers at least this part in time.
GOOD: Final = 0.99
#: Loads at which goodput is reported, as multiples of the capacity.
LOADS: Final = (0.5, 0.9, 1.2, 2.0)


class Run(Struct):
    """What one run gave: of all requests ("all") and of each kind.

    Attributes:
        cpu: Part of a core that the busiest generator used.
        waited: Requests that waited for a connection.
    """

    kinds: dict[str, Figures]
    cpu: float
    waited: int

    @property
    def all(self) -> Figures:
        """Of all requests."""
        return self.kinds["all"]


def run(target: Target, scenario: Scenario, processes: int = 1, label: str = "") -> tuple[Run, Outcome]:
    """Sends a scenario.

    Raises:
        ConnectionError: nothing listens there.
    """
    bar = report.Bar(label or scenario.name)
    try:
        outcome = generators.run(target, schedule.plan(scenario), processes, bar)
    finally:
        bar.close()
    late = scenario.late_ms / 1e3
    kinds = {"all": statistics.figures(outcome, scenario.seconds, late)}
    for number, request in enumerate(scenario.requests):
        kinds[request.name] = statistics.figures(outcome, scenario.seconds, late, number)
    return Run(kinds, outcome.sent.cpu, outcome.sent.waited), outcome


class Capacity(Struct):
    """The highest rate of which at least `GOOD` was answered in time.

    Attributes:
        rate: Requests a second; 0 if there was none.
        probes: Each rate that was tried and which part of it was good, in the order of trying.
    """

    rate: float
    probes: list[tuple[float, float]]


def capacity(
    target: Target, scenario: Scenario, *, seconds: float = 5.0, start: float = 0.0, probes: int = 8, processes: int = 1
) -> Capacity:
    """Searches the capacity for a scenario's mix: doubles or halves from `start`, then halves the interval.

    Args:
        target: The server.
        scenario: What is sent; its rates are scaled, its phases shortened or stretched to `seconds`.
        seconds: Of each probe, without its warm-up of half a second.
        start: Requests a second of the first probe; 0: as in the file.
        probes: How many at most, so the search takes about `probes * (seconds + 2)` seconds.
        processes: Generators.

    Raises:
        ConnectionError: nothing listens there.
    """
    shape = msgspec.structs.replace(lasting(scenario, seconds), warmup=0.5)

    def good(rate: float, number: int) -> float:
        # Other arrivals each time: one unlucky burst is not to decide.
        probe = msgspec.structs.replace(scaled(shape, rate), seed=scenario.seed + number)
        return run(target, probe, processes, f"capacity, {rate:.0f}/s")[0].all.fraction

    return search(good, start or scenario.mean, probes)


def search(good: Callable[[float, int], float], start: float, probes: int) -> Capacity:
    """The highest rate of which at least `GOOD` is good, as far as so many tries tell; pure.

    Args:
        good: Told a rate and the number of the try; says which part was good.
        start: The first rate.
        probes: How many at most.
    """
    rate, low, high = start, 0.0, 0.0
    tried: list[tuple[float, float]] = []
    for number in range(probes):
        tried.append((rate, good(rate, number)))
        if tried[-1][1] >= GOOD:
            low = rate
        else:
            high = rate
        if low and high and high / low < 1.06:
            break
        rate = (low * high) ** 0.5 if low and high else (rate * 1.6 if low else rate / 1.6)
    return Capacity(low, tried)


def at_loads(
    target: Target,
    scenario: Scenario,
    rate: float,
    seconds: float,
    *,
    loads: tuple[float, ...] = LOADS,
    processes: int = 1,
) -> dict[float, Run]:
    """The scenario's mix at multiples of a capacity, `seconds` each.

    Raises:
        ConnectionError: nothing listens there.
    """
    shape = lasting(scenario, seconds)
    return {
        load: run(target, scaled(shape, load * rate), processes, f"{scenario.name}, {load:g} of capacity")[0]
        for load in loads
    }


def loads_table(name: str, rate: float, found: dict[float, Run]) -> list[list[str]]:
    """Rows of `report.COLUMNS`, and goodput as part of the capacity."""
    return [
        [*report.cells(f"{name} {load:g}x", one.all), f"{one.all.goodput / rate:.1%}" if rate else "-"]
        for load, one in found.items()
    ]


def saved(found: dict[float, Run]) -> dict[str, Any]:
    """For JSON, whose keys are texts."""
    return {f"{load:g}": one for load, one in found.items()}
