"""What the demo shows: texts side by side, a progress bar, figures, a graph's timeline, annotated pictures."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from examples.timeline import Step

#: Columns of a timeline's picture.
_SPAN = 56
#: Waiting for its arguments, queued, on the way, running; later ones hide earlier ones.
_MARKS = " .-#"
_GREEN, _RED, _GREY, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[90m", "\x1b[0m"


def paint(text: str, colour: str) -> str:
    """`text` in colour, if a terminal is there to show it."""
    return f"{colour}{text}{_PLAIN}" if sys.stdout.isatty() else text


def verdict(right: bool) -> str:
    return paint("OK   ", _GREEN) if right else paint("WRONG", _RED)


def heading(text: str) -> None:
    print(f"\n{text}\n{paint('-' * len(text), _GREY)}")


def side_by_side(found: Sequence[str], expected: Sequence[str], same: Iterable[bool]) -> None:
    """Rows that were read beside those that should have been."""
    width = max(map(len, itertools.chain(found, ["read"])))
    for (one, other), right in zip(itertools.zip_longest(found, expected, fillvalue=""), same, strict=True):
        print(f"  {verdict(right)} {one:<{width}}  {paint('|', _GREY)} {other}")


class Progress:
    """A bar on a terminal, nothing elsewhere. Use as a context manager."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begin = time.perf_counter()
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")

    def show(self, done: int) -> None:
        """Draw the bar, with the number of requests answered so far."""
        if not self._shown:
            return
        passed = min(time.perf_counter() - self._begin, self._seconds)
        full = round(40 * passed / self._seconds)
        bar = "#" * full + "-" * (40 - full)
        sys.stderr.write(f"\r  [{bar}] {passed:4.1f} of {self._seconds:.0f} s, {done} requests\x1b[K")
        sys.stderr.flush()


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def batches(steps: Iterable[Step]) -> None:
    """For each kind of task that ran in batches: how full they were."""
    sizes: dict[str, list[int]] = {}
    for step in steps:
        sizes.setdefault(step.name, []).append(step.batch)
    for name, seen in sizes.items():
        if max(seen) > 1:
            # Each of the n calls of a batch reports n, so it counts for one n-th of an execution.
            runs = sum(1 / size for size in seen)
            fill = f"{len(seen) / runs:.1f} a run, at most {max(seen)}"
            print(f"  {name:<10} {len(seen):6} calls in {runs:6.0f} runs: {fill}")


def timeline(steps: Sequence[Step], total: float) -> None:
    """Where the time of one graph went, one row for each kind of task.

    Args:
        steps: Its tasks.
        total: Seconds from the request to the answer.
    """
    span = max([step.at + step.total for step in steps], default=0.0) or 1e-9
    print(f"  {'':18}{'':{_SPAN + 2}} tasks   queue  transfer    run   (ms, summed)")
    for name, group in itertools.groupby(sorted(steps, key=_by_first(steps)), key=lambda step: step.name):
        same = list(group)
        parts = [(step.queued, step.transfer, step.run / step.batch) for step in same]
        sums = [1e3 * sum(values) for values in zip(*parts, strict=True)]
        figures = f"{len(same):6} {sums[0]:7.1f} {sums[1]:9.1f} {sums[2]:6.1f}"
        print(f"  {name:<18}{paint('|', _GREY)}{_row(same, span)}{paint('|', _GREY)}{figures}")
    print(f"  {'':18} 0{f'{1e3 * span:.0f} ms':>{_SPAN - 1}}")
    queue, transfer = (1e3 * sum(getattr(step, part) for step in steps) for part in ("queued", "transfer"))
    run = 1e3 * sum(step.run / step.batch for step in steps)
    print(
        f"  {len(steps)} tasks in {1e3 * span:.0f} ms ({1e3 * total:.0f} ms with HTTP): run {run:.0f} ms, "
        f"queue {queue:.0f} ms, transfer {transfer:.0f} ms; . queue, - transfer, # run"
    )


def _by_first(steps: Sequence[Step]) -> Any:
    first: dict[str, float] = {}
    for step in steps:
        first.setdefault(step.name, step.at + step.waiting)
    order = sorted(first, key=first.__getitem__)
    return lambda step: (order.index(step.name), step.at)


def _row(steps: Sequence[Step], span: float) -> str:
    """One line of the picture: what most wants to be seen of each moment."""
    cells = [" "] * _SPAN
    for step in steps:
        ready = step.at + step.waiting
        phases = ((".", ready, step.queued), ("-", ready + step.queued, step.transfer))
        for mark, begin, length in (*phases, ("#", ready + step.queued + step.transfer, step.run)):
            if length <= 0:
                continue
            first = min(int(begin / span * _SPAN), _SPAN - 1)
            last = min(int((begin + length) / span * _SPAN), _SPAN - 1)
            for column in range(first, last + 1):
                cells[column] = max(cells[column], mark, key=_MARKS.index)
    return "".join(cells)


def annotate_page(png: bytes, lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Save the page with the box of each line, and beside it what was read, at the same height."""
    page = Image.open(BytesIO(png)).convert("RGB")
    picture = Image.new("RGB", (2 * page.width, page.height), "white")
    picture.paste(page)
    pen = ImageDraw.Draw(picture)
    for line in lines:
        corners = [(x, y) for x, y in line["box"]]
        pen.polygon(corners, outline=(220, 30, 30), width=2)
        left, top = min(x for x, _ in corners), min(y for _, y in corners)
        height = max(y for _, y in corners) - top
        font = ImageFont.load_default(max(8, round(0.7 * height)))
        pen.text((page.width + left, top), line["text"], fill=(20, 90, 20), font=font)
    picture.save(path)


def annotate_faces(png: bytes, faces: Sequence[dict[str, Any]], path: Path) -> None:
    """Save the picture with the box and the landmarks of each face."""
    picture = Image.open(BytesIO(png)).convert("RGB")
    pen = ImageDraw.Draw(picture)
    for face in faces:
        x, y, width, height = face["box"]
        pen.rectangle((x, y, x + width, y + height), outline=(40, 220, 40), width=3)
        for px, py in face["landmarks"].values():
            pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill=(255, 220, 0))
    picture.save(path)
