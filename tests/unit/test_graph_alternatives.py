"""Tasks that may run with one of several sets of resources: which one they get."""

from __future__ import annotations

from typing import Any

from rtml.messages import Alternative
from tests.unit.cores import Engine
from tests.unit.trees import Tree

GPU_OR_CPU = [Alternative(gpu=1.0, cpu=0.0), Alternative(cpu=1.0)]


def engine(workers: int = 3, **settings: Any) -> Engine:
    made = Engine(workers, gpu=1.0, **settings)
    made.define("either", alternatives=GPU_OR_CPU)
    made.define("gpu", gpu=1.0, cpu=0.0)
    made.define("cpu", cpu=1.0)
    return made


def takes(e: Engine, task: str) -> str:
    """What a running task occupies."""
    return str(e.task(task).profile.shape)


def taught(e: Engine, gpu: float, cpu: float) -> Engine:
    """Each alternative has run once, and took so long."""
    e.submit("on the gpu", "on a cpu", of="either")
    assert takes(e, "on the gpu") == "gpu=1"
    assert takes(e, "on a cpu") == "cpu=1"
    e.finish("on the gpu", run=gpu)
    e.finish("on a cpu", run=cpu)
    return e


def test_the_first_is_preferred_and_each_is_tried_once() -> None:
    taught(engine(), 1.0, 1.0)


def test_it_waits_for_the_better_one_if_that_ends_it_earlier() -> None:
    e = taught(engine(), gpu=1.0, cpu=10.0)
    e.submit("a", "b", "c", of="either")
    assert takes(e, "a") == "gpu=1"
    assert sum(len(e.assigned(worker)) for worker in ("w1", "w2", "w3")) == 1
    e.advance(1.0)
    e.finish("a", run=1.0)
    assert takes(e, "b") == "gpu=1"


def test_a_queue_before_the_better_one_makes_the_other_better() -> None:
    e = taught(engine(), gpu=1.0, cpu=2.5)
    e.submit(*"abcd", of="either")
    # The gpu would have ended them after 1, 2, 3 and 4 seconds.
    assert takes(e, "a") == "gpu=1"
    assert takes(e, "c") == "cpu=1"
    assert takes(e, "d") == "cpu=1"
    assert not e.task("b").worker
    e.advance(1.0)
    e.finish("a", run=1.0)
    assert takes(e, "b") == "gpu=1"


def test_a_better_one_that_takes_longer_than_it_should_is_not_waited_for_for_ever() -> None:
    e = taught(engine(), gpu=1.0, cpu=3.0)
    e.submit("a", "b", of="either")
    assert not e.task("b").worker
    e.advance(20.0)
    assert takes(e, "b") == "cpu=1"


def test_one_that_is_tried_again_may_choose_again() -> None:
    e = taught(engine(), gpu=1.0, cpu=1.5)
    e.submit("before", of="gpu")
    e.finish("before", run=1.0)
    e.submit("other", of="gpu")
    e.submit("a", of="either")
    assert takes(e, "a") == "cpu=1"
    e.finish("other", run=1.0)
    e.finish("a", error="E", retryable=True)
    assert takes(e, "a") == "gpu=1"
    e.finish("a")
    assert e.outcome("a") == "ok"


def test_a_call_may_say_what_it_wants() -> None:
    e = engine()
    e.submit("a", of="either", cpu=2.0)
    assert takes(e, "a") == "cpu=2"


def test_what_no_alternative_can_have_fails_at_once() -> None:
    e = engine()
    e.define("nothing", alternatives=[Alternative(gpu=5.0), Alternative(resources={"x": 1.0})])
    e.define("something", alternatives=[Alternative(gpu=5.0), Alternative(cpu=1.0)])
    e.submit("a", of="nothing")
    e.submit("b", of="something")
    assert e.outcome("a") == "error Unschedulable"
    assert takes(e, "b") == "cpu=1"


def hands(e: Engine) -> list[str]:
    return e.assigned("w1") + e.assigned("w2")


def test_a_root_decides_between_nodes_by_what_it_learned() -> None:
    t = Tree(nodes=2, workers=2, gpu=1.0)
    for node in t.nodes.values():
        if node.name == "n2":
            node.node(gpu=0.0)
    t.settle()
    t.root.define("either", alternatives=GPU_OR_CPU)
    t.root.submit("a", "b", of="either")
    t.settle()
    assert str(t.root.task("a").profile.shape) == "gpu=1"
    assert str(t.root.task("b").profile.shape) == "cpu=1"
    for name, run in (("a", 1.0), ("b", 50.0)):
        next(node for node in t.nodes.values() if name in hands(node)).finish(name, run=run)
    t.settle()
    t.advance(0.1)
    t.root.submit("c", "d", of="either")
    t.settle()
    assert "c" in hands(t.node("n1"))
    assert str(t.root.task("c").profile.shape) == "gpu=1"
    assert not t.root.task("d").worker
