"""The page reader's graph. It is not declared anywhere: it is what happens when `read_page` runs.

    open_picture -> detector_input -> detect -> find_lines -> N boxes, known only now
        each box:  cut_line -> classifier_input -> classify          (batched across lines and pages)
        all boxes: the vote on which way up the page lies
        each box:  recogniser_input -> recognise                     (batched by width, across lines and pages)
                   and once more the other way up, if that made little sense
    -> rows in reading order

Submitting a task with the future of another as its argument is all it takes to chain them: `read_page` waits only
where it has to decide something, and holds no core meanwhile.
"""

from __future__ import annotations

import msgspec
import numpy as np

import rtml
from examples.ocr import layout, steps

#: A reading below this is tried the other way up too. Right readings of the samples score 0.83 and more, lines that
#: stand on their heads 0.2 to 0.7.
_SURE = 0.75
#: A line below this, whichever way up, is a speck that the detector took for text. (The library's own limit.)
_LEGIBLE = 0.5


class Line(msgspec.Struct):
    """One line of text as it was found."""

    text: str
    score: float
    #: Its corners [x, y] in pixels of the picture, clockwise.
    box: list[list[float]]
    #: Number of its row, from 0; cells of a table share one.
    row: int


class Page(msgspec.Struct):
    """What stands on a page."""

    #: The rows in reading order, joined by line ends.
    text: str
    lines: list[Line]
    upside_down: bool
    #: Size of the picture, in pixels.
    width: int
    height: int


detect = rtml.model(steps.MODELS / "ch_PP-OCRv4_det_infer.onnx", name="detect", warmup=(1, 3, 480, 640))
classify = rtml.model(
    steps.MODELS / "ch_ppocr_mobile_v2.0_cls_infer.onnx", name="classify", batch=16, warmup=(1, 3, 48, 192)
)
recognise = rtml.model(
    steps.MODELS / "ch_PP-OCRv4_rec_infer.onnx", name="recognise", batch=4, warmup=(1, 3, 48, 320), after=steps.spell
)

open_picture = rtml.task(steps.open_picture)
detector_input = rtml.task(steps.detector_input)
find_lines = rtml.task(steps.find_lines)
cut_line = rtml.task(steps.cut_line)
classifier_input = rtml.task(steps.classifier_input)
recogniser_input = rtml.task(steps.recogniser_input)


@rtml.task
async def read_page(image: bytes) -> Page:
    """Read the text of a page.

    Args:
        image: A picture file: PNG, JPEG, or whatever else Pillow opens.
    """
    sheet = open_picture.submit(image)
    heat = detect.submit(detector_input.submit(sheet))
    found = await find_lines.submit(heat, sheet)
    crops = [cut_line.submit(sheet, box) for box in found.boxes]

    votes = await rtml.gather(*[classify.submit(classifier_input.submit(crop)) for crop in crops])
    turned = bool(votes) and layout.upside_down(np.concatenate(votes), found.boxes)

    readings = [reading for (reading,) in await rtml.gather(*[_read(crop, turned) for crop in crops])]
    unsure = [index for index, reading in enumerate(readings) if reading.score < _SURE]
    again = await rtml.gather(*[_read(crops[index], not turned) for index in unsure])
    for index, (reading,) in zip(unsure, again, strict=True):
        readings[index] = max(reading, readings[index], key=lambda each: each.score)
    return _page(found, readings, turned)


def _read(crop: rtml.Future[steps.Pixels], turned: bool) -> rtml.Future[list[steps.Reading]]:
    return recognise.submit(recogniser_input.submit(crop, turned))


def _page(found: steps.Found, readings: list[steps.Reading], turned: bool) -> Page:
    """The lines that could be read, in reading order."""
    lines: list[Line] = []
    texts: list[str] = []
    for row in layout.rows(found.boxes, turned):
        kept = [index for index in row if readings[index].score >= _LEGIBLE]
        for index in kept:
            text, score = readings[index]
            lines.append(Line(text, round(score, 3), found.original[index].tolist(), len(texts)))
        if kept:
            texts.append(" ".join(readings[index].text for index in kept))
    return Page("\n".join(texts), lines, turned, found.width, found.height)
