"""What an ONNX file says about itself, read without loading the model.

A gateway serves models that only executors run, yet has to tell clients their inputs and outputs. An ONNX file is one
protocol buffer; this walks over its top level, steps over weights and nodes by their length, and needs neither onnx
nor onnxruntime. Malformed files raise ValueError; nothing is allocated beyond the names that are asked for.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final, NamedTuple

#: ONNX element types (TensorProto.DataType) -> numpy dtype names. Strings are object arrays.
_DTYPES: Final = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "object",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
}
#: Other element types, and what is no tensor: field of TypeProto -> name.
_OTHER_DTYPES: Final = {
    17: "float8e4m3fn",
    18: "float8e4m3fnuz",
    19: "float8e5m2",
    20: "float8e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
    24: "float8e8m0",
    25: "uint2",
    26: "int2",
}
_KINDS: Final = {4: "a sequence", 5: "a map", 7: "an opaque type", 8: "a sparse tensor", 9: "an optional"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX: Final = 10


class TensorInfo(NamedTuple):
    """One input or output of a model."""

    name: str
    #: A numpy dtype name; "object" for strings, "bfloat16" for what numpy lacks, "" for what is no plain tensor.
    dtype: str
    #: -1 is a dimension of any size; None: the file does not say, not even the rank.
    shape: tuple[int, ...] | None
    #: What it is where `dtype` is "": "a sequence", "a tensor of float8e5m2", ...
    other: str = ""


class ModelInfo(NamedTuple):
    """What a model takes and gives, and the properties its maker wrote down."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    properties: dict[str, str]


def describe(source: str | bytes) -> ModelInfo:
    """The inputs, outputs and properties of an ONNX model.

    Args:
        source: The path of the file, or its content.

    Raises:
        OSError: the file cannot be read.
        ValueError: this is no ONNX model.
    """
    if isinstance(source, bytes):
        return _model(memoryview(source))
    with open(source, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as empty:
            raise ValueError(f"{source} is no ONNX model: it is empty") from empty
        with mapped, memoryview(mapped) as data:
            try:
                return _model(data)
            except ValueError as error:
                raise ValueError(f"{source} is no ONNX model: {error}") from None


def _model(data: memoryview) -> ModelInfo:
    graph: memoryview | None = None
    properties = {}
    for number, value in _fields(data):
        if number == 7:
            graph = _message(value)
        elif number == 14:
            entry = dict(_fields(_message(value)))
            properties[_text(entry.get(1, b""))] = _text(entry.get(2, b""))
    if graph is None:
        raise ValueError("no graph in it")
    inputs, outputs, weights = [], [], set()
    for number, value in _fields(graph):
        if number == 11:
            inputs.append(_tensor(_message(value)))
        elif number == 12:
            outputs.append(_tensor(_message(value)))
        elif number == 5:
            weights.add(next((_text(name) for field, name in _fields(_message(value)) if field == 8), ""))
    # Old files list their weights among the inputs.
    return ModelInfo(tuple(i for i in inputs if i.name not in weights), tuple(outputs), properties)


def _tensor(data: memoryview) -> TensorInfo:
    name, dtype, shape, other = "", "", None, ""
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, inner in _fields(_message(value)):
                if kind == 1:
                    dtype, shape, other = _tensor_type(_message(inner))
                else:
                    other = _KINDS.get(kind, other)
    return TensorInfo(name, dtype, shape, other)


def _tensor_type(data: memoryview) -> tuple[str, tuple[int, ...] | None, str]:
    dtype, shape, other = "", None, ""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            dtype = _DTYPES.get(value, "")
            if not dtype:
                other = f"a tensor of {_OTHER_DTYPES.get(value, f'element type {value}')}"
        elif number == 2:
            shape = tuple(_dimension(_message(dim)) for field, dim in _fields(_message(value)) if field == 1)
    return dtype, shape, other


def _dimension(data: memoryview) -> int:
    for number, value in _fields(data):
        # Some exporters write 0 or a negative number for "any".
        if number == 1 and isinstance(value, int) and 0 < value < 1 << 63:
            return value
    return -1


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: (number, integer or bytes)."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError("a field without a number")
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind == _FIXED64:
            size = 8
        elif kind == _FIXED32:
            size = 4
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if size > end - position:
            raise ValueError("it ends in the middle of a field")
        yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    for byte in data[position : position + _VARINT_BYTES_MAX]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number without an end")


def _message(value: int | memoryview | bytes) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return memoryview(value)


def _text(value: int | memoryview | bytes) -> str:
    return bytes(_message(value)).decode("utf-8", "replace")
