"""What the demo shows: texts side by side, a progress bar, figures, a graph's timeline, annotated pictures."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

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


def batches(before: dict[str, dict[float, float]], after: dict[str, dict[float, float]]) -> None:
    """Of each function that ran in batches between two scrapes: how many calls shared an execution.

    Args:
        before: Function -> size -> calls so far in batches of at most this size.
        after: The same, later.
    """
    for name, buckets in after.items():
        upto = {size: calls - before.get(name, {}).get(size, 0.0) for size, calls in sorted(buckets.items())}
        calls = upto.get(float("inf"), 0.0)
        shares, last, least = [], 0.0, 1
        for size, count in upto.items():
            if count > last:
                sizes = f"{size:.0f}" if size == least else f"{least}-{size:.0f}"
                shares.append(f"{sizes}: {100 * (count - last) / calls:.0f} %")
            last, least = count, int(min(size, 1e9)) + 1
        if calls > upto.get(1.0, 0.0):
            print(f"  {name:<10} {calls:6.0f} calls, in batches of " + ", ".join(shares))


def timeline(trace: dict[str, Any], total: float) -> None:
    """Where the time of one graph went, one row for each kind of task.

    Args:
        trace: What `rtml trace --json` says of it.
        total: Seconds from the request to the answer.
    """
    tasks = trace["tasks"]
    span = max(task["finished"] for task in tasks)
    groups: dict[str, list[dict[str, Any]]] = {}
    for task in sorted(tasks, key=lambda task: task["submitted"]):
        groups.setdefault(task["function"], []).append(task)
    print(f"  {'':16} {'':{_SPAN + 2}} tasks   queue  transfer     run  (ms, summed)")
    for name, same in groups.items():
        queue, transfer, run = (1e3 * sum(parts) for parts in zip(*map(_parts, same), strict=True))
        figures = f"{len(same):6} {queue:7.1f} {transfer:9.1f} {run:7.1f}"
        print(f"  {name:<16} {paint('|', _GREY)}{_row(same, span)}{paint('|', _GREY)}{figures}")
    print(f"  {'':16}  0{f'{1e3 * span:.0f} ms':>{_SPAN - 1}}   . queue  - transfer  # run")
    children = [task for task in tasks if task["parent"]]
    queue, transfer, run = (1e3 * sum(parts) for parts in zip(*map(_parts, children), strict=True))
    print(
        f"  {len(children)} tasks below the graph program in {1e3 * span:.0f} ms ({1e3 * total:.0f} ms with HTTP): "
        f"run {run:.0f} ms, queue {queue:.0f} ms, transfer {transfer:.0f} ms"
    )


def _parts(task: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds in the queue, on the way (to the executor, in its queue, and back), and inside the function.

    Calls that shared an execution share its time.
    """
    queue = task["assigned"] - task["ready"]
    transfer = max(0.0, task["finished"] - task["assigned"] - task["run"])
    return queue, transfer, task["run"] / task["batch"]


def _row(tasks: Sequence[dict[str, Any]], span: float) -> str:
    """One line of the picture: of each moment what most wants to be seen."""
    cells = [" "] * _SPAN
    for task in tasks:
        # When it began to run is not known exactly: the way there counts as long, the way back as short.
        begin = max(task["assigned"], task["finished"] - task["run"])
        phases = (
            (".", task["ready"], task["assigned"]),
            ("-", task["assigned"], begin),
            ("#", begin, task["finished"]),
        )
        for mark, start, end in phases:
            if end > start:
                first, last = (min(int(moment / span * _SPAN), _SPAN - 1) for moment in (start, end))
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
        width, height = sorted((math.dist(corners[0], corners[1]), math.dist(corners[1], corners[2])), reverse=True)
        size = max(8.0, 0.7 * height)
        size *= min(1.0, width / ImageFont.load_default(size).getlength(line["text"]))
        pen.text((page.width + left, top), line["text"], fill=(20, 90, 20), font=ImageFont.load_default(size))
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
