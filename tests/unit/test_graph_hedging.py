"""A second attempt beside a slow one: when it begins, who wins, what happens when either is lost."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.tables import Limits
from rtml.messages import Blocked, ObjectRef, Revoke
from tests.unit.cores import Engine


def trained(workers: int = 2, runs: int = 40, share: float = 0.05, **options: Any) -> Engine:
    """An engine that knows that `h` takes 10 ms."""
    engine = Engine(workers=workers, limits=Limits(hedge_share=share))
    engine.define("h", **{"hedge": 0.9} | options)
    for number in range(runs):
        engine.submit(f"t{number}", of="h")
        engine.advance(0.01)
        engine.finish(f"t{number}", run=0.01)
    return engine


def straggling(**options: Any) -> Engine:
    """`slow` runs on one executor, its spare on the other."""
    engine = trained(**options)
    engine.submit("slow", of="h")
    engine.advance(0.05)
    assert engine.assigned("w1") == engine.assigned("w2") == ["slow"]
    return engine


def attempts(engine: Engine) -> dict[int, str]:
    """Executors by the number of the attempt of `slow` that they have."""
    task = engine.ids["slow"]
    return {engine.peers[name].hands[task].attempt: name for name in ("w1", "w2") if task in engine.peers[name].hands}


def counts(engine: Engine) -> tuple[int, int, int]:
    hedging = engine.core.hedging
    return hedging.won, hedging.lost, hedging.capped


def revoked(engine: Engine, name: str) -> list[tuple[int, int]]:
    return [key for message in engine.peers[name].heard if isinstance(message, Revoke) for key in message.attempts]


def test_it_begins_when_an_attempt_is_unusually_slow() -> None:
    engine = trained()
    engine.submit("slow", of="h")
    engine.advance(0.0109)
    assert len(attempts(engine)) == 1
    engine.advance(0.0002)
    assert sorted(attempts(engine)) == [1, 2]


@pytest.mark.parametrize("winner", [1, 2])
def test_the_first_result_wins_and_the_other_attempt_is_told_to_stop(winner: int) -> None:
    engine = straggling()
    where = attempts(engine)
    ref = engine.stored(where[winner], "seg")
    engine.finish("slow", on=where[winner], value=ref, run=0.02)
    assert engine.outcome("slow") == "ok"
    assert engine.results["slow"].payload == ref
    loser = 3 - winner
    assert revoked(engine, where[loser]) == [(engine.ids["slow"], loser)]
    engine.finish("slow", on=where[loser], outcome=2)
    assert counts(engine) == ((1, 0, 0) if winner == 2 else (0, 1, 0))
    engine.submit("next", of="h")
    assert engine.assigned("w1") + engine.assigned("w2") == ["next"]
    engine.finish("next")
    assert isinstance(engine.results["slow"].payload, ObjectRef)


def test_nobody_else_waits_for_it() -> None:
    engine = trained()
    engine.submit("slow", of="h")
    engine.submit("a", "b", of="f")
    engine.advance(0.1)
    assert sorted(engine.assigned("w1") + engine.assigned("w2")) == ["a", "slow"]
    engine.finish("a", run=0.1)
    engine.finish("b", run=0.1)
    engine.advance(0.02)
    assert engine.assigned("w1") == engine.assigned("w2") == ["slow"]


def test_there_is_a_budget() -> None:
    engine = trained(runs=60, hedge=0.5)
    for number in range(6):
        engine.submit(f"s{number}", of="h")
        engine.advance(0.05)
        holders = [name for name in ("w1", "w2") if engine.assigned(name)]
        assert len(holders) == (2 if number < 3 else 1), number
        for name in holders:
            engine.finish(f"s{number}", on=name, run=0.05)
    assert counts(engine)[2] >= 3


def test_what_is_not_known_or_not_asked_for_is_not_hedged() -> None:
    for engine in (trained(runs=10), trained(hedge=None), trained(share=0.0)):
        engine.submit("slow", of="h")
        engine.advance(1.0)
        assert len(attempts(engine)) == 1


def test_a_failed_spare_changes_nothing() -> None:
    engine = straggling()
    where = attempts(engine)
    engine.finish("slow", on=where[2], error="ValueError")
    assert engine.outcome("slow") == ""
    engine.finish("slow", on=where[1], run=0.1)
    assert engine.outcome("slow") == "ok"


def test_a_failed_task_takes_its_spare_along_and_is_tried_again_with_a_new_number() -> None:
    engine = straggling()
    where = attempts(engine)
    engine.finish("slow", on=where[1], error="OSError", retryable=True)
    assert engine.attempt("slow").attempt in (2, 3)
    engine.finish("slow", on=where[2], attempt=2, outcome=2)
    assert engine.outcome("slow") == ""
    again = engine.holder("slow")
    assert engine.attempt("slow").attempt == 3
    engine.finish("slow", on=again)
    assert engine.outcome("slow") == "ok"


@pytest.mark.parametrize("dead", [1, 2])
def test_whoever_dies_the_other_goes_on(dead: int) -> None:
    engine = straggling()
    where = attempts(engine)
    engine.die(where[dead], ["slow"])
    assert engine.outcome("slow") == ""
    other = where[3 - dead]
    assert engine.attempt("slow").attempt == 3 - dead, "no third attempt"
    engine.finish("slow", on=other, run=0.1)
    assert engine.outcome("slow") == "ok"


def test_a_cancelled_task_takes_its_spare_along() -> None:
    engine = straggling()
    where = attempts(engine)
    engine.cancel("slow")
    for number, name in where.items():
        assert revoked(engine, name) == [(engine.ids["slow"], number)]
        engine.finish("slow", on=name, outcome=2)
    assert engine.outcome("slow").startswith("cancelled")
    engine.submit("a", "b")
    assert sorted(engine.assigned("w1") + engine.assigned("w2")) == ["a", "b"]


def test_a_spare_that_begins_to_wait_is_given_up() -> None:
    engine = straggling()
    where = attempts(engine)
    engine.post(where[2], Blocked(engine.ids["slow"], 2))
    assert revoked(engine, where[2]) == [(engine.ids["slow"], 2)]
    engine.finish("slow", on=where[2], outcome=2)
    engine.finish("slow", on=where[1])
    assert engine.outcome("slow") == "ok"


def test_a_restarted_dispatcher_goes_on_with_one_of_them() -> None:
    engine = straggling()
    where = attempts(engine)
    engine.restart()
    with engine.together():
        engine.hello("node")
        engine.node()
    for name in ("w1", "w2"):
        engine.hello(name)
    engine.hello("ann")
    engine.again("slow")
    told = {number: revoked(engine, name) for number, name in where.items()}
    kept = 1 if told[2] else 2
    assert told[3 - kept] == [(engine.ids["slow"], 3 - kept)]
    engine.finish("slow", on=where[3 - kept], attempt=3 - kept, outcome=2)
    engine.finish("slow", on=where[kept])
    assert engine.outcome("slow") == "ok"
    engine.submit("a", "b")
    assert sorted(engine.assigned("w1") + engine.assigned("w2")) == ["a", "b"]
