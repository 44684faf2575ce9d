"""The steps between the models: plain functions of arrays, which `examples.ocr.graph` makes tasks of.

The library behind them is imported at the first call, so that a process which only names them (the gateway, the async
executor) stays small. Boxes have four corners, clockwise from the top left one as the text reads when the page is
upright.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from examples.packages import folder_of
from examples.pictures import open_rgb
from rtml.errors import InvalidInput
from rtml.onnxfile import describe

if TYPE_CHECKING:
    from examples.ocr.library import Library

Pixels = npt.NDArray[np.uint8]
Tensor = npt.NDArray[np.float32]

#: Lines are padded to a multiple of this many pixels, so that those of like length share a batch. Recognition costs
#: about 0.4 ms for 10 pixels of width: a coarser step makes fuller batches and dearer lines.
WIDTH_STEP = 64
#: Narrower inputs make the recognition model unsure of short words ("Ok" becomes "OK").
WIDTH_MIN = 128
_LINE_HEIGHT = 48
#: Pictures get a margin until they are at most this much longer than wide, and at least this many pixels wide.
_STRIP, _STRIP_SIDE = 16, 32


class Sheet(NamedTuple):
    """An opened picture, as the detector takes it."""

    pixels: Pixels
    #: Size of the original picture, in pixels.
    height: int
    width: int
    #: What was done to it: the library's own record, to map boxes back.
    record: dict[str, dict[str, float]]


class Found(NamedTuple):
    """The lines of a sheet, in the detector's order."""

    #: Corners [N, 4, 2] in pixels of the sheet, and in those of the original picture.
    boxes: Tensor
    original: Tensor
    #: Size of the original picture, in pixels.
    height: int
    width: int


class Reading(NamedTuple):
    """What the recogniser saw in one line."""

    text: str
    #: Mean probability of its characters.
    score: float


#: Where the library keeps its ONNX files.
MODELS = folder_of("rapidocr_onnxruntime") / "models"


@functools.cache
def _library() -> Library:
    from examples.ocr.library import Library

    characters = describe(str(MODELS / "ch_PP-OCRv4_rec_infer.onnx")).properties["character"]
    return Library(characters.splitlines())


def open_picture(picture: bytes) -> Sheet:
    """Decode a picture file, limit its size, and add margins to very flat ones.

    Raises:
        InvalidInput: this is no picture that Pillow can read, or it is too large.
    """
    from PIL import Image

    # Not the library's own loader: it takes the colour numbers of palettes and CMYK for brightness.
    image = open_rgb(picture)
    width, height = image.size
    # A strip would be enlarged until its shorter side suits the detector, whatever that makes of the longer one.
    least = max(width, height, _STRIP * _STRIP_SIDE) // _STRIP
    paper = Image.new("RGB", (max(width, least), max(height, least)), "white")
    paper.paste(image)
    page = _library().page
    # The library works with blue first.
    pixels, ratio_h, ratio_w = page.preprocess(np.ascontiguousarray(np.asarray(paper)[:, :, ::-1]))
    record: dict[str, Any] = {"preprocess": {"ratio_h": ratio_h, "ratio_w": ratio_w}}
    pixels, record = page.maybe_add_letterbox(pixels, record)
    return Sheet(pixels, height, width, record)


def detector_input(sheet: Sheet) -> Tensor:
    """The sheet as the detection model takes it: [1, 3, H, W], sides multiples of 32."""
    detector = _library().detector
    prepare = detector.get_preprocess(max(sheet.pixels.shape[:2]))
    tensor = prepare(sheet.pixels)
    if tensor is None:
        raise InvalidInput(f"a picture of {sheet.width}x{sheet.height} pixels is too small to read")
    return np.asarray(tensor, np.float32)


def find_lines(heat: Tensor, sheet: Sheet) -> Found:
    """The lines on a sheet, from the detection model's heat map of it."""
    library = _library()
    size = sheet.pixels.shape[:2]
    boxes, _ = library.detector.postprocess_op(heat, size)
    boxes = np.asarray(library.detector.filter_tag_det_res(boxes, size), np.float32).reshape(-1, 4, 2)
    original = boxes
    if len(boxes):
        mapped = library.page._get_origin_points(list(boxes), sheet.record, sheet.height, sheet.width)
        original = np.asarray(mapped, np.float32)
    return Found(boxes, original, sheet.height, sheet.width)


def cut_line(sheet: Sheet, box: Tensor) -> Pixels:
    """The line in `box`, straightened; a box taller than wide is turned by a quarter to the left."""
    (crop,) = _library().page.get_crop_img_list(sheet.pixels, [box])
    return np.ascontiguousarray(crop)


def classifier_input(crop: Pixels) -> Tensor:
    """A line as the direction classifier takes it: [1, 3, 48, 192]."""
    return np.asarray(_library().classifier.resize_norm_img(crop), np.float32)[np.newaxis]


def recogniser_input(crop: Pixels, turned: bool) -> Tensor:
    """A line as the recognition model takes it: [1, 3, 48, width], turned by half if it is `turned`."""
    if turned:
        crop = np.ascontiguousarray(crop[::-1, ::-1])
    natural = math.ceil(_LINE_HEIGHT * crop.shape[1] / crop.shape[0])
    width = max(WIDTH_MIN, math.ceil(natural / WIDTH_STEP) * WIDTH_STEP)
    # The library takes the ratio and rounds down; the half pixel keeps floating point from losing a whole one.
    tensor = _library().recogniser.resize_norm_img(crop, (width + 0.5) / _LINE_HEIGHT)
    return np.asarray(tensor, np.float32)[np.newaxis]


def spell(probabilities: Tensor) -> list[Reading]:
    """The text of each row of the recognition model's output [N, T, characters]."""
    return [Reading(text, float(score)) for text, score in _library().recogniser.postprocess_op(probabilities)]
