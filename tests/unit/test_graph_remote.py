"""Dispatchers that work for each other: delegation, spilling, handles, lost connections, restarts."""

from __future__ import annotations

from rtml.graph.spreading import SPILL_AFTER
from rtml.messages import Revoke, Watch
from tests.unit.cores import Engine
from tests.unit.trees import Tree


def where(tree: Tree, task: str) -> str:
    """The node whose executor has the task."""
    return next(name for name, node in tree.nodes.items() if any(task in node.assigned(w) for w in workers(node)))


def workers(node: Engine) -> list[str]:
    return [name for name, peer in node.peers.items() if peer.worker]


def test_the_root_delegates_and_answers() -> None:
    tree = Tree(nodes=2)
    tree.root.submit("a", "b")
    tree.settle()
    assert {where(tree, "a"), where(tree, "b")} == {"n1", "n2"}
    tree.node(where(tree, "a")).finish("a", value=b"result")
    tree.settle()
    assert tree.root.outcome("a") == "ok"
    assert tree.root.results["a"].payload == b"result"
    tree.node(where(tree, "b")).finish("b", error="ValueError")
    tree.settle()
    assert tree.root.outcome("b") == "error ValueError"
    tree.root.ack()
    tree.settle()
    assert not tree.root.core.tables.tasks
    tree.root.submit("c")  # carries `Safe` for the others
    tree.settle()
    assert all(len(node.core.tables.tasks) <= 1 for node in tree.nodes.values())


def test_what_a_task_submits_stays_on_its_node_and_the_root_hears_nothing() -> None:
    tree = Tree(nodes=1, workers=2)
    node = tree.node("n1")
    tree.root.submit("parent")
    tree.settle()
    tree.at_root.clear()
    for number in range(5):
        child = f"child{number}"
        node.submit(child, parent="parent")
        tree.settle()
        node.finish(child, run=0.001)
        tree.settle()
    assert not tree.at_root
    tree.advance(1.0)
    assert not tree.at_root
    node.finish("parent")
    tree.settle()
    assert tree.root.outcome("parent") == "ok"


def test_what_waits_too_long_spills_to_a_node_with_room() -> None:
    tree = Tree(nodes=2)
    first, second = tree.node("n1"), tree.node("n2")
    first.submit("a", "b")  # by a client of that node
    tree.settle()
    assert first.assigned("w1") == ["a"]
    tree.advance(SPILL_AFTER * 3)
    assert second.assigned("w1") == ["b"]
    second.finish("b", value=b"far")
    tree.settle()
    assert first.results["b"].payload == b"far"
    assert first.outcome("a") == ""


def test_what_fits_no_node_here_spills_at_once() -> None:
    tree = Tree(nodes=1)
    gpu = tree.add("g", workers=1, first_session=9000, uplink="g", gpu=1.0)
    tree.connect("g")
    tree.settle()
    tree.node("n1").define("train", gpu=1.0)
    tree.node("n1").submit("t", of="train")
    tree.settle()
    assert gpu.assigned("w1") == ["t"]
    gpu.finish("t")
    tree.settle()
    assert tree.node("n1").outcome("t") == "ok"
    tree.node("n1").define("huge", gpu=8.0)
    tree.node("n1").submit("h", of="huge")
    tree.settle()
    assert tree.node("n1").outcome("h") == "error Unschedulable"


def test_cancellation_reaches_the_executor_over_there() -> None:
    tree = Tree(nodes=1)
    tree.root.submit("a")
    tree.settle()
    tree.root.cancel("a")
    tree.settle()
    assert tree.root.outcome("a") == "cancelled TaskCancelled"
    node = tree.node("n1")
    assert node.heard("w1", Revoke)
    node.finish("a", outcome=2)
    tree.settle()
    tree.root.submit("b")
    tree.settle()
    assert node.assigned("w1") == ["b"]


def test_deadlines_and_chains_go_along() -> None:
    tree = Tree(nodes=1)
    node = tree.node("n1")
    tree.root.submit("a", deadline=0.5, trace="abc")
    tree.settle()
    assert 0.4 < (node.attempt("a").budget or 0) <= 0.5
    assert node.attempt("a").graph == tree.root.ids["a"]
    node.submit("child", parent="a")
    tree.settle()
    tree.advance(0.6)
    assert tree.root.outcome("a") == "expired DeadlineExceeded"


def test_a_short_cut_loses_nothing() -> None:
    tree = Tree(nodes=1, workers=2)
    node = tree.node("n1")
    tree.root.submit("a", "b")
    tree.settle()
    tree.cut("n1")
    node.finish("a", value=b"while it was cut")
    tree.root.submit("c")
    tree.connect("n1")
    tree.settle()
    assert tree.root.results["a"].payload == b"while it was cut"
    node.finish("b")
    tree.settle()
    assert tree.root.outcome("b") == "ok"
    node.finish("c")
    tree.settle()
    assert tree.root.outcome("c") == "ok"


def test_a_node_whose_kernel_says_that_it_has_ended_is_given_up_at_once() -> None:
    tree = Tree(nodes=2)
    tree.root.submit("a", "b")
    tree.settle()
    name, other = where(tree, "a"), where(tree, "b")
    tree.cut(name)
    tree.settle()
    assert not tree.node(other).known("a")  # it may come back
    asked = tree.knock(f"{name}:1")
    tree.root.knocked(asked.worker)
    tree.settle()
    tree.node(other).finish("b")
    tree.settle()
    tree.node(other).finish("a")
    tree.settle()
    assert tree.root.outcome("a") == "ok"
    tree.root.knocked(asked.worker)  # nobody knows it any more
    tree.connect(name)  # it was wrong: the node is told, and joins anew
    tree.settle()
    tree.advance(1.0)
    assert len(tree.root.core.tables.remotes) >= 1


def test_a_node_that_came_back_meanwhile_is_not_given_up() -> None:
    tree = Tree(nodes=1)
    node = tree.node("n1")
    tree.root.submit("a")
    tree.settle()
    tree.cut("n1")
    asked = tree.knock("n1:1")
    tree.connect("n1")
    tree.settle()
    tree.root.knocked(asked.worker)
    tree.settle()
    node.finish("a")
    tree.settle()
    assert tree.root.outcome("a") == "ok"


def test_what_was_on_its_way_when_the_link_broke_is_sent_again() -> None:
    tree = Tree(nodes=1)
    tree.root.submit("a")  # not settled: the delegation is lost
    tree.cut("n1")
    tree.connect("n1")
    tree.settle()
    tree.node("n1").finish("a")
    tree.settle()
    assert tree.root.outcome("a") == "ok"


def test_a_node_that_stays_away_is_given_up_and_its_tasks_run_elsewhere() -> None:
    tree = Tree(nodes=2)
    tree.root.submit("a")
    tree.settle()
    lost = where(tree, "a")
    other = tree.node("n2" if lost == "n1" else "n1")
    tree.cut(lost)
    tree.advance(12.0, step=0.5)
    assert other.assigned("w1") == ["a"]
    other.finish("a")
    tree.settle()
    assert tree.root.outcome("a") == "ok"
    tree.connect(lost)  # comes back under another id
    tree.settle()
    tree.node(lost).finish("a", outcome=2)
    tree.settle()
    tree.advance(0.1)
    tree.root.submit("b", "c")
    tree.settle()
    assert {where(tree, "b"), where(tree, "c")} == {"n1", "n2"}


def test_a_restarted_root_finds_what_runs() -> None:
    tree = Tree(nodes=1)
    node = tree.node("n1")
    tree.root.submit("a")
    tree.settle()
    tree.root.restart()
    tree._links.pop("n1")
    node._arrivals.append((1 << 20, None))
    node._turn()
    tree.root.hello("ann")
    tree.root.again("a")
    tree.connect("n1")
    tree.settle()
    node.finish("a", value=b"once")
    tree.settle()
    assert tree.root.results["a"].payload == b"once"
    assert node.assigned("w1") == []
    assert tree.root.task("a").attempt == 1


def test_spilled_tasks_survive_a_restarted_root() -> None:
    tree = Tree(nodes=2)
    first, second = tree.node("n1"), tree.node("n2")
    first.submit("a", "b")
    tree.advance(SPILL_AFTER * 3)
    assert second.assigned("w1") == ["b"]
    tree.root.restart()
    tree._links.clear()
    for node in (first, second):
        node._arrivals.append((1 << 20, None))
        node._turn()
    tree.connect("n2")
    tree.connect("n1")
    tree.settle()
    second.finish("b", value=b"kept")
    tree.advance(6.0, step=0.5)
    assert first.results["b"].payload == b"kept"


def test_handles_travel() -> None:
    tree = Tree(nodes=2)
    tree.root.submit("parent")
    tree.settle()
    home = tree.node(where(tree, "parent"))
    home.submit("inner", parent="parent")
    tree.settle()
    tree.advance(SPILL_AFTER * 3)  # its node is full: it runs on the other one
    home.finish("parent", handles=["inner"])
    tree.settle()
    assert tree.root.results["parent"].handles == [tree.root.ids["inner"]]
    tree.root.post("ann", Watch([tree.root.ids["inner"]]))
    tree.settle()
    runs = tree.node(where(tree, "inner"))
    runs.finish("inner", value=b"found")
    tree.settle()
    assert tree.root.watched["inner"].payload == b"found"
    tree.root.submit("uses", deps=["inner"])
    tree.settle()
    taken = tree.node(where(tree, "uses"))
    assert taken.attempt("uses").deps == [b"found"]


def test_a_task_that_is_known_by_its_handle_may_come_itself() -> None:
    tree = Tree(nodes=2)
    tree.root.submit("parent")
    tree.settle()
    home = tree.node(where(tree, "parent"))
    home.submit("inner", "other", parent="parent")
    home.finish("parent", handles=["inner", "other"])
    tree.settle()
    tree.root.post("ann", Watch([tree.root.ids["inner"], tree.root.ids["other"]]))
    tree.root.submit("uses", deps=["other"])
    tree.settle()
    tree.advance(SPILL_AFTER * 3)  # one of them is handed to the root, which knew both by handle
    for name in ("inner", "other"):
        tree.node(where(tree, name)).finish(name, value=name.encode())
        tree.settle()
    assert {name: result.payload for name, result in tree.root.watched.items()} == {
        "inner": b"inner",
        "other": b"other",
    }
    assert tree.node(where(tree, "uses")).attempt("uses").deps == [b"other"]


def test_a_node_that_leaves_gives_back_what_it_has_not_begun() -> None:
    tree = Tree(nodes=2)
    tree.root.define("quick")
    tree.root.submit("w", of="quick")
    tree.settle()
    tree.node(where(tree, "w")).finish("w", run=1e-4)
    tree.settle()
    names = [f"t{number}" for number in range(8)]
    tree.root.submit(*names, of="quick")
    tree.settle()
    leaving = tree.node("n1")
    leaving.node(leaving=True)
    tree.settle()
    begun = leaving.assigned("w1")
    other = tree.node("n2")
    for _ in range(10):
        for node in (leaving, other):
            for name in list(node.assigned("w1")):
                node.finish(name, run=1e-4)
        tree.settle()
        tree.advance(SPILL_AFTER * 3)
    assert all(tree.root.outcome(name) == "ok" for name in names)
    assert begun
    tree.root.submit("later")
    tree.settle()
    assert where(tree, "later") == "n2"


def test_each_wake_up_sends_what_it_delegates() -> None:
    tree = Tree(nodes=1, workers=2)
    node = tree.node("n1")
    for name in ("a", "b"):
        tree.root.submit(name)
        tree.settle()
        assert node.assigned(next(w for w in workers(node) if node.assigned(w))) == [name]
        node.finish(name)
        tree.settle()
        assert tree.root.outcome(name) == "ok"
