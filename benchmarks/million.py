"""Memory over 1,000,000 no-op tasks through one client, of all processes together.

* dropped: at most `WINDOW` futures are held at a time. Growth is from the end of the first tenth to the end.
* kept: every future is held, finished and read. Growth is divided by the number of tasks.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import deque
from typing import Any

from benchmarks import processes
from benchmarks.measure import MIB
from benchmarks.systems.rtml_ import Rtml

#: Futures held at a time while they are dropped.
WINDOW = 10_000


def say(text: str) -> None:
    """Progress."""
    print(f"row {text}", file=sys.stderr, flush=True)


def memory_mib(mark: str) -> dict[int, float]:
    """PSS of each process, in MiB."""
    gc.collect()
    return {pid: processes.pss_mib([pid]) for pid in processes.tree(mark)}


def report_growth(before: dict[int, float], after: dict[int, float]) -> float:
    """Total growth in MiB, with a line for each process on stderr."""
    for pid, mib in after.items():
        print(f"  {mib - before.get(pid, 0.0):+8.2f} MiB of {mib:8.1f}  {processes.command(pid)}", file=sys.stderr)
    return sum(after.values()) - sum(before.values())


def dropped(system: Rtml, count: int, mark: str) -> float:
    """Growth in MiB between a tenth of the tasks and all of them."""
    held: deque[Any] = deque()
    before: dict[int, float] = {}
    for number in range(count):
        held.append(system.submit(number))
        if len(held) >= WINDOW:
            assert held.popleft().result() == number - WINDOW + 1
        if number == count // 10:
            before = memory_mib(mark)
        if number % 100_000 == 0:
            say(f"dropped {number:,}")
    while held:
        held.popleft().result()
    return report_growth(before, memory_mib(mark))


def kept(system: Rtml, count: int, mark: str) -> float:
    """Bytes by which all processes grew, for each kept future."""
    before = memory_mib(mark)
    futures = []
    for number in range(count):
        futures.append(system.submit(number))
        if number % 100_000 == 0:
            say(f"kept {number:,}")
    for number, future in enumerate(futures):
        assert future.result() == number
    return report_growth(before, memory_mib(mark)) * MIB / count


def main() -> None:
    """Prints one JSON object: `million_dropped_growth_mib`, `million_kept_bytes_per_task`, and their rates."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 tasks")
    options = parser.parse_args()
    count = 100_000 if options.quick else 1_000_000
    mark = processes.mark()
    system = Rtml()
    system.start()
    rows: dict[str, float] = {}
    try:
        system.warm()
        start = time.perf_counter()
        rows["million_dropped_growth_mib"] = dropped(system, count, mark)
        rows["million_dropped_tasks_per_s"] = count / (time.perf_counter() - start)
        start = time.perf_counter()
        rows["million_kept_bytes_per_task"] = kept(system, count, mark)
        rows["million_kept_tasks_per_s"] = count / (time.perf_counter() - start)
        version = system.version()
    finally:
        system.stop()
    print(json.dumps({"system": system.name, "version": version, "rows": rows}))


if __name__ == "__main__":
    main()
