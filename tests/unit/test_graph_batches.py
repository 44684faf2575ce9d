"""Batches: when they leave, what they hold, and how they come apart."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.messages import CANCELLED
from tests.unit.cores import Engine


def engine_with(workers: int = 1, **options: Any) -> Engine:
    engine = Engine(workers)
    engine.define("model", **({"batch": 4} | options))
    engine.define("long")
    return engine


def busy(**options: Any) -> Engine:
    """Its only executor is occupied by "long"."""
    engine = engine_with(**options)
    engine.submit("long", of="long")
    return engine


def batches(engine: Engine, worker: str = "w1") -> list[str]:
    """What an executor holds, by batch."""
    found: dict[int, list[str]] = {}
    for attempt in engine.peers[worker].hands.values():
        found.setdefault(attempt.batch, []).append(engine.name_of(attempt.id))
    return [" ".join(names) for names in found.values()]


@pytest.mark.parametrize(
    ("limit", "items", "first"),
    [
        (4, [1, 1, 1, 1, 1, 1], "a b c d"),
        (4, [1, 1], "a b"),
        (1, [1, 1], "a"),
        (4, [2, 2, 1], "a b"),
        (4, [3, 2, 1], "a"),
        (4, [9, 1], "a"),
        (4, [4], "a"),
        (4, [1, 9, 1], "a"),
    ],
)
def test_a_batch_is_filled_by_items(limit: int, items: list[int], first: str) -> None:
    engine = busy(batch=limit)
    for name, count in zip("abcdef", items, strict=False):
        engine.submit(name, of="model", items=count)
    engine.finish("long", run=1.0)
    assert batches(engine) == [first]


@pytest.mark.parametrize(
    ("keys", "first"),
    [("k k k", "a b c"), ("k l k", "a c"), ("k l m", "a")],
)
def test_only_equal_keys_share_a_batch(keys: str, first: str) -> None:
    engine = busy()
    for name, key in zip("abc", keys.split(), strict=True):
        engine.submit(name, of="model", batch_key=key)
    engine.finish("long", run=1.0)
    assert batches(engine) == [first]


@pytest.mark.parametrize(
    "changed",
    [{"batch": 2}, {"cpu": 0.5}, {"of": "other"}],
    ids=["another limit", "another shape", "another function"],
)
def test_nor_do_calls_that_ask_for_something_else(changed: dict[str, Any]) -> None:
    engine = busy()
    engine.define("other", batch=4)
    engine.submit("a", of="model")
    engine.submit("b", **({"of": "model"} | changed))
    engine.finish("long", run=1.0)
    assert batches(engine) == ["a"]


def test_priorities_share_a_batch_most_urgent_first() -> None:
    engine = busy(batch=3)
    engine.submit("a", "b", "c", of="model")
    engine.submit("urgent", of="model", priority=1)
    engine.finish("long", run=1.0)
    assert batches(engine) == ["urgent a b"]


def test_submitters_take_turns_in_a_batch() -> None:
    engine = busy()
    engine.join("bob")
    engine.submit("a", "b", "c", "d", of="model")
    engine.submit("x", "y", of="model", by="bob")
    engine.finish("long", run=1.0)
    assert batches(engine) == ["a x b y"]


@pytest.mark.parametrize(
    ("mark", "facts", "key"),
    [
        ("", "f4(3)", "f4(3)"),
        ("?", "f4(3)", "f4(3)"),
        ("x=?", "f4(3)", "x=f4(3)"),
        ("i8|?", "f4", "i8|f4"),
    ],
)
def test_a_dependency_completes_the_key(mark: str, facts: str, key: str) -> None:
    engine = engine_with()
    engine.submit("made", of="long")
    engine.submit("uses", of="model", deps=["made"], batch_key=mark)
    engine.finish("made", batch_key=facts)
    assert engine.task("uses").batch_key == key


@pytest.mark.parametrize(
    ("mark", "key"),
    [
        ("?|?", "f4|u1"),
        ("x=?|i8|y=?", "x=f4|i8|y=u1"),
        ("?", "?"),  # one of them lies in a container: nobody knows which
        ("", "f4"),
    ],
)
def test_so_do_several(mark: str, key: str) -> None:
    engine = engine_with()
    engine.submit("one", "two", of="long")
    engine.submit("uses", of="model", deps=["one", "two"], batch_key=mark)
    engine.finish("one", batch_key="f4")
    engine.finish("two", batch_key="|u1")
    assert engine.task("uses").batch_key == key


# --- when they leave


def test_a_full_batch_does_not_wait() -> None:
    engine = engine_with(batch_delay=0.01)
    engine.submit("a", "b", "c", of="model")
    assert batches(engine) == []
    engine.submit("d", of="model")
    assert batches(engine) == ["a b c d"]


def test_it_is_full_by_items() -> None:
    engine = engine_with(batch_delay=0.01)
    engine.submit("a", of="model", items=4)
    assert batches(engine) == ["a"]


def test_the_delay_counts_from_the_first_one() -> None:
    engine = engine_with(batch_delay=0.01)
    engine.submit("a", of="model")
    engine.advance(0.006)
    engine.submit("b", of="model")
    engine.advance(0.003)
    assert batches(engine) == []
    engine.advance(0.001)
    assert batches(engine) == ["a b"]


def test_the_next_batch_waits_from_its_own_first_one() -> None:
    engine = busy(batch_delay=0.01, batch=2)
    engine.submit("a", "b", of="model")
    engine.advance(0.005)
    engine.submit("c", of="model")
    engine.finish("long")
    assert batches(engine) == ["a b"]
    engine.finish("a", "b")
    assert batches(engine) == []
    engine.advance(0.01)
    assert batches(engine) == ["c"]


def test_one_whose_first_left_goes_when_the_next_is_due() -> None:
    engine = engine_with(batch_delay=0.01)
    engine.submit("a", of="model")
    engine.advance(0.005)
    engine.submit("b", of="model")
    engine.cancel("a")
    engine.advance(0.006)
    assert batches(engine) == []
    engine.advance(0.004)
    assert batches(engine) == ["b"]


def test_it_waits_for_an_executor_in_any_case() -> None:
    engine = busy(batch_delay=0.01)
    engine.submit("a", of="model")
    engine.advance(0.05)
    assert batches(engine) == ["long"]
    engine.submit("b", of="model")
    engine.finish("long")
    assert batches(engine) == ["a b"]


# --- deadlines


@pytest.mark.parametrize(
    ("budgets", "first"),
    [
        ([None, None, None, None], "a b c d"),
        ([0.045, None, None, None], "a b c"),
        ([0.1, 0.025, 0.2, None], "b"),
        ([0.035, 0.036, 0.037, None], "a b"),
        # lost already: it comes last, and keeps nobody waiting, else a backlog ends all batches
        ([0.001, None, None, None], "b c d a"),
        ([0.021, None, None, None], "a"),
    ],
)
def test_a_deadline_bounds_the_batch(budgets: list[float | None], first: str) -> None:
    engine = engine_with(batch=8)
    for number, (size, seconds) in enumerate([(1, 0.02), (4, 0.05)] * 4):
        names = [f"warm{number}.{item}" for item in range(size)]
        engine.submit(*names, of="model")
        engine.finish(*names, run=seconds)
    engine.submit("long", of="long")
    for name, budget in zip("abcd", budgets, strict=True):
        engine.submit(name, of="model", deadline=budget)
    engine.finish("long")
    assert batches(engine) == [first]


# --- how they end


def test_items_end_one_by_one() -> None:
    engine = engine_with()
    engine.submit("a", "b", "c", of="model")
    with engine.together():
        engine.finish("a", value=b"1")
        engine.finish("b", error="ValueError")
        engine.finish("c", error="OSError", retryable=True)
    assert [engine.outcome(name) for name in "abc"] == ["ok", "error ValueError", ""]
    assert engine.attempt("c").attempt == 2


def test_the_cost_is_learned_from_the_first_of_each() -> None:
    engine = engine_with()
    engine.submit("a", "b", of="model")
    engine.finish("a", "b", run=0.02)
    function = engine.core.tables.functions[engine.functions["model"].id]
    assert function.estimate is None
    assert function.cost.predict(2) == pytest.approx(0.02)


def test_failed_batches_teach_nothing() -> None:
    engine = engine_with()
    engine.submit("a", "b", of="model")
    engine.finish("a", "b", error="ValueError", run=0.001)
    assert engine.core.tables.functions[engine.functions["model"].id].cost.predict(2) is None


def test_an_item_may_be_cancelled_while_the_others_run() -> None:
    engine = engine_with()
    engine.submit("a", "b", of="model")
    engine.cancel("a")
    assert engine.outcome("a").startswith("cancelled")
    engine.finish("a", outcome=CANCELLED)
    engine.finish("b")
    assert engine.outcome("b") == "ok"


@pytest.mark.parametrize("retries", [0, 2])
def test_batch_mates_of_a_crash_run_alone_and_uncharged(retries: int) -> None:
    engine = engine_with(3, retries=retries)
    engine.submit("a", "b", "c", of="model")
    engine.die(engine.holder("a"), ["a", "b", "c"])
    alive = [name for name in ("w1", "w2", "w3") if name in engine.peers]
    assert sorted(batch for worker in alive for batch in batches(engine, worker)) == ["a", "b"]
    engine.finish("a")
    engine.finish("c")
    engine.finish("b")
    assert {engine.outcome(name) for name in "abc"} == {"ok"}


def test_a_batch_of_one_is_charged() -> None:
    engine = engine_with(2, retries=0)
    engine.submit("a", of="model")
    engine.die(engine.holder("a"), ["a"])
    assert engine.outcome("a") == "error WorkerDied"
