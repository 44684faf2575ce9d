"""Placement near data, throughput of nodes, and recovery, as measured in the paper on Ray (OSDI'18).

Hosts are network namespaces on this machine, with shaped links where it matters. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.workloads import ray_locality, ray_page, ray_recovery, ray_throughput, report
from tests.integration import hosts

PARTS = {"locality": ray_locality, "throughput": ray_throughput, "recovery": ray_recovery}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that are wanted."""
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name in (options.only or PARTS):
            begin = time.monotonic()
            found[name] = part.measure(options.quick, report.say)
            report.say(f"{name}: {time.monotonic() - begin:.0f} s")
    return found


def main() -> None:
    """Measures, writes the page."""
    parser = report.arguments(__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; the page goes to out/workloads")
    options = parser.parse_args()
    missing = hosts.reason()
    if missing:
        raise SystemExit(f"hosts cannot be emulated here: {missing}")
    if options.only and not options.out:
        options.out = report.SCRATCH
    results: dict[str, Any] = {"workload": "ray", "machine": report.machine()}
    results |= measure(options)
    results["bars"] = ray_page.bars(results)
    directory = report.target(options)
    ray_page.plot(results, directory / "ray.png")
    report.write(directory, "ray", ray_page.page(results, options.note), results, options.json)


if __name__ == "__main__":
    main()
