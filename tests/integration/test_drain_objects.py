"""A node that leaves hands its objects over: what was put, what tasks made, and what it had taken itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rtml
from rtml.messages import ObjectRef
from tests.integration.test_nodes import Cluster, cluster, joined, until
from tests.integration.test_objects import LARGE, Labelled, at, expected, make, shared_memory, total, where


def leave(nodes: Cluster, name: str) -> None:
    nodes.processes[name].terminate()
    assert nodes.processes[name].wait(60) == 0


def place(future: Any) -> str:
    payload = future._payload
    assert isinstance(payload, ObjectRef)
    return payload.node


def test_what_was_put_and_made_on_a_node_survives_its_drain() -> None:
    with cluster(1, Labelled) as nodes, nodes.connect() as client:
        put = client.put(np.full(LARGE, 7, np.uint8))
        made = make.options(resources=at("n0"), retries=0).submit(8)  # could not be made again
        rtml.wait([made], timeout=60)
        assert place(put) == place(made)
        nodes.add("n1", "--label", "at=n1")
        until(lambda: joined(client) == 2)
        leave(nodes, "n0")
        # In a task where they are now, of a third node, and here.
        sums = [total.options(resources=at("n1")).submit(thing) for thing in (put, made)]
        assert [one.result(60) for one in sums] == [7 * LARGE, expected(8)]
        assert put.result(60).sum(dtype=np.int64) == 7 * LARGE
        assert made.result(60).sum(dtype=np.int64) == expected(8)
        nodes.add("n2", "--label", "at=n2")
        until(lambda: joined(client) == 2)
        leave(nodes, "n1")  # once more
        sums = [total.options(resources=at("n2")).submit(thing) for thing in (put, made)]
        assert [one.result(60) for one in sums] == [7 * LARGE, expected(8)]
        # Nobody needs them any more: what was taken over may go.
        directory = shared_memory(where.options(resources=at("n2")).submit().result(30))
        assert len(list(directory.glob("*-*"))) >= 2
        again = client.put(np.full(LARGE, 9, np.uint8))
        assert total.submit(again).result(60) == 9 * LARGE


def test_a_root_that_is_started_again_is_told_where_objects_went() -> None:
    with cluster(2, Labelled) as nodes, nodes.connect() as client:
        made = make.options(resources=at("n0"), retries=0).submit(8)
        rtml.wait([made], timeout=60)
        leave(nodes, "n0")
        assert total.options(resources=at("n1")).submit(made).result(60) == expected(8)
        nodes.processes["root"].kill()
        nodes.processes["root"].wait()
        nodes.start_root()
        until(lambda: joined(client) == 1, 60)
        assert total.options(resources=at("n1")).submit(made).result(60) == expected(8)
        assert made.result(60).sum(dtype=np.int64) == expected(8)


def test_without_another_node_it_is_said_that_objects_are_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with cluster(1, Labelled) as nodes, nodes.connect() as client:
        kept = client.put(np.full(LARGE, 7, np.uint8))
        leave(nodes, "n0")
        del kept
    assert "1 objects are lost with this node, nobody has taken them: there is no other node" in capfd.readouterr().err
