"""A task from its submission to its one result: dependencies, retries, cancellation, expiry, ownership, limits."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from rtml.graph.lifecycle import TIMEOUT_GRACE
from rtml.graph.tables import Limits
from rtml.messages import CANCELLED, Cancel, Interrupt, KillExecutor, Revoke, Submit, Task
from tests.unit.cores import Engine

# --- submission


def test_a_function_that_was_not_defined() -> None:
    engine = Engine()
    engine.ids["a"] = 1
    engine.post("ann", Submit([Task(1, 99, b"")]))
    assert engine.outcome("a") == "error ProtocolError"


def test_a_task_is_submitted_once_however_often_it_is_sent() -> None:
    engine = Engine(2)
    engine.submit("a")
    engine.again("a")
    assert engine.assigned("w1") + engine.assigned("w2") == ["a"]
    engine.finish("a")
    engine.results.clear()
    engine.again("a")
    assert engine.outcome("a") == "ok"


def test_an_id_of_another_submitter_is_not_answered() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a")
    engine.finish("a")
    engine.results.clear()
    engine.again("a", by="bob")
    assert not engine.outcome("a")


def test_a_child_of_a_task_that_has_ended() -> None:
    engine = Engine()
    engine.submit("p")
    engine.finish("p")
    engine.submit("x", parent="p", by="w1")
    assert engine.outcome("x") == "cancelled TaskCancelled"


def test_a_child_of_an_attempt_that_was_taken_back() -> None:
    engine = Engine()
    engine.submit("p")
    engine.give_back("w1", "p", leaving=True)
    engine.submit("x", parent="p", by="w1")
    assert engine.outcome("x") == "cancelled TaskCancelled"


def test_what_a_call_says_overrides_what_the_function_says() -> None:
    engine = Engine()
    engine.define("g", retries=5, priority=2, timeout=1.0, name="shown")
    engine.submit("a", of="g", retries=0, priority=7)
    profile = engine.task("a").profile
    assert (profile.retries, profile.priority, profile.timeout, profile.name) == (0, 7, 1.0, "shown")


@pytest.mark.parametrize(
    ("root", "function", "call", "priority"),
    [(None, None, None, 0), (5, None, None, 5), (5, 2, None, 2), (5, 2, 1, 1), (5, 0, None, 0), (-3, None, None, -3)],
)
def test_a_graph_has_the_priority_of_its_root(
    root: int | None, function: int | None, call: int | None, priority: int
) -> None:
    engine = Engine(3)
    engine.define("child", priority=function)
    engine.submit("p", priority=root)
    engine.submit("x", of="child", parent="p", priority=call)
    engine.submit("y", parent="x")
    assert [engine.task(name).profile.priority for name in "xy"] == [priority, priority]


def test_the_children_of_an_urgent_task_go_before_others() -> None:
    engine = Engine(2)
    engine.submit("busy", "urgent", priority=3)
    engine.submit("others", priority=2)
    engine.submit("x", parent="urgent")
    engine.finish("busy", run=1.0)
    assert engine.holder("x")


# --- dependencies


@pytest.mark.parametrize("first", ["a", "b"])
def test_values_are_in_the_order_of_the_arguments(first: str) -> None:
    engine = Engine(2)
    engine.submit("a", "b")
    engine.submit("sum", deps=["a", "b", ("a", b"given")])
    engine.finish(first, value=first.encode())
    assert not engine.peers["w1"].hands.get(engine.ids["sum"])
    second = "b" if first == "a" else "a"
    engine.finish(second, value=second.encode())
    assert engine.attempt("sum").deps == [b"a", b"b", b"given"]


def test_the_same_future_twice() -> None:
    engine = Engine()
    engine.submit("a")
    engine.submit("twice", deps=["a", "a"])
    engine.finish("a", value=b"1")
    assert engine.attempt("twice").deps == [b"1", b"1"]


def test_a_long_chain_is_no_recursion() -> None:
    engine = Engine()
    engine.submit("n0")
    with engine.together():
        for number in range(1, 3000):
            engine.submit(f"n{number}", deps=[f"n{number - 1}"])
    engine.finish("n0", error="ValueError")
    assert engine.outcome("n2999") == "error ValueError"


@pytest.mark.parametrize(
    ("how", "outcome"),
    [("error", "error ValueError"), ("cancel", "cancelled TaskCancelled"), ("expire", "expired DeadlineExceeded")],
)
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_an_ended_dependency_ends_what_waits_for_it(how: str, outcome: str, early: bool) -> None:
    engine = Engine()
    engine.submit("a", deadline=1.0)
    if early:
        engine.submit("waits", deps=["a"])
    if how == "error":
        engine.finish("a", error="ValueError")
    elif how == "cancel":
        engine.cancel("a")
    else:
        engine.advance(1.0)
    if not early:
        engine.submit("waits", deps=["a"])
    assert engine.outcome("waits") == outcome


def test_who_waits_for_two_that_fail_ends_once() -> None:
    engine = Engine(2)
    engine.submit("a", "b")
    engine.submit("waits", deps=["a", "b"])
    engine.finish("a", error="ValueError")
    engine.finish("b", error="OSError")
    assert engine.outcome("waits") == "error ValueError"


def test_chains_name_the_way_of_an_error() -> None:
    engine = Engine()
    for name in ("load", "resize", "read"):
        engine.define(name)
    engine.submit("a", of="load")
    engine.submit("b", of="resize", deps=["a"])
    engine.submit("c", of="read", deps=["b"])
    engine.finish("a", error="OSError")
    assert engine.error("c").chain == ["load", "resize", "read"]
    assert engine.error("b").chain == ["load", "resize"]


# --- retries


@pytest.mark.parametrize(
    ("options", "retryable", "attempts"),
    [({}, True, 3), ({"retries": 0}, True, 1), ({"retries": 1}, True, 2), ({"retries": 9}, False, 1)],
)
def test_retries(options: dict[str, Any], retryable: bool, attempts: int) -> None:
    engine = Engine()
    engine.submit("a", **options)
    for number in range(1, attempts + 1):
        assert not engine.outcome("a")
        assert engine.attempt("a").attempt == number
        engine.finish("a", error="OSError", retryable=retryable)
    assert engine.outcome("a") == "error OSError"


def test_crashes_and_errors_count_together() -> None:
    engine = Engine(2)
    engine.submit("a", retries=1)
    engine.die(engine.holder("a"), ["a"])
    engine.finish("a", error="OSError", retryable=True)
    assert engine.outcome("a") == "error OSError"


def test_a_retried_task_keeps_its_inputs() -> None:
    engine = Engine()
    engine.submit("a")
    engine.submit("b", deps=["a"])
    engine.finish("a", value=b"1")
    engine.ack()
    engine.finish("b", error="OSError", retryable=True)
    assert engine.attempt("b").deps == [b"1"]


# --- cancellation


def test_a_task_that_is_not_sent_yet_is_not_revoked() -> None:
    engine = Engine()
    engine.submit("x")
    engine.submit("a")
    with engine.together():
        engine.finish("x", run=1.0)
        engine.post("ann", Cancel([engine.ids["a"]]))
    assert engine.assigned("w1") == []
    assert not engine.heard("w1", Revoke)


@pytest.mark.parametrize("state", ["waiting", "ready", "assigned", "done"])
def test_cancel_in_every_state(state: str) -> None:
    engine = Engine()
    if state in {"waiting", "ready"}:
        engine.submit("busy")
    engine.submit("a", deps=["busy"] if state == "waiting" else [])
    if state == "done":
        engine.finish("a")
    engine.cancel("a")
    assert engine.outcome("a") == ("ok" if state == "done" else "cancelled TaskCancelled")
    assert bool(engine.heard("w1", Revoke)) == (state == "assigned")


@pytest.mark.parametrize("answer", [CANCELLED, None], ids=["interrupted", "too late"])
def test_the_executor_of_a_cancelled_task_is_free_when_it_says_so(answer: int | None) -> None:
    engine = Engine()
    engine.submit("a")
    engine.cancel("a")
    engine.submit("b")
    assert engine.assigned("w1") == ["a"]
    engine.finish("a", outcome=answer)
    assert engine.assigned("w1") == ["b"]
    assert engine.outcome("a") == "cancelled TaskCancelled"


def test_code_that_ignores_its_cancellation_ends_with_its_process() -> None:
    engine = Engine(limits=Limits(cancel_grace=3.0))
    engine.submit("a")
    engine.cancel("a")
    engine.advance(2.9)
    assert engine.heard("node", Interrupt)
    assert not engine.heard("node", KillExecutor)
    engine.advance(2.0)
    assert len(engine.heard("node", KillExecutor)) == 1


def test_cancelling_what_nobody_knows() -> None:
    engine = Engine()
    engine.post("ann", Cancel([12345]))
    assert not engine.results


def test_a_tree_is_cancelled_as_a_whole() -> None:
    engine = Engine(4)
    engine.submit("r")
    engine.submit("b1", "b2", parent="r")
    engine.submit("l1", "l2", parent="b1")
    engine.cancel("b1")
    assert {name for name in engine.results if engine.outcome(name)} == {"b1", "l1", "l2"}
    engine.cancel("r")
    assert engine.outcome("b2") == "cancelled TaskCancelled"


# --- deadlines and timeouts


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_a_budget_that_is_gone_already(budget: float) -> None:
    engine = Engine()
    engine.submit("a", deadline=budget)
    assert engine.outcome("a") == "expired DeadlineExceeded"
    assert not engine.assigned("w1")


@pytest.mark.parametrize(
    ("root", "child", "left"), [(1.0, None, 1.0), (1.0, 0.5, 0.5), (1.0, 2.0, 1.0), (None, 0.5, 0.5)]
)
def test_the_budget_of_a_child(root: float | None, child: float | None, left: float) -> None:
    engine = Engine(2)
    engine.submit("p", deadline=root)
    engine.submit("x", parent="p", deadline=child)
    assert engine.attempt("x").budget == left
    engine.advance(left)
    assert engine.outcome("x") in {"expired DeadlineExceeded", "cancelled TaskCancelled"}


def test_the_error_says_where_it_was() -> None:
    engine = Engine()
    engine.submit("runs", deadline=1.0)
    engine.submit("ready", deadline=1.0)
    engine.submit("waits", deps=["ready"], deadline=0.5)
    engine.advance(1.0)
    assert engine.error("waits").message == "the deadline passed while task 'f' was waiting"
    assert engine.error("ready").message == "the deadline passed while task 'f' was ready"
    assert engine.error("runs").message == "the deadline passed while task 'f' was running"


def test_an_ended_task_is_not_kept_for_its_timers() -> None:
    engine = Engine()
    engine.submit("a", deadline=60.0, timeout=30.0)
    record = weakref.ref(engine.task("a"))
    engine.finish("a")
    engine.ack()
    engine.core.take_ended()
    gc.collect()
    assert record() is None
    engine.advance(61.0)
    assert engine.outcome("a") == "ok"


def test_a_timeout_interrupts_first_and_then_kills() -> None:
    engine = Engine()
    engine.submit("a", timeout=1.0)
    engine.advance(1.0)
    assert engine.outcome("a") == "error TaskTimeout"
    assert engine.heard("w1", Revoke)
    engine.advance(TIMEOUT_GRACE)
    assert engine.heard("node", KillExecutor)


def test_nothing_is_killed_when_the_interrupt_helped() -> None:
    engine = Engine()
    engine.submit("a", timeout=1.0)
    engine.advance(1.0)
    engine.finish("a", outcome=CANCELLED)
    engine.advance(1.0)
    assert not engine.heard("node", KillExecutor)


def test_a_blocked_task_times_out_too() -> None:
    engine = Engine()
    engine.submit("p", timeout=1.0)
    engine.block("p")
    engine.advance(1.0 + TIMEOUT_GRACE)
    assert engine.outcome("p") == "error TaskTimeout"
    assert engine.heard("node", KillExecutor)


def test_a_timeout_is_of_one_attempt() -> None:
    engine = Engine()
    engine.submit("a", timeout=1.0)
    engine.advance(0.9)
    engine.finish("a", error="OSError", retryable=True)
    engine.advance(0.9)
    assert not engine.outcome("a")
    engine.advance(0.1)
    assert engine.outcome("a") == "error TaskTimeout"


# --- ownership


@pytest.mark.parametrize(
    ("error", "handles", "detached", "survives"),
    [
        ("", [], False, False),
        ("", ["x"], False, True),
        ("", [], True, True),
        ("ValueError", [], True, False),
        ("ValueError", ["x"], False, False),
    ],
)
def test_children_when_their_parent_ends(error: str, handles: list[str], detached: bool, survives: bool) -> None:
    engine = Engine(2)
    engine.submit("p")
    engine.submit("x", parent="p", detached=detached)
    engine.finish("p", error=error, handles=handles)
    assert bool(engine.outcome("x")) != survives
    if survives:
        engine.finish("x")
        assert engine.outcome("x") == "ok"


def test_a_handle_inside_of_a_childs_value_escapes_too() -> None:
    engine = Engine(3)
    engine.submit("p")
    engine.submit("inner", "box", "other", parent="p")
    engine.finish("box", handles=["inner"])
    engine.finish("p", handles=["box"])
    assert engine.outcome("other") == "cancelled TaskCancelled"
    assert not engine.outcome("inner")


def test_what_has_escaped_ends_with_its_new_owner() -> None:
    engine = Engine(3)
    engine.submit("r")
    engine.submit("p", parent="r")
    engine.submit("x", parent="p")
    engine.finish("p", handles=["x"])
    engine.finish("r")
    assert engine.outcome("x") == "cancelled TaskCancelled"


# --- limits


def test_a_graph_of_too_many_live_tasks_fails() -> None:
    engine = Engine(limits=Limits(graph_tasks_max=3))
    engine.submit("r")
    engine.submit("x", "y", parent="r")
    assert not engine.results
    engine.submit("z", parent="r")
    assert engine.outcome("r") == "error LimitExceeded"
    assert "graph_tasks_max" in engine.error("z").message


def test_ended_tasks_do_not_count() -> None:
    engine = Engine(2, limits=Limits(graph_tasks_max=2))
    engine.submit("r")
    for number in range(5):
        engine.submit(f"x{number}", parent="r")
        engine.finish(f"x{number}")
    engine.finish("r")
    assert engine.outcome("r") == "ok"


@pytest.mark.parametrize("count", [2, 3])
def test_dependencies_are_bounded(count: int) -> None:
    engine = Engine(limits=Limits(dependencies_max=2))
    names = [f"a{number}" for number in range(count)]
    engine.submit(*names)
    engine.submit("uses", deps=names)
    assert bool(engine.outcome("uses")) == (count > 2)


@pytest.mark.parametrize(("size", "fits"), [(50, True), (51, False)])
def test_so_are_their_bytes(size: int, fits: bool) -> None:
    engine = Engine(2, limits=Limits(inputs_max=100))
    engine.submit("a", "b")
    engine.submit("uses", deps=["a", "b"])
    engine.finish("a", value=bytes(size))
    engine.finish("b", value=bytes(50))
    assert engine.outcome("uses") == ("" if fits else "error LimitExceeded")


def test_definitions_nobody_uses_make_room() -> None:
    engine = Engine(limits=Limits(functions_max=2))
    for name in ("one", "two", "three"):
        engine.define(name)
    engine.submit("a", of="one")
    engine.submit("b", of="two")
    engine.finish("a")
    engine.submit("c", of="three")
    known = [function.definition.name for function in engine.core.tables.functions.values()]
    assert known == ["two", "three"]
    engine.define("four")
    engine.submit("d", of="four")  # all are in use: better too many than to fail
    assert len(engine.core.tables.functions) == 3


# --- records


def test_the_record_of_an_ended_task() -> None:
    engine = Engine()
    engine.submit("a", deadline=2.0, trace="t")
    engine.advance(0.5)
    engine.finish("a", run=0.25)
    (ended,) = engine.core.take_ended()
    assert (ended.task, ended.function, ended.worker, ended.attempts) == (engine.ids["a"], "f", 1, 1)
    assert (ended.submitted, ended.finished, ended.run, ended.slack, ended.trace) == (0.0, 0.5, 0.25, 1.5, "t")
    assert not engine.core.take_ended()


def test_timings_for_those_who_want_them() -> None:
    engine = Engine()
    engine.join("gateway", timings=True)
    engine.advance(1.0)
    engine.submit("long")
    engine.submit("a", by="gateway", deadline=9.0)
    engine.advance(1.0)
    engine.finish("long")
    engine.advance(0.5)
    engine.finish("a", run=0.25)
    timing = engine.results["a"].timing
    assert timing is not None
    assert (timing.waiting, timing.queued, timing.transfer, timing.run, timing.slack) == (0.0, 1.0, 0.25, 0.25, 7.5)
    assert engine.results["long"].timing is None
