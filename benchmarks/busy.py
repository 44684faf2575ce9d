"""The round trip of a no-op task while two processes outside rtml keep both cores busy at the executors' priority."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from benchmarks import processes
from benchmarks.measure import FULL, QUICK, Rows
from benchmarks.systems.rtml_ import Rtml

#: What executors run at.
EXECUTOR_NICE = 19

HOG = f"import os\nos.nice({EXECUTOR_NICE})\nprint(flush=True)\nwhile True: pass"


def start_hogs(count: int) -> list[subprocess.Popen[bytes]]:
    """Processes that compute for ever, each already at it. End them with `kill`."""
    hogs = [subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE) for _ in range(count)]
    for hog in hogs:
        assert hog.stdout is not None
        hog.stdout.readline()
    return hogs


def main() -> None:
    """Prints one JSON object: `busy_sync_p50_us`, `busy_sync_p99_us`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    system = Rtml()
    rows = Rows(system, QUICK if options.quick else FULL, processes.mark())
    system.start()
    try:
        system.warm()
        hogs = start_hogs(os.cpu_count() or 2)
        try:
            time.sleep(0.5)  # the scheduler has seen them
            rows.sync("busy_sync")
        finally:
            for hog in hogs:
                hog.kill()
                hog.communicate()
        version = system.version()
    finally:
        system.stop()
    print(json.dumps({"system": system.name, "version": version, "rows": rows.values}))


if __name__ == "__main__":
    main()
