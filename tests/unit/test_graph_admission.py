"""What is let in: predictions, promises that must be kept, quotas, probes; and what is learned from it."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.admission import FILL
from rtml.graph.core import Core
from rtml.graph.policy import POLICIES, Scheduling
from rtml.graph.predict import WINDOW, Quantiles
from rtml.graph.tables import Limits
from rtml.messages import ErrorInfo
from tests.unit.cores import Engine


def trained(run: float = 0.01, times: int = 20, workers: int = 1, **options: Any) -> Engine:
    """An engine that knows how long `f` takes."""
    engine = Engine(workers=workers, **options)
    for number in range(times):
        engine.submit(f"t{number}", deadline=9.0, admission=True)
        engine.advance(run)
        engine.finish(f"t{number}", run=run)
    return engine


def refusal(engine: Engine, name: str) -> ErrorInfo:
    result = engine.results[name]
    assert engine.outcome(name) == "error Overloaded", engine.outcome(name)
    assert result.error is not None
    return result.error


def details(engine: Engine, name: str) -> dict[str, Any]:
    found = refusal(engine, name).details
    assert found is not None
    return found


def shed(engine: Engine) -> list[str]:
    return [end.ending for end in engine.core.take_ended() if end.ending]


def test_nothing_known_lets_everything_in() -> None:
    engine = Engine()
    for number in range(50):
        engine.submit(f"a{number}", deadline=0.001, admission=True)
    assert not any(engine.outcome(f"a{number}") for number in range(50))


def test_what_cannot_make_it_is_refused_at_once_and_told_why() -> None:
    engine = trained(0.01)
    for number in range(5):
        engine.submit(f"a{number}", deadline=0.07, admission=True)
    engine.submit("late", deadline=0.07, admission=True)
    told = details(engine, "late")
    assert told["predicted"] == pytest.approx(0.06, rel=0.05)
    assert told["budget"] == 0.07
    assert told["retry_after"] == pytest.approx(0.05 / FILL + 0.01 - 0.07, abs=0.001)
    assert told["quota"] is False
    assert "take 60.0 ms and needs 12.5 ms to spare; it has 70.0" in refusal(engine, "late").message
    assert shed(engine)[-1] == "shed_admission"
    engine.submit("loose", deadline=0.1, admission=True)
    assert not engine.outcome("loose")


def test_who_does_not_ask_is_not_refused() -> None:
    engine = trained(0.01)
    engine.submit("a", "b", "c", "d")
    engine.submit("late", deadline=0.001)
    assert not engine.outcome("late")
    engine.advance(0.002)
    assert engine.outcome("late") == "expired DeadlineExceeded"
    assert shed(engine)[-1] == "expired_queue"


def test_the_backlog_is_what_is_left() -> None:
    engine = trained(0.01)
    for number in range(5):
        engine.submit(f"a{number}", deadline=1.0, admission=True)
    for number in range(4):
        engine.advance(0.01)
        engine.finish(f"a{number}", run=0.01)
    engine.submit("b", deadline=0.055, admission=True)
    assert not engine.outcome("b")


def test_what_runs_now_is_half_done() -> None:
    engine = trained(0.01)
    engine.submit("a", deadline=1.0, admission=True)
    engine.submit("b", deadline=1.0, admission=True)
    engine.advance(0.008)
    engine.submit("c", deadline=0.031, admission=True)
    assert not engine.outcome("c"), (
        "12 ms of others' work and 10 of its own, with room for more urgent ones, are within 31 ms"
    )


def test_the_urgent_overtake_only_as_far_as_promises_allow() -> None:
    engine = trained(0.01)
    for number in range(6):
        engine.submit(f"a{number}", deadline=0.08, admission=True)
    outcomes = []
    for number in range(4):
        engine.submit(f"u{number}", deadline=0.06, admission=True)
        outcomes.append(engine.outcome(f"u{number}"))
    assert outcomes[0] == "", "there is room for one that comes before the others"
    assert outcomes[3] == "error Overloaded"
    assert "only time for what was admitted before" in refusal(engine, "u3").message


def test_more_executors_do_more() -> None:
    engine = trained(0.01, workers=4)
    for number in range(8):
        engine.submit(f"a{number}", deadline=1.0, admission=True)
    engine.submit("b", deadline=0.05, admission=True)
    assert not engine.outcome("b"), "80 ms of work take 20 ms"


def test_descendants_are_expected_and_never_refused() -> None:
    engine = Engine(loops=1)
    engine.define("program", asynchronous=True)
    for number in range(10):
        engine.submit(f"p{number}", of="program", deadline=9.0, admission=True)
        engine.submit(f"c{number}", f"d{number}", parent=f"p{number}")
        for child in (f"c{number}", f"d{number}"):
            engine.advance(0.01)
            engine.finish(child, run=0.01)
        engine.finish(f"p{number}")
    forecast = engine.core.tables.functions[engine.functions["program"].id].forecast
    assert forecast.work == pytest.approx(0.02)
    for number in range(10, 14):
        engine.submit(f"p{number}", of="program", deadline=0.12, admission=True)
    engine.submit("late", of="program", deadline=0.12, admission=True)
    assert engine.outcome("late") == "error Overloaded", "their children are not there yet, and are counted"
    engine.submit("child", parent="p10", deadline=0.001, admission=True)
    assert not engine.outcome("child")


def test_a_lone_graph_is_counted_from_the_moment_another_one_comes() -> None:
    engine = trained(0.01)
    admission = engine.core.admission
    engine.submit("lone", admission=True)
    lone = admission.lone
    assert lone is not None
    assert not admission.backlog.shares
    engine.advance(0.004)
    engine.submit("late", deadline=0.012, admission=True)
    assert admission.lone is None
    assert details(engine, "late")["predicted"] == pytest.approx(0.016, abs=0.001), "6 ms of the other, then its own 10"
    engine.submit("loose", deadline=0.1, admission=True)
    assert sum(admission.live.values()) == 2
    engine.advance(0.006)
    engine.finish("lone", run=0.01)
    engine.advance(0.01)
    engine.finish("loose", run=0.01)
    assert not admission.live
    assert not admission.backlog.shares


def test_of_several_graphs_none_is_lone() -> None:
    engine = trained(0.01)
    engine.submit("a", "b", "c", admission=True)
    assert engine.core.admission.lone is None
    engine.submit("late", deadline=0.015, admission=True)
    assert details(engine, "late")["predicted"] == pytest.approx(0.02, abs=0.001), "urgent, but one of them has begun"
    engine.cancel("a", "b", "c")
    assert not engine.core.admission.live


def test_lone_graphs_teach_as_much_as_others() -> None:
    engine = Engine()
    forecast = None
    for number in range(100):
        engine.submit(f"a{number}", admission=True)
        assert engine.core.admission.lone is not None
        engine.advance(0.02 if number % 2 else 0.01)
        engine.finish(f"a{number}", run=0.01)
        forecast = engine.core.tables.functions[engine.functions["f"].id].forecast
        assert forecast.work is not None, "the first one is learned from at once"
    engine.submit("b", deadline=1.0, admission=True)
    assert forecast is not None
    assert len(forecast.own) == 100
    assert forecast.own.at(0.25) == pytest.approx(0.01)
    assert forecast.own.at(0.75) == pytest.approx(0.02)
    engine.submit("c", deadline=0.001, admission=True)
    assert engine.outcome("c") == "error Overloaded"


def test_a_tenant_has_a_quota_even_without_deadlines() -> None:
    engine = Engine(limits=Limits(tenant_graphs_max=2))
    engine.submit("a", "b", tenant="acme", admission=True)
    engine.submit("c", tenant="acme", admission=True)
    assert details(engine, "c")["quota"] is True
    engine.submit("d", tenant="other", admission=True)
    engine.submit("e", tenant="acme")
    assert not engine.outcome("d")
    assert not engine.outcome("e"), "it did not ask"
    engine.cancel("a", "b", "e")
    engine.submit("f", tenant="acme", admission=True)
    assert not engine.outcome("f")
    for name in "xyz":
        engine.submit(name, admission=True)
    assert details(engine, "z")["quota"] is False, "nobody's own quota: HTTP says 503"


def test_a_flood_of_one_tenant_is_not_in_the_way_of_another() -> None:
    engine = trained(0.01)
    for number in range(10):
        engine.submit(f"a{number}", deadline=0.06, admission=True, tenant="flood")
    assert engine.outcome("a9") == "error Overloaded"
    engine.submit("c", deadline=0.06, admission=True, tenant="calm")
    assert not engine.outcome("c"), "they take turns"


def test_a_wrong_prediction_corrects_itself() -> None:
    engine = trained(0.2, times=30)
    engine.submit("refused", deadline=0.05, admission=True)
    assert engine.outcome("refused") == "error Overloaded"
    engine.advance(2.0)
    engine.submit("probe", deadline=0.05, admission=True)
    assert not engine.outcome("probe"), "nobody of its kind ran lately"
    engine.submit("second", deadline=0.05, admission=True)
    assert engine.outcome("second") == "error Overloaded", "one at a time"
    engine.advance(0.01)
    engine.finish("probe", run=0.01)
    engine.submit("again", deadline=0.05, admission=True)
    assert not engine.outcome("again"), "it made it: what was learned is the past"


def test_a_pause_of_the_machine_is_learned_from_once() -> None:
    engine = trained(0.01, times=100)
    for number in range(4):
        engine.submit(f"a{number}", deadline=0.06, admission=True)
    engine.advance(0.5)
    assert [engine.outcome(f"a{number}") for number in range(4)] == ["expired DeadlineExceeded"] * 4
    engine.finish("a0", outcome=2)
    engine.submit("b", deadline=0.03, admission=True)
    assert not engine.outcome("b")


def test_when_most_miss_it_is_not_learned_from_the_lucky_ones_alone() -> None:
    engine = trained(0.01, times=60)
    for number in range(80):
        engine.submit(f"a{number}", deadline=0.03, admission=True)
        if engine.outcome(f"a{number}"):
            break
        engine.advance(0.031)
        engine.finish(f"a{number}", outcome=2)
    assert 5 < number < 20, "the machine became slow: it is noticed"
    engine.advance(1.0)
    engine.submit("probe", deadline=0.03, admission=True)
    engine.advance(0.01)
    engine.finish("probe", run=0.01)
    engine.submit("again", deadline=0.03, admission=True)
    assert not engine.outcome("again"), "and that it is over, too"


def test_missing_steps_are_named_when_the_deadline_passes() -> None:
    engine = Engine(loops=1)
    engine.define("program", asynchronous=True)
    engine.define("g")
    engine.submit("p", of="program", deadline=0.1)
    engine.submit("a", "b", parent="p")
    engine.submit("c", of="g", parent="p")
    engine.finish("a")
    engine.advance(0.2)
    error = engine.results["p"].error
    assert error is not None
    assert error.details == {"missing": ["f", "g"]}


@pytest.mark.parametrize(
    ("policy", "order"), [("fifo", "a b c"), ("edf", "c b a"), ("slack", "b c a"), ("deferred", "c b a")]
)
def test_policies_order_what_is_ready(policy: str, order: str) -> None:
    engine = Engine()
    engine.core = Core(2, scheduling=Scheduling(POLICIES[policy]))
    engine = _on(engine, engine.core)
    engine.define("long")
    engine.submit("warm", of="long")
    engine.advance(0.4)
    engine.finish("warm", run=0.4)
    engine.submit("busy")
    engine.submit("a", deadline=3.0)
    engine.submit("b", of="long", deadline=1.1)
    engine.submit("c", deadline=1.0)
    ran = []
    for before in ("busy", "x", "y"):
        if engine.assigned("w1"):
            engine.finish(engine.assigned("w1")[0], run=0.3)
        ran += engine.assigned("w1")
        assert before
    assert " ".join(ran) == order


def test_what_is_lost_already_comes_after_what_can_make_it() -> None:
    engine = trained(0.1)
    engine.submit("busy")
    engine.submit("lost", deadline=0.15)
    engine.submit("a", deadline=0.35)
    engine.submit("b", deadline=0.45)
    engine.advance(0.1)
    ran = []
    for _ in range(2):
        engine.finish(engine.assigned("w1")[0], run=0.1)
        ran += engine.assigned("w1")
        engine.advance(0.04)
    assert ran == ["a", "b"], "lost was let go instead of letting a miss its deadline, too"
    assert engine.outcome("lost") == "expired DeadlineExceeded"
    engine.finish("b", run=0.1)
    engine.submit("alone", deadline=0.05)
    assert engine.assigned("w1") == ["alone"], "nobody else wants to"


def _on(engine: Engine, core: Core) -> Engine:
    """The same peers on another core."""
    fresh = Engine.__new__(Engine)
    fresh.__dict__.update(engine.__dict__)
    fresh._links.clear()
    for peer in fresh.peers.values():
        peer.link, peer.epoch = None, 0
    fresh.core = core
    with fresh.together():
        fresh.hello("node")
        fresh.node()
        fresh.hello("w1")
        fresh.hello("ann")
    return fresh


def test_quantiles_are_of_the_last_values() -> None:
    quantiles = Quantiles()
    assert quantiles.at(0.5) is None
    for number in range(3 * WINDOW):
        quantiles.observe(float(number % 7))
        quantiles.observe(100.0 if number < WINDOW else 1.0)
    assert len(quantiles) == WINDOW
    assert quantiles.at(1.0) == 6.0
    assert quantiles.at(0.0) == 0.0
    quantiles.forget_above(1.0)
    assert quantiles.at(1.0) == 1.0
