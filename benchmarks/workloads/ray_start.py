"""How the programs of the Ray workloads begin: connected to the root, with all nodes there."""

from __future__ import annotations

import json
import time

import rtml


def nodes_there(client: rtml.Client) -> int:
    """Nodes that are connected and offer cpus."""
    return sum(one["connected"] and one["cpu"] > 0 for one in json.loads(client.query("status"))["dispatchers"])


def connect(arguments: list[str], nodes: int) -> rtml.Client:
    """A client, when so many nodes have joined. The arguments: the root's address, the directory of keys."""
    address, keys = arguments[:2]
    client = rtml.connect(address, keys=keys)
    limit = time.monotonic() + 60
    while nodes_there(client) < nodes:
        if time.monotonic() > limit:
            raise TimeoutError(f"after a minute {nodes_there(client)} of {nodes} nodes have joined")
        time.sleep(0.05)
    for number in range(1, nodes + 1):
        rtml.task(resources={f"at={number}": 1})(abs).submit(-1).result(60)
    return client
