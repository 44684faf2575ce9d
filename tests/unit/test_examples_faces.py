"""The face finder's steps, called here one after the other; tests/integration runs its graph on an engine."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from rtml.errors import InvalidInput

pytest.importorskip("cv2")

from examples.faces import graph, steps
from examples.faces.pictures import Picture, all_pictures, overlap, same_faces

PICTURES = all_pictures()


def find(png: bytes) -> list[steps.Face]:
    picture = steps.open_picture(png)
    height, width = picture.shape[:2]
    scales = steps.pyramid(height, width, 40)
    if not scales:
        return []
    boxes = steps.merge([steps.propose(graph.pnet(steps.level(picture, scale)), scale) for scale in scales])
    if len(boxes):
        boxes = steps.refine(boxes, graph.rnet(steps.patches(picture, boxes, 24)))
    return steps.faces(boxes, graph.onet(steps.patches(picture, boxes, 48))) if len(boxes) else []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_faces_are_found(picture: Picture) -> None:
    assert same_faces([face.box for face in find(picture.png)], picture.expected)


def test_landmarks_lie_in_the_face() -> None:
    (face,) = find(PICTURES[0].png)
    x, y, width, height = face.box
    marks = face.landmarks
    for px, py in (marks.left_eye, marks.right_eye, marks.nose, marks.mouth_left, marks.mouth_right):
        assert x < px < x + width
        assert y < py < y + height
    assert marks.left_eye[0] < marks.nose[0] < marks.right_eye[0]
    assert marks.left_eye[1] < marks.nose[1] < marks.mouth_left[1]


@pytest.mark.parametrize("size", [(1, 1), (39, 200), (40, 40), (200, 200)])
def test_pictures_without_anything(size: tuple[int, int]) -> None:
    buffer = BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    assert find(buffer.getvalue()) == []


def test_the_pyramid_ends_where_the_window_does_not_fit() -> None:
    scales = steps.pyramid(400, 600, 40)
    assert scales[0] == 0.3
    assert all(400 * scale >= 12 for scale in scales)
    assert 400 * scales[-1] * 0.709 < 12
    assert steps.pyramid(39, 600, 40) == []


def test_patches_are_black_beyond_the_edge() -> None:
    picture = np.full((10, 10, 3), 255, np.uint8)
    inside, half, outside = steps.patches(picture, np.array([[1, 1, 8, 8], [-3, 1, 4, 8], [50, 50, 57, 57]]), 8)
    assert (inside > 0.9).all()
    assert (half[:4] < -0.9).all()  # x comes first
    assert (half[4:] > 0.9).all()
    assert (outside < -0.9).all()


def test_what_is_no_picture() -> None:
    with pytest.raises(InvalidInput, match="no picture"):
        steps.open_picture(b"no picture")


def test_overlap() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (20, 20, 5, 5)) == 0
