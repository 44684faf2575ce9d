"""Tensor data of the Open Inference Protocol <-> numpy arrays: the 13 datatypes and BF16, as JSON and as raw bytes.

Pure functions, shared by every protocol that carries these tensors. In memory

* BYTES is an object array of `bytes`,
* BF16 is a float32 array (numpy has no bfloat16): widened when read, rounded to nearest even when written,
* every other datatype is the numpy dtype of the same meaning.

Reading raw bytes of a fixed-width type copies nothing: the array is a read-only view of the body. Everything that comes
from outside is checked before numpy sees it: a wrong size, count, range or nesting is an `InvalidInput` that names the
tensor, never a crash and never an allocation larger than the body that asked for it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from rtml import bfloat16
from rtml.errors import InvalidInput

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

#: Datatype -> the numpy dtype of its elements, little-endian as on the wire.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
    "BF16": np.dtype("<f4"),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

#: Dimensions of a tensor; numpy's own limit is 64.
RANK_MAX: Final = 32

#: Elements that a shape may describe, empty dimensions aside; numpy cannot address more bytes than 2**63.
ELEMENTS_MAX: Final = 2**56

#: JSON of at least so many bytes is counted before it is read.
_COUNTED_FROM: Final = 64 * 1024

_NESTED = re.compile(rb"\s*\[\s*\[")
_LENGTH = struct.Struct("<I")


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The datatype of arrays of `dtype`.

    Raises:
        ValueError: no datatype means this (complex numbers, dates, records).
    """
    if dtype.kind in "US":
        return "BYTES"
    name = _NAMES.get(dtype.newbyteorder("<"))
    if name is None:
        raise ValueError(f"arrays of {dtype} have no datatype in the Open Inference Protocol")
    return name


def check_shape(name: str, shape: Sequence[int]) -> int:
    """The number of elements of `shape`.

    Raises:
        InvalidInput: a dimension is negative, or they are too many or too large.
    """
    if len(shape) > RANK_MAX:
        raise InvalidInput(f"tensor {name!r} has {len(shape)} dimensions; at most {RANK_MAX} are possible")
    size = 1
    for dimension in shape:
        if dimension < 0:
            raise InvalidInput(f"tensor {name!r} has a negative dimension in its shape {list(shape)}")
        size *= dimension or 1
    if size > ELEMENTS_MAX:
        raise InvalidInput(f"tensor {name!r} has an impossible shape {list(shape)}")
    return 0 if 0 in shape else size


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """The numpy dtype of tensor `name`.

    Raises:
        InvalidInput: there is no such datatype.
    """
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidInput(f"tensor {name!r} has the unknown datatype {datatype!r}; known are {', '.join(DTYPES)}")
    return dtype


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: Buffer) -> Array:
    """The array in raw little-endian bytes; a view of `data` where the datatype allows.

    Raises:
        InvalidInput: `data` is longer or shorter than the shape says, or its inner lengths are wrong.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape)
    if datatype == "BYTES":
        return _object_array(_split_bytes(name, data, count), shape)
    width = 2 if datatype == "BF16" else dtype.itemsize
    if len(data) != count * width:
        raise InvalidInput(
            f"tensor {name!r} brings {len(data)} bytes; {datatype} of shape {list(shape)} takes {count * width}"
        )
    if datatype == "BF16":
        return bfloat16.widen(np.frombuffer(data, "<u2")).reshape(shape)
    if datatype == "BOOL":
        # Any byte but 0 and 1 would make a numpy bool that compares wrongly.
        flags: Array = np.frombuffer(data, "u1") != 0
        return flags.reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def as_datatype(name: str, datatype: str, array: Array) -> Array:
    """`array` with elements of `datatype`: wider numbers are narrowed, as models' inputs are.

    Raises:
        ValueError: its elements are of another kind.
    """
    if datatype == "BYTES":
        return array  # its elements are looked at when they are written
    dtype = DTYPES[datatype]
    if array.dtype == dtype:
        return array
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"output {name!r} is declared as {datatype}, but the model returned {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def to_bytes(datatype: str, array: Array) -> Buffer:
    """`array` as raw little-endian bytes; a view where the array is contiguous already.

    Raises:
        ValueError: the array does not hold what `datatype` says.
    """
    if datatype == "BYTES":
        elements = to_bytes_list(array)
        return b"".join([part for element in elements for part in (_LENGTH.pack(len(element)), element)])
    if datatype == "BF16":
        return bfloat16.narrow(array).tobytes()
    return np.ascontiguousarray(array, DTYPES[datatype]).reshape(-1).view("u1").data


def from_json(name: str, datatype: str, shape: Sequence[int], data: Buffer) -> Array:
    """The array in JSON text: row-major, nested as the shape says or flat.

    Raises:
        InvalidInput: it is not such a list, an element is of another type or out of range, or the count is wrong.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape)
    depth = len(shape) if _NESTED.match(data) else 1
    kind = {"b": bool, "i": int, "u": int, "f": float, "O": str}[dtype.kind]
    if len(data) >= _COUNTED_FROM and kind is not str and count:
        # Each of its elements becomes an object of ten times its size: not if they are too many anyway.
        found = bytes(data).count(b",") + 1
        if found != count:
            raise _miscounted(name, found, shape, count)
    try:
        values = _list_decoder(kind, max(depth, 1))(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"tensor {name!r}: {error} (its {datatype} data is a list, flat or as its shape)") from None
    for size in shape[1:depth]:
        if any(len(inner) != size for inner in values):
            raise InvalidInput(f"tensor {name!r} has data that is not nested as its shape {list(shape)}")
        values = [element for inner in values for element in inner]
    if len(values) != count:
        raise _miscounted(name, len(values), shape, count)
    if kind is str:
        return _object_array([text.encode() for text in values], shape)
    try:
        with np.errstate(over="ignore"):  # 1e300 as FP32 is infinity, as in every other parser
            return np.array(values, dtype).reshape(shape)
    except OverflowError:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        raise InvalidInput(f"tensor {name!r} has an element outside of {datatype}: {low} to {high}") from None


def _miscounted(name: str, found: int, shape: Sequence[int], count: int) -> InvalidInput:
    return InvalidInput(f"tensor {name!r} has {found} elements in its data; its shape {list(shape)} takes {count}")


def to_json(name: str, datatype: str, array: Array) -> list[Any]:
    """`array` as a flat list for JSON. NaN and infinities have no JSON form and become null.

    Raises:
        InvalidInput: BYTES elements that are not UTF-8; it was the request that asked for JSON.
        ValueError: elements that are no BYTES.
    """
    if datatype == "BYTES":
        try:
            return [element.decode() for element in to_bytes_list(array)]
        except UnicodeDecodeError:
            raise InvalidInput(f"tensor {name!r} holds bytes that are not UTF-8; ask for it as binary data") from None
    values: list[Any] = array.ravel().tolist()
    return values


def to_bytes_list(array: Array) -> list[bytes]:
    """The elements of a BYTES array, row-major.

    Raises:
        ValueError: an element is neither bytes nor text.
    """
    elements: list[Any] = array.ravel().tolist()
    for position, element in enumerate(elements):
        if isinstance(element, str):
            elements[position] = element.encode()
        elif not isinstance(element, bytes):
            raise ValueError(f"a BYTES array holds {type(element).__name__}; its elements must be bytes or str")
    return elements


def _object_array(elements: list[bytes], shape: Sequence[int]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def _split_bytes(name: str, data: Buffer, count: int) -> list[bytes]:
    """The `count` elements of raw BYTES data, each behind its length."""
    view = memoryview(data)
    end = len(view)
    if count * _LENGTH.size > end:
        raise InvalidInput(f"tensor {name!r}: {end} bytes cannot hold {count} BYTES elements")
    elements = []
    position = 0
    for _ in range(count):
        if position + _LENGTH.size > end:
            raise InvalidInput(f"tensor {name!r}: its data ends before {count} BYTES elements are complete")
        (length,) = _LENGTH.unpack_from(view, position)
        position += _LENGTH.size
        if length > end - position:
            raise InvalidInput(f"tensor {name!r}: a BYTES element of {length} bytes reaches beyond the data")
        elements.append(bytes(view[position : position + length]))
        position += length
    if position != end:
        raise InvalidInput(f"tensor {name!r}: {end - position} bytes are left over behind its {count} BYTES elements")
    return elements


@cache
def _list_decoder(kind: type, depth: int) -> Callable[[Buffer], list[Any]]:
    """A typed JSON decoder of `kind` in lists nested `depth` deep. Few enough to keep: 4 kinds, `RANK_MAX` depths."""
    nested: Any = kind
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested).decode
