"""How long work has to wait for a free slot, how sure that is, and what promises teach."""

from __future__ import annotations

from random import Random

import pytest

from rtml.graph.admission import _MARGIN_MAX, _MARGIN_MIN, _MARGIN_REGRET, BROKEN, MARGIN, Admission
from rtml.graph.backlog import Room
from rtml.graph.estimate import BatchCost
from rtml.graph.policy import Scheduling
from rtml.graph.predict import Forecast
from rtml.graph.tables import Limits, Tables
from tests.unit.cores import Engine
from tests.unit.test_graph_admission import details, refusal, trained


@pytest.mark.parametrize(
    ("slots", "busy", "work", "wait"),
    [
        (2.0, [], 0.0, 0.0),
        (2.0, [], 3.0, 1.5),
        (2.0, [1.0], 0.0, 0.0),
        (2.0, [1.0], 1.0, 1.0),
        (2.0, [1.0], 3.0, 2.0),
        (2.0, [1.0, 1000.0], 0.0, 1.0),
        (2.0, [1.0, 1000.0], 3.0, 4.0),
        (1.0, [1000.0], 0.0, 1000.0),
        (3.0, [1.0, 2.0], 2.0, 1.5),
        (1.5, [2.0], 0.5, 1.0),
        # more executors than slots: each has a part of the cpus
        (1.0, [1.0, 2.0, 3.0], 1.0, 2.0),
    ],
)
def test_slots_fill_like_vessels(slots: float, busy: list[float], work: float, wait: float) -> None:
    assert Room(slots, busy, {}).wait(work) == pytest.approx(wait)


def test_a_wait_is_as_long_as_it_takes_one_after_the_other() -> None:
    """Against the plain way: small pieces of work go where they begin first."""
    random = Random(3)
    for _ in range(50):
        slots = random.randint(1, 5)
        busy = [random.uniform(0.0, 2.0) for _ in range(random.randint(0, slots))]
        work = random.uniform(0.0, 8.0)
        free = [*busy, *[0.0] * (slots - len(busy))]
        for _ in range(2000):
            free[free.index(min(free))] += work / 2000
        assert Room(float(slots), busy, {}).wait(work) == pytest.approx(min(free), abs=0.01)


def test_the_error_of_a_sum_grows_with_its_root() -> None:
    room = Room(2.0, [], {})
    one, hundred = (room.wait(0.01 * n, 0.0001 * n, 3.0) - room.wait(0.01 * n) for n in (1, 100))
    assert hundred == pytest.approx(10 * one)


def test_the_spread_of_graphs_is_learned_whatever_is_first_believed() -> None:
    random = Random(1)
    for sigma in (0.0, 0.2):
        forecast = Forecast()
        for _ in range(2000):
            run = 0.01 * (1 + random.gauss(0.0, sigma))
            forecast.learn_work(run)
            forecast.learn_spread(0.01, run)
        assert forecast.spread == pytest.approx(0.01 * sigma**2, rel=0.5, abs=1e-5)


def test_one_pause_of_the_machine_does_not_make_everything_uncertain() -> None:
    forecast = Forecast()
    for run in [0.01] * 100 + [10.0]:
        forecast.learn_spread(0.01, run)
    assert forecast.spread < 0.01


def test_margins_follow_the_promises() -> None:
    admission = Admission(Tables(1, Limits()), Scheduling())
    assert admission.margin == MARGIN
    for _ in range(100):
        admission._keep_promises(kept=False)
    assert admission.margin == _MARGIN_MAX
    for _ in range(100_000):
        admission._keep_promises(kept=True)
    assert admission.margin == _MARGIN_MIN
    admission.margin = MARGIN
    random = Random(5)
    for _ in range(50_000):
        admission._keep_promises(kept=random.random() >= BROKEN)
    assert _MARGIN_MIN < admission.margin < _MARGIN_MAX


def test_a_wide_margin_refuses_nobody_who_finds_a_free_executor() -> None:
    engine = trained(0.01, times=2)
    engine.core.admission.margin = _MARGIN_MAX
    engine.submit("a", deadline=0.0125, admission=True)
    assert not engine.outcome("a")
    engine.submit("b", deadline=0.03, admission=True)
    assert details(engine, "b")["predicted"] == pytest.approx(0.02)


def test_what_overruns_is_expected_to_go_on_as_long_again() -> None:
    engine = trained(0.01, times=80)
    engine.submit("slow", deadline=1.0, admission=True)
    engine.advance(0.04)
    engine.submit("a", deadline=0.035, admission=True)
    assert details(engine, "a")["predicted"] == pytest.approx(0.04)
    engine.finish("slow", run=0.04)
    engine.submit("b", deadline=0.035, admission=True)
    assert not engine.outcome("b")


def test_the_calls_of_a_batch_share_its_time() -> None:
    engine = Engine()
    engine.define("model", batch=4)
    engine.submit("first", of="model", deadline=1.0, admission=True)
    names = [f"c{number}" for number in range(4)]
    engine.submit(*names, of="model", deadline=1.0, admission=True)
    engine.finish("first", run=0.0)
    plans = [engine.task(name).graph.plan for name in names]
    engine.advance(0.04)
    engine.finish(*names, run=0.04)
    assert [plan.done for plan in plans] == pytest.approx([0.01] * 4)


def test_a_batch_leaves_room_for_its_noise() -> None:
    random = Random(2)
    calm, noisy = BatchCost(), BatchCost()
    for _ in range(300):
        items = random.randint(1, 8)
        calm.observe(items, 0.01 + 0.001 * items)
        noisy.observe(items, (0.01 + 0.001 * items) * random.uniform(0.5, 1.5))
    assert calm.cautious(8) == pytest.approx(0.018, rel=0.01)
    assert 0.024 < (noisy.cautious(8) or 0.0) < 0.034
    assert BatchCost().cautious(8) is None


def test_who_was_refused_needlessly_narrows_the_margin() -> None:
    engine = trained(0.01, times=2)
    admission = engine.core.admission
    admission.margin = _MARGIN_MAX
    engine.submit("a", "b", deadline=0.05, admission=True)
    engine.submit("c", deadline=0.05, admission=True)
    assert "to spare" in refusal(engine, "c").message
    for name in "ab":
        engine.advance(0.001)
        engine.finish(name, run=0.001)
    before = admission.margin
    engine.submit("d", deadline=0.05, admission=True)
    assert admission.margin == pytest.approx(before - _MARGIN_REGRET)
    engine.submit("e", "f", deadline=0.05, admission=True)
    assert engine.outcome("f") == "error Overloaded"
    engine.advance(0.06)
    now = admission.margin
    engine.submit("g", deadline=0.05, admission=True)
    assert admission.margin == now, "an executor is free too late for f"


def test_a_call_that_is_too_slow_by_itself_says_nothing_about_waiting() -> None:
    for first, second, blamed in ((0.01, 0.1, False), (0.1, 0.01, True)):
        engine = trained(0.01, times=60)
        admission = engine.core.admission
        engine.submit("a", deadline=1.0, admission=True)
        engine.submit("b", deadline=0.05, admission=True)
        before = admission.margin
        engine.advance(first)
        engine.finish("a", run=first)
        engine.advance(second)
        assert engine.outcome("b") == "expired DeadlineExceeded"
        assert (admission.margin > before) is blamed
