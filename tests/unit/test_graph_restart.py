"""What peers hold over a restart of the dispatcher: attempts, results, handles, objects; and what never comes."""

from __future__ import annotations

from itertools import permutations

import pytest

from rtml.graph.tables import Limits
from rtml.messages import ERROR, Free, Holding, Interrupt, Release, Revoke, TaskResult, Unwatch, Watch
from tests.unit.cores import Engine

RECOVERY = Limits().recovery


def back(engine: Engine, *names: str) -> None:
    """Peers come back, each in a wake-up of its own; the supervisor lists its executors."""
    for name in names:
        with engine.together():
            engine.hello(name)
            if name == "node":
                engine.node()


def restarted(engine: Engine) -> Engine:
    engine.restart()
    return engine


@pytest.mark.parametrize("order", list(permutations(["node", "w1", "w2", "ann"])), ids=" ".join)
def test_the_order_of_return_does_not_matter(order: tuple[str, ...]) -> None:
    engine = Engine(2)
    engine.submit("runs", "done", "third")
    engine.submit("uses", deps=["done", "third"])
    finished, running = engine.holder("done"), engine.holder("runs")
    engine.restart()
    engine.peers[finished].hands.clear()
    for name in order:
        with engine.together():
            back(engine, name)
            if name == finished:
                engine.finish("done", on=finished, value=b"1")
            if name == "ann":
                engine.again("runs", "done", "third", "uses")
    assert engine.assigned(running) == ["runs"]
    assert engine.attempt("runs").attempt == 1
    assert engine.outcome("done") == "ok"
    engine.finish("third", value=b"3")
    assert engine.attempt("uses").deps == [b"1", b"3"]
    engine.finish("uses")
    engine.finish("runs")
    assert engine.outcome("runs") == "ok"


def test_nothing_is_scheduled_before_all_executors_have_spoken() -> None:
    engine = restarted(Engine(2))
    back(engine, "node", "ann", "w1")
    engine.submit("a")
    assert not engine.assigned("w1")
    back(engine, "w2")
    assert engine.holder("a")


@pytest.mark.parametrize("how", ["dies", "is silent"])
def test_one_that_does_not_come_back_is_not_waited_for(how: str) -> None:
    engine = restarted(Engine(2))
    back(engine, "node", "ann", "w1")
    engine.submit("a")
    if how == "dies":
        engine.die("w2")
    else:
        engine.advance(RECOVERY)
    assert engine.assigned("w1") == ["a"]


# --- attempts


def test_an_attempt_that_nobody_claims_is_revoked() -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1")
    engine.advance(RECOVERY)
    assert engine.heard("w1", Revoke) == [Revoke([(engine.ids["a"], 1)])]
    assert engine.heard("node", Interrupt)
    back(engine, "ann")
    engine.submit("b")
    assert engine.assigned("w1") == ["a"]
    engine.finish("a", outcome=2)
    assert engine.assigned("w1") == ["b"]


def test_attempts_that_are_given_back_run_elsewhere() -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1")
    engine.give_back("w1", "a")
    back(engine, "ann")
    engine.again("a")
    assert engine.attempt("a").attempt == 1
    assert not engine.core.tables.workers[1].unclaimed


def test_a_held_attempt_of_one_that_dies_runs_elsewhere() -> None:
    engine = Engine(2)
    engine.submit("a")
    holder = engine.holder("a")
    restarted(engine)
    back(engine, "node", "w1", "w2", "ann")
    engine.die(holder, ["a"])
    engine.again("a")
    assert engine.holder("a") != holder


def test_the_second_holder_of_a_task_is_told_to_stop() -> None:
    engine = Engine(2)
    engine.submit("a")
    first = engine.holder("a")
    second = "w1" if first == "w2" else "w2"
    restarted(engine)
    engine.peers[second].hands = dict(engine.peers[first].hands)
    back(engine, "node", first, "ann")
    engine.again("a")
    back(engine, second)
    engine.advance(RECOVERY)
    assert engine.heard(second, Revoke)
    assert not engine.heard(first, Revoke)
    engine.finish("a", on=first)
    assert engine.outcome("a") == "ok"


@pytest.mark.parametrize("first", ["executor", "submitter"])
@pytest.mark.parametrize("inline", [True, False])
def test_a_blocked_task_says_so_again(first: str, inline: bool) -> None:
    engine = Engine()
    engine.submit("p")
    engine.submit("x", parent="p")
    engine.block("p", inline=inline)
    engine.peers["w1"].hands = {engine.ids["p"]: engine.attempt("p")}
    restarted(engine)
    back(engine, "node")

    def executor() -> None:
        with engine.together():
            back(engine, "w1")
            engine.again("x", by="w1")
            engine.block("p", inline=inline)

    def submitter() -> None:
        back(engine, "ann")
        engine.again("p")

    for step in (executor, submitter) if first == "executor" else (submitter, executor):
        step()
    assert engine.task("p").blocked
    assert engine.assigned("w1") == (["p", "x"] if inline else ["p"])


def test_one_that_resumed_meanwhile_is_not_blocked() -> None:
    engine = Engine()
    engine.submit("p")
    restarted(engine)
    back(engine, "node", "w1")
    engine.block("p")
    engine.resume("p")
    back(engine, "ann")
    engine.again("p")
    assert not engine.task("p").blocked


def test_a_timeout_begins_again() -> None:
    engine = Engine()
    engine.submit("a", timeout=1.0)
    restarted(engine)
    back(engine, "node", "w1", "ann")
    engine.again("a")
    engine.advance(0.9)
    assert not engine.outcome("a")
    engine.advance(0.1)
    assert engine.outcome("a") == "error TaskTimeout"


# --- results


def test_a_result_waits_for_its_task() -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1")
    engine.finish("a", value=b"1")
    assert not engine.outcome("a")
    back(engine, "ann")
    engine.again("a")
    assert engine.results["a"].payload == b"1"


def test_an_error_that_may_be_retried_is() -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1")
    engine.finish("a", error="OSError", retryable=True)
    back(engine, "ann")
    engine.again("a")
    assert engine.attempt("a").attempt == 2


def test_a_result_that_comes_twice_counts_once() -> None:
    engine = Engine(2)
    engine.submit("a")
    holder = engine.holder("a")
    restarted(engine)
    back(engine, "node", "w1", "w2")
    engine.finish("a", on=holder, value=b"1")
    engine.finish("a", on="w1" if holder == "w2" else "w2", value=b"2")
    back(engine, "ann")
    engine.again("a")
    assert engine.results["a"].payload == b"2"


def test_a_result_nobody_asks_for_is_forgotten_by_its_executor() -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1")
    engine.finish("a")
    engine.advance(RECOVERY)
    assert engine.core.tables.workers[1].safe == 1


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_task_that_was_cancelled_before_it_came(cancelled_first: bool) -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1", "ann")
    if cancelled_first:
        engine.cancel("a")
        engine.again("a")
    else:
        engine.again("a")
        engine.cancel("a")
    assert engine.outcome("a") == "cancelled TaskCancelled"


# --- tasks that come before others


def test_a_child_waits_for_its_parent() -> None:
    engine = Engine(2)
    engine.submit("p")
    engine.submit("x", parent="p")
    on = engine.holder("p")
    restarted(engine)
    back(engine, "node", "w1", "w2")
    engine.again("x", by=on)
    assert not engine.known("x")
    back(engine, "ann")
    engine.again("p")
    assert engine.task("x").owner is engine.task("p")


def test_a_child_whose_parent_does_not_come_is_cancelled() -> None:
    engine = Engine(2)
    engine.submit("p")
    engine.submit("x", parent="p")
    on = engine.holder("p")
    restarted(engine)
    back(engine, "node", "w1", "w2")
    engine.again("x", by=on)
    engine.advance(RECOVERY)
    assert engine.outcome("x") == "cancelled TaskCancelled"


def test_a_detached_child_lives_on() -> None:
    engine = Engine(3)
    engine.submit("p")
    engine.submit("x", parent="p", detached=True)
    on, holder = engine.holder("p"), engine.holder("x")
    restarted(engine)
    engine.peers[on].hands.clear()
    back(engine, "node", "w1", "w2", "w3")
    engine.again("x", by=on)
    engine.advance(RECOVERY)
    engine.finish("x", on=holder)
    assert engine.outcome("x") == "ok"


def test_a_dependency_may_come_later() -> None:
    engine = Engine(2)
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1", "w2", "ann")
    engine.submit("uses", deps=["a"])
    assert not engine.known("uses")
    engine.again("a")
    engine.finish("a", value=b"1")
    assert engine.attempt("uses").deps == [b"1"]


def test_or_never() -> None:
    engine = Engine()
    engine.submit("a")
    engine.finish("a")
    restarted(engine)
    back(engine, "node", "w1", "ann")
    engine.submit("uses", deps=["a"])
    engine.submit("has", handles=["a"])
    assert not engine.known("has")
    engine.advance(RECOVERY)
    assert engine.outcome("uses") == "error ObjectLost"
    assert engine.assigned("w1") == ["has"]


def test_what_a_submitter_that_is_gone_had_sent_is_dropped() -> None:
    engine = Engine()
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1", "ann")
    engine.submit("uses", deps=["a"])
    engine.post("ann", Watch([12345]))
    engine.gone("ann")
    engine.advance(RECOVERY)
    assert not engine.known("uses")


# --- handles and objects


def test_a_watch_may_come_before_its_task() -> None:
    engine = Engine(2)
    engine.join("bob")
    engine.submit("a")
    restarted(engine)
    back(engine, "node", "w1", "w2", "bob")
    engine.post("bob", Watch([engine.ids["a"]]))
    back(engine, "ann")
    engine.again("a")
    engine.finish("a")
    assert engine.watched["a"].outcome == 0


def test_a_watch_of_a_task_that_never_comes_is_answered() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a", "b")
    restarted(engine)
    back(engine, "node", "w1", "bob")
    engine.post("bob", Watch([engine.ids["a"], engine.ids["b"]]))
    engine.post("bob", Unwatch([engine.ids["b"]]))
    engine.advance(RECOVERY)
    assert {name: result.outcome for name, result in engine.watched.items()} == {"a": ERROR}


@pytest.mark.parametrize("first", ["result", "holding"])
@pytest.mark.parametrize("released", [True, False])
def test_objects_older_than_the_dispatcher(first: str, released: bool) -> None:
    engine = Engine()
    engine.submit("a")
    ref = engine.stored("w1", "o")
    engine.finish("a", value=ref)
    restarted(engine)
    back(engine, "node", "w1", "ann")

    def result() -> None:
        engine.finish("a", on="w1", attempt=1, value=ref)

    def holding() -> None:
        engine.post("ann", Holding([ref.id], []))
        if released:
            engine.post("ann", Release([ref.id]))

    for step in (result, holding) if first == "result" else (holding, result):
        step()
    engine.advance(RECOVERY)
    assert bool(engine.heard("w1", Free)) == released
    engine.post("ann", Release([ref.id]))
    assert ref.id not in engine.core.tables.objects


def test_an_object_whose_result_was_safe_already() -> None:
    engine = Engine()
    ref = engine.stored("w1", "o")
    restarted(engine)
    back(engine, "node", "w1", "ann")
    engine.post("ann", Holding([ref.id], []))
    engine.advance(RECOVERY)
    assert ref.id in engine.core.tables.objects
    engine.post("ann", Release([ref.id]))
    assert engine.heard("w1", Free) == [Free([ref.id])]


def test_what_is_not_held_any_more_is_let_go() -> None:
    engine = Engine(2)
    engine.submit("a", "b")
    ref = engine.stored(engine.holder("a"), "o")
    owner = engine.holder("a")
    engine.finish("a", value=ref)
    engine.ack()
    engine.gone("ann")
    engine.hello("ann")
    engine.post("ann", Holding([], []))
    assert engine.heard(owner, Free) == [Free([ref.id])]
    engine.finish("b")
    assert engine.outcome("b") == "ok"


def test_results_on_their_way_are_held() -> None:
    engine = Engine()
    engine.submit("a")
    ref = engine.stored("w1", "o")
    engine.finish("a", value=ref)
    engine.gone("ann")
    with engine.together():
        engine.hello("ann")
        engine.post("ann", Holding([], []))
    assert not engine.heard("w1", Free)
    assert isinstance(engine.results["a"], TaskResult)
