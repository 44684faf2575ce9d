"""The parts of an object before they are stored: anything with bytes."""

from __future__ import annotations

import pickle
import sys
from typing import Any, Final

Buffer = bytes | bytearray | memoryview | pickle.PickleBuffer

#: Copies from this size on let other threads run meanwhile, in bytes.
_LONG_COPY: Final = 1024 * 1024


def flat(part: Buffer) -> memoryview:
    """All bytes of a part."""
    view = part.raw() if isinstance(part, pickle.PickleBuffer) else memoryview(part)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


def copy(target: memoryview, source: memoryview) -> None:
    """Copy all bytes."""
    if len(source) < _LONG_COPY:
        target[:] = source
        return
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        # As fast as a memoryview's copy, but without the interpreter lock.
        numpy.copyto(numpy.frombuffer(target, numpy.uint8), numpy.frombuffer(source, numpy.uint8))
        return
    for start in range(0, len(source), _LONG_COPY):
        target[start : start + _LONG_COPY] = source[start : start + _LONG_COPY]
