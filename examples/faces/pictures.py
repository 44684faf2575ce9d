"""Sample pictures with the faces that must be found in them.

They are made of photographs that ship in scikit-image (only the pictures are taken from that package, its code is never
imported): the portrait of an astronaut, three sizes of it on one canvas, and a cup of coffee in which no face is.
"""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

from PIL import Image

from examples.packages import folder_of

#: The face of the portrait: x, y, width, height.
_FACE = (182, 60, 86, 114)

Box = tuple[int, int, int, int]


class Picture(NamedTuple):
    """A picture, and where its faces are."""

    name: str
    #: The picture as PNG.
    png: bytes
    #: x, y, width, height of each face, from left to right.
    expected: tuple[Box, ...]


def all_pictures() -> list[Picture]:
    """Every sample picture.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    folder = folder_of("skimage") / "data"
    portrait = Image.open(folder / "astronaut.png").convert("RGB")
    group = Image.new("RGB", (1000, 512), "gray")
    places = ((0, 0, 400), (400, 180, 300), (700, 0, 256))
    for x, y, side in places:
        group.paste(portrait.resize((side, side), Image.Resampling.LANCZOS), (x, y))
    return [
        _picture("portrait", portrait, (_FACE,)),
        _picture("group", group, tuple(_placed(*place, portrait.width) for place in places)),
        _picture("mirrored", portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (_mirrored(_FACE, portrait.width),)),
        _picture("no face", Image.open(folder / "coffee.png").convert("RGB"), ()),
    ]


def overlap(one: Box, other: Box) -> float:
    """The common part of two boxes, as a part of what both cover."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = max(0, width) * max(0, height)
    return common / (one[2] * one[3] + other[2] * other[3] - common)


def same_faces(found: list[Box], expected: tuple[Box, ...]) -> bool:
    """Whether the right number of faces was found, each about where it is."""
    pairs = zip(sorted(found), expected, strict=False)
    return len(found) == len(expected) and all(overlap(one, other) > 0.7 for one, other in pairs)


def _picture(name: str, image: Image.Image, expected: tuple[Box, ...]) -> Picture:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return Picture(name, buffer.getvalue(), expected)


def _placed(x: int, y: int, side: int, original: int) -> Box:
    left, top, width, height = (round(value * side / original) for value in _FACE)
    return (x + left, y + top, width, height)


def _mirrored(box: Box, width: int) -> Box:
    return (width - box[0] - box[2], box[1], box[2], box[3])
