"""A node that leaves: what is needed of it, who frees what was moved, and where references lead from then on."""

from __future__ import annotations

from rtml.graph.tables import LetGo, Send
from rtml.messages import HandOver, Leavings, Message, Moved, ObjectRef, Release
from tests.unit.test_graph_lineage import ask, large, lose, made
from tests.unit.test_graph_remote import where
from tests.unit.trees import Member, Tree


def told(node: Member, peer: str) -> list[Message]:
    """All that a peer was told so far."""
    return [
        one for _, name, effect in node.effects if name == peer and isinstance(effect, Send) for one in effect.messages
    ]


def leavings(node: Member) -> Leavings:
    """What the supervisor is told."""
    node.post("node", HandOver())
    return next(message for message in reversed(told(node, "node")) if isinstance(message, Leavings))


def moved(tree: Tree, node: str, ref: ObjectRef, to: str) -> None:
    tree.node(node).post("node", Moved([(ref.id, f"{to}:1")]))
    tree.settle()


def test_what_nobody_needs_is_not_handed_over() -> None:
    tree = Tree(nodes=2)
    kept, dropped = made(tree, "a"), made(tree, "b")
    tree.root.post("ann", Release([dropped.id]))
    tree.settle()
    name = kept.node.partition(":")[0]
    other = {"n1": "n2", "n2": "n1"}[name]
    answer = leavings(tree.node(name))
    assert answer.objects == [kept]
    assert answer.to == [f"{other}:1"]


def test_moved_objects_belong_to_the_node_that_took_them() -> None:
    tree = Tree(nodes=1)
    ref = made(tree, "a", "n1")
    tree.add("n2", workers=1, first_session=2000, uplink="n2")
    tree.connect("n2")
    tree.settle()
    moved(tree, "n1", ref, "n2")
    assert Moved([(ref.id, "n2:1")]) in told(tree.root, "ann")
    lose(tree, "n1")
    # By its old name it is had all the same.
    tree.root.submit("b", deps=[("a", ref)])
    tree.settle()
    assert where(tree, "b") == "n2"
    (there,) = tree.root.task("b").inputs or []
    assert isinstance(there, ObjectRef)
    assert there.node == "n2:1"
    assert ask(tree, ref) == "at n2:1"
    tree.node("n2").finish("b")
    tree.settle()
    tree.root.post("ann", Release([ref.id]))
    tree.root.ack()
    tree.settle()
    freed = [effect for _, _, effect in tree.node("n2").effects if isinstance(effect, LetGo)]
    assert freed == [LetGo([ref.id])]


def test_waiting_tasks_and_results_name_the_new_place() -> None:
    tree = Tree(nodes=2)
    ref = made(tree, "a")
    name = ref.node.partition(":")[0]
    other = {"n1": "n2", "n2": "n1"}[name]
    tree.root.submit("first")
    tree.root.submit("waits", deps=[("a", ref), "first"])
    tree.settle()
    moved(tree, name, ref, other)
    inputs = tree.root.task("waits").inputs
    assert inputs is not None
    assert isinstance(inputs[0], ObjectRef)
    assert inputs[0].node == f"{other}:1"
    tree.root.submit("far", args=large("elsewhere"))
    tree.settle()
    assert tree.root.task("far").spec.args.node == "elsewhere:1"  # type: ignore[union-attr]


def test_clients_are_not_believed() -> None:
    tree = Tree(nodes=1)
    ref = made(tree, "a", "n1")
    tree.root.post("ann", Moved([(ref.id, "evil:1")]), HandOver())
    assert tree.root.core.tables.objects[ref.id].ref == ref
