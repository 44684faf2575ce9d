"""Collectives on emulated hosts, from "Hoplite: Efficient and Fault-Tolerant Collective Communication" (SIGCOMM'21).

Network namespaces on a bridge, each with a link that is shaped in both directions, and a node of rtml in each:
broadcast, reduce and allreduce of arrays, against everybody fetching from one host, `torch.distributed` with gloo in
the same namespaces, and the bounds S/B and (n-1)S/B. Needs root, `ip` and `tc`, and for gloo an environment with torch
(`make collectives` makes it).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.workloads import report
from benchmarks.workloads.report import ROOT, say
from rtml.link.keys import make_keys
from rtml.messages import INLINE_MAX
from tests.integration import hosts as emulated

#: Bits a second of every link, in each direction; the paper's 10 Gbit/s and its sizes by a hundred.
RATE = 100e6
FULL = (8, [10_000, 100_000, 1_000_000, 10_000_000], 3)
QUICK = (4, [1_000_000, 4_000_000], 1)

Found = dict[str, list[float]]


@contextlib.contextmanager
def network(count: int) -> Iterator[emulated.Network]:
    """So many hosts, whose links are shaped in both directions."""
    missing = emulated.reason()
    if missing:
        raise SystemExit(f"no emulated hosts: {missing}")
    rate = f"{RATE / 1e6:.0f}mbit"
    with emulated.hosts(count, rate=rate) as made:
        for number in range(count):
            shape = ("root", "tbf", "rate", rate, "burst", "64k", "latency", "20ms")
            subprocess.run(["tc", "qdisc", "add", "dev", made.outside(number), *shape], check=True)
        yield made


@contextlib.contextmanager
def engine(made: emulated.Network, count: int, directory: str) -> Iterator[list[str]]:
    """A root on host 0, and a node on every host; its address and keys."""
    keys = f"{directory}/keys"
    make_keys(keys)
    address = f"tcp://{made.address(0)}:7411"
    processes = [made.popen(0, "dispatcher", "--listen", address, "--keys", keys)]
    for number in range(count):
        node = ("--dispatcher", address, "--keys", keys, "--name", f"n{number}", "--cpu", "1", "--workers", "1")
        processes.append(made.popen(number, "worker", *node, "--label", f"at={number}"))
    try:
        yield [address, keys]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)


def with_rtml(made: emulated.Network, count: int, sizes: list[int], repetitions: int) -> tuple[Found, float]:
    """Seconds of rtml, and the portion of all cpus that was busy meanwhile."""
    with tempfile.TemporaryDirectory() as directory, engine(made, count, directory) as where:
        numbers = [str(size) for size in sizes]
        program = ("-m", "benchmarks.workloads.collectives_rtml", *where, str(count), *numbers, str(repetitions))
        before = _busy()
        done = subprocess.run(made.command(0, *program), cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
        after = _busy()
    if done.returncode:
        raise SystemExit(f"rtml's program ended with {done.returncode}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found, (after[0] - before[0]) / max(1e-9, after[1] - before[1])


def with_gloo(made: emulated.Network, count: int, sizes: list[int], repetitions: int, python: Path) -> Found:
    """Seconds of gloo; {} without torch."""
    if not python.exists():
        say(f"no {python}: gloo is left out (make collectives installs it)")
        return {}
    script = str(Path(__file__).with_name("collectives_gloo.py"))
    processes = []
    for rank in range(count):
        arguments = [script, str(rank), str(count), f"{made.address(0)}:29500", made.inside(rank)]
        arguments += [*map(str, sizes), str(repetitions)]
        command = [*made.command(rank)[:-1], str(python), *arguments]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE if rank == 0 else None, text=True))
    out, _ = processes[0].communicate(timeout=600)
    codes = [process.wait(60) for process in processes]
    if any(codes):
        raise SystemExit(f"gloo's ranks ended with {codes}")
    found: Found = json.loads(out.splitlines()[-1])
    return found


def _busy() -> tuple[float, float]:
    """Busy and all seconds of all cpus since boot."""
    fields = [float(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def median(found: Found, name: str, size: int) -> float | None:
    """Seconds; None if it was not measured."""
    values = found.get(f"{name} {size}")
    return statistics.median(values) if values else None


def bars(rtml: Found, gloo: Found, count: int, sizes: list[int]) -> list[dict[str, Any]]:
    """What was to be reached, for the largest size; by reduce for smaller ones that do not travel with results, too."""
    size = sizes[-1]
    bound = size * 8 / RATE
    found = []
    for name in ("broadcast", "reduce"):
        mine = median(rtml, name, size) or 0.0
        naive = median(rtml, f"naive {name}", size) or 0.0
        found.append(report.verdict(f"{name} within 1.5 S/B", mine <= 1.5 * bound, f"{mine / bound:.2f} S/B"))
        most = min(3.0, 0.75 * (count - 1))
        found.append(report.verdict(f"{name} {most:g}x naive", naive >= most * mine, f"{naive / mine:.1f}x"))
    late = median(rtml, "staggered", size) or 0.0
    found.append(
        report.verdict("reduce within 1.5 S/B of the last arrival", late <= 1.5 * bound, f"{late / bound:.2f} S/B")
    )
    for name in ("broadcast", "reduce", "allreduce"):
        mine, other = median(rtml, name, size) or 0.0, median(gloo, name, size)
        if other is not None:
            found.append(report.verdict(f"{name} within 1.3 of gloo", mine <= 1.3 * other, f"{mine / other:.2f}"))
    for small in sizes[:-1]:
        mine, other = median(rtml, "reduce", small) or 0.0, median(gloo, "reduce", small)
        if other is not None and small > INLINE_MAX:
            what = f"reduce of {small / 1e6:g} MB within 1.3 of gloo"
            found.append(report.verdict(what, mine <= 1.3 * other, f"{mine / other:.2f}"))
    return found


def rows(rtml: Found, gloo: Found, count: int, sizes: list[int]) -> Iterator[list[str]]:
    """Of the table."""
    for name in ("broadcast", "reduce", "allreduce"):
        for size in sizes:
            bound = size * 8 / RATE
            mine, other = median(rtml, name, size) or 0.0, median(gloo, name, size)
            naive: float
            if name == "allreduce":
                both = [median(rtml, f"naive {one}", size) or 0.0 for one in ("reduce", "broadcast")]
                naive = both[0] + both[1]
            else:
                naive = median(rtml, f"naive {name}", size) or 0.0
            yield [
                name, f"{size / 1e6:g} MB", f"{mine * 1e3:.1f}", "-" if other is None else f"{other * 1e3:.1f}",
                "-" if other is None else f"{mine / other:.2f}", f"{naive * 1e3:.1f}", f"{naive / mine:.1f}",
                f"{bound * 1e3:.1f}", f"{(count - 1) * bound * 1e3:.1f}",
            ]  # fmt: skip
    for size in sizes:
        mine = median(rtml, "staggered", size) or 0.0
        bound = size * 8 / RATE
        cells = ["reduce, staggered", f"{size / 1e6:g} MB", f"{mine * 1e3:.1f}", "-", "-", "-", "-"]
        yield [*cells, f"{bound * 1e3:.1f}", f"{(count - 1) * bound * 1e3:.1f}"]


def plot(rtml: Found, gloo: Found, count: int, sizes: list[int], path: Path) -> None:
    """Seconds by size."""
    made, axes = report.figure((11, 3.6), 3)
    for axis, name in zip(axes[0], ("broadcast", "reduce", "allreduce")):
        for label, found, key in (("rtml", rtml, name), ("gloo", gloo, name), ("naive", rtml, f"naive {name}")):
            values = [median(found, key, size) for size in sizes]
            if all(value is not None for value in values):
                axis.plot([size / 1e6 for size in sizes], values, marker="o", label=label)
        for label, factor in (("S/B", 1), ("(n-1)S/B", count - 1)):
            bound = [factor * size * 8 / RATE for size in sizes]
            axis.plot([size / 1e6 for size in sizes], bound, linestyle=":", color="grey", label=label)
        axis.set(xscale="log", yscale="log", xlabel="MB", ylabel="seconds", title=f"{name}, {count} hosts")
    axes[0][0].legend(fontsize=8)
    report.save(made, path)


PAGE = """# Collectives on emulated hosts (Hoplite, SIGCOMM'21)

`make collectives` (`python -m benchmarks.workloads.collectives`) writes this page.

{conditions}

{count} hosts are network namespaces on a bridge; every link is shaped to {rate:g} Mbit/s in both directions (`tbf`),
the paper's 10 Gbit/s by a hundred, and so are the sizes. The kernel here can add no delay: latency is that of a veth.
Meanwhile {busy:.0%} of the machine's cpus were busy; above 80 % cpus would be measured, not the network.

{bars}

![seconds by size](collectives.png)

## Milliseconds

The bars above are for the largest size, if they do not name another.

{table}

- S/B is the time of one transfer at the shaped rate, with no header of TCP or Ethernet (they take 4-5 %): no collective
  can be faster. (n-1)S/B is what one host needs that sends to all others, or receives from all.
- *naive*: every receiver fetches an array of its own from host 0, so that nobody can pass anything on; for reduce, one
  task with all arrays as arguments; for allreduce one after the other.
- Values of up to 64 KiB travel with their results: when the clock starts, inputs of 0.01 MB are at host 0 already, so
  that their reduce and allreduce measure only planning, and are not to be compared with gloo's.
- *staggered*: inputs come 0.1 s after each other; milliseconds since the last one came.
- *gloo*: `torch.distributed`, one process on each host, all of which call at the same moment; of its repetitions the
  slowest rank counts. rtml's times include planning and the tasks that it submits, on nodes that did not know before.
- Medians of {repetitions} repetitions; every result is compared with the sum.
"""


def main() -> None:
    """Measures, writes the page."""
    parser = report.arguments(__doc__)
    parser.add_argument("--torch", type=Path, default=ROOT / ".venv-torch/bin/python", help="a Python with torch")
    options = parser.parse_args()
    count, sizes, repetitions = QUICK if options.quick else FULL
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results: dict[str, Any] = {"workload": "collectives", "machine": report.machine(), "hosts": count, "rate": RATE}
    with network(count) as made:
        gloo = with_gloo(made, count, sizes, repetitions, options.torch)
        rtml, busy = with_rtml(made, count, sizes, repetitions)
    found = bars(rtml, gloo, count, sizes)
    results |= {"rtml": rtml, "gloo": gloo, "busy": busy, "bars": found}
    head = ("", "S", "rtml", "gloo", "rtml / gloo", "naive", "naive / rtml", "S/B", "(n-1)S/B")
    directory = report.target(options)
    page = PAGE.format(
        conditions=report.conditions(results["machine"], options.note), count=count, rate=RATE / 1e6, busy=busy,
        bars=report.verdicts(found), table=report.table(head, rows(rtml, gloo, count, sizes)), repetitions=repetitions,
    )  # fmt: skip
    plot(rtml, gloo, count, sizes, directory / "collectives.png")
    report.write(directory, "collectives", page, results, options.json)


if __name__ == "__main__":
    main()
