"""Actors in the core: processes, order, restarts, ends."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.actors import AHEAD_MAX
from rtml.graph.core import LAST_WORDS
from rtml.graph.tables import Limits
from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    STOP,
    ActorOptions,
    Assign,
    Attempt,
    Checkpoint,
    ExecutorDied,
    Hosting,
    KillExecutor,
    Leave,
    StartExecutor,
    Unwatch,
)
from tests.unit.cores import Engine


def engine(**options: Any) -> Engine:
    made = Engine(2, **options)
    made.define("C", cpu=0.0, retries=0)
    made.define("L", asynchronous=True, retries=0)
    made.define("m", method="m", cpu=0.0, retries=0)
    made.define("again", method="m", cpu=0.0, retries=3)
    made.define("batch", method="b", cpu=0.0, retries=0, batch=3)
    made.define("slow", method="s", cpu=0.0, retries=0, timeout=5.0)
    made.define("stop", method=STOP, cpu=0.0, retries=0)
    return made


def created(e: Engine, name: str = "actor", of: str = "C", options: ActorOptions | None = None, **more: Any) -> str:
    """An actor that lives; the name of its process."""
    e.submit(name, of=of, hosts=options or ActorOptions(), **more)
    return placed(e)


def placed(e: Engine) -> str:
    (start,) = e.heard("node", StartExecutor)
    assert isinstance(start, StartExecutor)
    assert start.role in (ACTOR, ASYNC_ACTOR)
    host = f"a{start.worker}"
    e.hello(host)
    return host


def test_an_actor_gets_a_process_of_its_own_and_calls_run_there_in_order() -> None:
    e = engine()
    host = created(e)
    e.submit("c1", "c2", of="m", actor="actor")
    e.submit("t")
    assert e.assigned(host) == ["actor", "c1", "c2"]
    assert e.attempt("actor").creates is not None
    assert e.assigned("w2") == ["t"]
    e.finish("c1")
    assert e.outcome("c1") == "ok"
    assert e.outcome("actor") == ""


def test_a_call_that_waits_for_its_argument_holds_later_ones_of_its_submitter_back_and_no_others() -> None:
    e = engine()
    e.join("bob")
    host = created(e)
    e.submit("slow task")
    e.submit("c1", of="m", actor="actor", deps=["slow task"])
    e.submit("c2", of="m", actor="actor")
    e.submit("b1", of="m", actor="actor", by="bob")
    assert e.assigned(host) == ["actor", "b1"]
    e.finish("slow task")
    assert e.assigned(host) == ["actor", "b1", "c1", "c2"]


def test_with_concurrency_calls_start_when_their_arguments_are_there_and_no_more_than_so_many() -> None:
    e = engine()
    host = created(e, of="L", options=ActorOptions(concurrency=2))
    e.submit("t")
    e.submit("c1", of="m", actor="actor", deps=["t"])
    e.submit("c2", "c3", "c4", of="m", actor="actor")
    assert e.assigned(host) == ["actor", "c2", "c3"]
    e.finish("c3")
    assert e.assigned(host) == ["actor", "c2", "c4"]


def test_no_more_calls_are_ahead_than_the_limit() -> None:
    e = engine()
    host = created(e)
    e.submit(*[f"c{n}" for n in range(AHEAD_MAX + 5)], of="m", actor="actor")
    assert len(e.assigned(host)) == 1 + AHEAD_MAX
    e.finish("c0", "c1")
    assert len(e.assigned(host)) == 1 + AHEAD_MAX


def test_calls_of_many_submitters_form_a_batch_when_nothing_is_before_them() -> None:
    e = engine()
    e.join("bob")
    host = created(e)
    e.submit("first", of="m", actor="actor")
    e.submit("a1", "a2", of="batch", actor="actor")
    e.submit("b1", "b2", of="batch", actor="actor", by="bob")
    assert e.assigned(host) == ["actor", "first"]
    e.finish("first")
    assert sorted(e.assigned(host)) == ["a1", "a2", "actor", "b1"]
    assert len({e.attempt(name).batch for name in ("a1", "a2", "b1")}) == 1
    e.finish("a1", "a2", "b1")
    assert e.assigned(host) == ["actor", "b2"]


def test_timed_calls_are_handed_over_one_by_one() -> None:
    e = engine()
    host = created(e)
    e.submit("s1", "s2", of="slow", actor="actor")
    assert e.assigned(host) == ["actor", "s1"]
    e.finish("s1")
    assert e.assigned(host) == ["actor", "s2"]


def test_death_ends_what_was_begun_and_everything_else_with_an_actor_that_is_not_restarted() -> None:
    e = engine()
    host = created(e)
    e.submit("c1", "c2", of="m", actor="actor")
    e.die(host, running=["c1"])
    assert e.outcome("actor") == e.outcome("c1") == e.outcome("c2") == "error ActorDied"
    assert "signal SIGSEGV" in e.error("c2").message
    e.submit("late", of="m", actor="actor")
    assert "signal SIGSEGV" in e.error("late").message


def test_a_restart_runs_what_was_certainly_not_begun_and_what_may_be_tried_again() -> None:
    e = engine()
    host = created(e, retries=1)
    e.submit("c1", of="m", actor="actor")
    e.submit("c2", of="again", actor="actor")
    e.submit("c3", of="m", actor="actor")
    e.die(host, running=["c2"])
    assert e.outcome("c1") == "error ActorDied"
    assert "restarted" in e.error("c1").message
    second = placed(e)
    assert second != host
    assert e.assigned(second) == ["actor", "c2", "c3"]
    assert e.attempt("actor").attempt == 2
    e.die(second, running=["c2"])
    assert e.outcome("c3") == e.outcome("c2") == "error ActorDied"
    assert "2 times" in e.error("actor").message


def test_without_knowing_what_ran_all_that_was_handed_over_counts_as_begun() -> None:
    e = engine()
    host = created(e, retries=1)
    e.submit("c1", "c2", of="m", actor="actor")
    e.die(host, reason="gone when the supervisor came back")
    assert e.outcome("c1") == e.outcome("c2") == "error ActorDied"


def test_the_last_checkpoint_comes_with_the_restart() -> None:
    e = engine()
    host = created(e, retries=5)
    for state in (b"one", b"two"):
        e.post(host, Checkpoint(e.ids["actor"], 1, state))
    big = e.stored(host, "state")
    e.post(host, Checkpoint(e.ids["actor"], 1, big))
    assert big.id in e.core.tables.objects
    e.post(host, Checkpoint(e.ids["actor"], 1, b"three"))
    assert big.id not in e.core.tables.objects
    e.die(host, running=["actor"])
    placed(e)
    assert e.attempt("actor").checkpoint == b"three"


def test_stop_is_the_last_call_of_all() -> None:
    e = engine()
    e.join("bob")
    host = created(e)
    e.submit("b1", of="m", actor="actor", by="bob")
    e.submit("c1", of="m", actor="actor")
    e.submit("the end", of="stop", actor="actor")
    e.submit("late", of="m", actor="actor", by="bob")
    assert "was stopped" in e.error("late").message
    assert sorted(e.assigned(host)) == ["actor", "b1", "c1"]
    e.finish("b1", "c1")
    assert e.assigned(host) == ["actor", "the end"]
    e.finish("the end", "actor")
    assert e.outcome("actor") == e.outcome("the end") == "ok"


def test_without_handles_it_ends_after_its_calls() -> None:
    e = engine()
    host = created(e)
    e.submit("c1", of="m", actor="actor")
    e.post("ann", Unwatch([e.ids["actor"]]))
    assert not e.heard(host, Leave)
    e.finish("c1")
    assert e.heard(host, Leave)
    e.finish("actor")
    assert e.outcome("actor") == "ok"


def test_a_handle_with_another_task_keeps_it() -> None:
    e = engine()
    host = created(e)
    e.submit("t", handles=["actor"])
    e.post("ann", Unwatch([e.ids["actor"]]))
    assert not e.heard(host, Leave)
    e.finish("t")
    assert e.heard(host, Leave)


def test_a_killed_actor_has_ended_when_its_process_has() -> None:
    e = engine()
    host = created(e, retries=3)
    e.submit("c1", of="m", actor="actor")
    e.cancel("actor")
    assert e.outcome("c1") == "error ActorDied"
    assert e.outcome("actor") == ""
    (order,) = e.heard("node", KillExecutor)
    assert isinstance(order, KillExecutor)
    e.die(host, reason=f"killed: {order.reason}")
    assert "was killed" in e.error("actor").message


def test_names_are_unique_and_free_again_after_the_end() -> None:
    e = engine()
    host = created(e, options=ActorOptions(name="n"))
    e.submit("second", of="C", hosts=ActorOptions(name="n"))
    assert e.outcome("second") == "error SubmitError"
    found = e.core.actors.find("n")
    assert found is not None
    assert found["id"] == e.ids["actor"]
    e.die(host)
    assert e.core.actors.find("n") is None
    created(e, "third", options=ActorOptions(name="n"))


def test_it_ends_with_its_creator_unless_it_is_detached() -> None:
    e = engine()
    e.join("bob")
    created(e, "mine", by="bob")
    kept = created(e, "kept", by="bob", detached=True, options=ActorOptions(name="kept"))
    e.gone("bob")
    e.advance(10)
    orders = [order for order in e.heard("node", KillExecutor) if isinstance(order, KillExecutor)]
    assert [order.reason for order in orders] == ["its actor was ended"]
    assert e.core.actors.find("kept") is not None
    e.submit("c1", of="m", actor="kept")
    assert e.assigned(kept) == ["kept", "c1"]


def test_declared_resources_are_its_own_for_life_and_calls_take_none() -> None:
    e = engine(resources={"disk": 1.0})
    host = created(e, resources={"disk": 1.0})
    e.submit("c1", of="m", actor="actor")
    e.submit("t", resources={"disk": 1.0})
    assert e.assigned("w1") == e.assigned("w2") == []
    e.finish("c1")
    assert e.assigned("w1") == e.assigned("w2") == []
    e.die(host)
    assert e.assigned("w2") == ["t"]


def test_one_that_no_node_can_hold_fails_at_once_and_so_do_too_many() -> None:
    e = engine(limits=Limits(actors_max=1))
    e.submit("wide", of="C", hosts=ActorOptions(), resources={"tape": 1.0})
    assert e.outcome("wide") == "error Unschedulable"
    created(e)
    e.submit("more", of="C", hosts=ActorOptions())
    assert e.outcome("more") == "error LimitExceeded"


def test_it_survives_a_dispatcher_with_the_calls_in_their_order() -> None:
    e = engine()
    host = created(e)
    e.submit("c1", "c2", "c3", of="m", actor="actor")
    creation = e.attempt("actor")
    e.restart()
    e.hello("node")
    e.node()
    e.hello("ann")
    e.again("actor", "c1", "c2", "c3")
    assert e.core.recovery.waiting
    e.hello(host)
    hosting(e, host, creation, b"state")
    e.hello("w1")
    e.hello("w2")
    assert e.assigned(host) == ["actor", "c1", "c2", "c3"]
    e.finish("c1", "c2", "c3")
    assert e.outcome("c3") == "ok"
    assert e.task("actor").hosted is not None
    assert e.task("actor").hosted.checkpoint == b"state"  # type: ignore[union-attr]


def test_a_detached_one_survives_a_dispatcher_without_its_creator() -> None:
    e = engine()
    host = created(e, options=ActorOptions(name="n"), detached=True)
    creation = e.attempt("actor")
    e.restart()
    e.hello("node")
    e.node()
    e.hello(host)
    hosting(e, host, creation)
    e.join("bob")
    assert e.core.actors.find("n") is not None
    e.submit("c1", of="m", actor="actor", by="bob")
    e.advance(10)
    assert e.assigned(host) == ["actor", "c1"]
    # And the creator, when it comes back, has it again.
    e.hello("ann")
    e.again("actor")
    e.die(host, running=["c1"])
    assert e.outcome("actor") == "error ActorDied"


def hosting(e: Engine, host: str, creation: Attempt, state: bytes | None = None) -> None:
    assert creation.creates is not None
    e.post(host, Hosting(creation.creates, creation.attempt, e.functions["C"], [], state))


def test_after_a_restart_calls_that_come_early_wait_for_the_actor_and_keep_their_order() -> None:
    e = engine()
    e.join("bob")
    host = created(e)
    e.submit("t")
    e.submit("b1", of="m", actor="actor", by="bob", deps=["t"])
    e.submit("b2", of="m", actor="actor", by="bob")
    creation = e.attempt("actor")
    e.restart()
    e.hello("node")
    e.node()
    for name in ("w1", "w2", host, "bob"):
        e.hello(name)
    hosting(e, host, creation)
    e.again("b1", "b2", by="bob")
    e.hello("ann")
    e.again("actor")
    assert e.assigned(host) == ["actor"]
    e.again("t")
    e.finish("t")
    assert e.assigned(host) == ["actor", "b1", "b2"]
    assert e.heard(host, Assign)


def test_what_a_process_that_left_has_said_counts_though_its_end_is_known_before() -> None:
    e = engine()
    host = created(e)
    e.submit("call", of="m", actor="actor")
    e.post("node", ExecutorDied(e.peers[host].worker, "left"))
    assert e.outcome("call") == ""
    e.finish("actor", error="ValueError", on=host)  # its constructor failed: on a slower link
    assert "it failed" in e.error("call").message
    assert "left" not in e.error("call").message
    assert e.peers[host].worker not in e.core.tables.workers


@pytest.mark.parametrize("how", ["time", "link"])
def test_last_words_are_not_waited_for_without_end(how: str) -> None:
    e = engine()
    host = created(e)
    e.submit("call", of="m", actor="actor")
    e.post("node", ExecutorDied(e.peers[host].worker, "left"))
    if how == "time":
        e.advance(LAST_WORDS * 0.9)
        assert e.outcome("call") == ""
        e.advance(LAST_WORDS * 0.2)
    else:
        e.gone(host)
    assert "died (left)" in e.error("call").message
