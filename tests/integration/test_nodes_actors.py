"""Actors of one node that are called from others, over real processes and ZeroMQ."""

from __future__ import annotations

import os
from typing import Any

import pytest

import rtml
from tests.integration.test_nodes import children, cluster, until


class CounterClass:
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def where(self) -> tuple[int, int]:
        return os.getppid(), os.getpid()

    def __rtml_save__(self) -> int:
        return self.count

    def __rtml_restore__(self, count: int) -> None:
        self.count = count


Counter: Any = rtml.actor(CounterClass)
#: Tasks of this kind run on a node with this label.
ON = {name: {"resources": {name: 0.1}} for name in ("a", "b", "c")}


@rtml.task
def calls(counter: Any, times: int) -> list[int]:
    return rtml.get([counter.add.submit(1) for _ in range(times)])


@rtml.task
def ends(counter: Any, how: str) -> None:
    if how == "kill":
        rtml.kill(counter)
    else:
        rtml.get(rtml.stop(counter))


@rtml.task
def creates(start: int) -> Any:
    return Counter.options(lifetime="detached").create(start)


@rtml.task
def passes_on(counter: Any, times: int) -> list[int]:
    """To a task somewhere else, and back."""
    return rtml.get(calls.options(**ON["c"]).submit(counter, times))


def labels(*names: str) -> Any:
    return [("--resource", f"{name}=1") for name in names]


def test_any_task_anywhere_calls_it_in_order_and_ends_it() -> None:
    with cluster(0) as nodes:
        for name in ("a", "b", "c"):
            nodes.add(name, "--resource", f"{name}=1")
        with nodes.connect() as client:
            until(lambda: _joined(client) == 3)
            counter = Counter.options(**ON["a"]).create(0)
            home = counter.where.submit().result(30)[0]
            assert calls.options(**ON["b"]).submit(counter, 20).result(30) == list(range(1, 21))
            assert passes_on.options(**ON["b"]).submit(counter, 20).result(30) == list(range(21, 41))
            # Made by a task on one node, called from another.
            other = creates.options(**ON["b"]).submit(100).result(30)
            assert calls.options(**ON["c"]).submit(other, 3).result(30) == [101, 102, 103]
            assert other.where.submit().result(30)[0] != home
            several = [calls.options(**ON[name]).submit(other, 30) for name in ("a", "b", "c")]
            seen = [future.result(30) for future in several]
            assert sorted(number for numbers in seen for number in numbers) == list(range(104, 194))
            assert all(numbers == sorted(numbers) for numbers in seen)
            # Its process dies: the caller is told, wherever it is.
            for how, actor in (("kill", counter), ("stop", other)):
                ends.options(**ON["c"]).submit(actor, how).result(30)
                with pytest.raises(rtml.errors.ActorDied):
                    calls.options(**ON["b"]).submit(actor, 1).result(30)


def _joined(client: Any) -> int:
    from tests.integration.test_nodes import joined

    return joined(client)


@rtml.task
def asks(name: str) -> int:
    return int(rtml.get_actor(name).add.options(retries=5).submit(1).result(30))


@rtml.task
def creates_named(name: str, start: int) -> int:
    actor = Counter.options(lifetime="detached", name=name, max_restarts=3, checkpoint_calls=1).create(start)
    return int(actor.add.submit(1).result(30))


def test_actors_survive_their_nodes_with_their_state_and_their_names() -> None:
    with cluster(3) as nodes, nodes.connect():
        counter = Counter.options(max_restarts=3, checkpoint_calls=1).create(10)
        assert [counter.add.submit(1).result(30) for _ in range(3)] == [11, 12, 13]
        assert creates_named.submit("tally", 100).result(30) == 101
        assert [asks.submit("tally").result(30) for _ in range(4)] == [102, 103, 104, 105]
        tally = rtml.get_actor("tally")
        with pytest.raises(rtml.errors.ActorDied, match="exists already"):
            creates_named.submit("tally", 0).result(30)
        with pytest.raises(LookupError):
            rtml.get_actor("nobody")
        doomed = _home(nodes, tally)
        nodes.processes[doomed].kill()
        nodes.processes.pop(doomed).wait()
        assert asks.submit("tally").result(60) == 106
        assert counter.add.options(retries=5).submit(1).result(60) == 14
        rtml.kill(tally)
        with pytest.raises(rtml.errors.ActorDied):
            tally.add.submit(1).result(30)


def _home(nodes: Any, actor: Any) -> str:
    """The node where an actor lives."""
    supervisor, _ = actor.where.submit().result(30)
    return next(
        str(name) for name, process in nodes.processes.items() if name != "root" and supervisor in children(process.pid)
    )
