"""The command line: `python -m loadtests.figures --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from loadtests import machine, report
from loadtests.figures import batching, cost, ends, goodput, hedging, opcodes, overhead
from loadtests.figures.verdict import is_verdict

#: Name -> how it is measured.
FIGURES: Final[dict[str, Callable[[bool], tuple[list[str], dict[str, Any]]]]] = {
    "overhead": overhead.measure,
    "cost": cost.measure,
    "opcodes": opcodes.measure,
    "throughput": overhead.throughput,
    "batching": batching.measure,
    "goodput": goodput.measure,
    "gateway-bound": partial(goodput.measure, name="json"),
    "gateway-bound-small": partial(goodput.measure, name="tiny"),
    "disconnects": ends.disconnects,
    "budgets": ends.budgets,
    "hedging": hedging.measure,
}


def main() -> int:
    """Measures what was named, or all."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.figures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; default all")
    parser.add_argument("--quick", action="store_true", help="shorter, for trying out")
    parser.add_argument("--out", type=Path, default=Path("out/load"), help="folder for JSON (default out/load)")
    options = parser.parse_args()
    if unknown := set(options.names) - FIGURES.keys():
        parser.error(f"there is no figure {', '.join(sorted(unknown))}: take {', '.join(FIGURES)}")
    failed = 0
    summary: list[str] = []
    for name in options.names or FIGURES:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            lines, document = FIGURES[name](options.quick)
        except (RuntimeError, ConnectionError, ValueError) as error:
            print(f"failed: {error}")
            summary.append(f"failed {name}: {error}")
            failed += 1
            continue
        print("\n".join(lines))
        summary += [line for line in lines if is_verdict(line) or line.startswith("reported")]
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
        report.save(options.out / f"figure-{name}.json", {"machine": machine.facts(), "lines": lines, **document})
    print("== all\n" + "\n".join(summary))
    report.save(options.out / "figures.json", {"machine": machine.facts(), "lines": summary})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
