"""Results as tables on a terminal, as JSON, as plots, and how far a run is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtests.statistics import Figures

#: Part of a core above which a generator may have been what was slow.
BUSY: Final = 0.85

COLUMNS: Final = (
    "", "offered/s", "goodput/s", "good", "p50 ms", "p99 ms", "p99.9 ms", "late", "shed", "expired", "errors",
    "lost", "missed", "client late",
)  # fmt: skip


class Bar:
    """A progress bar on stderr; on something that is no terminal, nothing.

    Args:
        label: What runs.
    """

    WIDTH: Final = 30

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown = sys.stderr.isatty()

    def __call__(self, part: float, sent: int, ended: int) -> None:
        if self._shown:
            full = int(part * self.WIDTH)
            bar = "#" * full + "." * (self.WIDTH - full)
            sys.stderr.write(f"\r\033[K{self._label} [{bar}] {part:4.0%} sent {sent:,}, under way {sent - ended:,}")
            sys.stderr.flush()

    def close(self) -> None:
        """Removes it."""
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def say(text: str) -> None:
    """A line of progress on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def milliseconds(value: float | None) -> str:
    """Seconds as a cell."""
    return "-" if value is None else f"{value * 1e3:.2f}" if value < 0.1 else f"{value * 1e3:.0f}"


def cells(name: str, found: Figures) -> list[str]:
    """One row of the table of a run."""
    return [
        name, f"{found.offered:.1f}", f"{found.goodput:.1f}", f"{found.fraction:.2%}", milliseconds(found.p50),
        milliseconds(found.p99), milliseconds(found.p999), str(found.late), str(found.shed), str(found.expired),
        str(found.errors), str(found.broken + found.timeouts), f"{found.missed_of_admitted:.2%}", str(found.misses),
    ]  # fmt: skip


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def runs(found: dict[str, dict[str, Figures]]) -> str:
    """The table of several runs: for each all requests, then each kind if there are several."""
    lines = [list(COLUMNS)]
    for run, kinds in found.items():
        for kind, figures in kinds.items():
            if kind == "all" or len(kinds) > 2:
                lines.append(cells(run if kind == "all" else f"  {kind}", figures))
    return table(lines)


def warnings(found: Figures, cpu: float, waited: int) -> list[str]:
    """What to know before the figures are believed."""
    said = []
    if found.requests and found.misses / found.requests > 0.01:
        late = f"the client sent {found.misses} of {found.requests} requests late"
        said.append(f"{late}: the machine is busy, or it takes more generators (--processes)")
    if cpu > BUSY:
        said.append(f"a generator used {cpu:.0%} of a core: take more of them")
    if waited and waited > found.requests * 0.01:
        said.append(f"{waited} requests waited for a connection")
    return said


def save(path: Path, document: dict[str, Any]) -> None:
    """As JSON; structs become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found
