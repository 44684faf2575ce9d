"""Where ready tasks run: idle executors, prefetch, recall, resources, blocked parents, async executors."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.placement import ASYNC_TASKS_MAX, LANES_KEPT, PREFETCH_TASKS_MAX, RECALL_AFTER, RESERVE_AFTER
from rtml.messages import Define, Interrupt, LoopLag, Recall, StartExecutor
from tests.unit.cores import Engine


def learned(run: float, workers: int = 1, **options: Any) -> Engine:
    """An engine that knows how long a call of "f" takes."""
    engine = Engine(workers, **options)
    engine.submit("warm")
    engine.finish("warm", run=run)
    engine.ack()
    return engine


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


# --- idle executors


def test_the_executor_that_became_idle_last_is_taken() -> None:
    engine = Engine(3)
    engine.submit("a", "b", "c")
    order = [engine.holder(name) for name in ("b", "c", "a")]
    for name in ("b", "c", "a"):
        engine.finish(name, run=1.0)
    engine.submit("d", "e", "g")
    assert [engine.holder(name) for name in ("d", "e", "g")] == order[::-1]


def test_one_that_knows_the_function_is_preferred() -> None:
    engine = Engine(2)
    engine.define("other")
    engine.submit("a")
    knows = engine.holder("a")
    engine.submit("b", of="other")
    engine.finish("a", run=1.0)
    engine.finish("b", run=1.0)  # its executor became idle last
    engine.submit("c")
    assert engine.holder("c") == knows


def test_a_function_is_defined_once_for_each_executor() -> None:
    engine = learned(1.0, 2)
    engine.submit("a", "b")
    assert all(len(engine.heard(worker, Define)) == 1 for worker in ("w1", "w2"))


@pytest.mark.parametrize(
    ("offer", "asked", "together"),
    [
        ({"cpu": 2.0}, {"cpu": 1}, 2),
        ({"cpu": 2.0}, {"cpu": 2}, 1),
        ({"cpu": 2.0}, {"cpu": 0.5}, 2),
        ({"cpu": 1.0}, {"cpu": 0.5}, 2),
        ({"cpu": 1.0}, {"cpu": 0}, 2),
        ({"cpu": 2.0, "gpu": 1.0}, {"gpu": 1}, 1),
        ({"cpu": 2.0, "gpu": 1.0}, {"gpu": 0.5}, 2),
        ({"cpu": 2.0, "memory": 100}, {"memory": 60}, 1),
        ({"cpu": 2.0, "memory": 100}, {"memory": 50}, 2),
        ({"cpu": 2.0, "resources": {"camera": 1}}, {"resources": {"camera": 1}}, 1),
        ({"cpu": 2.0, "resources": {"camera": 1}}, {"resources": {"camera": 0}}, 2),
    ],
)
def test_resources_bound_what_runs_at_a_time(offer: dict[str, Any], asked: dict[str, Any], together: int) -> None:
    engine = Engine(2, **offer)
    engine.define("needs", **asked)
    engine.submit("a", "b", of="needs")
    assert len(engine.assigned("w1") + engine.assigned("w2")) == together
    for name in ("a", "b"):
        engine.finish(name, run=1.0)
    node = engine.core.tables.nodes["n"]
    assert (node.free_cpu, node.free_extra) == (node.cpu, node.extra)


def test_a_wide_request_is_not_passed_by_for_ever() -> None:
    engine = Engine(2)
    engine.define("wide", cpu=2)
    engine.submit("a", "b")
    engine.submit("all", of="wide", priority=1)
    for number in range(3):
        engine.finish("a" if not number else f"a{number - 1}", run=1.0)
        engine.submit(f"a{number}")
        assert engine.assigned("w1") + engine.assigned("w2") != ["all"]
    engine.advance(RESERVE_AFTER)
    engine.finish("a2", run=1.0)
    engine.submit("late")
    assert "late" not in engine.assigned("w1") + engine.assigned("w2")
    engine.finish("b", run=1.0)
    assert engine.holder("all")


def test_lanes_of_past_batch_keys_are_forgotten() -> None:
    engine = Engine()
    engine.define("model", batch=2)
    for name in names("x", 2 * LANES_KEPT):
        engine.submit(name, of="model", batch_key=name)
        engine.finish(name)
    assert len(engine.core.placement._lanes) <= LANES_KEPT + 1


# --- prefetch


@pytest.mark.parametrize(
    ("run", "held"),
    [(0.0, PREFETCH_TASKS_MAX), (0.00009, 10), (0.0004, 2), (0.0006, 1), (0.5, 1)],
)
def test_prefetch_is_bounded_by_time_and_number(run: float, held: int) -> None:
    engine = learned(run)
    engine.submit(*names("a", 300))
    assert len(engine.assigned("w1")) == held


@pytest.mark.parametrize(("count", "each"), [(2, [1, 1]), (4, [2, 2]), (10, [5, 5])])
def test_prefetch_is_shared_out(count: int, each: list[int]) -> None:
    engine = learned(0.00001, 2)
    engine.submit(*names("a", count))
    assert sorted(len(engine.assigned(worker)) for worker in ("w1", "w2")) == each


def test_an_unknown_function_is_not_prefetched_behind_a_known_one() -> None:
    engine = learned(0.0001)
    engine.define("unknown")
    engine.submit("a", "b")
    engine.submit("c", of="unknown")
    engine.submit("d")
    assert engine.assigned("w1") == ["a", "b"]


def test_a_task_with_a_timeout_is_not_prefetched() -> None:
    engine = learned(0.0001)
    engine.submit("a")
    engine.submit("b", timeout=1.0)
    assert engine.assigned("w1") == ["a"]


def test_another_shape_is_not_prefetched() -> None:
    engine = learned(0.0001)
    engine.submit("a")
    engine.submit("b", cpu=0.5)
    assert engine.assigned("w1") == ["a"]


def test_nothing_is_queued_behind_what_takes_longer_than_expected() -> None:
    engine = learned(0.0001)
    engine.submit("slow")
    engine.advance(RECALL_AFTER)
    engine.submit("a")
    assert engine.assigned("w1") == ["slow"]


@pytest.mark.parametrize("run", [0.0001, 0.0006, 0.6])
def test_turns_of_submitters_do_not_depend_on_prefetch(run: float) -> None:
    engine = learned(run)
    engine.join("bob")
    engine.define("long")
    engine.submit("long", of="long")
    engine.submit(*names("a", 6))
    engine.submit(*names("b", 6), by="bob")
    engine.finish("long", run=1.0)
    order = ""
    while held := engine.assigned("w1"):
        order += held[0][0]
        engine.finish(held[0], run=run)
    assert order == "ab" * 6


# --- recall


def queued(engine: Engine, worker: str = "w1") -> str:
    return " ".join(engine.assigned(worker))


def recalled() -> Engine:
    """The executor of "slow" has been asked to give back "quick", which waits behind it."""
    engine = learned(0.0001, 2)
    engine.submit("slow", "a", "b", "quick")
    busy, other = engine.holder("slow"), engine.holder("a")
    engine.finish("a", "b", run=0.0001)
    assert (engine.assigned(busy), engine.assigned(other)) == (["slow", "quick"], [])
    engine.advance(RECALL_AFTER)
    assert engine.heard(busy, Recall)
    return engine


def test_what_waits_behind_a_slow_task_is_recalled() -> None:
    engine = recalled()
    busy = engine.holder("slow")
    engine.give_back(busy, "quick")
    assert engine.assigned(busy) == ["slow"]
    assert engine.attempt("quick").attempt == 2


def test_an_executor_that_is_asked_to_give_back_gets_nothing() -> None:
    engine = recalled()
    busy = engine.holder("slow")
    engine.submit(*names("x", 20))
    assert engine.assigned(busy) == ["slow", "quick"]


def test_a_recalled_task_may_have_been_started_just_before() -> None:
    engine = recalled()
    busy = engine.holder("slow")
    engine.finish("slow", run=0.01)
    engine.give_back(busy)
    engine.finish("quick", run=0.01)
    assert engine.outcome("quick") == "ok"


def test_signals_for_a_recall_are_repeated_until_it_is_answered() -> None:
    engine = recalled()
    engine.heard("node", Interrupt)
    engine.advance(1.0)
    assert 3 <= len(engine.heard("node", Interrupt)) <= 10
    engine.give_back(engine.holder("slow"), "quick")
    engine.advance(5.0)
    assert len(engine.heard("node", Interrupt)) <= 1


def test_recall_does_not_wait_for_tasks_that_nothing_is_free_for() -> None:
    engine = learned(0.0001, 3, gpu=1.0)
    engine.define("train", gpu=1)
    engine.submit("g1", "g2", of="train")
    engine.submit("s1", "s2", "s3", "s4")
    first, second = engine.holder("s1"), engine.holder("s2")
    engine.finish(*engine.assigned(second), run=0.0001)
    engine.advance(RECALL_AFTER)
    assert engine.heard(first, Recall)


def test_nothing_is_recalled_for_an_executor_without_room() -> None:
    engine = learned(0.0001, 2, cpu=1.0)
    engine.submit("slow", "quick")
    busy = engine.holder("slow")
    engine.advance(1.0)
    assert engine.assigned(busy) == ["slow", "quick"]
    assert not engine.heard(busy, Recall)


def test_nothing_is_recalled_out_of_a_batch() -> None:
    engine = Engine(2)
    engine.define("model", batch=4)
    engine.submit("a", "b", "c", of="model")
    engine.advance(1.0)
    assert not engine.heard(engine.holder("a"), Recall)


# --- blocked parents


def parent(workers: int = 1, run: float | None = None) -> Engine:
    engine = Engine(workers) if run is None else learned(run, workers)
    engine.define("parent")
    engine.submit("p", of="parent")
    return engine


def test_children_are_run_on_top_of_a_blocked_parent() -> None:
    engine = parent(run=0.0001)
    engine.submit("x", "y", parent="p")
    engine.submit("other")
    engine.block("p", returned=[name for name in engine.assigned("w1") if name != "p"])
    assert queued(engine) == "p x y"
    assert engine.attempt("x").under == engine.ids["p"]
    engine.finish("x", "y")
    engine.resume("p")
    assert queued(engine) == "p"
    engine.finish("p")
    assert queued(engine) == "other"


def test_children_of_unknown_cost_are_fed_one_by_one() -> None:
    engine = parent()
    engine.submit("x", "y", parent="p")
    engine.block("p")
    assert queued(engine) == "p x"


def test_children_are_shared_with_idle_executors() -> None:
    engine = parent(2, run=0.0001)
    with engine.together():
        engine.submit("x", "y", "z", "u", parent="p")
        engine.block("p")
    fed = engine.assigned(engine.holder("p"))
    assert fed == ["p", "x", "y"]


@pytest.mark.parametrize(
    "options",
    [{"timeout": 1.0}, {"of": "model"}, {"of": "coroutine"}, {"cpu": 3}],
    ids=["timeout", "batch", "async", "too wide"],
)
def test_children_that_are_not_run_on_top(options: dict[str, Any]) -> None:
    engine = Engine(1, cpu=2.0)
    engine.node(cpu=4.0)
    engine.define("model", batch=4)
    engine.define("coroutine", asynchronous=True)
    engine.submit("p", cpu=2)
    engine.submit("x", parent="p", **options)
    engine.node(cpu=2.0)
    engine.block("p")
    assert queued(engine) == "p"


def test_a_child_of_another_shape_is_not_mixed_in() -> None:
    engine = parent(run=0.0001)
    with engine.together():
        engine.submit("x", parent="p")
        engine.submit("half", parent="p", cpu=0.5)
        engine.submit("y", parent="p")
        engine.block("p")
    assert queued(engine) == "p x y"


def test_not_where_the_executor_cannot_run_them() -> None:
    engine = parent()
    engine.submit("x", parent="p")
    engine.block("p", inline=False)
    assert queued(engine) == "p"
    assert engine.heard("node", StartExecutor)


def test_children_may_block_too() -> None:
    engine = parent()
    engine.submit("x", parent="p")
    engine.block("p")
    engine.submit("y", parent="x")
    engine.block("x")
    assert queued(engine) == "p x y"
    assert engine.attempt("y").under == engine.ids["x"]
    assert engine.attempt("y").chain == ["parent", "f"]
    engine.finish("y")
    engine.resume("x")
    engine.finish("x")
    engine.resume("p")
    engine.finish("p")
    assert engine.outcome("p") == "ok"


def test_a_resume_that_was_not_said_is_implied_by_the_end() -> None:
    engine = parent()
    engine.submit("x", parent="p")
    engine.block("p")
    engine.submit("y", parent="x")
    engine.block("x")
    engine.finish("p")
    assert engine.outcome("p") == "ok"
    engine.finish("y", "x", outcome=2)
    assert queued(engine) == ""


def test_a_resume_of_a_task_that_is_not_blocked_means_nothing() -> None:
    engine = parent()
    engine.resume("p")
    engine.finish("p")
    assert engine.outcome("p") == "ok"


def test_a_resumed_parent_with_unstarted_children_waits_for_nobody() -> None:
    engine = parent(run=0.0001)
    with engine.together():
        engine.submit("x", "y", parent="p")
        engine.block("p")
    engine.finish("x")
    with engine.together():
        engine.resume("p")
        engine.give_back("w1", "y")
    assert engine.core.tables.nodes["n"].free_cpu == 0.0
    engine.finish("p")
    assert engine.core.tables.nodes["n"].free_cpu == 1.0


# --- async executors


def test_coroutines_go_where_there_are_fewest() -> None:
    engine = Engine(1, 2)
    engine.define("page", asynchronous=True)
    engine.submit(*names("a", 6), of="page")
    assert [len(engine.assigned(loop)) for loop in ("l1", "l2")] == [3, 3]


def test_coroutines_are_bounded_too() -> None:
    engine = Engine(1, 1)
    engine.define("page", asynchronous=True)
    engine.submit(*names("a", ASYNC_TASKS_MAX + 1), of="page")
    assert len(engine.assigned("l1")) == ASYNC_TASKS_MAX
    engine.finish("a0")
    assert engine.assigned("l1")[-1] == f"a{ASYNC_TASKS_MAX}"


def test_coroutines_may_ask_for_resources_each() -> None:
    engine = Engine(1, 1, gpu=1.0)
    engine.define("page", asynchronous=True, gpu=0.5)
    engine.submit("a", "b", "c", of="page")
    assert queued(engine, "l1") == "a b"
    engine.finish("a")
    assert queued(engine, "l1") == "b c"


def test_an_async_batch_waits_for_its_delay() -> None:
    engine = Engine(1, 1)
    engine.define("page", asynchronous=True, batch=2, batch_delay=0.01)
    engine.submit("a", of="page")
    assert queued(engine, "l1") == ""
    engine.advance(0.01)
    assert queued(engine, "l1") == "a"
    engine.submit("b", "c", of="page")
    assert engine.attempt("b").batch == engine.attempt("c").batch != engine.attempt("a").batch


def test_a_loop_that_does_not_turn_gets_nothing() -> None:
    engine = Engine(1, 2)
    engine.define("page", asynchronous=True)
    engine.submit("a", of="page")
    stuck = engine.holder("a")
    engine.post(stuck, LoopLag(engine.ids["a"], 0.06))
    engine.submit("b", "c", of="page")
    assert engine.assigned(stuck) == ["a"]
    engine.post(stuck, LoopLag(engine.ids["a"], 0.0))
    engine.submit("d", of="page")
    assert engine.assigned(stuck) == ["a", "d"]
    assert list(engine.core.lags) == [0.06]
