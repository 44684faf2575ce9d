"""Submitters and executors that come, go, die and come back, and who is charged for a death."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.tables import Close, Limits, Send, Sweep, Unlink
from rtml.messages import (
    DISPATCHER,
    EXECUTOR,
    SUPERVISOR,
    ExecutorDied,
    Farewell,
    Finished,
    Free,
    Heartbeat,
    Hello,
    KillExecutor,
    Leave,
    Refused,
    Rehello,
    Returned,
    Revoke,
    TaskResult,
    Welcome,
)
from tests.unit.cores import Engine

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


@pytest.mark.parametrize("role", [DISPATCHER, EXECUTOR, SUPERVISOR])
def test_a_guest_may_only_submit(role: str) -> None:
    engine = Engine()
    engine.core.membership.is_guest = lambda peer: True
    engine.join("guest", role=role)
    (refused,) = engine.heard("guest", Refused)
    assert isinstance(refused, Refused)
    assert f"may not join as {role}" in refused.reason
    assert engine.peers["guest"].link is None
    engine.join("bob")
    assert engine.heard("bob", Welcome)


def test_messages_before_hello_are_dropped() -> None:
    engine = Engine()
    engine.stray(Heartbeat(), Heartbeat())
    (_, _, effect) = engine.effects[-1]
    assert effect == Send(-1, [Rehello(1)])
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


def test_one_that_says_farewell_is_not_waited_for() -> None:
    engine = Engine(2)
    engine.submit("a", "b")
    ref = engine.stored(engine.holder("b"), "o")
    engine.finish("b", value=ref)
    engine.post("ann", Farewell())
    assert not engine.known("a")
    assert engine.heard("w1", Revoke) or engine.heard("w2", Revoke)
    assert not engine.core.tables.objects
    engine.gone("ann")
    engine.advance(60.0)


def test_executors_and_supervisors_have_no_farewell() -> None:
    engine = Engine(1)
    engine.submit("a")
    engine.post("w1", Farewell())
    engine.post("node", Farewell())
    engine.finish("a")
    assert engine.outcome("a") == "ok"


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


def test_hello_of_a_session_is_the_first_message_only_once() -> None:
    engine = Engine()
    peer = engine.peers["ann"]
    engine.post("ann", Hello("client", peer.session, name="ann"))
    assert len(engine.heard("ann", Welcome)) == 2


def test_a_coroutine_whose_process_dies_again_and_again_while_it_awaits_runs_alone_and_is_charged() -> None:
    engine = Engine(1, 1)
    engine.define("page", asynchronous=True, retries=0)
    engine.submit("a", "b", of="page")
    for worker, following in (("l1", "l3"), ("l3", "l4"), ("l4", "l5")):
        engine.die(worker)
        engine.hello(following)
    assert len(engine.assigned("l5")) == 1
    engine.die("l5")
    assert sum(engine.known(name) and engine.outcome(name) == "error WorkerDied" for name in "ab") == 1


def test_a_process_that_was_killed_on_purpose_says_nothing_of_its_coroutines() -> None:
    engine = Engine(1, 1)
    engine.define("page", asynchronous=True, retries=0)
    engine.submit("a", "b", of="page")
    for worker, following in (("l1", "l3"), ("l3", "l4"), ("l4", "l5"), ("l5", "l6")):
        engine.die(worker, reason="killed: task timeout")
        engine.hello(following)
    assert engine.assigned("l6") == ["a", "b"]
