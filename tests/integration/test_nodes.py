"""Nodes of real processes under one dispatcher: `rtml dispatcher` and `rtml worker` over ZeroMQ."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import rtml
from rtml.client.client import Client
from tests.integration.engine import eventually

ROOT = "tcp://127.0.0.1"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Cluster:
    """A root dispatcher and nodes; `with` ends what is left of them."""

    def __init__(self) -> None:
        self.address = f"{ROOT}:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start_root()

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rtml", *arguments]
        self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return self.processes[name]

    def start_root(self) -> None:
        self.start("root", "dispatcher", "--listen", self.address)

    def add(self, name: str, *arguments: str) -> None:
        self.start(name, "worker", "--dispatcher", self.address, "--name", name, "--cpu", "1", *arguments)

    def connect(self) -> Client:
        return rtml.connect(self.address)

    def end(self) -> None:
        for name, process in reversed(self.processes.items()):
            if process.poll() is None:
                process.terminate()
                assert process.wait(30) == 0, name


@contextmanager
def cluster(nodes: int, kind: type[Cluster] = Cluster) -> Iterator[Cluster]:
    made = kind()
    try:
        for number in range(nodes):
            made.add(f"n{number}")
        with made.connect() as client:
            until(lambda: joined(client) == nodes)
        yield made
    finally:
        made.end()


def joined(client: Client) -> int:
    return sum(peer["connected"] and peer["cpu"] > 0 for peer in json.loads(client.query("status"))["dispatchers"])


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@rtml.task
def node() -> str:
    """The supervisor's pid stands for the node."""
    time.sleep(0.02)
    return str(os.getppid())


@rtml.task
def fib(n: int) -> int:
    if n < 2:
        return n
    return rtml.get(fib.submit(n - 1)) + rtml.get(fib.submit(n - 2))


@rtml.task
async def afib(n: int) -> int:
    if n < 2:
        return n
    return sum(await rtml.gather(afib.submit(n - 1), afib.submit(n - 2)))


@rtml.task
def slow(x: int) -> int:
    time.sleep(0.15)
    return x


@rtml.task
def escapes(n: int) -> list[Any]:
    return [slow.submit(x) for x in range(n)]


def test_work_spreads_over_nodes_and_graphs_grow_anywhere() -> None:
    with cluster(2) as nodes, nodes.connect() as client:
        assert len(set(client.map(node, range(0)))) == 0
        assert len({future.result() for future in [node.submit() for _ in range(20)]}) == 2
        assert fib.submit(9).result(60) == 34
        assert afib.submit(9).result(60) == 34
        assert [future.result(30) for future in escapes.submit(4).result(30)] == [0, 1, 2, 3]
        with pytest.raises(ZeroDivisionError):
            client.submit(divmod, 1, 0).result(30)


def test_a_node_that_is_told_to_stop_loses_nothing() -> None:
    with cluster(2) as nodes, nodes.connect():
        futures = [slow.submit(x) for x in range(16)]
        time.sleep(0.3)
        nodes.processes["n0"].send_signal(signal.SIGTERM)
        assert [future.result(60) for future in futures] == list(range(16))
        assert nodes.processes["n0"].wait(30) == 0


def test_a_killed_node_loses_nothing() -> None:
    with cluster(2) as nodes, nodes.connect() as client:
        futures = [slow.submit(x) for x in range(16)]
        time.sleep(0.3)
        nodes.processes["n0"].kill()
        nodes.processes["n0"].wait()
        # Half a second, as nothing listens there any more; after `worker_grace`, ten, of a node that is only silent.
        until(lambda: [one["name"] for one in json.loads(client.query("status"))["dispatchers"]] == ["n1"], 8)
        assert [future.result(60) for future in futures] == list(range(16))


def test_a_killed_root_loses_nothing() -> None:
    with cluster(2) as nodes, nodes.connect():
        futures = [slow.submit(x) for x in range(16)]
        time.sleep(0.3)
        nodes.processes["root"].kill()
        nodes.processes["root"].wait()
        nodes.start_root()
        assert [future.result(60) for future in futures] == list(range(16))


def test_labels_resources_health_and_metrics() -> None:
    with cluster(1) as nodes:
        port = free_port()
        nodes.add("zoned", "--label", "zone=a", "--resource", "licence=1", "--metrics-port", str(port))
        with nodes.connect() as client:
            until(lambda: joined(client) == 2)
            here = {node.options(resources={"zone=a": 1}).submit().result(30) for _ in range(5)}
            assert len(here) == 1
            assert {node.options(resources={"licence": 1}).submit().result(30)} == here
            with pytest.raises(rtml.errors.Unschedulable, match="licence=1"):
                node.options(resources={"licence": 2}).submit().result(30)
        for path, expected in (("healthz", "ok"), ("readyz", "ok"), ("metrics", "rtml_tasks_total")):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
                assert expected in answer.read().decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dispatcher is missing"),
        (["--dispatcher", "unix:/tmp/x"], "tcp://host:port"),
        (["--dispatcher", "tcp://127.0.0.1"], "has no port: tcp://host:port"),
        (["--dispatcher", "tcp://127.0.0.1:99999"], "no port from 1 to 65535"),
        (["--dispatcher", "tcp://127.0.0.1:1", "--cpu", "-1"], "--cpu"),
        (["--dispatcher", "tcp://127.0.0.1:1", "--label", "zone"], "--label"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rtml", "worker", *arguments], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


class CounterClass:
    """Counts, in a process of its own somewhere."""

    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def where(self) -> tuple[int, int]:
        return os.getppid(), os.getpid()


Counter: Any = rtml.actor(CounterClass)


@rtml.task
def squares(n: int) -> Iterator[int]:
    for number in range(n):
        yield number * number


def test_actors_and_streams_live_on_nodes() -> None:
    with cluster(2) as nodes, nodes.connect():
        counter = Counter.create(10)
        assert [counter.add.submit(1).result(30) for _ in range(5)] == list(range(11, 16))  # one after the other
        assert [future.result(30) for future in [counter.add.submit(1) for _ in range(45)]] == list(range(16, 61))
        other = Counter.create(0)
        assert {counter.where.submit().result(30)[0], other.where.submit().result(30)[0]}
        assert list(squares.stream(100)) == [number * number for number in range(100)]
        rtml.kill(other)
        with pytest.raises(rtml.errors.ActorDied):
            other.add.submit(1).result(30)
        # Its process dies: there are no restarts, so it is gone.
        os.kill(counter.where.submit().result(30)[1], signal.SIGKILL)
        with pytest.raises(rtml.errors.ActorDied):
            counter.add.submit(1).result(30)


def test_an_actor_of_a_killed_node_begins_anew_elsewhere() -> None:
    with cluster(2) as nodes, nodes.connect():
        counter = Counter.options(max_restarts=1).create(5)
        assert counter.add.submit(1).result(30) == 6
        supervisor, process_of_actor = counter.where.submit().result(30)
        worker = next(
            process
            for name, process in nodes.processes.items()
            if name != "root" and supervisor in children(process.pid)
        )
        worker.kill()
        worker.wait()
        # The others follow it: a call that one of them still runs would count, and be lost with it.
        assert eventually(lambda: not os.path.exists(f"/proc/{process_of_actor}"))
        assert counter.add.options(retries=3).submit(1).result(60) == 6


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
