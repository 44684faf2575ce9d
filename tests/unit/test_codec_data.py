"""Values for readers that unpickle nothing."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import pickle
import re
import struct
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtml import codec
from rtml.codec.pickling import BUFFER_MIN
from rtml.errors import LimitExceeded, SerializationError
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.store import Store


class Bomb:
    """Whoever unpickles it fails the test."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


class Line(msgspec.Struct):
    text: str
    box: Any = None


@dataclasses.dataclass(slots=True)
class Page:
    lines: list[Line]
    source: Any = None


class Pair(NamedTuple):
    left: int
    right: int


class Colour(enum.Enum):
    RED = "red"


def trip(value: Any, store: Store | None = None) -> Any:
    return codec.decode_data(codec.encode_data(value, store).payload, store)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
keys = st.integers(-100, 100) | st.text() | st.binary()
trees = st.recursive(
    scalars | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_data_round_trips(value: Any) -> None:
    assert trip(value) == value
    assert codec.decode_value(codec.encode_data(value, None).payload, None) == value


arrays = hnp.arrays(
    dtype=hnp.boolean_dtypes()
    | hnp.integer_dtypes()
    | hnp.floating_dtypes()
    | hnp.complex_number_dtypes()
    | hnp.datetime64_dtypes()
    | hnp.timedelta64_dtypes()
    | hnp.unicode_string_dtypes()
    | hnp.byte_string_dtypes(),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)


@settings(max_examples=200, deadline=None)
@given(arrays, st.booleans())
def test_arrays_of_all_types_round_trip(array: np.ndarray[Any, Any], transposed: bool) -> None:
    if transposed:
        array = array.T
    for back in (trip(array), trip([array])[0], codec.decode_value(codec.encode_data([array], None).payload, None)[0]):
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        assert back.tobytes() == array.tobytes()
        assert back.flags.writeable


def test_everything_else_that_is_data() -> None:
    moment = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
    name = uuid.uuid4()
    value = {
        "page": Page([Line("a", (1, 2))], np.float32(1.5)),
        "pair": Pair(1, 2),
        "set": {3},
        "colour": Colour.RED,
        "moment": moment,
        "date": datetime.date(2024, 5, 6),
        "uuid": name,
        "price": decimal.Decimal("1.50"),
        "view": memoryview(b"xy"),
        (1, 2): np.bool_(True),
    }
    back = trip(value)
    assert back == {
        "page": {"lines": [{"text": "a", "box": [1, 2]}], "source": np.float32(1.5)},
        "pair": [1, 2],
        "set": [3],
        "colour": "red",
        "moment": moment,
        "date": "2024-05-06",
        "uuid": str(name),
        "price": "1.50",
        "view": b"xy",
        (1, 2): np.bool_(True),
    }
    assert type(back["page"]["source"]) is np.float32
    assert trip(None) is None
    assert [type(trip(value)) for value in (np.float64(1), np.str_("a"), np.bytes_(b"a"))] == [
        np.float64,
        np.str_,
        np.bytes_,
    ]


def test_arrays_of_objects() -> None:
    array = np.empty((2, 2), object)
    array[:] = [["a", b"b"], [None, 1.5]]
    array[1, 1] = [np.arange(2), {"k": np.array(["x"], object)}]
    back = trip({"out": array})["out"]
    assert (back.dtype, back.shape) == (np.dtype(object), (2, 2))
    assert back[0].tolist() == ["a", b"b"]
    assert back[1, 1][0].tolist() == [0, 1]
    assert back[1, 1][1]["k"].tolist() == ["x"]
    assert trip(np.array([], object)).shape == (0,)


def test_big_arrays_are_views_of_shared_memory(store: Store, other: Store) -> None:
    big = np.arange(INLINE_MAX).reshape(-1, 4)
    words = np.array(["word" * 10] * 1000)
    text = np.array(["x" * 100] * 2000, object)
    encoded = codec.encode_data({"big": big, "flip": big.T, "words": words, "text": text, "few": [1]}, store)
    assert isinstance(encoded.payload, ObjectRef)
    back = codec.decode_data(encoded.payload, other)
    for name, want in (("big", big), ("flip", big.T), ("words", words)):
        assert np.array_equal(back[name], want)
        assert not back[name].flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            back[name].flags.writeable = True
    assert back["text"].tolist() == text.tolist()
    assert back["few"] == [1]
    first = next(data for data in other.get(encoded.payload) if data.nbytes == big.nbytes)
    assert np.shares_memory(back["big"], np.frombuffer(first, np.uint8))


def test_small_results_stay_inline(store: Store) -> None:
    value = {"a": np.arange(BUFFER_MIN, dtype="u1"), "b": b"x" * 100}
    encoded = codec.encode_data(value, store)
    assert isinstance(encoded.payload, bytes)
    assert codec.decode_data(encoded.payload, None)["a"].tolist() == value["a"].tolist()  # type: ignore[attr-defined]
    assert isinstance(codec.encode_data(b"x" * INLINE_MAX, store).payload, ObjectRef)


def test_one_array_is_encoded_as_everywhere(store: Store) -> None:
    array = np.zeros((8, 3), np.uint8)
    assert codec.encode_data(array, store) == codec.encode_value(array, store)
    assert codec.encode_data(array, store).items == 8


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, {"a": Bomb()}], r"contains a Bomb - at \[1\]\['a'\] of the list: <.*Bomb"),
        (Page([Line("x", lambda: 1)]), r"contains a function - at \.lines\[0\]\.box of the Page"),
        (Line("x", 1j), r"contains a complex - at \.box of the Line: 1j"),
        (2**64, "can't serialize ints"),
        (Bomb, r"contains a type"),
        ({"a": np.array([Bomb()], object)}, r"contains a Bomb - at \['a'\] of the dict"),
        (np.zeros(2, [("a", "i4")]), r"array of dtype \[\('a', '<i4'\)\]"),
        (np.ma.MaskedArray([1], [True]), "a masked array"),
        ("\ud800", "surrogates"),
        ([Path("/a")], "contains a PosixPath"),
    ],
)
def test_what_is_no_data_is_named(value: Any, says: str) -> None:
    with pytest.raises(
        SerializationError, match=f"(?s)the result is no plain data: .*{says}.*Endpoint results must be"
    ):
        codec.encode_data(value, None)


def test_values_without_an_end() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(SerializationError, match="nested too deeply"):
        codec.encode_data(cycle, None)


def test_a_full_store_is_no_fault_of_the_value(directory: str) -> None:
    with pytest.raises(LimitExceeded):
        codec.encode_data(b"x" * INLINE_MAX, Store(directory, 3, capacity=1))


def test_no_pickle_is_read(store: Store) -> None:
    for value in (Bomb(), [np.zeros(INLINE_MAX), Bomb()], [Bomb(), np.zeros(BUFFER_MIN)], 1, [1], "a"):
        with pytest.raises(SerializationError, match="unpickles nothing"):
            codec.decode_data(codec.encode_value(value, store).payload, store)
    with pytest.raises(SerializationError, match="unpickles nothing"):
        codec.decode_data(pickle.dumps(Bomb(), 0), None)


def extension(code: int, content: Any) -> bytes:
    return b"D" + msgspec.msgpack.encode(msgspec.msgpack.Ext(code, msgspec.msgpack.encode(content)))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"D",
        b"D\xc1",
        b"Dx trailing",
        b"D" + b"\x91" * 100_000 + b"\xc0",
        b"D\x81\x80\xc0",
        extension(1, ("|O", [1], b"12345678")),
        extension(1, ("O", [1], b"12345678")),
        extension(1, ("|V8", [1], b"12345678")),
        extension(1, ("i4,O", [1], b"12345678")),
        extension(1, ("<i4", [3], b"12345678")),
        extension(1, ("<i4", [2**60, 2**60, 0], b"")),
        extension(1, ("<U0", [2], b"1234")),
        extension(1, ("<i4", [1], 5)),
        extension(1, "nonsense"),
        extension(3, ([3], [1])),
        extension(3, ([-1, -1], [1])),
        extension(3, 5),
        extension(9, 5),
        b"T" + struct.pack("<BB1Q", 2, 1, 1) + b"|O" + bytes(13) + bytes(8),
    ],
)
def test_damaged_and_hostile_payloads(payload: bytes) -> None:
    with pytest.raises(SerializationError):
        codec.decode_data(payload, None)
    with pytest.raises(SerializationError):
        codec.decode_value(payload, None)


def test_errors_without_pickles() -> None:
    info = codec.encode_error(ValueError("no"), ["a"], pickle=False)
    assert (info.type, info.message, info.pickled) == ("ValueError", "no", b"")
    assert re.search("ValueError: no", info.traceback)
