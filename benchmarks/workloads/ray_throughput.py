"""Empty tasks on one to four nodes (Ray, OSDI'18, figure 8b), normalised to what they cost.

On each node one task submits many empty ones and waits for them: bottom-up, these stay where they were born. For
comparison the same number of tasks from a client of the root, which spreads them. All nodes share this machine's cpus,
so that more of them cannot do more; what counts is the CPU time of a task, and how much of it the root spends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import rtml
from benchmarks.workloads import ray_start, turns
from benchmarks.workloads.cluster import cluster

#: Tasks of each node in one go.
TASKS = {False: 20_000, True: 3_000}
NODES = {False: (1, 2, 3, 4), True: (1, 2)}


@rtml.task
def nothing(number: int) -> int:
    """The empty task."""
    return number


@rtml.task(cpu=0)
async def many(count: int) -> int:
    """Submits so many and waits for them."""
    return len(await rtml.gather(*[nothing.submit(number) for number in range(count)]))


def run(how: str, nodes: int, count: int) -> dict[str, Any]:
    """`count` empty tasks for each node."""
    start = time.perf_counter()
    if how == "born on nodes":
        futures = [many.options(resources={f"at={number}": 1}).submit(count) for number in range(1, nodes + 1)]
        assert rtml.get(futures) == [count] * nodes
    else:
        assert len(rtml.get([nothing.submit(number) for number in range(count * nodes)])) == count * nodes
    return {"seconds": time.perf_counter() - start}


def measure(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """How -> nodes -> tasks a second, and CPU microseconds a task at the root, at the nodes, at the client."""
    found: dict[str, Any] = {}
    count = TASKS[quick]
    for nodes in NODES[quick]:
        with (
            cluster(nodes) as made,
            made.program("throughput", "benchmarks.workloads.ray_throughput", str(nodes)) as client,
        ):
            client.answer()
            for how in ("born on nodes", "through the root"):
                client.ask(how=how, nodes=nodes, count=count // 4)
                before = made.cpu_s()
                answer = client.ask(how=how, nodes=nodes, count=count)
                used = {number: cpu - before[number] for number, cpu in made.cpu_s().items()}
                tasks = count * nodes
                row = found.setdefault(how, {})[nodes] = {
                    "tasks": count,
                    "tasks_per_s": tasks / answer["seconds"],
                    "root_us": used.pop(0) / tasks * 1e6,
                    "nodes_us": sum(used.values()) / tasks * 1e6,
                    "client_us": answer["cpu_s"] / tasks * 1e6,
                    # cpus that were really had: others use this machine, too
                    "cpus": (sum(made.cpu_s().values()) - sum(before.values()) + answer["cpu_s"]) / answer["seconds"],
                }
                row["us"] = row["root_us"] + row["nodes_us"] + row["client_us"]
                say(
                    f"throughput, {how}, {nodes} nodes: {row['tasks_per_s']:,.0f} tasks/s on {row['cpus']:.1f} cpus; "
                    f"{row['us']:.0f} us of CPU a task, {row['root_us']:.1f} of them at the root"
                )
    return found


if __name__ == "__main__":
    with ray_start.connect(sys.argv[1:], int(sys.argv[3])):
        turns.serve(run)
