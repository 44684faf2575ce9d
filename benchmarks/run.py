"""Runs the measured systems in turn, takes medians, prints the table and keeps it.

The machine's speed drifts, so the systems alternate: each repetition runs every one of them, each in a process of its
own (and in an environment of its own, for the peers). Progress goes to stderr.

    python -m benchmarks.run [--peers] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks import processes
from benchmarks.bars import Table, advantage, verdicts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HISTORY = ROOT / "benchmarks" / "history.jsonl"

#: Seconds that one measured process may take.
TIMEOUT_S = 900


@dataclass(frozen=True)
class Part:
    """One process to run in each repetition."""

    system: str  # the table's column
    module: str
    python: str = sys.executable
    once: bool = False  # in the first repetition only
    full_only: bool = False


OWN = (
    Part("rtml", "benchmarks.systems.rtml_"),
    Part("process_pool", "benchmarks.systems.process_pool"),
)
PEERS = (
    Part("ray", "benchmarks.systems.ray_", str(ROOT / ".venv-ray/bin/python")),
    Part("dask", "benchmarks.systems.dask_", str(ROOT / ".venv-dask/bin/python")),
)
EXTRAS = (
    Part("rtml", "benchmarks.core"),
    Part("rtml", "benchmarks.busy"),
    Part("rtml", "benchmarks.million", once=True, full_only=True),
)


def say(text: str, end: str = "\n") -> None:
    """Progress."""
    print(text, end=end, file=sys.stderr, flush=True)


def follow(stream: IO[str], kept: list[str]) -> None:
    """Shows a part's progress lines on a terminal, keeps everything else for an error report."""
    for line in stream:
        if not line.startswith("row "):
            kept.append(line)
        elif sys.stderr.isatty():
            say(f"\r\033[K    {line[4:].rstrip()}", end="")
    if sys.stderr.isatty():
        say("\r\033[K", end="")


def end_all(mark: str) -> None:
    """Kills what a part left behind, and says so."""
    for pid in processes.marked(mark):
        say(f"    left behind, ended: {pid} {processes.command(pid)}")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def measure(part: Part, quick: bool) -> dict[str, Any]:
    """Runs one part: its JSON object, or one without rows if it failed."""
    mark = uuid.uuid4().hex
    command = [part.python, "-m", part.module, *(["--quick"] if quick else [])]
    environment = {**os.environ, processes.MARK_NAME: mark, "PYTHONPATH": str(ROOT)}
    errors: list[str] = []
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    reader = threading.Thread(target=follow, args=(child.stderr, errors), daemon=True)
    reader.start()
    watchdog = threading.Timer(TIMEOUT_S, child.kill)
    watchdog.start()
    try:
        assert child.stdout is not None
        output = child.stdout.read()
        status = child.wait()
    finally:
        watchdog.cancel()
        child.kill()
        wait_gone(mark)
    last = output.strip().rpartition("\n")[2]
    if status == 0 and last.startswith("{"):
        found: dict[str, Any] = json.loads(last)
        return found
    say(f"    {part.module} failed (status {status}):\n{''.join(errors[-30:])}")
    return {"system": part.system, "version": "failed", "rows": {}}


def wait_gone(mark: str, limit_s: float = 5.0) -> None:
    """Waits until a part's processes have ended, so that they do not disturb the next one."""
    limit = time.monotonic() + limit_s
    while processes.marked(mark) and time.monotonic() < limit:
        time.sleep(0.1)
    end_all(mark)


def median(values: list[float]) -> float:
    """The middle value, or the mean of the middle two."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def merge(results: list[dict[str, Any]]) -> Table:
    """Medians over the repetitions: row -> system -> value, rows in the order in which they appeared."""
    samples: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for row, value in result["rows"].items():
            cells = samples.setdefault(row, {})
            cells.setdefault(result["system"], [])
            if value is not None:
                cells[result["system"]].append(value)
    return {
        row: {system: float(f"{median(values):.5g}") if values else None for system, values in cells.items()}
        for row, cells in samples.items()
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
    }


def git(*arguments: str) -> str:
    """What git prints; nothing outside a repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit() -> str:
    """The short hash of what is measured, `-dirty` if tracked files differ from it."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/history.jsonl")
    return (git("rev-parse", "--short", "HEAD") or "unversioned") + ("-dirty" if changed else "")


def table(rows: Table, systems: list[str]) -> str:
    """The rows as text: a column for each system, then how many times better rtml is."""
    peers = [system for system in systems if system != "rtml"]
    head = ["row", *systems, *[f"vs {peer}" for peer in peers]]
    lines = [head]
    for row, cells in rows.items():
        factors = [advantage(row, cells.get("rtml"), cells.get(peer)) for peer in peers]
        lines.append(
            [
                row,
                *[shown(cells.get(system)) for system in systems],
                *["-" if factor is None else f"{factor:.2f}x" for factor in factors],
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def shown(value: float | None) -> str:
    """A cell."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def run(parts: list[Part], repetitions: int, quick: bool) -> list[dict[str, Any]]:
    """All repetitions of all parts, in turn."""
    results = []
    for repetition in range(repetitions):
        for part in parts:
            if (part.once and repetition) or (part.full_only and quick):
                continue
            start = time.perf_counter()
            result = measure(part, quick)
            results.append(result)
            name = part.module.removeprefix("benchmarks.").removeprefix("systems.").rstrip("_")
            taken = f"{time.perf_counter() - start:6.1f} s"
            say(f"  {repetition + 1}/{repetitions} {name:<13} {taken}  {len(result['rows'])} rows")
    return results


def describe(results: list[dict[str, Any]], quick: bool, repetitions: int) -> dict[str, Any]:
    """What a report says of its run, beside the rows."""
    systems = list(dict.fromkeys(result["system"] for result in results))
    versions = {result["system"]: result["version"] for result in reversed(results)}
    return {
        "versions": {"python": platform.python_version(), **{system: versions[system] for system in systems}},
        "rows": merge(results),
        "run": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "quick": quick,
            "repetitions": repetitions,
        },
    }


def keep(report: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Writes the report to its file, and a line of it to the history."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report['run']['date'][:10]}-{report['run']['commit']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    line = {**report["run"], "machine": report["machine"], "versions": report["versions"], "rows": report["rows"]}
    with HISTORY.open("a") as history:
        history.write(json.dumps(line, separators=(",", ":")) + "\n")
    return path


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description="measure rtml beside other systems")
    parser.add_argument("--peers", action="store_true", help="Ray and Dask too (their environments: make bench-peers)")
    parser.add_argument("--quick", action="store_true", help="one repetition, fewer rounds")
    parser.add_argument("--json", action="store_true", help="only the JSON object on stdout")
    parser.add_argument("--repetitions", type=int, default=0, help="default 3, quick 1")
    parser.add_argument("--only", action="append", help="only parts whose module name contains this")
    options = parser.parse_args()

    parts = [*OWN, *(PEERS if options.peers else ()), *EXTRAS]
    if options.only:
        parts = [part for part in parts if any(text in part.module for text in options.only)]
    report: dict[str, Any] = {"machine": machine()}
    repetitions = options.repetitions or (1 if options.quick else 3)
    say(f"{len(parts)} parts, {repetitions} repetition(s)")
    results = run(parts, repetitions, options.quick)

    report.update(describe(results, options.quick, repetitions))
    systems = [system for system in report["versions"] if system != "python"]
    path = keep(report)
    if options.json:
        print(json.dumps(report))
    else:
        print(table(report["rows"], systems))
        print("\n".join(["", *verdicts(report["rows"]), "", f"kept in {path.relative_to(ROOT)}"]))
    return 0 if all(result["rows"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
