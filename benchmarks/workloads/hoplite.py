"""Asynchronous SGD and an ensemble behind HTTP on emulated hosts, from "Hoplite" (SIGCOMM'21, sections 6.3 and 6.4).

The hosts are those of `benchmarks.workloads.collectives`. Both programs run with rtml's collectives and without: then
everything that several hosts need goes over the link of one. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.workloads import report
from benchmarks.workloads.collectives import RATE, engine, network
from benchmarks.workloads.hoplite_sgd import LAYERS
from benchmarks.workloads.report import ROOT, say
from tests.integration.hosts import Network

PORT = 8000
#: Hosts of the SGD, its steps and rounds; models of the ensemble, queries to warm up and to measure.
FULL = ((8, 20, 3), (8, 10, 60))
QUICK = ((4, 5, 1), (3, 3, 10))
#: Bytes of the parameters, and of an image.
PARAMETERS = 4 * sum(height * width for height, width in itertools.pairwise(LAYERS))
IMAGE = 4 * 3 * 224 * 224


def _ask(made: Network, module: str, *arguments: str) -> Any:
    """What a program on host 0 prints last."""
    command = made.command(0, "-m", f"benchmarks.workloads.{module}", *arguments)
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{module} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def sgd(hosts: int, steps: int, rounds: int) -> dict[str, Any]:
    """What `hoplite_sgd` found."""
    with network(hosts) as made, tempfile.TemporaryDirectory() as directory, engine(made, hosts, directory) as where:
        found: dict[str, Any] = _ask(made, "hoplite_sgd", *where, str(hosts), str(steps), str(rounds))
    return found


def ensemble(models: int, warmup: int, queries: int) -> dict[str, list[float]]:
    """Seconds of queries both ways."""
    os.environ["RTML_ENSEMBLE"] = str(models)
    count = models + 1
    with (
        network(count) as made,
        tempfile.TemporaryDirectory() as directory,
        engine(made, count, directory) as (address, keys),
    ):
        served = ("benchmarks.workloads.hoplite_served:app", "--address", address, "--keys", keys)
        gateway = made.popen(0, "gateway", *served, "--port", str(PORT))
        try:
            found: dict[str, list[float]] = _ask(made, "hoplite_queries", str(PORT), str(warmup), str(queries))
        finally:
            gateway.terminate()
            gateway.wait(60)
    return found


def plot(steps: dict[str, float], queries: dict[str, float], path: Path) -> None:
    """Both ratios as bars."""
    made, axes = report.figure((8, 3.2), 2)
    for axis, found, title in (
        (axes[0][0], steps, "asynchronous SGD, steps/s"),
        (axes[0][1], queries, "ensemble, queries/s"),
    ):
        axis.bar(list(found), list(found.values()), color=["tab:blue", "tab:grey"])
        axis.set(title=title)
    report.save(made, path)


PAGE = """# Asynchronous SGD and ensemble serving on emulated hosts (Hoplite, SIGCOMM'21)

`make hoplite` (`python -m benchmarks.workloads.hoplite`) writes this page.

{conditions}

Hosts are network namespaces on a bridge; every link is shaped to {rate:g} Mbit/s in both directions, the paper's
10 Gbit/s by a hundred. All hosts share this machine's two cpus, so gradients and models are small: what is compared is
how the bytes travel.

{table}

![both](hoplite.png)

- *Asynchronous SGD*: a server and {workers} workers; a step takes the first {quota} gradients ({parameters:.2f} MB
  each, of a network of {layers} units, computed in numpy) and sends as much back to those workers. Naively {moved}
  transfers go over the server's link in each step. The loss of held-out examples went from {before:.2f} to
  {collective:.2f} with collectives and {naive:.2f} without, after {steps} steps each: the order of arrivals differs,
  so the numbers do, too. Medians of {rounds} rounds in turn.
- *Ensemble*: a query of {image:.2f} MB over HTTP to host 0, {models} models on as many other hosts, the sum of their
  logits; all answers of both ways are the same. One query at a time, {queries} each way, in turns; medians.
"""


def main() -> None:
    """Measures, writes the page."""
    options = report.arguments(__doc__).parse_args()
    (hosts, steps, rounds), (models, warmup, queries) = QUICK if options.quick else FULL
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results: dict[str, Any] = {"workload": "hoplite", "machine": report.machine(), "rate": RATE}
    say(f"asynchronous SGD on {hosts} hosts")
    trained = results["sgd"] = sgd(hosts, steps, rounds)
    say(f"ensemble of {models} models")
    asked = results["ensemble"] = ensemble(models, warmup, queries)
    per_s = {name: steps / statistics.median(one["seconds"] for one in found) for name, found in trained.items()}
    asked_s = {name: 1 / statistics.median(found) for name, found in asked.items()}
    quota = max(1, (hosts - 1) // 2)
    faster = per_s["collective"] / per_s["naive"]
    answered = asked_s["shared"] / asked_s["naive"]
    learned = all(after < before for one in trained.values() for before, after in (run["loss"] for run in one))
    results["bars"] = [
        report.verdict("SGD: collectives are faster", faster > 1, f"{faster:.1f}x"),
        report.verdict("SGD: the loss falls, both ways", learned, "yes" if learned else "no"),
        report.verdict("ensemble: collectives are faster", answered > 1, f"{answered:.1f}x"),
    ]
    table = report.table(
        ("", "with collectives", "naive", "ratio", "in the paper"),
        [
            ("asynchronous SGD, steps/s", f"{per_s['collective']:.2f}", f"{per_s['naive']:.2f}", f"{faster:.1f}",
             "up to 7.8 on 16 hosts; its model predicts 3 on 8"),
            ("ensemble, queries/s", f"{asked_s['shared']:.2f}", f"{asked_s['naive']:.2f}", f"{answered:.1f}",
             "2.2 with 8 models"),
        ],
    )  # fmt: skip
    directory = report.target(options)
    plot(per_s, asked_s, directory / "hoplite.png")
    ends = {name: statistics.median(one["loss"][1] for one in found) for name, found in trained.items()}
    page = PAGE.format(
        conditions=report.conditions(results["machine"], options.note), rate=RATE / 1e6, table=table,
        workers=hosts - 1, quota=quota, parameters=PARAMETERS / 1e6, layers="-".join(map(str, LAYERS)), moved=2 * quota,
        before=trained["naive"][0]["loss"][0], **ends, steps=steps + 1, rounds=rounds, image=IMAGE / 1e6, models=models,
        queries=queries,
    )  # fmt: skip
    report.write(directory, "hoplite", page, results, options.json)


if __name__ == "__main__":
    main()
