"""Peers that come, go, die and come back; pools that grow and shrink; nodes that change."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.pools import START_BACKOFF_MAX
from rtml.graph.state import WorkerState
from rtml.graph.tables import Close, Limits, Sweep, Unlink
from rtml.graph.workforce import SURPLUS_IDLE
from rtml.messages import (
    ASYNC_EXECUTOR,
    EXECUTOR,
    SUPERVISOR,
    ExecutorDied,
    ExecutorStarted,
    Finished,
    Free,
    Heartbeat,
    Hello,
    Interrupt,
    KillExecutor,
    Leave,
    Node,
    Refused,
    Rehello,
    Returned,
    Revoke,
    StartExecutor,
    TaskResult,
    Welcome,
)
from tests.unit.cores import Engine


def worker(engine: Engine, number: int) -> WorkerState:
    return engine.core.tables.workers[number]


# --- hello


def test_a_welcome_says_what_there_is() -> None:
    engine = Engine(3)
    engine.join("bob")
    (welcome,) = engine.heard("bob", Welcome)
    assert isinstance(welcome, Welcome)
    assert (welcome.epoch, welcome.cpus) == (1, 3.0)


@pytest.mark.parametrize("wire", [(0, 9), (2, 0)])
def test_another_major_version_is_refused(wire: tuple[int, int]) -> None:
    engine = Engine()
    engine.join("bob", wire=wire)
    (refused,) = engine.heard("bob", Refused)
    assert isinstance(refused, Refused)
    assert "install the same major version" in refused.reason
    assert engine.peers["bob"].link is None


@pytest.mark.parametrize(("role", "name"), [(EXECUTOR, "ann"), ("client", "other")])
def test_a_session_id_that_is_taken(role: str, name: str) -> None:
    engine = Engine()
    engine.join("twin", role=role, session=engine.peers["ann"].session, name=name)
    assert engine.heard("twin", Refused)
    engine.submit("a")
    assert engine.assigned("w1") == ["a"]


def test_messages_before_hello_are_dropped() -> None:
    engine = Engine()
    engine.stray(Heartbeat(), Heartbeat())
    (_, _, effect) = engine.effects[-1]
    assert effect == (-1, [Rehello(1)])
    assert engine.core.dropped == 2


@pytest.mark.parametrize(
    "message", [Finished(1, []), Returned([]), Welcome(1), Leave()], ids=lambda message: type(message).__name__
)
def test_messages_of_another_role_are_dropped(message: Any) -> None:
    engine = Engine()
    engine.post("ann", message, Heartbeat())
    assert engine.core.dropped == 1


# --- submitters


def test_a_submitter_that_comes_back_in_time_has_lost_nothing() -> None:
    engine = Engine(2, limits=Limits(session_grace=2.0))
    engine.submit("a", "b")
    engine.gone("ann")
    engine.finish("a")
    engine.advance(1.9)
    engine.hello("ann")
    engine.advance(5.0)
    engine.finish("b")
    assert (engine.outcome("a"), engine.outcome("b")) == ("ok", "ok")


def test_one_that_is_gone_twice_has_its_time_again() -> None:
    engine = Engine(limits=Limits(session_grace=2.0))
    engine.submit("a")
    engine.gone("ann")
    engine.advance(1.5)
    engine.hello("ann")
    engine.gone("ann")
    engine.advance(1.0)
    assert engine.known("a")
    engine.advance(1.0)
    assert engine.outcome("a") == ""
    assert engine.heard("w1", Revoke)


def test_one_that_stays_away_takes_its_graphs_along() -> None:
    engine = Engine(2)
    engine.submit("p", "q")
    engine.submit("x", parent="p")
    engine.finish("q", value=engine.stored(engine.holder("q"), "o"))
    engine.gone("ann")
    engine.advance(3.0)
    assert not [name for name in ("p", "x", "q") if engine.known(name) and engine.task(name).result is None]
    assert not engine.core.tables.objects
    engine.hello("ann")
    assert engine.heard("ann", Welcome)


def test_a_link_that_was_replaced_may_close_late() -> None:
    engine = Engine()
    old = engine.peers["ann"].link
    assert old is not None
    engine.lose("ann")
    engine.hello("ann")
    engine._arrivals.append((old, None))
    engine.submit("a")
    assert engine.assigned("w1") == ["a"]


# --- executors


def test_an_executor_that_comes_back_goes_on() -> None:
    engine = Engine()
    engine.submit("a")
    engine.gone("w1")
    engine.submit("b")
    engine.hello("w1")
    engine.finish("a")
    engine.finish("b")
    assert (engine.outcome("a"), engine.outcome("b")) == ("ok", "ok")


def test_what_it_never_got_runs_again() -> None:
    engine = Engine()
    engine.submit("a")
    engine.gone("w1")
    engine.peers["w1"].hands.clear()
    engine.hello("w1")
    assert engine.attempt("a").attempt == 2


def test_what_was_cancelled_meanwhile_is_revoked_again() -> None:
    engine = Engine()
    engine.submit("a")
    engine.gone("w1")
    engine.cancel("a")
    engine.hello("w1")
    assert Revoke([(engine.ids["a"], 1)]) in engine.heard("w1", Revoke)


def test_a_blocked_task_of_an_executor_that_comes_back_says_so_again() -> None:
    engine = Engine()
    engine.submit("p")
    engine.block("p")
    engine.gone("w1")
    engine.hello("w1")
    assert not engine.task("p").blocked
    engine.block("p")
    engine.submit("x", parent="p")
    assert engine.assigned("w1") == ["p", "x"]


def test_results_that_are_sent_again_count_once() -> None:
    engine = Engine()
    engine.submit("a")
    engine.finish("a", value=b"1")
    engine.post("w1", Finished(1, [TaskResult(engine.ids["a"], 1, 0, b"2")]))
    assert engine.results["a"].payload == b"1"


def test_orders_to_free_are_repeated() -> None:
    engine = Engine()
    engine.submit("a")
    ref = engine.stored("w1", "o")
    engine.finish("a", value=ref)
    engine.gone("ann")
    engine.advance(3.0)
    engine.gone("w1")
    engine.hello("w1")
    assert engine.heard("w1", Free) == [Free([ref.id])] * 2


@pytest.mark.parametrize("supervised", [True, False])
def test_an_executor_that_stays_away_is_ended(supervised: bool) -> None:
    engine = Engine(2, limits=Limits(worker_grace=3.0))
    engine.submit("a")
    name = engine.holder("a")
    number = engine.peers[name].worker
    engine.gone(name)
    if not supervised:
        engine.gone("node")
    engine.advance(3.0)
    if supervised:
        assert engine.heard("node", KillExecutor) == [KillExecutor(number, "not heard of any more")]
        assert number in engine.core.tables.workers
        engine.advance(3.0)
    assert number not in engine.core.tables.workers
    del engine.peers[name]
    assert engine.attempt("a").attempt == 2


def test_one_that_is_back_in_time_is_not() -> None:
    engine = Engine(limits=Limits(worker_grace=3.0))
    engine.gone("w1")
    engine.advance(2.0)
    engine.hello("w1")
    engine.advance(5.0)
    assert not engine.heard("node", KillExecutor)


def test_an_executor_that_was_reported_dead_is_refused() -> None:
    engine = Engine()
    engine.post("node", ExecutorDied(1, "signal SIGKILL"))
    engine.lose("w1")
    engine.hello("w1")
    assert engine.heard("w1", Refused)


def test_what_a_dead_one_had_sent_counts() -> None:
    engine = Engine()
    engine.submit("a")
    with engine.together():
        engine.post("node", ExecutorDied(1, "exit code 1", [engine.ids["a"]]))
        engine.finish("a")
    assert engine.outcome("a") == "ok"


def test_a_death_closes_the_link_and_sweeps_the_memory() -> None:
    engine = Engine()
    engine.submit("a")
    engine.finish("a", value=engine.stored("w1", "kept"))
    session = engine.peers["w1"].session
    engine.die("w1")
    effects = [effect for _, _, effect in engine.effects]
    assert any(isinstance(effect, Close) for effect in effects)
    assert Sweep(session, frozenset({"kept"})) in effects
    engine.gone("ann")
    engine.advance(3.0)
    assert any(isinstance(effect, Unlink) for _, _, effect in engine.effects)


def test_deaths_are_counted_by_kind() -> None:
    engine = Engine(4)
    for number, reason in enumerate(["signal SIGSEGV", "signal SIGKILL", "exit code 3", "killed: task timeout", ""], 1):
        engine.post("node", ExecutorDied(number, reason))
    assert engine.core.deaths == {"signal": 2, "exit": 1, "killed": 1, "unknown": 1}


@pytest.mark.parametrize(
    ("running", "retries", "charged"),
    [(["a"], 0, True), (["a"], 1, False), ([], 0, False), (["b"], 0, False)],
)
def test_who_is_charged_for_a_death(running: list[str], retries: int, charged: bool) -> None:
    engine = Engine(2)
    engine.submit("a", retries=retries)
    engine.submit("b")
    engine.die(engine.holder("a"), running)
    assert engine.outcome("a") == ("error WorkerDied" if charged else "")


def test_a_blocked_task_is_charged_when_nothing_ran_on_top() -> None:
    engine = Engine(2)
    engine.submit("p", retries=0)
    engine.block("p")
    engine.die(engine.holder("p"), ["p"])
    assert engine.outcome("p") == "error WorkerDied"


def test_an_ended_task_is_charged_nothing() -> None:
    engine = Engine(2)
    engine.submit("a", retries=0)
    engine.cancel("a")
    engine.die(engine.holder("a"), ["a"])
    assert engine.outcome("a") == "cancelled TaskCancelled"


def test_suspects_of_an_async_executor_run_alone() -> None:
    engine = Engine(1, 1)
    engine.define("page", asynchronous=True, retries=0)
    engine.submit("a", "b", "c", of="page")
    engine.die("l1", ["a", "b", "c"])
    engine.hello("l3")
    assert engine.assigned("l3") == ["a"]
    engine.submit("d", of="page")
    assert engine.assigned("l3") == ["a"]
    engine.finish("a")
    assert len(engine.assigned("l3")) == 1
    engine.die("l3", engine.assigned("l3"))
    assert sum(engine.outcome(name) == "error WorkerDied" for name in "bc") == 1


# --- pools


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
    assert waits == sorted(waits)
    assert waits[0] < 0.1
    assert START_BACKOFF_MAX / 2 < waits[-1] <= START_BACKOFF_MAX + 0.02


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


def test_hello_of_a_session_is_the_first_message_only_once() -> None:
    engine = Engine()
    peer = engine.peers["ann"]
    engine.post("ann", Hello("client", peer.session, name="ann"))
    assert len(engine.heard("ann", Welcome)) == 2
