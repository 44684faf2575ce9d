"""Numpy arrays as bytes: one numeric array per payload, and the dtypes that a reader accepts.

What is read here may come from anybody: a dtype with Python objects in it would make numpy take bytes for pointers.
"""

from __future__ import annotations

import re
import struct
import sys
from functools import lru_cache
from typing import Any, Final

from rtml.incoming import Incoming
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.segment import HEADER_OFFSET, header, layout, unfinished
from rtml.store import Store

#: Tag of a payload that is one numeric array: dtype, shape, data; readable in any language.
TENSOR: Final = b"T"

#: Kinds of numpy dtypes whose bytes mean the same everywhere: bool, (u)int, float, complex, datetime, timedelta.
_TENSOR_KINDS: Final = "biufcmM"
#: Inline buffers are aligned to this within the payload, whose own data begins at such an address in CPython.
ALIGNMENT: Final = 16

#: The class of numpy's arrays, once somebody has imported it.
_ARRAYS: Final[list[Any]] = []

#: Heads of arrays that are remembered: most calls of a model look alike.
_HEADS_MAX: Final = 1024

#: Numbers, times, and text and bytes of a fixed size.
_DTYPE: Final = re.compile(r"[<>|=][biufcmMSU]\d+(\[\d*[a-zA-Z]+\])?")


def is_tensor(value: Any) -> bool:
    """Whether it is a numeric numpy array."""
    if not _ARRAYS:
        kind = getattr(sys.modules.get("numpy"), "ndarray", None)
        if kind is None:
            return False
        _ARRAYS.append(kind)
    return type(value) is _ARRAYS[0] and value.dtype.kind in _TENSOR_KINDS


def array_facts(array: Any) -> tuple[str, int]:
    """What arrays that can share a batch have in common, and how many rows this one has."""
    shape = array.shape
    return (f"{array.dtype.str}{shape[1:]}", shape[0]) if shape else (f"{array.dtype.str}", 1)


def known_dtype(text: str) -> Any:
    """The dtype that a sender named.

    Raises:
        ValueError: it is none that can be made of bytes.
    """
    import numpy

    if not _DTYPE.fullmatch(text):
        raise ValueError(f"no array can be made of bytes with dtype {text[:40]!r}")
    return numpy.dtype(text)


def raw(array: Any) -> memoryview:
    """The data of an array in C order, without a copy if it lies so."""
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    return memoryview(array.reshape(-1).view("u1"))


def from_buffer(data: memoryview, dtype: Any, shape: Any) -> Any:
    """The array of these bytes, a view of them.

    Raises:
        ValueError: they are not as many as the shape says.
    """
    import numpy

    # Not numpy.ndarray(buffer=...), which would keep the exporter for its base and so could be made writable.
    return numpy.frombuffer(data, dtype).reshape(shape) if data.nbytes else numpy.empty(0, dtype).reshape(shape)


def grow_tensor(like: Any, store: Store) -> tuple[Incoming, Any, int]:
    """Room in the store for an array, and where its data begins. It is filled in place, `finished`, and published.

    Args:
        like: of its dtype and shape; its data does not matter.
        store: where it will lie, as if it had been put there.

    Raises:
        LimitExceeded: the store is full.
    """
    head = _head(like.dtype, like.shape)
    table, offsets, size = layout([len(head), like.nbytes])
    incoming = store.reserve(store.new_id(), size)
    memory = incoming.in_memory()
    for offset, piece in ((HEADER_OFFSET, header(unfinished(incoming.id), table)), (offsets[0], head)):
        memory[offset : offset + len(piece)] = piece
    return incoming, from_buffer(memory[offsets[1] : size], like.dtype, like.shape), offsets[1]


def encode_tensor(array: Any, store: Store | None) -> bytes | ObjectRef:
    """The payload of a numeric array."""
    head = _head(array.dtype, array.shape)
    if array.nbytes + len(head) <= INLINE_MAX or store is None:
        data: bytes = array.tobytes()
        return head + data
    return store.put([head, raw(array)])


def decode_tensor(head: bytes | memoryview, data: memoryview | None) -> Any:
    """The array of a payload (`data` None: it follows the head, and is copied), or of two parts in the store.

    Raises:
        ValueError: it is damaged; struct.error, IndexError and TypeError likewise.
    """
    make, dtype, shape, start = _described(bytes(head[: 3 + 8 * head[2] + head[1]]))
    if data is not None:
        return from_buffer(data, dtype, shape)
    return make(shape, dtype, head, start).copy()


@lru_cache(_HEADS_MAX)
def _head(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """What says dtype and shape, up to where the data begins."""
    kind: bytes = dtype.str.encode()
    head = TENSOR + struct.pack(f"<BB{len(shape)}Q", len(kind), len(shape), *shape) + kind
    return head + bytes(-len(head) % ALIGNMENT)


@lru_cache(_HEADS_MAX)
def _described(head: bytes) -> tuple[Any, Any, tuple[int, ...], int]:
    """What makes arrays, and of the one that a head describes dtype, shape, and where its data begins.

    Args:
        head: its tag, the length of the dtype, the number of dimensions, then these and the dtype.

    Raises:
        Exception: as `decode_tensor`.
    """
    import numpy

    length, ndim = head[1], head[2]
    shape = struct.unpack_from(f"<{ndim}Q", head, 3)
    dtype = known_dtype(head[3 + 8 * ndim : 3 + 8 * ndim + length].decode("ascii"))
    return numpy.ndarray, dtype, shape, len(head) + -len(head) % ALIGNMENT
