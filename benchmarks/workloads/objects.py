"""Objects in shared memory and between hosts, each figure against what it must be compared with.

A `put` of 64 MiB against copying as much into mapped memory; a `put` and ten tasks that read it against Ray; a million
puts of mixed size in a bounded store; one transfer between two hosts against the rate of the link; and one object for
seven hosts against all of them reading from one. Needs root, `ip` and `tc` for the hosts, and an environment with Ray
(`make objects` makes it) for the second; what is missing is left out, visibly.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workloads import objects_links as links
from benchmarks.workloads import objects_puts as puts
from benchmarks.workloads import report
from benchmarks.workloads.report import ROOT, say
from tests.integration import hosts as emulated

MIB = 1 << 20
LARGE = 64 * MIB


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    puts: int
    repetitions: int
    hosts: int
    size: int
    rate: float


FULL = Plan(rounds=40, puts=1_000_000, repetitions=3, hosts=8, size=10_000_000, rate=100e6)
QUICK = Plan(rounds=10, puts=20_000, repetitions=1, hosts=4, size=4_000_000, rate=100e6)


@dataclass(frozen=True)
class Row:
    """A figure, what it is compared with, and the bar for the ratio of both."""

    name: str
    measured: float
    unit: str
    against: str
    other: float
    #: Most, or (`at_least`) least.
    bar: float
    at_least: bool = False

    @property
    def ratio(self) -> float:
        """Measured to the other."""
        return self.measured / self.other if self.other else float("inf")

    @property
    def met(self) -> bool:
        """Whether the bar is reached."""
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar


def put_and_copy(rounds: int) -> tuple[float, float]:
    """Median seconds of a `put` of 64 MiB and of copying as much into mapped shared memory, in turn."""
    import numpy as np

    import rtml

    array = np.arange(LARGE // 8)
    with open(f"/dev/shm/rtml-bench-{os.getpid()}", "w+b") as file:
        os.unlink(file.name)
        os.posix_fallocate(file.fileno(), 0, LARGE)
        mapped = np.frombuffer(mmap.mmap(file.fileno(), LARGE), array.dtype)
    seconds: tuple[list[float], list[float]] = [], []
    with rtml.connect(workers=1) as client:
        for number in range(rounds + 2):
            start = time.perf_counter()
            future = client.put(array)
            middle = time.perf_counter()
            del future
            between = time.perf_counter()
            np.copyto(mapped, array)
            if number >= 2:  # the first ones make the memory that is recycled
                seconds[0].append(middle - start)
                seconds[1].append(time.perf_counter() - between)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def readers(python: Path, repetitions: int) -> tuple[float, float] | None:
    """Microseconds of a put and ten tasks that read it, here and in Ray, in turn; None without Ray."""
    if not python.exists():
        say(f"no Ray at {python}: left out")
        return None
    found: dict[str, list[float]] = {"rtml_": [], "ray_": []}
    for _ in range(repetitions):
        for name, values in found.items():
            command = [sys.executable if name == "rtml_" else str(python), "-m", f"benchmarks.systems.{name}"]
            done = subprocess.run(
                [*command, "--quick", "--only", "arrays"], cwd=ROOT, check=True, capture_output=True, text=True
            )
            values.append(json.loads(done.stdout.splitlines()[-1])["rows"]["put_64mib_read10_p50_us"])
    return statistics.median(found["rtml_"]), statistics.median(found["ray_"])


def many_puts(count: int) -> dict[str, float]:
    """What a program with so many puts finds, and what another one leaves that is killed in the midst of its own."""
    command = [sys.executable, "-m", "benchmarks.workloads.objects_puts", str(count)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as victim:
        assert victim.stderr is not None
        while not (line := victim.stderr.readline()).startswith("running "):
            assert victim.poll() is None
        victim.send_signal(signal.SIGKILL)
    directory = Path(line.split()[1])
    end = time.monotonic() + 20
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return found | {"left_after_kill": float(directory.exists())}


def local_rows(plan: Plan, ray: Path) -> list[Row]:
    """On one node."""
    put, copy = put_and_copy(plan.rounds)
    rows = [Row("put of 64 MiB", put * 1e3, "ms", "one copy into mapped memory", copy * 1e3, 1.5)]
    pair = readers(ray, plan.repetitions)
    if pair is not None:
        rows.append(Row("put of 64 MiB and ten readers", pair[0] / 1e3, "ms", "Ray", pair[1] / 1e3, 0.5))
    found = many_puts(plan.puts)
    what = f"{plan.puts:,} puts of 1 KiB to 8 MiB"
    say(f"{what} in {found['seconds']:.0f} s: {found['seconds'] / plan.puts * 1e6:.0f} us each")
    bound = puts.BOUND / MIB
    return [
        *rows,
        Row(
            f"{what}: memory beside the shared one", found["late_mib"], "MiB", "after a tenth", found["early_mib"], 1.05
        ),
        Row(f"{what}: shared memory", found["shared_most_mib"], "MiB", "the bound", bound, 1.0),
        Row(f"{what}: directory left at the end", found["left"], "", "one engine", 1.0, 0.0),
        Row(f"{what}: left after kill -9", found["left_after_kill"], "", "one engine", 1.0, 0.0),
    ]


def link_rows(plan: Plan) -> list[Row]:
    """Between hosts."""
    mine, plain = links.on_loopback(LARGE, max(5, plan.rounds // 4))
    best, median = LARGE / min(mine) / 1e6, LARGE / statistics.median(mine) / 1e6
    rows = [
        Row("64 MiB over loopback", median, "MB/s", "plain sockets", LARGE / statistics.median(plain) / 1e6, 0.3, True)
    ]
    say(f"loopback: best {best:.0f} MB/s")
    missing = emulated.reason()
    if missing:
        say(f"no emulated hosts ({missing}): left out")
        return rows
    size, rate = 4 * plan.size, 2 * plan.rate
    seconds = statistics.median(links.on_links(2, rate, size, plan.repetitions + 2))
    payload = rate / 8e6 * links.PAYLOAD
    name = f"{size / 1e6:g} MB between two hosts, {rate / 1e6:g} Mbit/s"
    rows.append(Row(name, size / seconds / 1e6, "MB/s", "the link's payload", payload, 0.95, True))
    many = statistics.median(links.on_links(plan.hosts, plan.rate, plan.size, plan.repetitions + 2))
    naive = statistics.median(links.on_links(plan.hosts, plan.rate, plan.size, 1, naive=True))
    name = f"{plan.size / 1e6:g} MB to {plan.hosts - 1} hosts, {plan.rate / 1e6:g} Mbit/s"
    bound = plan.size * 8 / plan.rate
    rows.append(Row(name, many * 1e3, "ms", "one transfer (S/B)", bound * 1e3, 1.5))
    rows.append(Row(name, many * 1e3, "ms", "all from one host", naive * 1e3, 1 / min(3, plan.hosts - 2)))
    return rows


PAGE = """# Objects

`make objects` (`python -m benchmarks.workloads.objects`) writes this page.

{conditions}

{table}

- *put of 64 MiB*: `rtml.put` of a numpy array whose memory is recycled, and `numpy.copyto` into a mapped file of shared
  memory that was written before; in turn, medians.
- *ten readers*: `put_64mib_read10_p50_us` of `make bench-peers`: ten tasks of which each sums another MiB.
- *puts*: sizes are even over the magnitudes, {held} values are held at a time, {bound} MiB of shared memory are
  allowed; what is above 64 KiB lies there.
- *hosts* are network namespaces on a bridge, their links shaped by `tbf`. Of what a link carries {payload:.1%} are
  payload at an MTU of 1500; S/B is without headers. Endpoints are processes of their own; no dispatcher takes part.
- Loopback: 64 MiB between two endpoints, whose memory is new at first and recycled later; plain sockets copy into one
  buffer.
"""


def main() -> None:
    """Measures, writes the page."""
    parser = report.arguments(__doc__)
    parser.add_argument("--ray", type=Path, default=ROOT / ".venv-ray/bin/python", help="a Python with Ray")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results: dict[str, Any] = {"workload": "objects", "machine": report.machine()}
    rows = local_rows(plan, options.ray) + link_rows(plan)
    sign = {True: "at least", False: "at most"}
    table = report.table(
        ("", "measured", "compared with", "", "ratio", "bar", ""),
        [
            (
                row.name, f"{row.measured:,.4g} {row.unit}", row.against, f"{row.other:,.4g} {row.unit}",
                f"{row.ratio:.2f}", f"{sign[row.at_least]} {row.bar:.2g}", "met" if row.met else "**missed**",
            )
            for row in rows
        ],
    )  # fmt: skip
    results["rows"] = [{"name": row.name, "measured": row.measured, "other": row.other} for row in rows]
    results["bars"] = [
        report.verdict(f"{row.name} / {row.against}", row.met, f"{row.ratio:.2f} ({sign[row.at_least]} {row.bar:.2g})")
        for row in rows
    ]
    page = PAGE.format(
        conditions=report.conditions(results["machine"], options.note), table=table, held=puts.HELD,
        bound=puts.BOUND // MIB, payload=links.PAYLOAD,
    )  # fmt: skip
    report.write(report.target(options), "objects", page, results, options.json)


if __name__ == "__main__":
    main()
