"""After a restart of the dispatcher: what peers hold is fitted together, whatever the order in which they come back."""

from __future__ import annotations

import itertools

import pytest

from rtml.graph.tables import Limits
from rtml.messages import Blocked, Cancel, Free, Holding, Release, Revoke, Unwatch, Watch
from tests.unit.cores import Engine


def restarted(engine: Engine, *first: str) -> None:
    """A new dispatcher, to which these peers have come back."""
    engine.restart()
    for name in first:
        back(engine, name)


def back(engine: Engine, name: str) -> None:
    """A peer says Hello again; a supervisor also what it has."""
    engine.hello(name)
    if name == "node":
        engine.node()


@pytest.mark.parametrize("order", list(itertools.permutations(["node", "w1", "ann"])))
def test_a_running_task_is_found_again_in_any_order(order: tuple[str, ...]) -> None:
    engine = Engine(1)
    engine.submit("a")
    engine.restart()
    for name in order:
        back(engine, name)
        if name == "ann":
            engine.again("a")
    assert engine.assigned("w1") == ["a"]
    assert engine.task("a").attempt == 1
    engine.finish("a")
    assert engine.outcome("a") == "ok"


@pytest.mark.parametrize("order", list(itertools.permutations(["node", "w1", "ann"])))
def test_so_is_a_result(order: tuple[str, ...]) -> None:
    engine = Engine(1)
    engine.submit("a")
    engine.restart()
    for name in order:
        if name == "w1":
            # It ended while there was no dispatcher.
            with engine.together():
                engine.peers["w1"].hands.clear()
                back(engine, "w1")
                engine.finish("a", on="w1", value=b"once")
        else:
            back(engine, name)
        if name == "ann":
            engine.again("a")
    assert engine.results["a"].payload == b"once"
    assert not engine.assigned("w1")


def test_nothing_is_scheduled_before_all_executors_have_spoken() -> None:
    engine = Engine(2)
    engine.submit("a")
    holder = engine.holder("a")
    other = {"w1": "w2", "w2": "w1"}[holder]
    restarted(engine, "node", other, "ann")
    engine.again("a")
    assert not engine.assigned(other)
    back(engine, holder)
    assert not engine.assigned(other)
    assert engine.task("a").worker is engine.core.tables.workers[engine.peers[holder].worker]


def test_but_not_for_ever() -> None:
    engine = Engine(2, limits=Limits(recovery=3.0))
    engine.submit("a")
    holder = engine.holder("a")
    other = {"w1": "w2", "w2": "w1"}[holder]
    restarted(engine, "node", other, "ann")
    engine.again("a")
    engine.advance(3.1)
    assert engine.assigned(other) == ["a"]


def test_a_first_start_waits_for_nobody() -> None:
    engine = Engine(2)
    assert not engine.core.recovery.active


def test_children_come_before_their_parent() -> None:
    engine = Engine(2)
    engine.submit("p")
    parent = engine.holder("p")
    engine.submit("x", "y", parent="p")
    restarted(engine, "node", "w1", "w2")
    engine.again("x", "y", by=parent)
    assert not engine.known("x")
    back(engine, "ann")
    engine.again("p")
    assert engine.task("x").owner is engine.task("p")
    assert not engine.outcome("x")


def test_a_parent_that_has_ended_keeps_the_children_that_escaped() -> None:
    engine = Engine(2)
    engine.submit("p")
    parent = engine.holder("p")
    engine.submit("x", "y", parent="p")
    restarted(engine, "node")
    with engine.together():
        del engine.peers[parent].hands[engine.ids["p"]]
        back(engine, parent)
        engine.again("x", "y", by=parent)
        engine.finish("p", on=parent, handles=["x"])
    for name in ("w1", "w2"):
        if name != parent:
            back(engine, name)
    back(engine, "ann")
    engine.again("p")
    assert engine.outcome("p") == "ok"
    assert engine.outcome("y") == "cancelled TaskCancelled"
    assert engine.known("x")
    assert not engine.outcome("x")


def test_an_escaped_child_whose_parent_nobody_asks_for_any_more() -> None:
    """Its submitter got the parent's value before the restart. Somebody watches the child."""
    engine = Engine(2, limits=Limits(recovery=1.0))
    engine.submit("p")
    parent = engine.holder("p")
    engine.submit("x", parent="p")
    engine.finish("p", handles=["x"])
    restarted(engine, "node", "w1", "w2", "ann")
    engine.again("x", by=parent)
    engine.post("ann", Watch([engine.ids["x"]]))
    engine.advance(1.1)
    engine.finish("x")
    assert engine.watched["x"].payload == b"v"


def test_what_nobody_claims_is_revoked() -> None:
    engine = Engine(1, limits=Limits(recovery=1.0))
    engine.submit("a")
    restarted(engine, "node", "w1", "ann")
    engine.submit("b")
    # The executor is busy with what nobody has claimed.
    assert engine.assigned("w1") == ["a"]
    engine.advance(1.1)
    assert engine.heard("w1", Revoke) == [Revoke([(engine.ids["a"], 1)])]
    engine.finish("a", error="TaskCancelled")
    assert engine.assigned("w1") == ["b"]


def test_a_claim_that_comes_too_late_is_a_new_attempt() -> None:
    engine = Engine(1, limits=Limits(recovery=1.0))
    engine.submit("a")
    restarted(engine, "node", "w1")
    engine.advance(1.1)
    engine.finish("a", error="TaskCancelled")
    back(engine, "ann")
    engine.again("a")
    engine.finish("a")
    assert engine.outcome("a") == "ok"


def test_a_blocked_task_is_blocked_again() -> None:
    engine = Engine(1)
    engine.submit("p")
    engine.submit("x", parent="p")
    engine.block("p")
    engine.restart()
    back(engine, "node")
    with engine.together():
        back(engine, "w1")
        engine.again("x", by="w1")
        engine.post("w1", Blocked(engine.ids["p"], 1))
    back(engine, "ann")
    engine.again("p")
    assert engine.task("p").blocked
    assert engine.task("x").worker is engine.task("p").worker
    assert engine.core.tables.nodes["n"].free_cpu == 0.0


def test_it_may_have_gone_on_before_it_was_claimed() -> None:
    engine = Engine(1)
    engine.submit("p")
    engine.block("p")
    engine.restart()
    back(engine, "node")
    with engine.together():
        back(engine, "w1")
        engine.post("w1", Blocked(engine.ids["p"], 1))
    engine.resume("p")
    back(engine, "ann")
    engine.again("p")
    assert not engine.task("p").blocked


def test_an_adopted_task_may_be_ahead_of_its_dependency() -> None:
    """The dependency's value came with the attempt; its record comes back as well, and is needed for a retry."""
    engine = Engine(2)
    engine.submit("d")
    engine.submit("a", deps=["d"])
    first = engine.holder("d")
    engine.finish("d", value=b"d")
    second = engine.holder("a")
    engine.restart()
    back(engine, "node")
    with engine.together():
        back(engine, second)
        if first == second:
            engine.finish("d", on=first, value=b"d")
    for name in ("w1", "w2"):
        if name != second:
            with engine.together():
                back(engine, name)
                if name == first:
                    engine.finish("d", on=first, value=b"d")
    back(engine, "ann")
    engine.again("a", "d")
    engine.finish("a", error="OSError", retryable=True)
    assert engine.attempt("a").deps == [b"d"]


def test_cancelled_before_it_came() -> None:
    engine = Engine(1)
    engine.submit("p")
    engine.submit("x", parent="p")
    restarted(engine, "node")
    with engine.together():
        back(engine, "w1")
        engine.again("x", by="w1")
        engine.post("w1", Cancel([engine.ids["x"]]))
    back(engine, "ann")
    engine.again("p")
    assert engine.outcome("x") == "cancelled TaskCancelled"


def test_watched_before_it_came_and_dropped_again() -> None:
    engine = Engine(1)
    engine.join("bob")
    engine.submit("a", "b")
    restarted(engine, "node", "w1", "bob")
    engine.post("bob", Watch([engine.ids["a"], engine.ids["b"]]), Unwatch([engine.ids["b"]]))
    back(engine, "ann")
    engine.again("a", "b")
    engine.finish("a")
    engine.finish("b")
    assert list(engine.watched) == ["a"]


def test_watching_what_never_comes() -> None:
    engine = Engine(1, limits=Limits(recovery=1.0))
    engine.submit("a")
    engine.join("bob")
    restarted(engine, "node", "w1", "bob")
    engine.post("bob", Watch([engine.ids["a"]]))
    assert not engine.watched
    engine.advance(1.1)
    error = engine.watched["a"].error
    assert error is not None
    assert error.type == "ObjectLost"


def test_objects_that_submitters_have_are_kept_and_others_freed() -> None:
    engine = Engine(1, limits=Limits(recovery=1.0))
    engine.submit("a", "b")
    kept, dropped = engine.stored("w1", "kept"), engine.stored("w1", "dropped")
    engine.finish("a", value=kept)
    engine.finish("b", value=dropped)
    engine.restart()
    back(engine, "node")
    with engine.together():
        # Neither result was known to be safe, so both are sent again. ann has them, and wants only one object.
        back(engine, "w1")
        engine.peers["w1"].serial = 0
        engine.finish("a", on="w1", value=kept)
        engine.finish("b", on="w1", value=dropped)
    with engine.together():
        back(engine, "ann")
        engine.post("ann", Holding([kept.id], []))
    engine.heard("w1", Free)
    engine.advance(1.1)
    assert engine.heard("w1", Free) == [Free([dropped.id])]
    engine.post("ann", Release([kept.id]))
    assert engine.heard("w1", Free) == [Free([kept.id])]


def test_a_long_family_is_no_recursion() -> None:
    engine = Engine(1)
    engine.submit("t0")
    names = ["t0"]
    for depth in range(1, 500):
        engine.block(names[-1])
        engine.submit(f"t{depth}", parent=names[-1], by="w1")
        names.append(f"t{depth}")
    engine.restart()
    back(engine, "node")
    with engine.together():
        back(engine, "w1")
        engine.again(*names[:0:-1], by="w1")
        engine.post("w1", *[Blocked(engine.ids[name], 1) for name in names[:-1]])
    back(engine, "ann")
    engine.again("t0")
    assert engine.task("t499").depth == 499
