"""What is kept for whom, and what is sent in which frame: acknowledgements, handles, objects, logs, large frames."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest

from rtml.graph.outgoing import FRAME_DEPENDENCIES_MAX, RESULTS_MAX, SAFE_LAG_MAX
from rtml.graph.tables import Answer, Send, Unlink
from rtml.messages import (
    INLINE_MAX,
    Ack,
    Assign,
    Free,
    Hello,
    Logs,
    Query,
    Release,
    Results,
    Safe,
    Submit,
    Unwatch,
    Watch,
    WatchResults,
)
from tests.unit.cores import Engine


def results(engine: Engine, name: str = "ann") -> list[int]:
    """Numbers of the `Results` that a peer was sent since the last call."""
    return [message.serial for message in engine.heard(name, Results) if isinstance(message, Results)]


def watch(engine: Engine, by: str, *names: str) -> None:
    engine.post(by, Watch([engine.ids[name] for name in names]))


def unwatch(engine: Engine, by: str, *names: str) -> None:
    engine.post(by, Unwatch([engine.ids[name] for name in names]))


# --- acknowledgements


def test_results_are_sent_again_until_they_are_acknowledged() -> None:
    engine = Engine(2)
    engine.submit("a", "b")
    engine.finish("a")
    engine.finish("b")
    assert results(engine) == [1, 2]
    engine.post("ann", Ack(1))
    engine.gone("ann")
    engine.hello("ann")
    assert results(engine) == [2]
    engine.post("ann", Submit([], ack=2))
    engine.gone("ann")
    engine.hello("ann")
    assert results(engine) == []


def test_results_of_the_absent_wait_for_them() -> None:
    engine = Engine()
    engine.submit("a")
    engine.gone("ann")
    engine.finish("a")
    assert results(engine) == []
    engine.hello("ann")
    assert results(engine) == [1]


def test_an_executor_forgets_in_order() -> None:
    engine = Engine(1, 1)
    engine.define("page", asynchronous=True)
    engine.join("bob")
    engine.submit("a", of="page")
    engine.submit("b", of="page", by="bob")
    engine.finish("a")
    engine.finish("b")
    executor = engine.core.tables.workers[engine.peers["l1"].worker]
    engine.ack("bob")
    assert executor.safe == 0  # the first is not
    engine.ack("ann")
    assert executor.safe == 2


def test_it_hears_of_it_with_its_next_message_after_some() -> None:
    engine = Engine()
    for number in range(SAFE_LAG_MAX):
        engine.submit(f"a{number}")
        engine.finish(f"a{number}")
        engine.ack()
        assert not engine.heard("w1", Safe)
    engine.submit("b")
    assert engine.heard("w1", Safe) == [Safe(SAFE_LAG_MAX)]


# --- handles


def test_a_record_is_kept_as_long_as_somebody_holds_it() -> None:
    engine = Engine(2)
    engine.join("bob")
    engine.submit("a")
    engine.submit("has", handles=["a"])
    watch(engine, "bob", "a")
    engine.finish("a")
    engine.ack()
    assert engine.known("a")
    engine.finish("has")
    assert engine.known("a")
    unwatch(engine, "bob", "a")
    assert not engine.known("a")


def test_every_watcher_is_told_once() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a")
    watch(engine, "bob", "a")
    watch(engine, "bob", "a")
    engine.finish("a")
    assert len(engine.heard("bob", WatchResults)) == 1
    watch(engine, "bob", "a")
    assert engine.watched["a"].payload == b"v"


def test_one_that_does_not_watch_any_more_is_not_told() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a")
    watch(engine, "bob", "a")
    unwatch(engine, "bob", "a")
    engine.finish("a")
    assert not engine.watched


def test_nor_is_one_that_is_gone() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a")
    watch(engine, "bob", "a")
    engine.gone("bob")
    engine.advance(3.0)
    engine.finish("a")
    assert not engine.watched


def test_a_value_keeps_the_tasks_it_has_handles_of() -> None:
    engine = Engine(2)
    engine.submit("inner")
    engine.submit("box")
    engine.finish("inner")
    engine.finish("box", handles=["inner"])
    unwatch(engine, "ann", "inner")
    assert engine.known("inner")
    engine.ack()
    assert not engine.known("inner")


def test_a_task_keeps_those_inside_of_its_arguments_values() -> None:
    engine = Engine(2)
    engine.submit("inner", "box")
    engine.finish("inner")
    engine.finish("box", handles=["inner"])
    engine.submit("busy1", "busy2")
    engine.submit("opens", deps=["box"])
    engine.ack()
    unwatch(engine, "ann", "inner")
    assert engine.known("inner")
    engine.cancel("opens")
    engine.ack()
    assert not engine.known("inner")


def test_a_chain_of_records_is_forgotten_without_recursion() -> None:
    engine = Engine()
    engine.submit("n0")
    engine.finish("n0")
    engine.checked = False
    for number in range(1, 1500):
        engine.submit(f"n{number}")
        engine.finish(f"n{number}", handles=[f"n{number - 1}"])
        unwatch(engine, "ann", f"n{number - 1}")
    engine.checked = True
    engine.ack()
    assert not engine.core.tables.tasks


# --- objects


@pytest.mark.parametrize("order", ["release ack finish", "finish release ack", "ack finish release"])
def test_an_object_is_freed_when_the_last_one_lets_go(order: str) -> None:
    engine = Engine(2)
    engine.submit("a")
    owner = engine.holder("a")
    ref = engine.stored(owner, "o")
    engine.finish("a", value=ref)
    engine.submit("reads", deps=["a"])
    steps: dict[str, Callable[[], None]] = {
        "release": lambda: engine.post("ann", Release([ref.id])),
        "ack": engine.ack,
        "finish": lambda: engine.finish("reads"),
    }
    for step in order.split():
        assert not engine.heard(owner, Free)
        steps[step]()
    assert engine.heard(owner, Free) == [Free([ref.id])]


def test_a_submitter_gives_a_value_that_it_has() -> None:
    engine = Engine(2)
    engine.submit("a")
    owner = engine.holder("a")
    ref = engine.stored(owner, "o")
    engine.finish("a", value=ref)
    engine.ack()
    engine.submit("reads", deps=[("a", ref)])
    engine.post("ann", Release([ref.id]))
    assert not engine.heard(owner, Free)
    engine.finish("reads")
    assert engine.heard(owner, Free)


def test_a_watcher_holds_the_object() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a")
    watch(engine, "bob", "a")
    ref = engine.stored("w1", "o")
    engine.finish("a", value=ref)
    engine.ack()
    engine.post("ann", Release([ref.id]))
    unwatch(engine, "bob", "a")
    assert not engine.heard("w1", Free)
    engine.post("bob", Release([ref.id]))
    assert engine.heard("w1", Free)


def test_an_object_of_a_dead_executor_is_unlinked() -> None:
    engine = Engine(2)
    engine.submit("a")
    owner = engine.holder("a")
    ref = engine.stored(owner, "o")
    engine.finish("a", value=ref)
    engine.ack()
    engine.die(owner)
    engine.post("ann", Release([ref.id, 99]))
    assert engine.effects[-1][2] == Unlink(ref)


def test_a_result_that_comes_too_late_is_freed() -> None:
    engine = Engine()
    engine.submit("a")
    engine.cancel("a")
    ref = engine.stored("w1", "o")
    engine.finish("a", value=ref)
    assert engine.heard("w1", Free) == [Free([ref.id])]


# --- frames


def frames(engine: Engine, name: str) -> list[int]:
    """How many attempts or results each frame to a peer had."""
    sent = [effect.messages for _, peer, effect in engine.effects if peer == name and isinstance(effect, Send)]
    sizes = []
    for message in chain.from_iterable(sent):
        if isinstance(message, Assign):
            sizes.append(len(message.attempts))
        elif isinstance(message, Results):
            sizes.append(len(message.results))
    return sizes


def test_many_results_go_in_several_frames() -> None:
    engine = Engine()
    engine.submit("root")
    names = [f"a{number}" for number in range(2 * RESULTS_MAX + 1)]
    engine.submit(*names, deps=["root"])
    engine.finish("root", error="ValueError")
    assert frames(engine, "ann") == [RESULTS_MAX, RESULTS_MAX, 2]


@pytest.mark.parametrize("batch", [False, True])
def test_large_dependencies_go_in_several_frames(batch: bool) -> None:
    engine = Engine()
    count = FRAME_DEPENDENCIES_MAX // INLINE_MAX + 10
    engine.define("reads", batch=10_000 if batch else None)
    engine.submit("warm", of="reads")
    engine.finish("warm")
    engine.submit("made")
    engine.submit(*[f"r{number}" for number in range(count)], of="reads", deps=["made"])
    engine.effects.clear()
    engine.finish("made", value=bytes(INLINE_MAX))
    sizes = frames(engine, "w1")
    assert sum(sizes) == (count if batch else 128)
    assert len(sizes) == 1


def test_but_those_of_one_batch_stay_together() -> None:
    engine = Engine(1, 1)
    engine.define("reads", asynchronous=True)
    engine.define("pairs", asynchronous=True, batch=2)
    count = FRAME_DEPENDENCIES_MAX // INLINE_MAX
    engine.submit("made")
    engine.submit(*[f"r{number}" for number in range(count - 1)], of="reads", deps=["made"])
    engine.submit("x", "y", of="pairs", deps=["made"])
    engine.effects.clear()
    engine.finish("made", value=bytes(INLINE_MAX))
    assert frames(engine, "l1") == [count + 1]
    engine.submit("made2")
    engine.submit(*[f"s{number}" for number in range(count)], of="reads", deps=["made2"])
    engine.submit("z", of="reads", deps=["made2"])
    engine.effects.clear()
    engine.finish("made2", value=bytes(INLINE_MAX))
    assert frames(engine, "l1") == [count, 1]


# --- logs, questions, numbers


def test_lines_go_to_the_submitter_of_the_root() -> None:
    engine = Engine()
    engine.join("bob")
    engine.submit("a")
    engine.submit("b", by="bob")
    engine.submit("x", parent="a")
    lines = [(engine.ids[name], "f", 1, "out", name) for name in ("a", "x", "b")]
    engine.post("w1", Logs(lines))
    assert engine.heard("ann", Logs) == [Logs([lines[0], lines[1]])]
    assert engine.heard("bob", Logs) == [Logs([lines[2]])]


@pytest.mark.parametrize("there", [True, False])
def test_lines_of_a_task_that_has_ended(there: bool) -> None:
    engine = Engine()
    engine.submit("a")
    engine.finish("a")
    engine.ack()
    if not there:
        engine.gone("ann")
    engine.post("w1", Logs([(engine.ids["a"], "f", 1, "err", "late")]))
    assert len(engine.heard("ann", Logs)) == there


def test_a_question_is_for_the_shell() -> None:
    engine = Engine()
    engine.post("ann", Query(7, "status"))
    link = engine.peers["ann"].link
    assert link is not None
    assert engine.effects[-1][2] == Answer(link, Query(7, "status"))


def test_a_refused_peer_asks_nothing() -> None:
    engine = Engine()
    engine.join("bob")
    engine.post("bob", Hello("executor", engine.peers["bob"].session, worker=9), Query(1, "status"))
    assert not any(isinstance(effect, Answer) for _, _, effect in engine.effects)


def test_the_numbers_of_a_snapshot() -> None:
    engine = Engine(2, gpu=1.0)
    engine.submit("a", "b", "c")
    engine.submit("waits", deps=["c"])
    engine.finish("a")
    numbers = engine.core.snapshot()
    assert numbers["tasks"] == {"waiting": 1, "ready": 0, "assigned": 2, "done": 1}
    assert numbers["peers"] == {"supervisor": 1, "executor": 2, "client": 1}
    (node,) = numbers["nodes"]
    assert (node["cpu"], node["free_cpu"], node["resources"]) == (2.0, 0.0, {"gpu": 1.0})
    assert [executor["queued"] for executor in node["executors"]] == [1, 1]
