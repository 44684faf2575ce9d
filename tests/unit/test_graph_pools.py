"""Pools that grow and shrink, nodes that change, requests that nothing can meet."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.pools import START_BACKOFF_MAX
from rtml.graph.state import WorkerState
from rtml.graph.workforce import SURPLUS_IDLE
from rtml.messages import (
    ASYNC_EXECUTOR,
    EXECUTOR,
    SUPERVISOR,
    ExecutorStarted,
    Interrupt,
    KillExecutor,
    Leave,
    Node,
    StartExecutor,
)
from tests.unit.cores import Engine


def worker(engine: Engine, number: int) -> WorkerState:
    return engine.core.tables.workers[number]


# --- growing and shrinking


def test_dead_executors_are_replaced_up_to_the_cpus() -> None:
    engine = Engine(2)
    engine.die("w1")
    assert engine.heard("node", StartExecutor) == [StartExecutor(EXECUTOR, 3)]
    engine.hello("w3")
    engine.submit("a", "b")
    assert engine.assigned("w3")


def test_executors_that_die_at_their_start_are_started_ever_more_slowly() -> None:
    engine = Engine()
    engine.submit("a")
    engine.die("w1")
    waits = []
    for number in range(2, 12):
        started = engine.now
        while not engine.heard("node", StartExecutor):
            engine.advance(0.01)
        waits.append(round(engine.now - started, 2))
        engine.die(f"w{number}", reason="exit code 1")
    assert waits[0] < 0.1
    assert waits[:7] == sorted(set(waits[:7]))
    assert waits[-1] == pytest.approx(START_BACKOFF_MAX, abs=0.02)


def test_one_that_leaves_is_not_replaced() -> None:
    engine = Engine(2)
    engine.give_back("w1", leaving=True)
    engine.die("w1", reason="left")
    assert not engine.heard("node", StartExecutor)


def test_a_surplus_goes_when_it_was_idle_for_long() -> None:
    engine = Engine(1)
    engine.submit("p")
    engine.submit("x", parent="p")
    engine.block("p", inline=False)
    engine.hello("w2")
    engine.finish("x")
    engine.resume("p")
    engine.advance(SURPLUS_IDLE - 0.1)
    assert not engine.heard("w2", Leave)
    engine.advance(0.1)
    assert engine.heard("w2", Leave)
    engine.finish("p")
    engine.submit("a", "b")
    assert engine.assigned("w2") == []


def test_as_many_stay_as_the_node_was_told_to_have() -> None:
    engine = Engine(2)
    engine.node(cpu=1.0, gpu=1.0, workers=2)  # a lane of a gpu beside the cpu
    engine.submit("a")
    engine.finish("a")
    engine.advance(2 * SURPLUS_IDLE)
    assert not engine.heard("w1", Leave)
    assert not engine.heard("w2", Leave)
    engine.die("w2")
    assert engine.heard("node", StartExecutor) == [StartExecutor(EXECUTOR, 3)]


def test_a_surplus_that_is_needed_stays() -> None:
    engine = Engine(1)
    engine.submit("p")
    engine.submit("x", parent="p")
    engine.block("p", inline=False)
    engine.hello("w2")
    engine.finish("x")
    engine.advance(SURPLUS_IDLE / 2)
    engine.submit("y", parent="p")
    assert engine.assigned("w2") == ["y"]
    engine.finish("y")
    engine.advance(SURPLUS_IDLE / 2)
    assert not engine.heard("w2", Leave)


def test_fractions_of_a_cpu_get_executors_too() -> None:
    engine = Engine(1)
    engine.submit("a", "b", cpu=0.5)
    assert engine.heard("node", StartExecutor) == [StartExecutor(EXECUTOR, 2)]
    engine.hello("w2")
    assert (engine.assigned("w1"), engine.assigned("w2")) == (["a"], ["b"])


def test_executors_are_started_one_at_a_time() -> None:
    engine = Engine(1)
    engine.submit("a", "b", "c", "d", cpu=0.25)
    assert len(engine.heard("node", StartExecutor)) == 1
    engine.hello("w2")
    assert len(engine.heard("node", StartExecutor)) == 1


def test_async_executors_are_started_when_they_are_needed() -> None:
    engine = Engine(1)
    engine.define("page", asynchronous=True)
    engine.submit("a", of="page")
    assert engine.heard("node", StartExecutor) == [StartExecutor(ASYNC_EXECUTOR, 2)]
    engine.hello("l2")
    assert engine.assigned("l2") == ["a"]


def test_the_nesting_limit_names_the_way_out() -> None:
    engine = Engine(1, blocked_max=0)
    engine.submit("p")
    engine.submit("x", parent="p", timeout=1.0)
    engine.block("p")
    assert engine.outcome("p") == "error NestingLimit"
    assert "async functions" in engine.error("p").message


# --- nodes


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ({"cpu": 3}, {"cpu": 2.0}),
        ({"gpu": 1}, {"cpu": 2.0}),
        ({"memory": 10}, {"cpu": 2.0, "memory": 9}),
        ({"resources": {"camera": 1}}, {"cpu": 2.0}),
    ],
)
def test_what_can_never_run(asked: dict[str, Any], offered: dict[str, Any]) -> None:
    engine = Engine(2, **offered)
    engine.submit("a", **asked)
    assert engine.outcome("a") == "error Unschedulable"
    engine.node(can_grow=True)
    engine.submit("b", **asked)
    assert not engine.outcome("b")
    engine.node(can_grow=False, cpu=4.0, gpu=1.0, memory=10, resources={"camera": 1})
    assert engine.holder("b")
    engine.finish("b")
    node = engine.core.tables.nodes["n"]
    assert (node.free_cpu, node.free_extra) == (node.cpu, node.extra)


def test_an_offer_that_shrinks_dooms_what_waits_for_it() -> None:
    engine = Engine(1, gpu=2.0)
    engine.submit("runs", gpu=2)
    engine.submit("waits", gpu=2)
    engine.node(gpu=1.0)
    assert engine.outcome("waits") == "error Unschedulable"
    engine.finish("runs")
    assert engine.outcome("runs") == "ok"


def test_a_resource_may_vanish_and_come_back() -> None:
    engine = Engine(1, gpu=1.0)
    engine.submit("a", gpu=1)
    engine.node(gpu=0.0)
    engine.finish("a")
    engine.node(gpu=1.0)
    assert engine.core.tables.nodes["n"].free_extra == {"gpu": 1.0}


def test_without_a_supervisor_nothing_is_hopeless() -> None:
    engine = Engine(1)
    engine.gone("node")
    engine.submit("a", gpu=1)
    assert not engine.outcome("a")


def test_a_supervisor_that_comes_back_says_who_is_alive() -> None:
    engine = Engine(2)
    engine.submit("a", "b")
    engine.gone("node")
    lost = engine.assigned("w2")
    del engine.peers["w2"]
    with engine.together():
        engine.hello("node")
        engine.node()
    assert list(engine.core.tables.workers) == [1, 3]
    engine.hello("w3")
    assert engine.assigned("w3") == lost


def test_and_is_told_again_whom_to_kill() -> None:
    engine = Engine()
    engine.submit("a", timeout=1.0)
    engine.advance(2.0)
    engine.heard("node", KillExecutor)
    engine.gone("node")
    with engine.together():
        engine.hello("node")
        engine.node()
    assert engine.heard("node", KillExecutor)


def test_an_executor_may_be_there_before_its_node() -> None:
    engine = Engine(0)
    engine.restart()
    engine._add("w7", EXECUTOR, 7)
    engine.hello("w7")
    with engine.together():
        engine.hello("node")
        engine.node()
    assert worker(engine, 7).node.name == "n"
    assert list(engine.core.tables.nodes) == ["n"]


def test_a_report_of_a_start_changes_nothing() -> None:
    engine = Engine()
    engine.post("node", ExecutorStarted(1, EXECUTOR, 123))
    assert list(engine.core.tables.workers) == [1]


def test_two_nodes() -> None:
    engine = Engine(1)
    engine.join("other", SUPERVISOR)
    engine.post("other", Node("m", 1.0, gpu=1.0, executors=[(9, EXECUTOR, 0)]))
    engine.join("w9", EXECUTOR, 9)
    engine.submit("a", gpu=1)
    assert engine.assigned("w9") == ["a"]
    engine.die("w1", reason="")
    assert engine.heard("node", StartExecutor)
    assert not engine.heard("other", StartExecutor)
    assert not engine.heard("other", Interrupt)


def test_labels_are_shown_as_labels() -> None:
    engine = Engine(1, resources={"zone=a": 1e9, "licence": 3.0, "rack=7": 0.5})
    engine.submit("t", resources={"zone=b": 1.0, "licence": 1.0})
    said = engine.error("t").message
    assert "asks for cpu=1, licence=1, zone=b, which no worker can ever offer" in said
    assert "there is: n with cpu=1, licence=3, rack=7=0.5, zone=a)" in said
