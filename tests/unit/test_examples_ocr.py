"""The page reader's steps and layout, called one after the other; tests/integration runs its graph on an engine."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtml.errors import InvalidInput

pytest.importorskip("rapidocr_onnxruntime")

from examples.ocr import graph, layout, steps
from examples.ocr.pages import Page, all_pages, same_text

PAGES = all_pages()


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def found_on(picture: bytes) -> tuple[steps.Sheet, steps.Found]:
    sheet = steps.open_picture(picture)
    return sheet, steps.find_lines(graph.detect(steps.detector_input(sheet)), sheet)


def reading(crop: steps.Pixels, turned: bool) -> steps.Reading:
    (only,) = graph.recognise(steps.recogniser_input(crop, turned))
    assert isinstance(only, steps.Reading)
    return only


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_read(page: Page) -> None:
    sheet, found = found_on(page.png)
    crops = [steps.cut_line(sheet, box) for box in found.boxes]
    votes = np.concatenate([graph.classify(steps.classifier_input(crop)) for crop in crops])
    turned = layout.upside_down(votes, found.boxes)
    readings = [reading(crop, turned) for crop in crops]
    rows = [" ".join(readings[index].text for index in row) for row in layout.rows(found.boxes, turned)]
    assert len(rows) == len(page.expected)
    assert [row for row, expected in zip(rows, page.expected, strict=True) if not same_text(row, expected)] == []


def test_the_pages_differ() -> None:
    assert len(PAGES) >= 10
    assert {len(page.expected) for page in PAGES} >= {1, 3, 6, 12}
    assert all_pages() == PAGES


def test_an_upside_down_line_reads_badly() -> None:
    """What the second look rests on: the wrong way up scores lower than the right one."""
    (letter,) = [page for page in PAGES if page.name == "letter"]
    sheet, found = found_on(letter.png)
    crops = [steps.cut_line(sheet, box) for box in found.boxes]
    for crop in crops:
        assert reading(crop, False).score > 0.75 > reading(crop, True).score


def test_widths_fall_into_buckets() -> None:
    for width in (20, 47, 128, 129, 500, 2000):
        tensor = steps.recogniser_input(np.full((48, width, 3), 255, np.uint8), False)
        expected = max(steps.WIDTH_MIN, math.ceil(width / steps.WIDTH_STEP) * steps.WIDTH_STEP)
        assert tensor.shape == (1, 3, 48, expected)


def test_turning_is_half_a_turn() -> None:
    crop = np.random.default_rng(1).integers(0, 255, (48, 128, 3), np.uint8)
    once = steps.recogniser_input(crop, True)
    assert np.array_equal(once[:, :, ::-1, ::-1], steps.recogniser_input(crop, False))


def test_lines_are_read_the_same_in_a_batch() -> None:
    (page,) = [page for page in PAGES if page.name == "mixed widths"]
    sheet, found = found_on(page.png)
    tensors = [steps.recogniser_input(steps.cut_line(sheet, box), False) for box in found.boxes]
    together: list[Any] = graph.recognise(tensors)
    assert [text for ((text, _),) in together] == [graph.recognise(tensor)[0].text for tensor in tensors]


@pytest.mark.parametrize("size", [(400, 300), (1, 1), (3, 900), (900, 3), (30, 30), (9000, 1), (1, 9000)])
def test_an_empty_page_has_no_lines(size: tuple[int, int]) -> None:
    _, found = found_on(png(Image.new("RGB", size, "white")))
    assert found.boxes.shape == found.original.shape == (0, 4, 2)
    assert layout.rows(found.boxes, False) == []
    assert (found.width, found.height) == size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_every_kind_of_picture_is_read(mode: str) -> None:
    with Image.open(BytesIO(PAGES[0].png)) as image:
        converted = image.quantize(32) if mode == "P" else image.convert(mode)
    buffer = BytesIO()
    converted.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    sheet, found = found_on(buffer.getvalue())
    (box,) = found.boxes
    assert same_text(reading(steps.cut_line(sheet, box), False).text, PAGES[0].expected[0])


@pytest.mark.parametrize("body", [b"", b"no picture", PAGES[0].png[:200]])
def test_what_is_no_picture(body: bytes) -> None:
    with pytest.raises(InvalidInput, match="no picture"):
        steps.open_picture(body)


@pytest.mark.parametrize("size", [(10_001, 1), (8000, 8000)])
def test_what_is_too_large(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=f"{size[0]}x{size[1]} pixels is too large"):
        steps.open_picture(png(Image.new("1", size)))


def grid(columns: int, rows: int) -> Any:
    """Boxes of lines 80 wide and 20 high, row by row."""
    return np.array(
        [
            [(x, y), (x + 80, y), (x + 80, y + 20), (x, y + 20)]
            for y in range(0, 40 * rows, 40)
            for x in range(0, 100 * columns, 100)
        ],
        np.float32,
    )


def turned_by(boxes: Any, degrees: float) -> Any:
    """The boxes of a page that lies turned, with their corners in the detector's order."""
    angle = math.radians(degrees)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = boxes @ rotation
    quarters = round(degrees / 90)
    return np.roll(corners, quarters, axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("degrees", "turned"), [(0, False), (6, False), (-6, False), (180, True), (174, True), (90, False), (-90, True)]
)
def test_reading_order(degrees: float, turned: bool) -> None:
    boxes = turned_by(grid(3, 4), degrees)
    shuffled = np.random.default_rng(0).permutation(12)
    order = layout.rows(boxes[shuffled], turned)
    assert [[int(shuffled[index]) for index in row] for row in order] == np.arange(12).reshape(4, 3).tolist()


def test_longer_lines_count_for_more() -> None:
    boxes = np.array(
        [[(0, y), (width, y), (width, y + 20), (0, y + 20)] for y, width in ((0, 300), (40, 40), (80, 40))]
    )
    up, down = [0.9, 0.1], [0.1, 0.9]
    assert not layout.upside_down(np.array([up, down, down]), boxes)
    assert layout.upside_down(np.array([down, up, up]), boxes)
