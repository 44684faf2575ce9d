"""What the workloads' commands share: options, progress, pages of results with what machine they were measured on."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "results"
SCRATCH = ROOT / "out" / "workloads"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every workload's command has. From here on SIGTERM ends what was started, too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="under 45 s: fewer and smaller; the page goes to out/workloads"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    parser.add_argument("--out", type=Path, help="directory for the page, its plots and the JSON (docs/results)")
    parser.add_argument("--note", default="", help="a sentence for the page")
    return parser


def target(options: argparse.Namespace) -> Path:
    """Where the results go; made if it does not exist."""
    path: Path = options.out or (SCRATCH if options.quick else DOCS)
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """When, what, and how busy it was at the start."""
    return {
        "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "nice": os.nice(0),
    }


def conditions(found: dict[str, Any], note: str) -> str:
    """A paragraph of it."""
    text = (
        f"Measured {found['time']} at `{found['commit']}`: {found['cpus']} cpus ({found['processor']}), Python "
        f"{found['python']}, load {found['load']} when it began, nice {found['nice']}."
    )
    if found["load"] > 1:
        text += " **Other programs were running: take the ratios, and take them with care.**"
    return f"{text} {note}".strip()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(name: str, met: bool, figure: str) -> dict[str, Any]:
    """A figure that was to be reached, and whether it was."""
    return {"bar": name, "met": met, "figure": figure}


def verdicts(found: list[dict[str, Any]]) -> str:
    """A table of them."""
    return table(
        ("bar", "measured", ""), [(one["bar"], one["figure"], "met" if one["met"] else "**missed**") for one in found]
    )


def figure(size: tuple[float, float], columns: int = 1) -> Any:
    """A figure of matplotlib's that needs no screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)


def save(made: Any, path: Path) -> None:
    """The figure as PNG. Without the time in it, equal plots are equal files."""
    from matplotlib import pyplot

    made.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(made)


def write(directory: Path, name: str, page: str, results: dict[str, Any], as_json: bool) -> None:
    """The page and the results beside it."""
    (directory / f"{name}.md").write_text(page)
    text = json.dumps(results, indent=1)
    (directory / f"{name}.json").write_text(text + "\n")
    for one in results["bars"]:
        say(f"{'met   ' if one['met'] else 'MISSED'} {one['bar']}: {one['figure']}")
    say(f"written: {directory / name}.md and .json")
    if as_json:
        print(json.dumps(results))
