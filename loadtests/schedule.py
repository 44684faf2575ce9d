"""When each request is to be sent and which it is, from a scenario and its seed alone. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loadtests.scenario import Bursts, Constant, Phase, Ramp, Scenario

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class Plan(NamedTuple):
    """Requests in the order of their times; arrays of one length.

    Attributes:
        times: When, in seconds after the beginning.
        kinds: Which of the scenario's requests.
        deadlines: Seconds that it has; inf: none.
        counted: False while warming up.
    """

    times: Floats
    kinds: Numbers
    deadlines: Floats
    counted: npt.NDArray[np.bool_]

    def part(self, number: int, parts: int) -> Plan:
        """Every `parts`-th request, from `number` on: what one of several generators sends."""
        one = slice(number, None, parts)
        return Plan(self.times[one], self.kinds[one], self.deadlines[one], self.counted[one])


def plan(scenario: Scenario) -> Plan:
    """The scenario's requests; the same for the same scenario."""
    rng = np.random.default_rng(scenario.seed)
    found: list[Floats] = []
    start = 0.0
    if scenario.warmup:
        first = scenario.phases[0]
        rate = first.mean if isinstance(first, Ramp) else first.rate
        found.append(_uniform(rng, rate, scenario.warmup))
        start = scenario.warmup
    for phase in scenario.phases:
        found.append(start + arrivals(phase, rng))
        start += phase.seconds
    times = np.concatenate(found)
    weights = np.array([request.weight for request in scenario.requests])
    kinds = rng.choice(len(weights), len(times), p=weights / weights.sum())
    deadlines = np.full(len(times), np.inf)
    for kind, request in enumerate(scenario.requests):
        if request.deadline_ms:
            mine = kinds == kind
            deadlines[mine] = rng.choice(request.deadline_ms, int(mine.sum())) / 1e3
    return Plan(times, kinds, deadlines, times >= scenario.warmup)


def arrivals(phase: Phase, rng: np.random.Generator) -> Floats:
    """Times within a phase, from 0 on, sorted."""
    if isinstance(phase, Constant):
        return np.arange(0, phase.seconds, 1 / phase.rate)
    if isinstance(phase, Bursts):
        starts = _uniform(rng, phase.rate / phase.size, phase.seconds)
        return np.repeat(starts, rng.geometric(1 / phase.size, len(starts)))
    if isinstance(phase, Ramp):
        return _ramp(phase, rng)
    return _uniform(rng, phase.rate, phase.seconds)


def _uniform(rng: np.random.Generator, rate: float, seconds: float) -> Floats:
    """A Poisson process: as many as it gives, each anywhere."""
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def _ramp(phase: Ramp, rng: np.random.Generator) -> Floats:
    """The expected count up to `t` is `rate t + (to - rate) t^2 / 2 seconds`; uniform in it, and back to times."""
    slope = (phase.to - phase.rate) / phase.seconds
    expected = phase.mean * phase.seconds
    counts = np.sort(rng.uniform(0, expected, rng.poisson(expected)))
    if slope == 0:
        return counts / phase.rate
    return (np.sqrt(np.maximum(0.0, phase.rate**2 + 2 * slope * counts)) - phase.rate) / slope
