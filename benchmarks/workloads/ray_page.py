"""The page of the Ray workloads: what their measurements mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.workloads import ray_locality, ray_recovery, report
from benchmarks.workloads.ray_recovery import BIN

KILLED = "chains, a node killed"
WITHOUT = "actors, no checkpoints, processes killed"
WITH = "actors, checkpoints, processes killed"


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached."""
    verdicts = []
    if "locality" in results:
        near, blind = results["locality"]["near"], results["locality"]["blind"]
        size = 10_000_000
        ratio = blind[size]["mean_s"] / near[size]["mean_s"]
        name = f"placed near {size / 1e6:g} MB: at least 10 times the speed of blind placement"
        verdicts.append(report.verdict(name, ratio >= 10, f"{ratio:.0f} times"))
    if "throughput" in results:
        rows = results["throughput"]["born on nodes"]
        share = rows[max(rows)]["root_us"] / rows[max(rows)]["us"]
        name = f"of the CPU time of tasks born on {max(rows)} nodes at most a tenth is the root's"
        verdicts.append(report.verdict(name, share <= 0.1, f"{share:.1%}"))
    if "recovery" in results:
        found = results["recovery"]
        verdicts.append(report.verdict("all results right after a node was killed", True, "compared"))
        again, limit = found[WITH]["again"], ray_recovery.ACTORS // 4 * ray_recovery.EVERY
        name = f"with checkpoints every {ray_recovery.EVERY} calls at most {limit} calls are made again"
        figure = f"{again}; without: {found[WITHOUT]['again']}"
        verdicts.append(report.verdict(name, again <= limit < found[WITHOUT]["again"], figure))
    return verdicts


def _plot_locality(axes: Any, found: dict[str, Any]) -> None:
    for mode, rows in found.items():
        sizes = [size / 1e6 for size in rows]
        axes.plot(sizes, [row["mean_s"] * 1e3 for row in rows.values()], marker="o", label=mode)
    axes.set(xscale="log", yscale="log", xlabel="MB of a task's argument", ylabel="ms to a task's end, mean")
    axes.set_title(f"2 nodes, links of {ray_locality.RATE}", fontsize=9)
    axes.legend(fontsize=8)


def _plot_throughput(axes: Any, found: dict[str, Any]) -> None:
    for how, rows in found.items():
        axes.plot(list(rows), [row["us"] for row in rows.values()], marker="o", label=f"{how}: all processes")
        axes.plot(list(rows), [row["root_us"] for row in rows.values()], marker=".", ls="--", label=f"{how}: the root")
    axes.set(xlabel="nodes", ylabel="us of CPU time a task", ylim=(0, None), xticks=list(next(iter(found.values()))))
    axes.set_title("empty tasks", fontsize=9)
    axes.legend(fontsize=7)


def _plot_recovery(axes: Any, found: dict[str, Any]) -> None:
    row = found[KILLED]
    below: list[float] = []
    for node, counts in row["rates"].items():
        values = [count / BIN for count in counts]
        below = below or [0.0] * len(values)
        axes.bar([(number + 0.5) * BIN for number in range(len(values))], values, BIN, bottom=below, label=node)
        below = [one + other for one, other in zip(below, values)]
    axes.set(xlabel="seconds", ylabel="tasks a second")
    axes.set_title(f"n2 killed at {row['kill_at']:g} s, back at {row['join_at']:g} s", fontsize=9)
    axes.legend(fontsize=8)


def plot(results: dict[str, Any], path: Path) -> None:
    """All parts side by side."""
    parts = {"locality": _plot_locality, "throughput": _plot_throughput, "recovery": _plot_recovery}
    wanted = {name: part for name, part in parts.items() if name in results}
    made, (row,) = report.figure((4.6 * len(wanted), 3.9), len(wanted))
    for axes, (name, part) in zip(row, wanted.items()):
        part(axes, results[name])
    report.save(made, path)


LOCALITY = """## Placement near data

The paper: on two nodes, placement that does not look at where arguments are makes tasks 1-2 orders of magnitude slower
at 10-100 MB; with it the latency does not depend on the size. Here: two nodes of one cpu each, links of {rate}; half of
the objects is made on each; tasks that read one each are submitted all at once in a random order. *blind* is the same
engine with `rtml dispatcher --blind`. What the links carry was learned from a few transfers before. (Objects of 64 KiB
and less travel with the task.)

{table}
"""

THROUGHPUT = """## Tasks a second

The paper: empty tasks scale linearly, to 1.8 million a second on 100 nodes of 64 threads. Here all nodes, of one cpu
each, share {cpus} cpus, so that **tasks a second say nothing about scaling**. What does: the CPU time of a task, for
one node and for several (more processes than cpus also cost some, as they take the caches from each other), and how
much of it is spent at the root, which the nodes of a real cluster share. *born on nodes*: one task on each node submits
{tasks:,} empty ones there and waits for them. *through the root*: a client of the root submits as many. "cpus had" is
what all processes together really got of the machine.

{table}
"""

RECOVERY = """## Recovery

The paper: chains of tasks keep their throughput while nodes go and come; 400 lost actors replay 500 calls with
checkpoints, 10,000 without. Here: {nodes} nodes, {slots} tasks at a time on each.

*chains*: {length} tasks of {ms:g} ms one after the other, each taking the large result of the one before, which lies on
the node where it was made. Node n2 is killed (SIGKILL to all its processes at once) and started again later. *actors*:
{actors} of them take {calls} calls each; the processes of a quarter, or a node, are killed on the way. A call returns
how many the actor has made, and the program continues from there. Checkpoints every {every} calls. Every execution
writes a line into a file; "again" counts those that were not the first of their call. All results were compared with
what they must be. A node that vanished is given up after {grace:g} s here (`--worker-grace`, by default 10: it may
come back with all that it has), and who fetches from it tries for 3 s.

{table}
"""


def _locality(found: dict[str, Any]) -> str:
    rows = []
    for size, near in found["near"].items():
        blind = found["blind"][size]
        rows.append(
            (
                f"{size / 1e6:g}", near["tasks"], f"{near['mean_s'] * 1e3:.1f}", f"{blind['mean_s'] * 1e3:.1f}",
                f"{blind['mean_s'] / near['mean_s']:.1f}", f"{near['moved'] / 1e6:.1f}", f"{blind['moved'] / 1e6:.1f}",
            )
        )  # fmt: skip
    head = ("MB", "tasks", "near, ms", "blind, ms", "blind / near", "near, MB moved", "blind, MB moved")
    return LOCALITY.format(rate=ray_locality.RATE, table=report.table(head, rows))


def _throughput(found: dict[str, Any], machine: dict[str, Any]) -> str:
    rows = []
    for how, by_nodes in found.items():
        for nodes, row in by_nodes.items():
            per_cpu = f"{1e6 / row['us']:,.0f}"
            cells = [f"{row[name]:.1f}" for name in ("us", "nodes_us", "root_us", "client_us", "cpus")]
            rows.append((how, nodes, f"{row['tasks_per_s']:,.0f}", per_cpu, *cells))
    head = ("", "nodes", "tasks/s", "tasks per CPU second", "us of CPU a task", "nodes", "root", "client", "cpus had")
    tasks = next(iter(found.values()))
    return THROUGHPUT.format(
        cpus=machine["cpus"], tasks=next(iter(tasks.values()))["tasks"], table=report.table(head, rows)
    )


def _recovery(found: dict[str, Any]) -> str:
    rows = [
        (name, row["executed"], row["again"], row.get("failed", ""), f"{row['seconds']:.1f}")
        for name, row in found.items()
    ]
    head = ("", "executions", "again", "calls that failed", "seconds")
    return RECOVERY.format(
        nodes=ray_recovery.NODES,
        slots=ray_recovery.CPUS,
        length=ray_recovery.LENGTH,
        ms=ray_recovery.SECONDS * 1e3,
        actors=ray_recovery.ACTORS,
        calls=found[WITH]["calls"],
        every=ray_recovery.EVERY,
        grace=ray_recovery.GRACE,
        table=report.table(head, rows),
    )


def page(results: dict[str, Any], note: str) -> str:
    """The results in Markdown."""
    parts = []
    if "locality" in results:
        parts.append(_locality(results["locality"]))
    if "throughput" in results:
        parts.append(_throughput(results["throughput"], results["machine"]))
    if "recovery" in results:
        parts.append(_recovery(results["recovery"]))
    return f"""# Placement, throughput, recovery (Ray, OSDI'18)

`make ray-workloads` (`python -m benchmarks.workloads.ray`) writes this page. Hosts are network namespaces here.

{report.conditions(results["machine"], note)}

{report.verdicts(results["bars"])}

![placement, throughput, recovery](ray.png)

""" + "\n".join(parts)
