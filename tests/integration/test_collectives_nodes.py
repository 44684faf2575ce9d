"""Collectives over several nodes: folded where the inputs lie, streamed from node to node, nodes that die meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.messages import ObjectRef
from tests.integration.test_nodes import Cluster, cluster, joined, until
from tests.integration.test_objects import Labelled, at

#: Elements: 4 MB.
LARGE = 1_000_000


@rtml.task
def make(seed: int, seconds: float = 0.0) -> Any:
    time.sleep(seconds)
    return np.random.default_rng(seed).integers(0, 1000, LARGE).astype(np.float32)


@rtml.task
def kinds(seed: int, more: int = 0) -> Any:
    return np.full(LARGE // 4 + more, seed, [np.int32, np.float32, np.int64][seed % 3])


@rtml.task
def same(array: Any, seeds: list[int]) -> bool:
    return bool((array == expected(seeds)).all())


@rtml.task
async def there(futures: list[Any]) -> Any:
    total = rtml.reduce(futures)
    return await total, total.contributors


@rtml.task
def endpoint() -> str:
    return str(rtml.current().store.place.data)


def expected(seeds: list[int]) -> Any:
    arrays = [np.random.default_rng(seed).integers(0, 1000, LARGE).astype(np.float32) for seed in seeds]
    return np.sum(arrays, axis=0)


class Zoned(Labelled):
    def add(self, name: str, *arguments: str) -> None:
        super().add(name, *arguments, *(() if name == "n0" else ("--label", "zone=b")))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(3, Zoned) as found, found.connect():
        yield found


def spread(seeds: list[int], seconds: float = 0.0) -> list[Any]:
    return [make.options(resources=at(f"n{seed % 3}")).submit(seed, seconds) for seed in seeds]


def test_inputs_on_three_nodes_become_one(nodes: Cluster) -> None:
    seeds = list(range(7))
    total = rtml.reduce(spread(seeds))
    assert (total.result(60) == expected(seeds)).all()
    assert total.contributors == seeds
    largest = rtml.reduce(spread(seeds), lambda left, right: left if left[0] > right[0] else right)
    assert largest.result(60)[0] == max(expected([seed])[0] for seed in seeds)


def test_arrays_that_are_not_alike_in_all(nodes: Cluster) -> None:
    # Steps begin as if all arrays were like their own: these are not, and are folded all the same.
    mixed = [kinds.options(resources=at(f"n{seed % 3}")).submit(seed) for seed in range(6)]
    total = rtml.reduce(mixed).result(60)
    assert total.dtype == np.float64
    assert bool((total == sum(range(6))).all())
    both = rtml.reduce(mixed, "logical_and").result(60)
    assert both.dtype == np.bool_
    assert not both.any()
    shapes = [kinds.options(resources=at(f"n{seed}")).submit(seed, seed + 1) for seed in range(3)]
    with pytest.raises(ValueError, match="broadcast"):
        rtml.reduce(shapes).result(60)


def test_all_who_gave_have_the_result(nodes: Cluster) -> None:
    total = rtml.allreduce(spread([0, 1, 2]), "mean")
    mean = expected([0, 1, 2]) / 3
    np.testing.assert_allclose(total.result(60), mean, rtol=1e-6)


def test_a_value_for_all_nodes(nodes: Cluster) -> None:
    made = spread([1])[0]
    held = rtml.broadcast(made)
    assert len(held.result(60)) == 3
    assert all(same.options(resources=at(f"n{number}")).submit(made, [1]).result(60) for number in range(3))


def test_a_node_dies_with_what_lies_there_and_another_makes_it_again(nodes: Cluster) -> None:
    # From here on a node is missing.
    client = rtml.current()
    where = {endpoint.options(resources=at(name)).submit().result(60): name for name in ("n0", "n1", "n2")}
    early = [make.options(resources={"zone=b": 1.0}).submit(seed) for seed in (1, 2)]
    rtml.wait(early, num_returns=2, timeout=60)
    late = make.options(resources=at("n0")).submit(3, 1.0)
    total = there.options(resources=at("n0")).submit([rtml.ref(one) for one in (*early, late)])
    lost = early[0]._payload
    assert isinstance(lost, ObjectRef)
    victim = nodes.processes.pop(where[lost.node])
    victim.kill()  # its processes go with it
    victim.wait(30)
    until(lambda: joined(client) == 2)
    value, contributors = total.result(60)
    assert (value == expected([1, 2, 3])).all()
    assert contributors == [0, 1, 2]


def test_a_reduction_whose_node_died_is_made_again_of_its_inputs(nodes: Cluster) -> None:
    # The last test: another node does not come back. Its inputs may have lain there, too, and are nobody's any more.
    client = rtml.current()
    left = [name for name in nodes.processes if name != "root"]
    where = {endpoint.options(resources=at(name)).submit().result(60): name for name in left}
    total = rtml.reduce([make.submit(seed) for seed in (4, 5, 6)], "mean")
    rtml.wait([total], timeout=60)
    lost = total._payload
    assert isinstance(lost, ObjectRef)
    victim = nodes.processes.pop(where[lost.node])
    victim.kill()
    victim.wait(30)
    until(lambda: joined(client) == 1)
    np.testing.assert_allclose(total.result(60), expected([4, 5, 6]) / 3, rtol=1e-6)
    assert total.contributors == [0, 1, 2]
