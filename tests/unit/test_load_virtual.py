"""Admission under load in virtual time: what is promised is kept, and no more is refused than must be."""

from __future__ import annotations

import pytest

from benchmarks import hedging
from benchmarks.policies import BATCHED, BURST, MIXED, NOISY, ONE, QUIET, SCENARIOS, row, table
from benchmarks.virtual import DRIFT_PERIOD, Asked, Model, Noise, Scenario, Simulation
from rtml.graph.policy import POLICIES


def simulated(
    models: tuple[Model, ...], noise: Noise, load: float, burst: int = 1, seconds: float = 5.0, seed: int = 1
) -> Simulation:
    simulation = Simulation(Scenario("test", models, burst, noise), "edf", load, True, seed)
    simulation.run(seconds)
    return simulation


def goodput(simulation: Simulation, start: float, end: float) -> float:
    """The portion of the work asked for in an interval that was done in time."""
    asked = {number for number, one in simulation.asked.items() if start <= one.came < end}
    return simulation.work(asked & simulation.in_time) / simulation.work(asked)


@pytest.mark.parametrize("burst", [1, BURST])
@pytest.mark.parametrize("models", [ONE, MIXED, BATCHED], ids=["one", "mixed", "batches"])
@pytest.mark.parametrize("noise", [QUIET, NOISY], ids=["quiet", "noisy"])
def test_goodput_holds_at_twice_the_capacity_and_promises_are_kept(
    models: tuple[Model, ...], noise: Noise, burst: int
) -> None:
    found = simulated(models, noise, 2.0, burst)
    assert found.work(found.in_time) / found.possible() >= 0.88
    assert found.missed <= 0.012


def test_hardly_anything_is_refused_at_half_the_capacity_whatever_the_noise() -> None:
    for models in (ONE, MIXED, BATCHED):
        found = simulated(models, NOISY, 0.5, seconds=DRIFT_PERIOD)
        assert len(found.shed) / len(found.asked) <= 0.01, models
        assert len(found.in_time) / len(found.asked) >= 0.985, models


def test_a_cold_start_lets_everything_in() -> None:
    found = simulated(ONE, NOISY, 1.0, burst=40, seconds=0.5)
    first = [number for number, one in found.asked.items() if one.came == min(found.asked.values()).came]
    assert len(first) > 5
    assert not found.shed & set(first)


@pytest.mark.parametrize("models", [ONE, BATCHED], ids=["one", "batches"])
def test_a_storm_of_stragglers_is_over_when_it_is_over(models: tuple[Model, ...]) -> None:
    """Two seconds in which everything takes five times as long, and what was learned then is forgotten in two more."""
    found = simulated(models, Noise(sigma=0.3, storm=(3.0, 5.0)), 0.8, seconds=9.0)
    assert goodput(found, 1.0, 3.0) >= 0.97
    assert goodput(found, 3.5, 5.0) < 0.5, "the storm itself costs what it must"
    assert goodput(found, 7.0, 9.0) >= 0.97
    in_storm = {number for number, one in found.asked.items() if 3.5 <= one.came < 5.0} - found.shed
    assert len(in_storm - found.in_time) / len(in_storm) < 0.5, "most of what is let in makes it even then"


def test_what_hangs_takes_one_executor_and_not_the_other() -> None:
    """One call takes 1,000 seconds while 0.45 of the capacity is asked for: the other executor does it."""
    models = (Model("one", 1.0, 0.0, 0.01, (0.1, 0.2)), Model("hangs", 0.0, 1000.0, 0.0, (0.5,)))
    simulation = Simulation(Scenario("test", models), "edf", 0.45, True)
    simulation.at(1.0, simulation._ask, Asked(1.0, 0.5, 2))
    simulation.run(6.0)
    assert goodput(simulation, 2.0, 6.0) >= 0.9


def test_second_attempts_shorten_the_tail_within_their_budget() -> None:
    plain, hedged = (hedging.row(0.1, hedge, 40.0) for hedge in (None, 0.95))
    assert hedged.p999 < 0.8 * plain.p999
    assert hedged.p50 == pytest.approx(plain.p50, rel=0.03)
    assert 0.005 < hedged.seconds <= 0.05
    assert hedged.work == pytest.approx(plain.work, rel=0.03)


def test_the_table_of_policies_has_a_row_for_each_load() -> None:
    rows = [row(SCENARIOS[0], "fifo", False, 0.5, 0.5)]
    rows += [row(SCENARIOS[0], policy, True, 0.5, 0.5) for policy in POLICIES]
    lines = table(rows).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| one model | 0.5 | 100 / 0.0 |")
