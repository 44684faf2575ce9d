"""When requests are sent, and which: from a scenario and its seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loadtests import scenario, schedule
from loadtests.scenario import Bursts, Constant, Poisson, Ramp, Request, Scenario

RNG = np.random.default_rng


def plan_of(*phases: scenario.Phase, requests: list[Request] | None = None, seed: int = 1) -> schedule.Plan:
    kinds = requests or [Request("a", model="a")]
    return schedule.plan(Scenario("test", list(phases), kinds, seed=seed, warmup=0.0))


def test_constant_is_even() -> None:
    times = plan_of(Constant(100, 2)).times
    assert len(times) == 200
    assert np.allclose(np.diff(times), 0.01)


def test_poisson_is_poisson() -> None:
    times = plan_of(Poisson(1000, 20)).times
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    # Exponential gaps: as wide as their mean, and e^-1 of them longer than it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.01)


def test_bursts_come_at_one_moment_and_keep_the_rate() -> None:
    times = plan_of(Bursts(1000, 20, size=10)).times
    _, sizes = np.unique(times, return_counts=True)
    assert len(times) == pytest.approx(20_000, rel=0.1)
    assert sizes.mean() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(("rate", "to"), [(0, 1000), (1000, 0), (500, 500)])
def test_a_ramp_goes_in_a_line(rate: float, to: float) -> None:
    times = plan_of(Ramp(rate, to, 20)).times
    first, last = (times < 10).sum() / 10, (times >= 10).sum() / 10
    middle = (rate + to) / 2
    assert first == pytest.approx((rate + middle) / 2, rel=0.1)
    assert last == pytest.approx((to + middle) / 2, rel=0.1)
    assert times.min() >= 0
    assert times.max() <= 20


def test_phases_follow_each_other_and_the_warm_up_is_not_counted() -> None:
    made = Scenario("test", [Constant(10, 1), Constant(100, 1)], [Request("a", model="a")], warmup=2)
    plan = schedule.plan(made)
    assert (plan.times >= 2).tolist() == plan.counted.tolist()
    assert (plan.counted & (plan.times < 3)).sum() == 10
    assert (plan.times >= 3).sum() == 100
    assert (np.diff(plan.times) >= 0).all()


def test_kinds_and_deadlines_are_mixed() -> None:
    kinds = [Request("a", model="a", weight=3, deadline_ms=[50, 100]), Request("b", path="/b")]
    plan = plan_of(Poisson(1000, 20), requests=kinds)
    assert (plan.kinds == 0).mean() == pytest.approx(0.75, abs=0.02)
    assert set(plan.deadlines[plan.kinds == 0]) == {0.05, 0.1}
    assert set(plan.deadlines[plan.kinds == 1]) == {np.inf}


def test_a_seed_says_everything() -> None:
    kinds = [Request("a", model="a", deadline_ms=[1, 2, 3]), Request("b", path="/b")]
    one, same, other = (plan_of(Poisson(100, 5), requests=kinds, seed=seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same))
    assert len(one.times) != len(other.times) or (one.times != other.times).any()


def test_parts_are_the_whole() -> None:
    plan = plan_of(Poisson(100, 5))
    parts = [plan.part(number, 3) for number in range(3)]
    assert sorted(np.concatenate([part.times for part in parts])) == plan.times.tolist()


def test_scaled_and_lasting_keep_the_shape() -> None:
    made = Scenario("test", [Ramp(0, 100, 5), Poisson(50, 5), Bursts(10, 10)], [Request("a", model="a")])
    other = scenario.lasting(scenario.scaled(made, 200), 4)
    assert other.mean == pytest.approx(200)
    assert other.seconds == pytest.approx(4)
    assert [phase.seconds for phase in other.phases] == [1, 1, 2]


@pytest.mark.parametrize("path", sorted(scenario.FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_projects_scenarios_are_read(path: Path) -> None:
    made = scenario.read(path.stem)
    assert made.name == path.stem
    assert made.about
    assert len(schedule.plan(made).times)


def test_all_forms_of_a_file_say_the_same(tmp_path: Path) -> None:
    said = {
        "name": "s",
        "phases": [{"kind": "bursts", "rate": 5.0, "seconds": 1.0, "size": 2.0}],
        "requests": [{"name": "a", "path": "/a", "json": {"x": [1]}}],
    }
    (tmp_path / "s.json").write_text(json.dumps(said))
    (tmp_path / "s.yaml").write_text(
        "name: s\nphases: [{kind: bursts, rate: 5, seconds: 1, size: 2}]\n"
        "requests: [{name: a, path: /a, json: {x: [1]}}]\n"
    )
    (tmp_path / "s.toml").write_text(
        'name = "s"\nphases = [{ kind = "bursts", rate = 5, seconds = 1, size = 2 }]\n'
        'requests = [{ name = "a", path = "/a", json = { x = [1] } }]\n'
    )
    found = [scenario.read(str(tmp_path / f"s.{suffix}")) for suffix in ("json", "yaml", "toml")]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('requests = [{ name = "a", path = "/a" }]', "missing required field `name`"),
        ('name = "x"\nphases = []\nrequests = []', "length >= 1"),
        ('name = "x"\nphases = [{ kind = "wave", rate = 1, seconds = 1 }]\nrequests = []', "wave"),
        ('name = "x"\nphases = [{ kind = "poisson", rate = -1, seconds = 1 }]\nrequests = []', "phases[0].rate"),
        ('name = "x"\nphases = [{ kind = "poisson", rate = 1, seconds = 1 }]\nrequests = [{ name = "a" }]', "`path`"),
        ("name = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.toml") as raised:
        scenario.read(str(path))
    assert said in str(raised.value)


def test_an_unknown_scenario_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="poisson"):
        scenario.read("nothing")
