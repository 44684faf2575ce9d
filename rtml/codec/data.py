"""Values without pickles, for readers that must not run a sender's code (D10): msgpack, with numpy arrays inside.

What it takes is what `msgspec` encodes by itself, and numpy's arrays and scalars, at any depth. It comes back as data:
tuples and sets as lists, structs and dataclasses as dicts, enums as their values, dates as text (a moment with a time
zone as a datetime). Arrays are msgpack extensions:

    1, 2   array, scalar: (dtype, shape, bytes, or the number of the part of the object in the store)
    3      array of objects, or of text of any length: (shape, elements as msgpack)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from rtml.codec.arrays import from_buffer, known_dtype, raw
from rtml.codec.pickling import BUFFER_MIN
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.store import Store

#: Tag of such a payload.
DATA: Final = b"D"

_ARRAY: Final = 1
_SCALAR: Final = 2
_OBJECTS: Final = 3

_Ext = msgspec.msgpack.Ext
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_decode_array = msgspec.msgpack.Decoder(tuple[str, list[int], memoryview | int]).decode


def place(value: Any, store: Store | None) -> bytes | ObjectRef:
    """The payload of a value, inline or in the store.

    Raises:
        TypeError: a part is of no type that is data; other errors (of msgspec, of integers too large) likewise.
        LimitExceeded: the store is full.
    """
    if store is None:
        return DATA + _encode(value, enc_hook=_Hook(None))
    buffers: list[memoryview] = []
    stream = DATA + _encode(value, enc_hook=_Hook(buffers))
    if len(stream) + sum([buffer.nbytes for buffer in buffers]) > INLINE_MAX:
        return store.put([stream, *buffers])
    return DATA + _encode(value, enc_hook=_Hook(None)) if buffers else stream


def unpack(stream: memoryview, parts: Sequence[memoryview]) -> Any:
    """The value of a payload without its tag. Arrays of parts are views of them, others are copies.

    Raises:
        ValueError: it is damaged; TypeError, IndexError, RecursionError and msgspec's errors likewise.
    """

    def extension(code: int, content: memoryview) -> Any:
        if code == _OBJECTS:
            return _make_objects(*_decode(content, ext_hook=extension))
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"no extension of this version of rtml: {code}")
        dtype, shape, data = _decode_array(content)
        if isinstance(data, int):
            return from_buffer(parts[data], known_dtype(dtype), shape)
        array = from_buffer(data, known_dtype(dtype), shape).copy()
        return array[()] if code == _SCALAR else array

    return _decode(stream, ext_hook=extension)


class _Hook:
    """Encodes what msgspec does not know: numpy's arrays and scalars.

    Args:
        buffers: takes the data of larger arrays; None leaves everything in the stream.
    """

    def __init__(self, buffers: list[memoryview] | None) -> None:
        self._buffers = buffers

    def __call__(self, value: Any) -> msgspec.msgpack.Ext:
        numpy: Any = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic):
            raise TypeError(f"it contains a {type(value).__name__}")
        if isinstance(value, numpy.ma.MaskedArray):
            raise TypeError("it contains a masked array")
        dtype = value.dtype
        if dtype.kind in "OT":
            return _Ext(_OBJECTS, _encode((value.shape, value.reshape(-1).tolist()), enc_hook=self))
        try:
            known_dtype(dtype.str)
        except ValueError:
            raise TypeError(f"it contains an array of dtype {dtype}") from None
        array = numpy.asarray(value)
        if not dtype.itemsize:  # text or bytes, all empty: numpy cannot count such items
            array = array.astype(f"{dtype.kind}1")
        return self._extension(_SCALAR if isinstance(value, numpy.generic) else _ARRAY, array)

    def _extension(self, code: int, array: Any) -> msgspec.msgpack.Ext:
        data: bytes | int
        if self._buffers is None or array.nbytes < BUFFER_MIN:
            data = array.tobytes()
        else:
            data = len(self._buffers)
            self._buffers.append(raw(array))
        return _Ext(code, _encode((array.dtype.str, array.shape, data)))


def _make_objects(shape: Sequence[int], elements: Sequence[Any]) -> Any:
    import numpy

    if math.prod(shape) != len(elements):
        raise ValueError(f"{len(elements)} elements for an array of shape {tuple(shape)}")
    array = numpy.empty(len(elements), object)
    for index, element in enumerate(elements):  # at once, numpy would look into elements that are lists
        array[index] = element
    return array.reshape(shape)
