"""bfloat16, which numpy lacks: the upper half of a float32.

Arrays of it are float32 everywhere in rtml; these functions stand where it meets others, who want its bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def widen(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers whose bits these are; exact."""
    wide: npt.NDArray[np.float32] = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    return wide


def narrow(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of `array`'s numbers, of the same shape: rounded to nearest, ties to even."""
    # 0-d arrays become 1-d on the way.
    bits = np.ascontiguousarray(array, "<f4").view("<u4").reshape(array.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding would carry a NaN's low bits up into infinity: keep its upper bits and set a quiet one.
    rounded = np.where(np.isnan(array), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return np.ascontiguousarray(rounded, "<u2").reshape(array.shape)
