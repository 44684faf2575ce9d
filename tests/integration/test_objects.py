"""Large objects between real nodes, and of clients that share no memory with any."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.client.client import Client
from rtml.messages import Options
from rtml.serving.engine import ClientEngine
from tests.integration.test_nodes import Cluster, cluster, joined, until

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


@rtml.task
def place(array: Any) -> int:
    return os.getppid()


@rtml.task
def asks(future: Any) -> int:
    return rtml.get(place.submit(future))


def test_what_a_task_submits_goes_to_its_data() -> None:
    with cluster(2, Labelled) as nodes, nodes.connect():
        made = make.options(resources=at("n1")).submit(2, 8 * LARGE)
        rtml.wait([made], timeout=60)
        there = where.options(resources=at("n1")).submit().result(30)
        assert asks.options(resources=at("n0")).submit(rtml.ref(made)).result(60) == there


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


def shared_memory(supervisor: int) -> Path:
    arguments = Path(f"/proc/{supervisor}/cmdline").read_text().split("\0")
    return Path(arguments[arguments.index("--shm-dir") + 1])


def test_a_killed_supervisor_takes_its_data_endpoint_along() -> None:
    with cluster(1, Labelled) as nodes, nodes.connect() as client:
        supervisor = where.options(resources=at("n0")).submit().result(30)
        directory, endpoint = shared_memory(supervisor), data_endpoints()[supervisor]
        client.put(np.full(LARGE, 7, np.uint8))
        assert any(directory.glob("*-*"))
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: not directory.exists() and not Path(f"/proc/{endpoint}").exists())
        assert nodes.processes["n0"].wait(30) != 0


def test_objects_go_when_nobody_needs_them() -> None:
    with cluster(2, Small) as nodes, nodes.connect() as client:
        directories = [shared_memory(where.options(resources=at(name)).submit().result(30)) for name in ("n0", "n1")]
        for seed in range(10):
            made = make.options(resources=at("n0")).submit(seed)
            put = client.put(np.full(LARGE, seed, np.uint8))
            assert total.options(resources=at("n1")).submit(made).result(60) == expected(seed)
            assert total.options(resources=at("n1")).submit(put).result(60) == seed * LARGE
            del made, put
        for directory in directories:
            assert sum(path.stat().st_size for path in directory.glob("*-*")) <= 6 * LARGE
    assert not any(directory.exists() for directory in directories)


@rtml.task
async def gathered(arrays: list[Any]) -> int:
    sums = await rtml.gather(*[total.submit(array) for array in arrays])
    return sum(sums)


@rtml.task
async def awaited(futures: Any) -> int:
    array = await futures
    return int(array.sum(dtype=np.int64))


def test_async_tasks_and_programs_await_far_objects() -> None:
    async def program(client: Client) -> None:
        made = make.options(resources=at("n0")).submit(4)
        assert (await made).sum(dtype=np.int64) == expected(4)
        assert await gathered.options(resources=at("n1")).submit([made, made]) == 2 * expected(4)
        assert await awaited.options(resources=at("n1")).submit(rtml.ref(made)) == expected(4)
        both = await rtml.gather(made, make.options(resources=at("n1")).submit(5))
        assert [int(array.sum(dtype=np.int64)) for array in both] == [expected(4), expected(5)]

    with cluster(2, Labelled) as nodes, nodes.connect() as client:
        asyncio.run(program(client))


@rtml.task
def doubled(array: Any) -> Any:
    return array * 2


def test_results_of_a_killed_node_are_made_again() -> None:
    with cluster(1) as nodes, nodes.connect() as client:
        made = make.submit(6)
        twice = doubled.submit(made)
        again = doubled.submit(twice)
        rtml.wait([again], timeout=60)
        put = client.put(np.full(LARGE, 7, np.uint8))
        nodes.add("n1")
        until(lambda: joined(client) == 2)
        nodes.processes["n0"].kill()
        nodes.processes["n0"].wait()
        summed = total.submit(made)
        assert summed.result(120) == expected(6)
        del made, twice  # the last one's arguments are no longer kept, and are made again all the same
        value = np.random.default_rng(6).integers(0, 256, LARGE, np.uint8)
        assert (again.result(120) == value * 4).all()
        with pytest.raises(rtml.errors.ObjectLost, match="put"):
            client.submit(bytes, put).result(120)


def test_a_gateway_elsewhere_sends_and_gets_large_arrays_without_blocking_its_loop() -> None:
    async def use(address: str) -> None:
        engine = ClientEngine.open(address)
        try:
            array = np.full((4, LARGE // 8), 2, np.float64)
            prepared = engine.prepare(rtml.task(np.sqrt))
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    await asyncio.sleep(0.001)
                    turns += 1

            turning = asyncio.create_task(turn())
            pending = engine.submit(prepared, (array,), {}, Options())
            before = turns
            value = await pending
            assert turns > before
            assert np.allclose(value, np.sqrt(array))
            assert pending.timing is not None
            turning.cancel()
        finally:
            engine.close()

    with cluster(1) as nodes:
        asyncio.run(use(nodes.address))


def test_a_copy_outlives_the_node_of_what_was_put() -> None:
    with cluster(1) as nodes, nodes.connect() as client:
        put = client.put(np.full(LARGE, 7, np.uint8))  # at the only node
        nodes.add("n1", "--label", "at=n1")
        until(lambda: joined(client) == 2)
        assert total.options(resources=at("n1")).submit(put).result(60) == 7 * LARGE
        nodes.processes["n0"].kill()
        nodes.processes["n0"].wait()
        assert put.result(60).sum(dtype=np.int64) == 7 * LARGE
