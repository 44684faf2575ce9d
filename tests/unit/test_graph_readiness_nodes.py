"""Functions that are kept ready on other nodes, and how much is looked at when there are many of them."""

from __future__ import annotations

from typing import Any

import pytest

from rtml.graph.readiness import Readiness
from rtml.messages import Define, ErrorInfo, Forget, Forgot, Keep, Kept, Prepare, Prepared
from tests.unit.cores import Engine
from tests.unit.trees import Tree


def heard(engine: Engine, peer: str, kind: type[Any]) -> list[Any]:
    return [message for message in engine.peers[peer].heard if isinstance(message, kind)]


def define(tree: Tree, name: str, **options: Any) -> int:
    tree.root.define(name, **options)
    function = tree.root.functions[name]
    tree.root.post("ann", Define([function]))
    tree.root.peers["ann"].defined.add(name)
    return function.id


def keep(tree: Tree, *functions: int, dropped: tuple[int, ...] = (), more: bool = True) -> None:
    tree.root.post("ann", Keep(list(functions), list(dropped), more))
    tree.settle()


def done(tree: Tree, node: str, worker: str, function: int, error: ErrorInfo | None = None) -> None:
    tree.node(node).post(worker, Prepared(function, 0.1, error))
    tree.settle()


def preparing(tree: Tree) -> list[str]:
    """Executors of nodes that were asked, each as often as it was."""
    return [
        f"{name}.{peer}"
        for name, node in tree.nodes.items()
        for peer in node.peers
        if peer.startswith("w")
        for _ in heard(node, peer, Prepare)
    ]


def test_a_dispatcher_without_executors_has_its_nodes_prepare() -> None:
    tree = Tree(nodes=2, workers=2)
    model = define(tree, "model")
    keep(tree, model)
    assert preparing(tree) == ["n1.w1"]  # one alone tries first
    done(tree, "n1", "w1", model)
    assert preparing(tree) == ["n1.w1", "n1.w2"]
    done(tree, "n1", "w2", model)
    assert preparing(tree) == ["n1.w1", "n1.w2", "n2.w1"]
    done(tree, "n2", "w1", model)
    assert not heard(tree.root, "ann", Kept)
    done(tree, "n2", "w2", model)
    assert heard(tree.root, "ann", Kept) == [Kept(model, 4)]


def test_own_executors_and_nodes_have_it_before_the_submitter_is_told() -> None:
    tree = Tree(nodes=1, root_workers=1)
    model = define(tree, "model")
    keep(tree, model)
    assert len(heard(tree.root, "w1", Prepare)) == 1
    assert preparing(tree) == []
    tree.root.post("w1", Prepared(model, 0.1))
    tree.settle()
    assert preparing(tree) == ["n1.w1"]
    assert not heard(tree.root, "ann", Kept)
    done(tree, "n1", "w1", model)
    assert heard(tree.root, "ann", Kept) == [Kept(model, 2)]


def test_a_node_that_joins_gets_what_is_kept_without_being_asked_for_it() -> None:
    tree = Tree(nodes=1)
    model = define(tree, "model")
    keep(tree, model)
    done(tree, "n1", "w1", model)
    late = tree.add("late", workers=1, first_session=9000, uplink="late")
    tree.connect("late")
    tree.settle()
    assert [message.functions[0].id for message in heard(late, "w1", Prepare)] == [model]
    done(tree, "late", "w1", model)
    assert heard(tree.root, "ann", Kept) == [Kept(model, 1)]  # it was ready already
    # And a task of it needs no definition any more.
    tree.root.submit("a", "b", of="model")
    tree.settle()
    assert {name for node in tree.nodes.values() for name in node.assigned("w1")} == {"a", "b"}


def test_what_does_not_load_on_a_node_is_an_error() -> None:
    tree = Tree(nodes=2)
    model = define(tree, "model")
    keep(tree, model)
    done(tree, "n1", "w1", model, ErrorInfo("ValueError", "truncated"))
    (told,) = heard(tree.root, "ann", Kept)
    assert told.error.message == "truncated"
    assert preparing(tree) == ["n1.w1"]


def test_a_node_that_can_never_have_it_is_left_out() -> None:
    tree = Tree(nodes=1)
    model = define(tree, "model", gpu=1.0)
    keep(tree, model)
    assert preparing(tree) == []
    assert not heard(tree.root, "ann", Kept)  # another node may come
    tree.add("gpu", workers=1, first_session=9000, uplink="gpu", gpu=1.0)
    tree.connect("gpu")
    tree.settle()
    assert preparing(tree) == ["gpu.w1"]
    done(tree, "gpu", "w1", model)
    assert heard(tree.root, "ann", Kept) == [Kept(model, 1)]


def test_what_nobody_keeps_is_forgotten_on_nodes_and_can_come_back() -> None:
    tree = Tree(nodes=1)
    node = tree.node("n1")
    model = define(tree, "model")
    keep(tree, model)
    done(tree, "n1", "w1", model)
    keep(tree, dropped=(model,))
    assert heard(node, "w1", Forget) == [Forget([model])]
    assert heard(tree.root, "ann", Forgot) == [Forgot([model])]
    assert model not in node.core.tables.functions
    tree.root.post("ann", Define([tree.root.functions["model"]]))
    keep(tree, model)
    assert preparing(tree) == ["n1.w1", "n1.w1"]
    done(tree, "n1", "w1", model)
    assert len(heard(tree.root, "ann", Kept)) == 2


def test_what_is_dropped_while_a_node_is_away_it_hears_when_it_is_back() -> None:
    tree = Tree(nodes=1)
    node = tree.node("n1")
    old, new = define(tree, "old"), define(tree, "new")
    keep(tree, old)
    done(tree, "n1", "w1", old)
    tree.cut("n1")
    keep(tree, new, dropped=(old,))
    tree.connect("n1")
    tree.settle()
    assert heard(node, "w1", Forget) == [Forget([old])]
    done(tree, "n1", "w1", new)
    assert heard(tree.root, "ann", Kept)[-1] == Kept(new, 1)


def test_a_node_that_comes_back_need_not_load_again() -> None:
    tree = Tree(nodes=1)
    model = define(tree, "model")
    keep(tree, model)
    done(tree, "n1", "w1", model)
    tree.cut("n1")
    tree.connect("n1")
    tree.settle()
    assert preparing(tree) == ["n1.w1"]
    assert not heard(tree.node("n1"), "w1", Forget)


def test_a_restarted_dispatcher_asks_its_nodes_again() -> None:
    tree = Tree(nodes=1)
    model = define(tree, "model")
    keep(tree, model)
    done(tree, "n1", "w1", model)
    tree.cut("n1")
    tree.root.restart()
    tree.connect("n1")
    tree.settle()
    assert not heard(tree.node("n1"), "w1", Forget)
    tree.root.hello("ann")
    tree.root.post("ann", Define([tree.root.functions["model"]]), Keep([model]))
    tree.settle()
    assert heard(tree.root, "ann", Kept)[-1] == Kept(model, 1)
    assert preparing(tree) == ["n1.w1"]


@pytest.mark.parametrize("nodes", [0, 2])
def test_many_functions_are_not_all_looked_at_all_the_time(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    look = Readiness._look

    def counted(self: Readiness, *arguments: Any) -> bool:
        nonlocal looks
        looks += 1
        return look(self, *arguments)

    monkeypatch.setattr(Readiness, "_look", counted)
    tree = Tree(nodes=nodes, root_workers=0 if nodes else 2)
    functions = [define(tree, f"m{number}") for number in range(200)]
    for function in functions:
        keep(tree, function)
    engines = list(tree.nodes.values()) or [tree.root]
    for _ in range(10_000):
        if len(heard(tree.root, "ann", Kept)) == len(functions):
            break
        for engine in engines:
            for name in [name for name in engine.peers if name.startswith("w")]:
                worker = engine.core.tables.workers.get(engine.peers[name].worker)
                if worker is not None and worker.preparing:
                    engine.post(name, Prepared(worker.preparing, 0.1))
                    tree.settle()
    assert len(heard(tree.root, "ann", Kept)) == len(functions)
    assert looks < 20 * len(functions)
