"""Writes the figures of a benchmark run into a document, between two marker comments.

    python -m benchmarks.table README.md [benchmarks/results/<date>-<commit>.json]

Without a results file it takes the newest one. The rows and their names are those of the run; rows that were not
measured are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.bars import advantage
from benchmarks.run import RESULTS, shown

BEGIN = "<!-- measured: python -m benchmarks.table README.md -->"
END = "<!-- /measured -->"

#: Row -> what it is, for readers who have not seen the benchmarks.
ROWS = {
    "sync_p50_us": "round trip of a no-op task, median (us)",
    "sync_p99_us": "the same, 99th percentile (us)",
    "async_tasks_per_s": "10,000 no-op tasks (tasks/s)",
    "actor_sync_p50_us": "round trip of a call on an actor, median (us)",
    "actor_async_per_s": "10,000 calls on an actor (calls/s)",
    "actor_create_p50_us": "a new actor's first result (us)",
    "fan_1_100_1_p50_us": "one task, 100 on its result, one on theirs (us)",
    "chain100_per_task_us": "chain of 100 tasks, each (us)",
    "nested10_p50_us": "a task that submits 10 and gathers (us)",
    "arg_1mib_p50_us": "1 MiB array as argument (us)",
    "arg_64mib_p50_us": "64 MiB array as argument (us)",
    "put_64mib_read10_p50_us": "64 MiB stored once, read by 10 tasks (us)",
    "submit_us": "submit, within a burst (us)",
    "get_ready_us": "result of a finished task (us)",
    "cold_start_s": "import to first result (s)",
    "idle_rss_mib": "memory when idle, all processes (MiB)",
    "idle_cpu_percent": "cpu when idle (% of a core)",
}
#: System -> its column's head.
SYSTEMS = {"rtml": "rtml", "process_pool": "ProcessPoolExecutor", "ray": "Ray", "dask": "Dask"}


def render(result: dict[str, Any]) -> str:
    """The table of a results file, with how much better rtml is than each other system in brackets."""
    rows: dict[str, dict[str, float | None]] = result["rows"]
    systems = [system for system in SYSTEMS if any(system in rows.get(row, {}) for row in ROWS)]
    lines = [f"| | {' | '.join(SYSTEMS[system] for system in systems)} |", f"|---{'|---:' * len(systems)}|"]
    for row, meaning in ROWS.items():
        cells = rows.get(row, {})
        if cells.get("rtml") is not None:
            lines.append(f"| {meaning} | {' | '.join(_cell(row, system, cells) for system in systems)} |")
    machine, run = result["machine"], result["run"]
    versions = ", ".join(f"{SYSTEMS.get(name, name)} {value}" for name, value in result["versions"].items())
    lines += ["", f"{machine['cores']} cores of {machine['cpu']}, {run['date'][:10]}, {run['commit']}; {versions}."]
    times = "one run" if run["repetitions"] == 1 else f"medians of {run['repetitions']} runs"
    lines.append(f"All systems in turn, {times}; in brackets how many times better rtml is.")
    return "\n".join(lines)


def _cell(row: str, system: str, cells: dict[str, float | None]) -> str:
    value = cells.get(system)
    if value is None:
        return "-"
    factor = None if system == "rtml" else advantage(row, cells.get("rtml"), value)
    return shown(value) if factor is None else f"{shown(value)} ({shown(factor)}x)"


def replace(text: str, table: str) -> str:
    """`text` with `table` between the markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no block between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Replace the block."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("results", type=Path, nargs="?", help="by default the newest in benchmarks/results")
    options = parser.parse_args(arguments)
    found = sorted(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)
    results: Path | None = options.results or (found[-1] if found else None)
    if results is None:
        sys.exit("there are no results; run make bench-peers first")
    table = render(json.loads(results.read_text()))
    options.document.write_text(replace(options.document.read_text(), table))
    print(f"{options.document}: the figures of {results}")


if __name__ == "__main__":
    main()
