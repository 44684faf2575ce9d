"""Inference messages without copies of their tensors. Pure: bytes in, bytes out.

protobuf copies each `bytes` field twice on its way to Python. A tensor's raw data is the last thing that needs that, so
the top level of the two inference messages, which is a list of fields behind their numbers and lengths, is walked here:
`split` takes the raw tensors of a request out as views, `join` puts those of a reply behind the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rtml.errors import InvalidInput
from rtml.serving.tensors import Buffer

#: Tags: (field number << 3) | 2, where 2 is "so many bytes follow".
_RAW_INPUT: Final = (7 << 3) | 2
_RAW_OUTPUT: Final = (6 << 3) | 2

_INFER_RESPONSE: Final = (2 << 3) | 2

_VARINT_BITS_MAX: Final = 63
#: Of a request: inputs, outputs, parameters, raw tensors. More would only keep the event loop busy.
_FIELDS_MAX: Final = 4096


def split(data: bytes) -> tuple[bytes, list[memoryview]]:
    """A serialised `ModelInferRequest` as one without `raw_input_contents`, and these.

    Raises:
        InvalidInput: it is no such message, or has too many fields.
    """
    view = memoryview(data)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    position = 0
    end = len(data)
    while position < end:
        if len(raw) + len(rest) == _FIELDS_MAX:
            raise InvalidInput(
                f"the message has more than {_FIELDS_MAX} inputs, outputs, parameters and raw_input_contents together"
            )
        start = position
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 2:
            length, position = _varint(data, position)
            if length > end - position:
                raise _malformed()
            if tag == _RAW_INPUT:
                raw.append(view[position : position + length])
                position += length
                continue
            position += length
        elif kind == 0:
            _, position = _varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise _malformed()
        rest.append(view[start:position])
    return b"".join(rest), raw


def join(head: bytes, raw: Iterable[Buffer]) -> bytes:
    """A serialised `ModelInferResponse` with `raw` as its `raw_output_contents`."""
    parts: list[Buffer] = [head]
    for data in raw:
        parts.append(bytes([_RAW_OUTPUT]) + _encode_varint(len(data)))
        parts.append(data)
    return b"".join(parts)


def stream_response(response: bytes) -> bytes:
    """A serialised `ModelStreamInferResponse` with this serialised `ModelInferResponse`."""
    return b"".join((bytes([_INFER_RESPONSE]), _encode_varint(len(response)), response))


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = shift = 0
    try:
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > _VARINT_BITS_MAX:
                raise _malformed()
    except IndexError:
        raise _malformed() from None


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _malformed() -> InvalidInput:
    return InvalidInput("the message is no inference.ModelInferRequest")
