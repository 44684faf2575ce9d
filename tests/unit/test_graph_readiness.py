"""Functions that are kept ready: who prepares them, when submitters are told, when they are forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.messages import (
    Define,
    ErrorInfo,
    Forget,
    Forgot,
    Function,
    Keep,
    Kept,
    Prepare,
    Prepared,
)
from tests.unit.cores import Engine

SET = 900


def heard(engine: Engine, peer: str, kind: type[Any]) -> list[Any]:
    return [message for message in engine.peers[peer].heard if isinstance(message, kind)]


def preparing(engine: Engine) -> list[str]:
    return [name for name in engine.peers if name.startswith("w") and len(heard(engine, name, Prepare)) == 1]


#: In the order of `Engine.define`, after its own "f".
MODEL, OTHER = 2, 3


@pytest.fixture
def engine() -> Engine:
    made = Engine(workers=3)
    made.define("model")
    made.define("other")
    made.post("ann", Define(list(made.functions.values())))
    made.peers["ann"].defined |= made.functions.keys()
    return made


def keep(engine: Engine, *functions: int, dropped: tuple[int, ...] = ()) -> None:
    engine.post("ann", Keep(list(functions), list(dropped)))


def done(engine: Engine, worker: str, function: int, error: ErrorInfo | None = None) -> None:
    engine.post(worker, Prepared(function, 0.1, error))


def all_done(engine: Engine, function: int) -> None:
    for worker in ("w1", "w2", "w3"):
        done(engine, worker, function)


def test_one_executor_tries_first_then_the_others_one_at_a_time(engine: Engine) -> None:
    keep(engine, MODEL)
    assert preparing(engine) == ["w1"]
    done(engine, "w1", MODEL)
    assert preparing(engine) == ["w1", "w2"]
    done(engine, "w2", MODEL)
    assert not heard(engine, "ann", Kept)
    done(engine, "w3", MODEL)
    assert heard(engine, "ann", Kept) == [Kept(MODEL, 3)]


def test_what_fails_in_the_first_one_meets_no_other(engine: Engine) -> None:
    keep(engine, MODEL)
    error = ErrorInfo("ValueError", "truncated")
    done(engine, "w1", MODEL, error)
    assert preparing(engine) == ["w1"]
    (told,) = heard(engine, "ann", Kept)
    assert told.error == error


def test_an_executor_that_dies_while_it_prepares_does_not_blame_its_task(engine: Engine) -> None:
    keep(engine, MODEL)
    engine.submit("a", "b", "c", retries=0)
    (mine,) = engine.assigned("w1")
    engine.die("w1", running=[mine])
    (told,) = heard(engine, "ann", Kept)
    assert "died" in told.error.message
    assert engine.outcome(mine) == ""


def test_an_executor_that_is_killed_from_outside_is_blamed_on_the_function_the_second_time(engine: Engine) -> None:
    keep(engine, MODEL)
    engine.die("w1", reason="signal SIGKILL")
    assert not heard(engine, "ann", Kept)
    assert preparing(engine) == ["w2"]
    engine.die("w2", reason="signal SIGKILL")
    (told,) = heard(engine, "ann", Kept)
    assert "died" in told.error.message
    assert preparing(engine) == []


def test_executors_that_join_get_what_is_kept(engine: Engine) -> None:
    keep(engine, MODEL)
    all_done(engine, MODEL)
    engine.die("w2")
    engine.hello("w4")  # which was started in its place
    assert [message.functions[0].id for message in heard(engine, "w4", Prepare)] == [MODEL]
    assert heard(engine, "ann", Kept) == [Kept(MODEL, 3)]


def test_what_nobody_keeps_is_forgotten_everywhere(engine: Engine) -> None:
    keep(engine, MODEL)
    all_done(engine, MODEL)
    keep(engine, OTHER)
    assert heard(engine, "w1", Forget) == heard(engine, "w3", Forget) == [Forget([MODEL])]
    assert heard(engine, "ann", Forgot) == [Forgot([MODEL])]
    assert MODEL not in engine.core.tables.functions


def test_a_live_task_keeps_its_function(engine: Engine) -> None:
    keep(engine, MODEL)
    all_done(engine, MODEL)
    engine.submit("t", of="model")
    keep(engine)
    assert not heard(engine, "ann", Forgot)
    engine.finish("t")
    assert heard(engine, "ann", Forgot) == [Forgot([MODEL])]


def test_a_graph_keeps_what_its_context_names(engine: Engine) -> None:
    engine.post("ann", Define([Function(SET, "versions", pickled=b"x", members=[MODEL])]))
    keep(engine, MODEL, SET)
    all_done(engine, MODEL)
    engine.submit("t", of="other", context=SET)
    keep(engine, OTHER)
    assert not heard(engine, "ann", Forgot)
    engine.finish("t")
    assert {number for told in heard(engine, "ann", Forgot) for number in told.functions} == {MODEL, SET}
    assert not engine.core.tables.functions.keys() & {MODEL, SET}


def test_an_attempt_comes_after_its_context(engine: Engine) -> None:
    context = Function(SET, "versions", pickled=b"x", members=[MODEL])
    engine.post("ann", Define([context]))
    engine.submit("t", of="other", context=SET)
    assert Define([context]) in engine.peers[engine.holder("t")].heard
    assert engine.attempt("t").context == SET


def test_an_unknown_context_is_refused(engine: Engine) -> None:
    engine.submit("t", of="other", context=77)
    assert "context 4d was not defined" in engine.error("t").message


def test_what_was_forgotten_meanwhile_is_to_be_defined_again(engine: Engine) -> None:
    keep(engine, 555)
    assert heard(engine, "ann", Forgot) == [Forgot([555])]


def test_two_submitters_keep_it_until_both_let_go(engine: Engine) -> None:
    engine.join("bob")
    engine.post("bob", Define([engine.functions["model"]]))
    keep(engine, MODEL)
    engine.post("bob", Keep([MODEL]))
    all_done(engine, MODEL)
    assert heard(engine, "bob", Kept) == [Kept(MODEL, 3)]
    keep(engine)
    assert not heard(engine, "w1", Forget)
    engine.post("bob", Keep([], [MODEL]))
    assert heard(engine, "w1", Forget) == [Forget([MODEL])]
    assert heard(engine, "ann", Forgot) == heard(engine, "bob", Forgot) == [Forgot([MODEL])]


def test_another_submitter_may_go_on_calling_it(engine: Engine) -> None:
    engine.join("bob")
    engine.post("bob", Define([engine.functions["model"]]))
    keep(engine, MODEL)
    all_done(engine, MODEL)
    keep(engine)
    assert heard(engine, "w1", Forget) == [Forget([MODEL])]
    assert MODEL in engine.core.tables.functions


def test_a_new_version_begins_with_what_was_learned_of_the_last(engine: Engine) -> None:
    again = Function(103, "model", ref="m:f")
    engine.post("ann", Define([again]))
    keep(engine, MODEL)
    all_done(engine, MODEL)
    engine.submit("t", of="model")
    engine.finish("t", run=0.25)
    keep(engine, MODEL, 103)
    assert engine.core.tables.functions[103].estimate == engine.core.tables.functions[MODEL].estimate is not None


def test_what_no_node_can_have_is_an_error(engine: Engine) -> None:
    engine.define("big", gpu=2.0)
    engine.post("ann", Define([engine.functions["big"]]), Keep([engine.functions["big"].id]))
    (told,) = heard(engine, "ann", Kept)
    assert told.error is not None
    assert "'big' asks for cpu=1, gpu=2, which no node has" in told.error.message


def test_nodes_that_can_grow_may_have_it_later() -> None:
    engine = Engine(workers=1, can_grow=True)
    engine.define("big", gpu=1.0)
    engine.post("ann", Define([engine.functions["big"]]), Keep([engine.functions["big"].id]))
    assert not heard(engine, "ann", Kept)
    engine.node(gpu=1.0)
    done(engine, "w1", engine.functions["big"].id)
    assert heard(engine, "ann", Kept) == [Kept(engine.functions["big"].id, 1)]
