"""Which way up a page lies, and in which order its lines are read.

The library trusts its direction classifier line by line and sorts boxes from top to bottom. Both fail on real pages:
the classifier errs on one line in ten, and a page may be tilted, on its side or upside down. Here all lines of a page
vote, and the order follows the direction in which they run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

#: The library turns a box to the left by a quarter when it is this much taller than wide.
_TALL = 1.5
#: Boxes belong to one row when their middles are closer than this part of a line's height.
_ROW_SHARE = 0.5


def upside_down(votes: Floats, boxes: Floats) -> bool:
    """Whether the lines stand on their heads, after boxes on their side were turned to the left.

    Args:
        votes: The classifier's probabilities [N, 2] of being upright and of being turned.
        boxes: The lines [N, 4, 2]; longer ones count for more, because they show more.
    """
    lengths, _ = _sizes(boxes)
    return bool(lengths @ (votes[:, 1] - votes[:, 0]) > 0)


def rows(boxes: Floats, turned: bool) -> list[list[int]]:
    """The indices of `boxes` in reading order: rows from first to last, each from its beginning to its end."""
    if not len(boxes):
        return []
    along = _direction(boxes, turned)
    across = np.array([-along[1], along[0]])  # y grows downwards, so this is the way from one row to the next
    middles = boxes.mean(axis=1)
    starts, depths = middles @ along, middles @ across
    _, heights = _sizes(boxes)
    found: list[list[int]] = []
    for index in np.argsort(depths, kind="stable"):
        row = found[-1] if found else []
        close = row and depths[index] - np.mean(depths[row]) < _ROW_SHARE * np.median(heights[[*row, index]])
        if close:
            row.append(int(index))
        else:
            found.append([int(index)])
    return [sorted(row, key=lambda index: starts[index]) for row in found]


def _direction(boxes: Floats, turned: bool) -> Floats:
    """The unit vector along which the page's lines are read."""
    widths, heights = _edges(boxes)
    tall = (heights >= _TALL * widths)[:, np.newaxis]
    # A tall box was turned to the left before it was read, so its text begins at the top right corner and runs down.
    vectors = np.where(tall, boxes[:, 2] - boxes[:, 1], boxes[:, 1] - boxes[:, 0])
    # Short words tell the direction badly: they count by the square of their length.
    total = (vectors * np.linalg.norm(vectors, axis=1, keepdims=True)).sum(axis=0)
    unit: Floats = total / np.linalg.norm(total)
    return -unit if turned else unit


def _sizes(boxes: Floats) -> tuple[Floats, Floats]:
    """Length and height of each line, as it is read."""
    widths, heights = _edges(boxes)
    tall = heights >= _TALL * widths
    return np.where(tall, heights, widths), np.where(tall, widths, heights)


def _edges(boxes: Floats) -> tuple[Floats, Floats]:
    """Width and height of each box, as it lies."""
    top, right, bottom, left = (np.linalg.norm(boxes[:, i] - boxes[:, (i + 1) % 4], axis=1) for i in range(4))
    # Whole pixels, as the library counts them when it decides what is tall.
    return np.floor(np.maximum(top, bottom)), np.floor(np.maximum(left, right))
