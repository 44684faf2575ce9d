"""Lost results are made again, and large arguments are counted where a task is placed: cores alone."""

from __future__ import annotations

import itertools

import pytest

from rtml.graph import lineage
from rtml.graph.lineage import REBUILDS_MAX
from rtml.graph.locality import observe
from rtml.graph.policy import Scheduling
from rtml.graph.state import NodeState
from rtml.graph.tables import Ahead
from rtml.messages import OK, Folded, ObjectRef, Query, Release, Reply, task_id
from tests.unit.test_graph_remote import where
from tests.unit.trees import Tree

MIB = 1024 * 1024
_numbers = itertools.count(1)


def large(node: str, size: int = 100 * MIB) -> ObjectRef:
    number = next(_numbers)
    return ObjectRef(task_id(99, number), size, f"00000063-{number}", f"{node}:1")


def made(tree: Tree, task: str, node: str = "", **submit: object) -> ObjectRef:
    """Have a node make a large result."""
    tree.root.submit(task, **submit)  # type: ignore[arg-type]
    tree.settle()
    name = where(tree, task)
    assert node in ("", name)
    ref = large(name)
    tree.node(name).finish(task, value=ref, run=0.01)
    tree.settle()
    tree.root.ack()
    tree.settle()
    return ref


def lose(tree: Tree, node: str) -> None:
    """The node is gone, and has been given up."""
    tree.cut(node)
    tree.advance(11.0, step=1.0)


def dependent(name: str, of: str, ref: ObjectRef) -> dict[str, object]:
    return {"deps": [(of, ref)]}


def rebuilt(tree: Tree) -> str:
    """The name under which tests know the task that was submitted by nobody."""
    known = set(tree.root.ids.values())
    (number,) = [task for task in tree.root.core.tables.tasks if task not in known]
    name = f"rebuilt{next(_numbers)}"
    tree.root.ids[name] = number
    return name


# --- placement --------------------------------------------------------------------------------------------------------


def test_bandwidth_is_learned_from_what_takes_time() -> None:
    node = NodeState("n", 1.0, {})
    before = node.bandwidth
    observe(node, 1000, 1.0)
    assert node.bandwidth == before
    for _ in range(50):
        observe(node, 10 * MIB, 1.0)
    assert node.bandwidth == pytest.approx(10 * MIB, rel=0.01)


@pytest.mark.parametrize("data", ["n1", "n2", "n3"])
def test_tasks_go_where_their_arguments_lie(data: str) -> None:
    tree = Tree(nodes=3)
    ref = large(data)
    tree.root.submit("put", "other")
    tree.settle()
    for name in ("put", "other"):
        tree.node(where(tree, name)).finish(name)
    tree.settle()
    for number in range(3):
        tree.root.submit(f"t{number}", deps=[("put", ref)])
        tree.settle()
        assert where(tree, f"t{number}") == data
        tree.node(data).finish(f"t{number}", run=0.001)
        tree.settle()


def test_a_blind_dispatcher_does_not_look_where_arguments_lie() -> None:
    places = set()
    for data in ("n1", "n2"):
        tree = Tree(nodes=2, scheduling=Scheduling(blind=True))
        tree.root.submit("t", args=large(data))
        tree.settle()
        places.add(where(tree, "t"))
    assert len(places) == 1


def test_a_task_waits_for_a_busy_node_but_not_longer_than_fetching_takes() -> None:
    tree = Tree(nodes=2)
    tree.root.submit("busy")
    tree.settle()
    busy = where(tree, "busy")
    ref = large(busy, 50 * MIB)  # 0.2 s at the bandwidth that is assumed
    tree.root.submit("t", args=ref)
    tree.settle()
    other = {"n1": "n2", "n2": "n1"}[busy]
    assert not any(tree.node(other).assigned(name) for name in ("w1",))
    tree.advance(0.1)
    assert tree.node(other).assigned("w1") == []
    tree.advance(0.15)
    assert where(tree, "t") == other


def test_what_is_born_on_a_node_goes_to_its_data_if_that_is_sooner() -> None:
    tree = Tree(nodes=3)
    first, second = tree.node("n1"), tree.node("n2")
    first.submit("far", args=large("n2"))  # by a client of that node
    tree.settle()
    assert where(tree, "far") == "n2"
    assert not any(isinstance(effect, Ahead) for _, _, effect in first.effects)
    second.finish("far", value=b"there")
    tree.settle()
    assert first.results["far"].payload == b"there"
    tree.at_root.clear()
    first.submit("own", args=large("n1"))
    first.submit("little", args=large("n2", MIB // 10))  # sooner fetched than asked about
    tree.settle()
    assert where(tree, "own") == "n1"
    first.finish("own")
    tree.settle()
    assert where(tree, "little") == "n1"
    assert any(isinstance(effect, Ahead) for _, _, effect in first.effects)
    assert not tree.at_root["Delegate"]


def test_a_root_with_executors_of_its_own_sends_tasks_to_their_data() -> None:
    tree = Tree(nodes=2, root_workers=1)
    tree.root.submit("far", args=large("n2"))
    tree.settle()
    assert where(tree, "far") == "n2"
    tree.root.core.tables.data = "root:1"
    tree.root.submit("here", args=large("root"))
    tree.settle()
    assert tree.root.assigned("w1") == ["here"]


def test_data_where_there_is_no_room_is_fetched_instead() -> None:
    tree = Tree(nodes=2)
    tree.node("n2").submit("busy")
    tree.settle()
    tree.advance(0.1)
    tree.node("n1").submit("far", args=large("n2", 10 * MIB))
    tree.settle()
    tree.advance(0.5)  # it went to ask, and came back
    assert where(tree, "far") == "n1"


def test_a_node_begins_to_fetch_what_waits_for_its_turn() -> None:
    tree = Tree(nodes=1)
    ref = large("elsewhere")
    tree.root.submit("t", args=ref)
    tree.settle()
    told = [effect for _, _, effect in tree.node("n1").effects if isinstance(effect, Ahead)]
    assert told == [Ahead([ref])]


# --- nodes that were given up -----------------------------------------------------------------------------------------


def test_what_a_dead_node_ran_does_not_look_for_arguments_there() -> None:
    tree = Tree(nodes=1)
    ref = made(tree, "a", "n1")
    tree.root.submit("b", deps=[("a", ref)])
    tree.settle()
    assert where(tree, "b") == "n1"
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    lose(tree, "n1")
    again = rebuilt(tree)
    assert where(tree, again) == "n2", "before b was tried and failed"
    new = large("n2")
    tree.node("n2").finish(again, value=new, run=0.01)
    tree.settle()
    tree.node("n2").finish("b")
    tree.settle()
    assert tree.root.results["b"].outcome == OK


# --- lineage ----------------------------------------------------------------------------------------------------------


def test_a_lost_argument_is_made_again_when_its_task_fails() -> None:
    tree = Tree(nodes=1)
    ref = made(tree, "a", "n1")
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    tree.cut("n1")  # and not given up yet
    tree.root.submit("b", deps=[("a", ref)])
    tree.settle()
    assert where(tree, "b") == "n2"
    tree.node("n2").finish("b", error="ObjectLost")
    tree.settle()
    again = rebuilt(tree)
    assert where(tree, again) == "n2"
    new = large("n2")
    tree.node("n2").finish(again, value=new)
    tree.settle()
    assert tree.root.task("b").inputs == [new]
    tree.node("n2").finish("b")
    tree.settle()
    assert tree.root.outcome("b") == "ok"
    # As long as its client holds the lost result, what was made in its place is kept for the next who asks.
    assert new.id in tree.root.core.tables.objects
    tree.root.post("ann", Release([ref.id]))
    tree.settle()
    assert not tree.root.core.tables.objects
    assert tree.root.core.lifecycle.lineages._bytes == 0


def test_a_reduction_is_made_again_of_what_it_was_made_of() -> None:
    tree = Tree(nodes=1, workers=2)
    given = made(tree, "a", "n1")
    tree.root.submit("late")
    tree.root.submit("r", handles=["a", "late"])
    tree.settle()
    ref = large("n1")
    tree.node("n1").finish("r", value=ref, run=0.01, folded=Folded([0], b"call", [given, b"small"]))
    tree.node("n1").finish("late")
    tree.settle()
    tree.root.ack()
    tree.root.post("ann", Release([given.id]))  # nobody else needs the input
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    lose(tree, "n1")
    tree.root.submit("b", deps=[("r", ref)])
    tree.settle()
    known = set(tree.root.ids.values())
    new = [task for task in tree.root.core.tables.tasks.values() if task.id not in known]
    first, second = sorted(new, key=lambda task: task.waiting)
    tree.root.ids |= {"first": first.id, "second": second.id}
    again = large("n2")
    tree.node("n2").finish("first", value=again, run=0.01)
    tree.settle()
    attempt = tree.node("n2").attempt("second")
    assert (attempt.args, attempt.deps) == (b"call", [again, b"small"])
    tree.node("n2").finish("second", value=large("n2"), run=0.01)
    tree.settle()
    tree.node("n2").finish("b")
    tree.settle()
    assert tree.root.outcome("b") == "ok"


def test_a_reduction_that_does_not_say_how_is_not_made_again() -> None:
    tree = Tree(nodes=1, workers=2)
    tree.root.submit("a")
    tree.root.submit("r", handles=["a"])
    tree.settle()
    tree.node("n1").finish("r", value=large("n1"), run=0.01, folded=Folded([0]))
    tree.settle()
    assert [stored.lineage for stored in tree.root.core.tables.objects.values()] == [None]


def test_a_chain_is_made_again_as_far_back_as_needed() -> None:
    tree = Tree(nodes=1)
    first = made(tree, "a", "n1")
    second = made(tree, "b", "n1", deps=[("a", first)])
    tree.root.post("ann", Release([first.id]))
    tree.settle()
    assert first.id not in tree.root.core.tables.objects
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    lose(tree, "n1")
    answer = ask(tree, second)
    assert answer.startswith("task ")
    tree.settle()
    tree.root.ids["b again"] = int(answer.split()[1])
    waiting = tree.root.task("b again")
    assert waiting.waiting == 1
    (number,) = [task for task in tree.root.core.tables.tasks if task not in tree.root.ids.values()]
    tree.root.ids["a again"] = number
    tree.node("n2").finish("a again", value=large("n2"))
    tree.settle()
    tree.node("n2").finish("b again", value=b"small now")
    tree.settle()
    assert tree.root.task("b again").result.payload == b"small now"  # type: ignore[union-attr]
    assert ask(tree, second) == answer, "it is there already"


def test_what_cannot_be_made_again_says_so() -> None:
    tree = Tree(nodes=1)
    once = made(tree, "once", "n1", retries=0)
    put = large("n1")
    assert "is there, but does not give it" in ask(tree, once)
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    lose(tree, "n1")
    assert "only results of tasks that may be retried" in ask(tree, once)
    assert "it was put" in ask(tree, put)
    tree.root.ids["put"] = task_id(99, 0)
    tree.root.submit("b", deps=[("put", put)], retries=0)
    tree.settle()
    tree.node("n2").finish("b", error="ObjectLost")
    tree.settle()
    assert "it was put" in tree.root.error("b").message


def test_it_is_tried_only_so_often_and_so_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(nodes=1)
    ref = made(tree, "a", "n1")
    for number in range(2, 2 + REBUILDS_MAX + 1):
        name = f"n{number}"
        tree.add(name, workers=1, first_session=1000 * number, uplink=name)
        tree.connect(name)
        lose(tree, f"n{number - 1}")
        answer = ask(tree, ref)
        tree.settle()
        if number == 2 + REBUILDS_MAX:
            assert "no more than" in answer
            break
        task = f"again{number}"
        tree.root.ids[task] = int(answer.split()[1])
        tree.node(name).finish(task, value=large(name))
        tree.settle()
    monkeypatch.setattr(lineage, "DEPTH_MAX", 5)
    deep = Tree(nodes=1)
    last = made(deep, "t0", "n1")
    for number in range(1, 6):
        last = made(deep, f"t{number}", "n1", deps=[(f"t{number - 1}", last)])
    assert deep.root.core.tables.objects[last.id].lineage is None


def iterated(tree: Tree, rounds: int, width: int = 1) -> list[ObjectRef]:
    """A computation in rounds: each round's tasks take all results of the one before, which are let go then."""
    last: dict[str, ObjectRef] = {}
    for number in range(rounds):
        deps = list(last.items())
        new = {f"r{number}.{lane}": made(tree, f"r{number}.{lane}", "n1", deps=deps) for lane in range(width)}
        tree.root.post("ann", Release([ref.id for ref in last.values()]))
        tree.settle()
        last = new
    return list(last.values())


def finish_rebuilds(tree: Tree, node: str) -> int:
    """Run what is made again, one after the other; how many large results were kept at a time."""
    known, most = set(tree.root.ids.values()), 0
    tasks = tree.root.core.tables.tasks
    while new := [task for task in tasks.values() if task.id not in known and task.result is None]:
        task = next(task for task in new if not task.waiting)
        name = f"rebuilt{next(_numbers)}"
        tree.root.ids[name] = task.id
        tree.node(node).finish(name, value=large(node), run=0.01)
        tree.settle()
        most = max(most, len(tree.root.core.tables.objects))
    return most


@pytest.mark.parametrize(("rounds", "width"), [(100, 1), (25, 3)])
def test_a_long_iteration_is_made_again_and_keeps_no_more_than_its_last_rounds(rounds: int, width: int) -> None:
    tree = Tree(nodes=1)
    last = iterated(tree, rounds, width)
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    lose(tree, "n1")
    for ref in last:
        assert ask(tree, ref).startswith("task ")
    tree.settle()
    assert finish_rebuilds(tree, "n2") <= 3 * width  # what was lost, what is made of what
    for ref in last:
        number = int(ask(tree, ref).split()[1])
        assert tree.root.core.tables.tasks[number].result.outcome == OK  # type: ignore[union-attr]
    tree.root.post("ann", Release([ref.id for ref in last]))
    tree.settle()
    assert not tree.root.core.tables.objects
    assert tree.root.core.lifecycle.lineages._bytes == 0


@pytest.mark.parametrize(("limit", "possible"), [(0.255, True), (0.245, False)])
def test_what_would_take_too_long_is_not_made_again(
    monkeypatch: pytest.MonkeyPatch, limit: float, possible: bool
) -> None:
    monkeypatch.setattr(lineage, "COST_MAX", limit)
    tree = Tree(nodes=1)
    last = iterated(tree, 13, width=2)  # one of the last round and two of each before: 25 runs of 0.01 s
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    lose(tree, "n1")
    assert ask(tree, last[0]).startswith("task ") == possible


def ask(tree: Tree, ref: ObjectRef) -> str:
    tree.root.post("ann", Query(7, "rebuild", f"{ref.id} {ref.node}"))
    return [message for message in tree.root.heard("ann", Reply) if isinstance(message, Reply)][-1].body


def test_a_copy_at_another_node_is_better_than_making_it_again() -> None:
    tree = Tree(nodes=2)
    tree.root.ids["put"] = task_id(99, 0)
    tree.root.submit("busy")
    tree.settle()
    here = where(tree, "busy")
    other = {"n1": "n2", "n2": "n1"}[here]
    ref = large(here, MIB)  # quickly fetched: nobody waits for its node
    tree.root.submit("copies", deps=[("put", ref)])
    tree.advance(0.02)
    assert where(tree, "copies") == other
    tree.node(other).finish("copies")
    tree.node(here).finish("busy")
    tree.settle()
    lose(tree, here)
    assert ask(tree, ref) == f"at {other}:1"
    copy = ObjectRef(ref.id, ref.size, ref.segment, f"{other}:1")
    assert "it was put" in ask(tree, copy), "it is not there either"
    assert "it was put" in ask(tree, ref)
