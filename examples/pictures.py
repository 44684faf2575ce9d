"""Picture files from anywhere -> pixels, with limits."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from rtml.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

#: A 40 megapixel camera's pictures pass; what could exhaust an executor's memory does not.
PIXELS_MAX = 40_000_000
SIDE_MAX = 10_000


def open_rgb(data: bytes) -> Image.Image:
    """Decode a picture file: as RGB, on white where it is transparent, turned as its camera says.

    Raises:
        InvalidInput: this is no picture that Pillow can read, or it is too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data)) as opened:
            width, height = opened.size
            if max(width, height) > SIDE_MAX or width * height > PIXELS_MAX:
                raise InvalidInput(
                    f"a picture of {width}x{height} pixels is too large: at most {SIDE_MAX} a side, {PIXELS_MAX} in all"
                )
            image = ImageOps.exif_transpose(opened)
            if not image.has_transparency_data:
                return image.convert("RGB")
            paper = Image.new("RGBA", image.size, "white")
            paper.alpha_composite(image.convert("RGBA"))
            return paper.convert("RGB")
    except InvalidInput:
        raise
    except UnidentifiedImageError:
        raise InvalidInput("the body is no picture, or of an unknown format") from None
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise InvalidInput(f"the body is no picture: {error}") from None
