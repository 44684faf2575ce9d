"""What travels with a delegated task, and what a look at waiting tasks costs."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.queues import Lane
from rtml.graph.spreading import GIVE_UP_AFTER, SPILL_AFTER, Spreading
from rtml.graph.state import Profile, TaskState, WorkerState
from rtml.graph.tables import Limits
from rtml.messages import Delegate
from tests.unit.test_graph_remote import where
from tests.unit.trees import Member, Tree


def profile(node: Member, task: str) -> Profile:
    return node.core.tables.tasks[node.ids[task]].profile


def filled(tree: Tree, name: str = "n1") -> Member:
    """The node, whose only executor works for a client of its own, before others know it."""
    node = tree.node(name)
    node.submit(f"own of {name}")
    return node


def test_all_options_of_a_call_go_along() -> None:
    tree = Tree(nodes=1)
    given: dict[str, Any] = {
        "cpu": 0.5, "gpu": 1.0, "memory": 1024, "resources": {"zone=a": 1.0}, "retries": 5, "timeout": 3.0,
        "priority": 7, "detached": True, "name": "shown", "tenant": "t", "hedge": 0.9, "latest": "left", "max_age": 2.0,
    }  # fmt: skip
    tree.add("g", workers=1, first_session=9000, uplink="g", gpu=1.0, memory=2048, resources={"zone=a": 1.0})
    tree.connect("g")
    tree.settle()
    tree.root.submit("all", **given)
    tree.settle()
    here, there = profile(tree.root, "all"), profile(tree.node("g"), "all")
    different = [slot for slot in Profile.__slots__ if getattr(here, slot) != getattr(there, slot)]
    assert different in (["shape"], ["lane", "shape"])  # numbers of the dispatchers' own
    assert (here.shape.cpu, here.shape.extra) == (there.shape.cpu, there.shape.extra)


def test_what_a_call_switches_off_stays_off_over_there() -> None:
    tree = Tree(nodes=1, limits=Limits(tenant_graphs_max=1))
    tree.root.define("look", latest="k", hedge=0.9, tenant="t", detached=True, admission=True)
    tree.root.submit("plain", of="look", latest="", hedge=0.0, tenant="", detached=False, deadline=60.0)
    tree.settle()
    there = profile(tree.node("n1"), "plain")
    assert (there.latest, there.hedge, there.tenant, there.detached) == ("", 0.0, "", False)


def test_what_was_let_in_is_not_asked_for_again_over_there() -> None:
    tree = Tree(nodes=1, workers=2, limits=Limits(tenant_graphs_max=1))
    tree.root.define("page", admission=True)
    tree.root.submit("a", "b", of="page", deadline=60.0)
    tree.settle()
    for name in ("a", "b"):
        tree.node("n1").finish(name)
    tree.settle()
    assert [tree.root.outcome(name) for name in ("a", "b")] == ["ok", "ok"]


def test_a_newer_call_supersedes_one_that_waits_at_a_node() -> None:
    tree = Tree(nodes=1, workers=2)
    node = tree.node("n1")
    with node.together():  # takes both executors before the two calls come
        node.submit("own", "own too")
    tree.root.submit("old", "new", latest="k")  # there was room for both, as far as the root knew
    tree.settle()
    assert tree.root.outcome("old") == "cancelled Superseded"
    node.finish("own")
    tree.settle()
    node.finish("new")
    tree.settle()
    assert tree.root.outcome("new") == "ok"


def test_nothing_that_may_be_superseded_is_sent_ahead() -> None:
    tree = Tree(nodes=1)
    tree.root.define("look", latest="k")
    tree.root.define("plain")
    for name in ("look", "plain"):  # a run time is learned
        tree.root.submit(f"first {name}", of=name)
        tree.settle()
        tree.node("n1").finish(f"first {name}", run=1e-5)
        tree.settle()
    tree.root.submit("running", of="plain")
    tree.root.submit("old", of="look")
    tree.root.submit("ahead", of="plain")
    tree.settle()
    node = tree.node("n1")
    assert node.ids["ahead"] in node.core.tables.tasks
    assert node.ids["old"] not in node.core.tables.tasks
    tree.root.submit("new", of="look")
    assert tree.root.outcome("old") == "cancelled Superseded"


@pytest.mark.parametrize("option", ["latest", "max_age"])
def test_a_call_that_comes_back_unbegun_is_as_old_as_ever(option: str) -> None:
    tree = Tree(nodes=1)
    node = filled(tree)
    tree.root.define("look", latest="k") if option == "latest" else tree.root.define("look", max_age=1.0)
    tree.root.submit("old", of="look")
    assert tree.root.core.tables.tasks[tree.root.ids["old"]].worker is not None  # handed over
    tree.settle()
    if option == "latest":
        tree.root.submit("new", of="look")
        assert tree.root.outcome("old") == ""  # it may have begun
    node.core.placement.spreading.leaving = True
    node.core.remote.return_all()
    node.advance(0.0)
    tree.settle()
    if option == "latest":
        assert tree.root.outcome("old") == "cancelled Superseded"
        assert tree.root.outcome("new") == ""
    else:
        tree.advance(0.5)
        assert tree.root.outcome("old") == ""
        tree.advance(0.6)
        assert tree.root.outcome("old") == "expired DeadlineExceeded"


def test_a_turn_without_room_anywhere_looks_at_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(nodes=2)
    tree.root.define("long")
    tree.root.submit("known", of="long")
    tree.settle()
    tree.node(where(tree, "known")).finish("known", run=1.0)
    tree.settle()
    tree.root.submit(*(f"t{number}" for number in range(20)), of="long")
    tree.settle()
    popped: list[TaskState] = []
    looks: list[Lane] = []
    pop, room = Lane.pop, Spreading._room

    def counted_pop(lane: Lane) -> TaskState:
        popped.append(task := pop(lane))
        return task

    def counted_room(spreading: Spreading, lane: Lane) -> list[tuple[WorkerState, bool]]:
        looks.append(lane)
        return room(spreading, lane)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "pop", counted_pop)
        patch.setattr(Spreading, "_room", counted_room)
        tree.root.submit("one more", of="long")
    assert (len(popped), len(looks)) == (0, 1)
    node = tree.node("n1")
    node.finish(node.assigned("w1")[0], run=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Lane, "pop", counted_pop)
        patch.setattr(Spreading, "_room", counted_room)
        member, _, messages = tree._carried.popleft()
        tree.root._arrivals.append((tree._links[member.name], messages))
        tree.root._turn()
    assert (len(popped), len(looks)) == (1, 3)  # one delegation, one look before it and one after it


def test_tasks_of_others_behind_own_ones_still_go_back() -> None:
    tree = Tree(nodes=2)
    first = filled(tree)
    second = filled(tree, "n2")
    tree.settle()
    first.submit("spilled")  # waits, as there is no room anywhere
    tree.advance(SPILL_AFTER * 3)
    assert first.outcome("spilled") == ""
    first.finish("own of n1")
    tree.advance(GIVE_UP_AFTER * 3)
    assert first.assigned("w1") == ["spilled"]
    assert second.assigned("w1") == ["own of n2"]


def test_a_delegation_names_what_is_left_of_the_age() -> None:
    tree = Tree(nodes=1)
    node = filled(tree)
    tree.advance(0.2)  # the root knows that there is no room
    tree.root.submit("frame", max_age=1.0)
    tree.advance(0.4)
    sent: list[float | None] = []
    carry = tree.carry

    def seen(sender: Member, effect: object) -> None:
        for message in getattr(effect, "messages", ()):
            if isinstance(message, Delegate):
                sent.extend(item.task.options.max_age for item in message.tasks if item.task.options is not None)
        carry(sender, effect)  # type: ignore[arg-type]

    tree.carry = seen  # type: ignore[method-assign]
    node.finish("own of n1")
    tree.advance(0.1)
    assert len(sent) == 1
    assert sent[0] is not None
    assert 0.5 <= sent[0] <= 0.6
