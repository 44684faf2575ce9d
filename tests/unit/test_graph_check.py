"""The invariants hold in an ordinary life, and each notices when it is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rtml.graph.check import INVARIANTS, check
from rtml.graph.core import Core
from rtml.graph.state import State, TaskState
from rtml.messages import ErrorInfo, Release, Results, Watch
from tests.unit.cores import Engine


def busy() -> Engine:
    """A core with something of everything: ready, waiting, running, blocked and ended tasks, handles, objects."""
    engine = Engine(3, loops=1, gpu=1.0)
    engine.define("half", gpu=0.5)
    engine.define("co", asynchronous=True)
    engine.define("slow")
    engine.submit("escaper")
    engine.submit("kid", parent="escaper")
    engine.finish("escaper", handles=["kid"])
    engine.ack()
    engine.submit("big")
    engine.finish("big", value=engine.stored(engine.holder("big"), "o"))
    engine.submit("parent", of="half")
    engine.submit("child", parent="parent")
    engine.block("parent")
    engine.submit("loop", of="co")
    # All three executors are taken; a fourth was asked for.
    engine.submit("first", "second", "third", of="slow")
    engine.submit("last", deps=["first", "loop"], handles=["second"])
    engine.post("l1", Watch([engine.ids["kid"]]))
    check(engine.core)
    return engine


def a_task(core: Core, *states: int) -> TaskState:
    return next(task for task in core.tables.tasks.values() if task.state in states)


def lose_id(core: Core) -> None:
    tasks = core.tables.tasks
    tasks[1] = tasks.pop(next(iter(tasks)))


def forget_result(core: Core) -> None:
    a_task(core, State.DONE).result = None


def drop_from_lane(core: Core) -> None:
    a_task(core, State.READY).entry = 0


def miscount_lane(core: Core) -> None:
    next(iter(core.placement.active.values())).count += 1


def lose_attempt(core: Core) -> None:
    worker = next(worker for worker in core.tables.workers.values() if worker.queue)
    worker.queue.popitem()


def wait_for_nothing(core: Core) -> None:
    a_task(core, State.WAITING).waiting += 1


def disown(core: Core) -> None:
    task = a_task(core, State.READY)
    assert task.owner.children is not None
    del task.owner.children[task.id]


def keep_child(core: Core) -> None:
    done = a_task(core, State.DONE)
    done.session.children[done.id] = done


def miscount_graph(core: Core) -> None:
    a_task(core, State.READY).graph.live += 1


def queue_the_waiting(core: Core) -> None:
    worker = next(iter(core.tables.workers.values()))
    task = a_task(core, State.WAITING)
    worker.queue[task.id] = task


def forget_idle(core: Core) -> None:
    worker = next(worker for worker in core.tables.workers.values() if worker.queue)
    core.workforce.idle[worker.role][worker.id] = worker


def forget_blocked(core: Core) -> None:
    core.workforce.stacked.clear()


def leak_cpu(core: Core) -> None:
    core.tables.nodes["n"].free_cpu -= 1


def hold_a_shape_for_nothing(core: Core) -> None:
    worker = next(worker for worker in core.tables.workers.values() if worker.shape is not None)
    worker.queue.clear()


def miscount_load(core: Core) -> None:
    next(iter(core.tables.workers.values())).load += 1


def repeat_a_serial(core: Core) -> None:
    session = next(session for session in core.tables.sessions.values() if session.serial)
    session.unacked.extend([Results(1, []), Results(1, [])])


def lose_a_result(core: Core) -> None:
    for session in core.tables.sessions.values():
        session.unacked.clear()


def miscount_receipt(core: Core) -> None:
    worker = next(worker for worker in core.tables.workers.values() if worker.receipts)
    worker.receipts[0].remaining += 1


def miscount_holds(core: Core) -> None:
    a_task(core, State.READY).holds += 1


def hold_an_object_for_nobody(core: Core) -> None:
    next(iter(core.tables.objects.values())).holders.add(12345)


def cross_links(core: Core) -> None:
    first, second = list(core.tables.peers)[:2]
    core.tables.peers[first] = core.tables.peers[second]


def lose_a_worker(core: Core) -> None:
    core.tables.nodes["n"].workers.popitem()


def leave_undone(core: Core) -> None:
    core.lifecycle.fail(a_task(core, State.READY), ErrorInfo("", ""))


BREAKS: dict[str, Callable[[Core], None]] = {
    "every record is stored under its own id": lose_id,
    "exactly when it is done": forget_result,
    "in exactly one lane": drop_from_lane,
    "a lane counts": miscount_lane,
    "held by exactly one worker": lose_attempt,
    "counts its unresolved inputs": wait_for_nothing,
    "among the children of its owner": disown,
    "the children of a task or session": keep_child,
    "count their unfinished tasks": miscount_graph,
    "queue holds assigned tasks": queue_the_waiting,
    "among the idle": forget_idle,
    "with a blocked task": forget_blocked,
    "what is free on a node": leak_cpu,
    "occupies a shape": hold_a_shape_for_nothing,
    "predicted time": miscount_load,
    "rising numbers": repeat_a_serial,
    "on its way to its submitter": lose_a_result,
    "a receipt counts": miscount_receipt,
    "counts the handles": miscount_holds,
    "needed by somebody": hold_an_object_for_nobody,
    "belong together one to one": cross_links,
    "listed by its node": lose_a_worker,
    "left undone": leave_undone,
}


@pytest.mark.parametrize("sentence", BREAKS)
def test_a_broken_invariant_is_noticed(sentence: str) -> None:
    engine = busy()
    BREAKS[sentence](engine.core)
    broken = [(invariant.__doc__ or "").lower() for invariant in INVARIANTS if list(invariant(engine.core))]
    assert any(sentence in text for text in broken), broken
    with pytest.raises(AssertionError, match=r"^I\d+: "):
        check(engine.core)


def test_every_invariant_has_one_sentence() -> None:
    for invariant in INVARIANTS:
        assert invariant.__doc__ is not None
        assert invariant.__doc__.endswith("."), invariant
        assert "\n" not in invariant.__doc__, invariant


def test_the_message_names_number_sentence_and_offender() -> None:
    engine = busy()
    task = a_task(engine.core, State.DONE)
    task.result = None
    with pytest.raises(AssertionError, match=rf"^I2: A task has a result exactly when it is done\. But: \[{task.id}"):
        check(engine.core)


def test_an_input_that_nobody_keeps_is_noticed() -> None:
    engine = Engine(2)
    engine.submit("big")
    ref = engine.stored(engine.holder("big"), "o")
    engine.finish("big", value=ref)
    engine.submit("taker", deps=["big"])
    engine.post("ann", Release([ref.id]))
    engine.core.tables.objects[ref.id].holders.discard(engine.ids["taker"])
    with pytest.raises(AssertionError, match="objects among the inputs"):
        check(engine.core)


def test_an_idle_executor_beside_a_ready_task_is_noticed() -> None:
    engine = Engine(1)
    engine.submit("running", "ready")
    engine.join("w2", "executor", 7)
    with pytest.raises(AssertionError, match="No task that may run now"):
        engine.core.tables.nodes["n"].free_cpu += 1
        engine.core.tables.nodes["n"].cpu += 1
        check(engine.core)
