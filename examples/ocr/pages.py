"""Sample pages with the text that must be read from them.

The pages are drawn when they are asked for, with the font that Pillow carries, so that neither pictures nor font
files lie in the repository and every machine gets the same pixels. One more page is a photograph of a real one, which
ships in scikit-image; only the picture is taken from that package, its code is never imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from examples.packages import folder_of

#: Kept around the text of a drawn page, in pixels.
_MARGIN = 40

_LETTER = (
    "Dear Ms Okafor,",
    "thank you for your order of 17 March.",
    "The parcel left our warehouse today",
    "and should reach you on Thursday.",
    "Tracking number: 4471-0098-25",
    "Kind regards, R. Lindqvist",
)

_LONG = (
    "1. Scope of this agreement",
    "These terms apply to every delivery.",
    "2. Prices and payment",
    "Invoices are due within 30 days.",
    "Late payment costs 5% per year.",
    "3. Delivery",
    "Goods travel at the buyer's risk.",
    "Partial delivery is allowed.",
    "4. Warranty",
    "Defects must be reported at once.",
    "5. Place of jurisdiction",
    "Gothenburg, Sweden",
)

_MIXED = (
    "No.",
    "Exit",
    "Platform 9",
    "Mind the gap between the train and the platform",
    "Ok",
    "Departure 18:45",
    "All passengers for Edinburgh change at York and Newcastle upon Tyne",
    "12",
)

#: Rows of cells: the gap makes two boxes of one row, and the order has to be restored from their places.
_TABLE = (
    ("Item", "Price"),
    ("Coffee", "3.20"),
    ("Rye bread", "4.75"),
    ("Orange juice", "2.90"),
    ("Total", "10.85"),
)

_PHOTO = (
    "Region-based segmentation",
    "Let us first determine markers of the coins and the",
    "background. These markers are pixels that we can label",
    "unambiguously as either object or background. Here,",
    "the markers are found at the two extreme parts of the",
    "histogram of grey values:",
)


class Page(NamedTuple):
    """A picture of a page, and what stands on it."""

    name: str
    #: The picture as PNG.
    png: bytes
    #: The rows of text in reading order.
    expected: tuple[str, ...]


def all_pages() -> list[Page]:
    """Every sample page: the drawn ones, and the photograph if scikit-image is installed."""
    return [*_drawn(), *_photographed()]


def same_text(found: str, expected: str) -> bool:
    """Whether two rows of text are equal but for blanks, which the recognition model does not always keep."""
    return "".join(found.split()) == "".join(expected.split())


def _drawn() -> Iterator[Page]:
    yield _page("one line", _draw(("INVOICE 2024-0117",), 36), ("INVOICE 2024-0117",))
    yield _page("three lines", _draw(_LETTER[:3], 30), _LETTER[:3])
    yield _page("letter", _draw(_LETTER, 32), _LETTER)
    yield _page("twelve lines", _draw(_LONG, 28), _LONG)
    yield _page("upside down", _draw(_LETTER, 32).rotate(180), _LETTER)
    yield _page(
        "tilted", _draw(_LETTER, 32).rotate(5, Image.Resampling.BICUBIC, expand=True, fillcolor="white"), _LETTER
    )
    yield _page("on its side", _draw(_LETTER, 32).rotate(90, expand=True), _LETTER)
    yield _page("mixed widths", _draw(_MIXED, 30), _MIXED)
    yield _page("table", _draw_table(), tuple(" ".join(row) for row in _TABLE))
    yield _page("white on blue", _draw(_LETTER[:4], 34, ink="white", paper=(20, 40, 110)), _LETTER[:4])


def _photographed() -> Iterator[Page]:
    try:
        file = folder_of("skimage") / "data" / "page.png"
    except ModuleNotFoundError:
        return
    picture = Image.open(file).convert("RGB")
    # Below this the photograph cuts through a line of code, which has no right answer.
    yield _page("photograph", picture.crop((0, 0, picture.width, 140)), _PHOTO)


def _page(name: str, picture: Image.Image, expected: tuple[str, ...]) -> Page:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return Page(name, buffer.getvalue(), expected)


def _draw(
    lines: tuple[str, ...], size: int, ink: str = "black", paper: str | tuple[int, int, int] = "white"
) -> Image.Image:
    font = ImageFont.load_default(size)
    step = round(size * 1.7)
    width = max(round(font.getlength(line)) for line in lines)
    picture = Image.new("RGB", (width + 2 * _MARGIN, len(lines) * step + 2 * _MARGIN), paper)
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + row * step), line, fill=ink, font=font)
    return picture


def _draw_table() -> Image.Image:
    size, step, column = 32, 56, 420
    font = ImageFont.load_default(size)
    picture = Image.new("RGB", (column + 160 + _MARGIN, len(_TABLE) * step + 2 * _MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    for row, cells in enumerate(_TABLE):
        for place, cell in zip((_MARGIN, column), cells, strict=True):
            pen.text((place, _MARGIN + row * step), cell, fill="black", font=font)
    return picture
