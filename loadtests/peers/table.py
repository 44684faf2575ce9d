"""Writes the figures of a comparison into a document, between two marker comments.

    python -m loadtests.peers.table docs/loadtests.md [loadtests/results/peers-....json]

Without a results file it takes the newest one of the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from loadtests import report
from loadtests.peers.systems import SYSTEMS

RESULTS: Final = Path(__file__).resolve().parent.parent / "results"
#: Row -> what it is; the last number is for how many decimals, percentages are parts of one.
ROWS: Final = {
    "c1_per_s": "requests/s, one at a time",
    "c1_p50_ms": "p50, ms",
    "c1_p99_ms": "p99, ms",
    "c8_per_s": "requests/s, 8 at a time",
    "c8_p50_ms": "p50, ms",
    "c8_p99_ms": "p99, ms",
    "c64_per_s": "requests/s, 64 at a time",
    "c64_p50_ms": "p50, ms",
    "c64_p99_ms": "p99, ms",
    "capacity_per_s": "capacity: requests/s, 99 % within {deadline:g} ms",
    "goodput_0.5x": "goodput at 0.5 x capacity, of it",
    "goodput_0.9x": "at 0.9 x",
    "goodput_1.2x": "at 1.2 x",
    "goodput_2x": "at 2.0 x",
    "missed_2x": "missed, of what was let in, at 2.0 x",
    "p99_2x_ms": "p99 of answers at 2.0 x, ms",
    "client_cpu": "the load generator, of a core",
    "memory_mib": "memory after the first part, MiB",
}


def shown(row: str, value: float | None) -> str:
    """A cell."""
    if value is None:
        return "-"
    if row.startswith(("goodput", "missed", "client")):
        return f"{value:.1%}" if row.startswith("missed") else f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def lines(document: dict[str, Any]) -> list[list[str]]:
    """Head and rows."""
    present = [system for system in SYSTEMS if system.name in document["rows"]]
    found = [["", *[system.title for system in present]]]
    for row, meaning in ROWS.items():
        values = [document["rows"][system.name].get(row) for system in present]
        if any(value is not None for value in values):
            name = meaning.format(deadline=document["run"]["deadline_ms"])
            found.append([name, *[shown(row, value) for value in values]])
    return found


def text(document: dict[str, Any]) -> str:
    """For a terminal."""
    return report.table(lines(document))


def render(document: dict[str, Any]) -> str:
    """As Markdown, with what it was taken on."""
    head, *rows = lines(document)
    made = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    made += [f"| {' | '.join(row)} |" for row in rows]
    run, machine = document["run"], document["machine"]
    fronts = {system.name: (system.title, system.front) for system in SYSTEMS}
    versions = ", ".join(
        f"{fronts[name][0]} {value} ({fronts[name][1]})" for name, value in document["versions"].items()
    )
    times = "one run" if run["repetitions"] == 1 else f"medians of {run['repetitions']} runs"
    place = f"{machine['cores']} cores of {machine['cpu']}, {run['date'][:10]}, {run['commit']}"
    told = f"the servers in turn, {times}. In brackets what speaks HTTP: {versions}."
    made += ["", f"Model `{run['model']}`; {place}; {told}"]
    made += [f"Not measured: {name} ({why.splitlines()[0]})." for name, why in document["failed"].items()]
    return "\n".join(made)


def replace(document: str, model: str, table: str) -> str:
    """`document` with the table between the model's markers.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- measured: make serving-peers MODEL={model} -->", f"<!-- /measured {model} -->"
    before, found, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"there is no block between {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(arguments: list[str] | None = None) -> None:
    """Replace the block."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.peers.table", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("results", type=Path, nargs="?", help="by default the newest in loadtests/results")
    options = parser.parse_args(arguments)
    found = sorted(RESULTS.glob("peers-*.json"), key=lambda path: path.stat().st_mtime)
    path: Path | None = options.results or (found[-1] if found else None)
    if path is None:
        sys.exit("there are no results; run make serving-peers first")
    document = report.load(path)
    table = replace(options.document.read_text(), document["run"]["model"], render(document))
    options.document.write_text(table)
    print(f"{options.document}: the figures of {path}")


if __name__ == "__main__":
    main()
