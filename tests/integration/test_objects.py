"""Large objects between real nodes, and of clients that share no memory with any."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import rtml
from tests.integration.test_nodes import Cluster, cluster

LARGE = 8 * 1024 * 1024


class Labelled(Cluster):
    def add(self, name: str, *arguments: str) -> None:
        super().add(name, "--label", f"at={name}", *arguments)


@rtml.task
def make(seed: int, size: int = LARGE) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@rtml.task
def total(array: Any) -> int:
    assert not array.flags.writeable
    return int(array.sum(dtype=np.int64))


@rtml.task
def where() -> int:
    return os.getppid()


def expected(seed: int, size: int = LARGE) -> int:
    return int(np.random.default_rng(seed).integers(0, 256, size, np.uint8).sum(dtype=np.int64))


def at(name: str) -> dict[str, float]:
    return {f"at={name}": 1.0}


def test_a_remote_client_puts_and_gets_large_arrays() -> None:
    with cluster(1) as nodes, nodes.connect() as client:
        array = np.arange(64 * 1024 * 1024 // 8)
        assert client.submit(np.sum, array).result(60) == array.sum()
        put = client.put(array)
        assert client.submit(np.sum, put).result(60) == array.sum()
        back = make.submit(1).result(60)
        assert back.sum(dtype=np.int64) == expected(1)


def test_objects_move_between_nodes() -> None:
    with cluster(2, Labelled) as nodes, nodes.connect():
        made = make.options(resources=at("n0")).submit(2)
        sums = [total.options(resources=at(name)).submit(made) for name in ("n0", "n1", "n1")]
        assert [one.result(60) for one in sums] == [expected(2)] * 3
