"""`ray microbenchmark`, Ray's own suite, on rtml and on Ray in turn: medians, and how many times faster rtml is.

The rows and their sizes are Ray's (`ray/_private/ray_perf.py`), but for two kinds that nothing here corresponds to:
placement groups (rtml reserves no groups of resources), and Ray's rows for its compiled channels. Where they say
"object store", rtml gives the value that the future of this process holds already.

    python -m benchmarks.microbench [--quick] [--json] [--repetitions N]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.bars import Table, advantage
from benchmarks.run import RESULTS, ROOT, Part, describe, keep, machine, run, say, table

PARTS = [
    Part("rtml", "benchmarks.suite.rtml_"),
    Part("ray", "benchmarks.suite.ray_", str(ROOT / ".venv-ray/bin/python")),
]
#: How many times faster each row must be; rows that memory bandwidth bounds, less.
FACTOR, FACTOR_GIGABYTES = 5.0, 1.2


def missed(rows: Table) -> list[str]:
    """A line for each row that is not far enough ahead, or was measured on one side only."""
    lines = []
    for row, cells in rows.items():
        limit = FACTOR_GIGABYTES if "gigabytes" in row else FACTOR
        factor = advantage(row, cells.get("rtml"), cells.get("ray"))
        if factor is None:
            lines.append(f"  only one side  {row}")
        elif factor < limit:
            lines.append(f"  MISSED  {row}: {factor:.3g}x, at least {limit:g}x is wanted")
    return lines


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.microbench", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one repetition, short windows, smaller bursts")
    parser.add_argument("--json", action="store_true", help="only the JSON object on stdout")
    parser.add_argument("--repetitions", type=int, default=0, help="default 3, quick 1")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine()}
    repetitions = options.repetitions or (1 if options.quick else 3)
    say(f"{len(PARTS)} systems, {repetitions} repetition(s)")
    results = run(PARTS, repetitions, options.quick)
    report.update(describe(results, options.quick, repetitions))
    report["run"]["suite"] = "ray microbenchmark"
    path = keep(report, RESULTS / "microbench")
    if options.json:
        print(json.dumps(report))
    else:
        print(table(report["rows"], ["rtml", "ray"]))
        print("\n".join(["", *missed(report["rows"]), "", f"kept in {path.relative_to(ROOT)}"]))
    return 0 if all(result["rows"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
