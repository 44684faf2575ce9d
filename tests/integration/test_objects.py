"""Large objects between real nodes, and of clients that share no memory with any."""

from __future__ import annotations

import os
import signal
from pathlib import Path
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


def data_endpoints() -> dict[int, int]:
    """The data endpoints of nodes of this test: pid by supervisor's pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text() == "rtml-data\n":
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(fields[1])] = int(entry.name)
        except OSError:
            continue
    return found


def test_a_killed_data_endpoint_loses_nothing() -> None:
    with cluster(2, Labelled) as nodes, nodes.connect() as client:
        makers = [where.options(resources=at(name)).submit().result(30) for name in ("n0", "n1")]
        made = make.options(resources=at("n0")).submit(3)
        put = client.put(np.full(LARGE, 7, np.uint8))
        assert total.options(resources=at("n1")).submit(made).result(60) == expected(3)
        assert total.options(resources=at("n0")).submit(put).result(60) == 7 * LARGE
        for supervisor, pid in data_endpoints().items():
            if supervisor in makers:
                os.kill(pid, signal.SIGKILL)
        sums = [total.options(resources=at(name)).submit(thing) for name in ("n0", "n1") for thing in (made, put)]
        assert [one.result(60) for one in sums] == [expected(3), 7 * LARGE] * 2
        again = client.put(np.full(LARGE, 9, np.uint8))
        assert total.options(resources=at("n1")).submit(again).result(60) == 9 * LARGE


class Small(Cluster):
    def add(self, name: str, *arguments: str) -> None:
        super().add(name, "--label", f"at={name}", "--object-memory", str(6 * LARGE), *arguments)


def test_objects_go_when_nobody_needs_them() -> None:
    before = set(Path("/dev/shm").glob("rtml-*"))
    with cluster(2, Small) as nodes, nodes.connect() as client:
        for seed in range(10):
            made = make.options(resources=at("n0")).submit(seed)
            put = client.put(np.full(LARGE, seed, np.uint8))
            assert total.options(resources=at("n1")).submit(made).result(60) == expected(seed)
            assert total.options(resources=at("n1")).submit(put).result(60) == seed * LARGE
            del made, put
        for directory in set(Path("/dev/shm").glob("rtml-*")) - before:
            assert sum(path.stat().st_size for path in directory.glob("*-*")) <= 6 * LARGE
    assert set(Path("/dev/shm").glob("rtml-*")) <= before
