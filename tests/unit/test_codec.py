"""The codec: values in and out, and calls with futures among their arguments."""

from __future__ import annotations

import collections
import dataclasses
import enum
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtml import codec
from rtml.codec.pickling import BUFFER_MIN
from rtml.codec.values import decode_value
from rtml.errors import SerializationError
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.store import Store


class Handle:
    """As much of a future as the codec sees."""

    def __init__(self, number: int) -> None:
        self.id = number

    def __reduce__(self) -> NoReturn:
        raise AssertionError("the codec never pickles a future")


def value_trip(value: Any, store: Store | None = None) -> Any:
    return codec.decode_value(codec.encode_value(value, store, Handle).payload, store, Handle)


def call_trip(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Through the codec without a store; dependencies become ("value", id)."""
    encoded = codec.encode_call(args, kwargs, None, Handle)
    return codec.decode_call(encoded.payload, [("value", dep.id) for dep in encoded.deps], None, Handle)


# --- values -----------------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
hashables = scalars | st.tuples(scalars, scalars) | st.frozensets(scalars, max_size=3)
trees = st.recursive(
    scalars | st.sets(hashables, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_values_round_trip(value: Any) -> None:
    assert value_trip(value) == value
    assert call_trip(value, name=value) == ((value,), {"name": value})


arrays = hnp.arrays(
    dtype=hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.datetime64_dtypes(endianness="="),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)


@settings(max_examples=150, deadline=None)
@given(arrays, st.booleans(), st.booleans())
def test_arrays_round_trip(array: np.ndarray[Any, Any], transposed: bool, shared: bool) -> None:
    if transposed:
        array = array.T
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-codec-") as directory:
        store = Store(directory, 1)
        if shared and array.nbytes:
            array = np.tile(array, (INLINE_MAX // array.nbytes + 1,) + (1,) * array.ndim)
        payload = codec.encode_value(array, store).payload
        assert isinstance(payload, ObjectRef) == (shared and array.nbytes > 0)
        for back in (
            codec.decode_value(payload, store),
            codec.decode_data(payload, store),
            codec.decode_call(codec.encode_call((array,), {}, store).payload, (), store)[0][0],
        ):
            assert back.dtype == array.dtype
            assert back.shape == array.shape
            assert np.array_equal(back, array, equal_nan=array.dtype.kind in "fM")
        store.close()


def test_small_arrays_are_writable_and_big_ones_are_views(store: Store, other: Store) -> None:
    small, big = np.arange(10), np.arange(INLINE_MAX)
    makers: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
        (lambda a: a, lambda back: back),
        (lambda a: {"a": a}, lambda back: back["a"]),
        (lambda a: (a, object), lambda back: back[0]),
    ]
    for make, take in makers:
        array = take(codec.decode_value(codec.encode_value(make(small), store).payload, other))
        array += 1
        array = take(codec.decode_value(codec.encode_value(make(big), store).payload, other))
        assert np.array_equal(array, big)
        assert not array.flags.writeable
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_medium_buffers_inline(store: Store) -> None:
    value: dict[str, Any] = {
        "a": np.arange(BUFFER_MIN // 8),
        "b": [np.arange(1500.0), "x"],
        "c": bytearray(9000),
    }
    encoded = codec.encode_value(value, store)
    assert isinstance(encoded.payload, bytes)
    back = codec.decode_value(encoded.payload, store)
    assert np.array_equal(back["a"], value["a"])
    assert np.array_equal(back["b"][0], np.arange(1500.0))
    back["b"][0][0] = 5
    assert back["c"] == bytes(9000)


def test_big_plain_values_go_to_the_store(store: Store, other: Store) -> None:
    for value in ("x" * 100_000, b"y" * 100_000, list(range(50_000)), {"k": "z" * 100_000}):
        encoded = codec.encode_value(value, store)
        assert isinstance(encoded.payload, ObjectRef)
        assert codec.decode_value(encoded.payload, other) == value
        call = codec.encode_call((value,), {"k": value}, store)
        assert isinstance(call.payload, ObjectRef)
        assert codec.decode_call(call.payload, (), other) == ((value,), {"k": value})
        assert isinstance(codec.encode_value(value, None).payload, bytes)


def test_dtypes_that_are_not_numeric() -> None:
    for array in (
        np.array(["a", "bc"]),
        np.array([{"a": 1}, None], dtype=object),
        np.zeros(3, dtype=[("x", "f4"), ("y", "i2")]),
    ):
        assert (value_trip(array) == array).all()
        assert (call_trip(array)[0][0] == array).all()
    assert isinstance(value_trip(np.float32(3)), np.float32)
    masked = np.ma.masked_array([1, 2], mask=[True, False])
    assert value_trip(masked).mask.tolist() == [True, False]


def test_none_is_one_byte() -> None:
    assert codec.encode_value(None, None).payload == b"N"
    assert value_trip(None) is None


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: Any


class Pair(NamedTuple):
    a: Any
    b: Any


def test_objects() -> None:
    for value in (Colour.RED, Point(1, [2]), Pair(1, 2), collections.OrderedDict(a=1), range(3), Path("/a"), int):
        assert value_trip(value) == value
        assert call_trip([value], k=value) == (([value],), {"k": value})


def test_facts() -> None:
    image = np.zeros((8, 4, 3), np.uint8)
    value = codec.encode_value(image, None)
    assert (value.batch_key, value.items) == ("|u1(4, 3)", 8)
    call = codec.encode_call((image, 1, Handle(1)), {"z": np.zeros(5), "a": Handle(2)}, None, Handle)
    assert (call.batch_key, call.items) == ("|u1(4, 3)||?|a=?|z=<f8()", 8)
    empty = codec.encode_call((image[:0],), {}, None, Handle)
    assert (empty.batch_key, empty.items) == ("|u1(4, 3)", 1), "a call without rows is a call"
    scalar = codec.encode_call((np.zeros(()),), {}, None, Handle)
    assert (scalar.batch_key, scalar.items) == ("<f8", 1)
    plain = codec.encode_call((1, [image]), {}, None, Handle)
    assert (plain.batch_key, plain.items) == ("", 1)


def test_garbage() -> None:
    for payload in (
        b"",
        b"\x80",
        b"\x80\x05garbage",
        b"Znope",
        b"Nx",
        b"X\x01",
        b"X\x05\x00\x00\x00hello",
        b"T\x09\x09",
    ):
        with pytest.raises(SerializationError):
            codec.decode_value(payload, None)
        with pytest.raises(SerializationError):
            codec.decode_call(payload, (), None)
        with pytest.raises(SerializationError):
            codec.decode_data(payload, None)
    with pytest.raises(SerializationError, match="no access"):
        codec.decode_value(ObjectRef(1, 1, "x"), None)


def test_inline_limit_is_exact(store: Store) -> None:
    overhead = len(pickle.dumps(b"x" * 1000, 5)) - 1000
    for size in (INLINE_MAX - overhead - 3, INLINE_MAX + 1):
        payload = codec.encode_value(b"x" * size, store).payload
        assert isinstance(payload, bytes) == (size < INLINE_MAX)
        assert decode_value(payload, store) == b"x" * size


# --- futures ----------------------------------------------------------------------------------------------------------


def test_dependencies_at_any_depth() -> None:
    a, b = Handle(1), Handle(2)
    inner: list[Any] = [b, {"k": (a, 3)}]
    encoded = codec.encode_call((a, inner, "plain"), {"z": [[b]], "q": 1}, None, Handle)
    assert encoded.deps == [a, b]
    assert not encoded.handles
    back: Any = codec.decode_call(encoded.payload, ["A", ["B"]], None)
    assert back == (("A", [["B"], {"k": ("A", 3)}], "plain"), {"z": [[["B"]]], "q": 1})
    # The arguments themselves are as they were, and one value is one object.
    assert inner[0] is b
    assert back[0][1][0] is back[1]["z"][0][0]


future_trees = st.recursive(
    scalars | st.integers(1, 5).map(lambda n: ("future", n)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(future_trees, st.booleans())
def test_dependencies_in_random_trees(tree: Any, with_object: bool) -> None:
    pool = {n: Handle(n) for n in range(1, 6)}

    def grown(node: Any, leaf: Callable[[int], Any]) -> Any:
        if isinstance(node, tuple) and len(node) == 2 and node[0] == "future":
            return leaf(node[1])
        if isinstance(node, (list, tuple)):
            return type(node)([grown(child, leaf) for child in node])
        if isinstance(node, dict):
            return {key: grown(child, leaf) for key, child in node.items()}
        return node

    extra = (Colour.RED,) if with_object else ()
    encoded = codec.encode_call((grown(tree, pool.__getitem__), *extra), {}, None, Handle)
    assert len({dep.id for dep in encoded.deps}) == len(encoded.deps)
    args, kwargs = codec.decode_call(encoded.payload, [("value", dep.id) for dep in encoded.deps], None)
    assert args == (grown(tree, lambda n: ("value", n)), *extra)
    assert kwargs == {}


def test_futures_elsewhere_stay_futures() -> None:
    future = Handle(7)
    captured = lambda: future  # noqa: E731
    args = (Point(1, future), Pair(future, 2), {future}, captured, {future: 1}, [future])
    encoded = codec.encode_call(args, {}, None, Handle)
    assert encoded.deps == [future]
    assert {handle.id for handle in encoded.handles} == {7}
    made: list[Handle] = []

    def make(number: int) -> Handle:
        made.append(Handle(number))
        return made[-1]

    (point, pair, members, function, keyed, values), _ = codec.decode_call(encoded.payload, ["value"], None, make)
    assert len(made) == 1
    new = made[0]
    assert new.id == 7
    assert point.y is pair.a is function() is new
    assert members == {new}
    assert list(keyed) == [new]
    assert values == ["value"]


def test_futures_in_results_are_handles(store: Store) -> None:
    value = [Handle(1), {"k": Handle(2)}, np.zeros(INLINE_MAX)]
    encoded = codec.encode_value(value, store, Handle)
    assert encoded.handles == [1, 2]
    back = codec.decode_value(encoded.payload, store, Handle)
    assert [back[0].id, back[1]["k"].id, back[2].sum()] == [1, 2, 0]
    assert codec.encode_value(Handle(3), store, Handle).handles == [3]
    with pytest.raises(SerializationError, match="contains futures"):
        codec.decode_value(encoded.payload, store)


def test_dependencies_next_to_big_arrays(store: Store, other: Store) -> None:
    big = np.arange(INLINE_MAX)
    future = Handle(1)
    encoded = codec.encode_call((big, future, [big[::2], future]), {"o": Point(1, big)}, store, Handle)
    assert isinstance(encoded.payload, ObjectRef)
    args, kwargs = codec.decode_call(encoded.payload, [big[:3]], other)
    assert np.array_equal(args[0], big)
    assert np.array_equal(args[1], big[:3])
    assert np.array_equal(args[2][0], big[::2])
    assert args[2][1] is args[1]
    assert np.array_equal(kwargs["o"].y, big)


def test_shared_and_cyclic_containers() -> None:
    shared = [Handle(1)]
    (first, second), _ = call_trip(shared, shared)
    assert first is second
    assert first == [("value", 1)]
    cycle: list[Any] = [1]
    cycle.append(cycle)
    (back,), _ = call_trip(cycle)
    assert back[1] is back
    cycle.append(Handle(2))
    with pytest.raises(SerializationError, match="contains itself"):
        call_trip(cycle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError, match="deep"):
        call_trip(deep)
