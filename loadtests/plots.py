"""Plots as PNG files. Needs matplotlib: `pip install 'rtml[load]'`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loadtests.schedule import Floats


def available() -> bool:
    """Whether there is matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(columns: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5.5 * columns, 4), layout="constrained")


def run(path: Path, title: str, taken: Floats, slices: dict[str, list[float]]) -> None:
    """One run: what was offered and answered over time, and how latencies are spread.

    Args:
        path: The PNG file.
        title: Above it.
        taken: Seconds from the planned times, of requests with an answer.
        slices: See `statistics.over_time`.
    """
    figure, (left, right) = _figure(2)
    for name in ("offered", "good", "shed", "missed"):
        left.step(slices["time"], slices[name], where="post", label=name)
    left.set(xlabel="planned time, s", ylabel="requests/s", title=title, ylim=(0, None))
    left.legend()
    if len(taken):
        ordered = np.sort(taken)
        right.plot(1 - np.arange(len(ordered)) / len(ordered), ordered * 1e3)
        right.set(
            xscale="log", yscale="log", xlabel="part of answers that took longer", ylabel="ms from the planned time"
        )
        right.invert_xaxis()
        right.grid(visible=True, which="both", alpha=0.3)
    _save(figure, path)


def goodput(path: Path, title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Goodput over load, both as parts of the capacity; a line for each name."""
    figure, axes = _figure(1)
    highest = max((load for points in lines.values() for load, _ in points), default=1.0)
    axes.plot([0, 1, highest], [0, 1, 1], color="0.7", linestyle="--", label="ideal")
    for name, points in lines.items():
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set(xlabel="offered / capacity", ylabel="goodput / capacity", title=title, ylim=(0, None))
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
