"""Tensor data of the Open Inference Protocol: every datatype both ways, and everything that must be refused."""

import struct
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtml.errors import InvalidInput
from rtml.serving import tensors

PLAIN = [name for name in tensors.DTYPES if name not in ("BYTES", "BF16")]


def numbers(datatype: str) -> Any:
    elements: dict[str, Any] = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else {}
    return hnp.arrays(tensors.DTYPES[datatype], hnp.array_shapes(max_dims=4, max_side=4), elements=elements)


@pytest.mark.parametrize("datatype", PLAIN)
@given(data=st.data())
def test_plain_datatypes_survive_both_forms(datatype: str, data: st.DataObject) -> None:
    array = data.draw(numbers(datatype))
    raw = bytes(tensors.to_bytes(datatype, array))
    assert len(raw) == array.nbytes
    back = tensors.from_bytes("x", datatype, array.shape, raw)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    flat = msgspec.json.encode(tensors.to_json("x", datatype, array))
    np.testing.assert_array_equal(tensors.from_json("x", datatype, array.shape, flat), array)
    nested = msgspec.json.encode(array.tolist())
    np.testing.assert_array_equal(tensors.from_json("x", datatype, array.shape, nested), array)


@given(elements=st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_keep_nul_and_empty_elements(elements: list[bytes]) -> None:
    array = np.empty(len(elements), object)
    array[:] = elements
    raw = tensors.to_bytes("BYTES", array)
    assert tensors.from_bytes("x", "BYTES", [len(elements)], raw).tolist() == elements


@given(elements=st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_bytes_in_json_are_text(elements: list[str]) -> None:
    raw = msgspec.json.encode(elements)
    array = tensors.from_json("x", "BYTES", [1, len(elements)], raw)
    assert array.shape == (1, len(elements))
    assert tensors.to_json("x", "BYTES", array) == elements


def test_numpy_strings_are_bytes_too() -> None:
    assert tensors.datatype_of(np.array(["a", "bc"]).dtype) == "BYTES"
    assert bytes(tensors.to_bytes("BYTES", np.array(["a", "bc"]))) == b"\x01\0\0\0a\x02\0\0\0bc"
    assert tensors.to_json("x", "BYTES", np.array([b"a"])) == ["a"]


def test_bf16_is_float32_rounded_to_nearest_even() -> None:
    values = np.array([1.0, -2.5, 0.0, np.inf, 3.14159274, 1.00390625, 1.01171875], "f4")
    raw = bytes(tensors.to_bytes("BF16", values))
    assert len(raw) == 2 * len(values)
    back = tensors.from_bytes("x", "BF16", [len(values)], raw)
    # 1.00390625 lies between 1.0 and 1.0078125, 1.01171875 between 1.0078125 and 1.015625: both go to the even one.
    np.testing.assert_array_equal(back, np.array([1.0, -2.5, 0.0, np.inf, 3.140625, 1.0, 1.015625], "f4"))


def test_bf16_keeps_every_kind_of_nan() -> None:
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], "<u4").view("f4")
    assert np.isnan(tensors.from_bytes("x", "BF16", [3], tensors.to_bytes("BF16", nans))).all()


def test_reading_raw_bytes_copies_nothing() -> None:
    raw = struct.pack("<4f", 1, 2, 3, 4)
    array = tensors.from_bytes("x", "FP32", [2, 2], raw)
    assert np.shares_memory(array, np.frombuffer(raw, "f4"))
    assert not array.flags.writeable


def test_raw_bool_is_a_proper_bool() -> None:
    array = tensors.from_bytes("x", "BOOL", [3], b"\x00\x01\x07")
    assert array.view("u1").tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("array", "datatype"), [(np.zeros((0, 3), "f4"), "FP32"), (np.array(3, "i8"), "INT64"), (np.empty(0, "O"), "BYTES")]
)
def test_empty_and_scalar_tensors(array: np.ndarray[Any, Any], datatype: str) -> None:
    raw = bytes(tensors.to_bytes(datatype, array))
    assert tensors.from_bytes("x", datatype, array.shape, raw).shape == array.shape


def test_strided_and_big_endian_arrays_are_written_row_major() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert tensors.datatype_of(array.dtype) == "INT32"
    assert bytes(tensors.to_bytes("INT32", array)) == np.array([0, 3, 1, 4, 2, 5], "<i4").tobytes()


def test_no_datatype_for_complex_numbers() -> None:
    with pytest.raises(ValueError, match="complex64"):
        tensors.datatype_of(np.dtype("c8"))


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "message"),
    [
        ("FP32", [2], b"1234567", "brings 7 bytes; FP32 of shape \\[2\\] takes 8"),
        ("FP33", [2], b"", "unknown datatype 'FP33'"),
        ("FP32", [-1], b"1234", "negative dimension"),
        ("FP32", [2**62, 4], b"1234", "impossible shape"),
        ("FP32", [0, 2**62], b"", "impossible shape"),
        ("FP32", [1] * 33, b"1234", "33 dimensions"),
        ("BYTES", [2**40], b"1234", "cannot hold"),
        ("BYTES", [1], b"\x05\0\0\0ab", "reaches beyond"),
        ("BYTES", [1], b"\x01\0\0\0ab", "1 bytes are left over"),
        ("BYTES", [2], b"\x04\0\0\0abcd\0\0", "ends before 2"),
    ],
)
def test_raw_bytes_that_do_not_fit_are_refused(datatype: str, shape: list[int], data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        tensors.from_bytes("x", datatype, shape, data)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "message"),
    [
        ("FP32", [3], b"[1, 2]", "2 elements in its data; its shape \\[3\\] takes 3"),
        ("FP32", [2], b'["1", "2"]', "Expected `float`, got `str`"),
        ("FP32", [2], b"3", "Expected `array`"),
        ("INT8", [1], b"[128]", "outside of INT8: -128 to 127"),
        ("UINT64", [1], b"[-1]", "outside of UINT64"),
        ("INT32", [1], b"[1.5]", "Expected `int`"),
        ("BOOL", [1], b"[1]", "Expected `bool`, got `int`"),
        ("BYTES", [1], b"[1]", "Expected `str`"),
        ("FP32", [2, 2], b"[[1, 2], [3]]", "not nested as its shape"),
        ("FP32", [2, 2], b"[[1, 2], [3, 4], [5, 6]]", "6 elements"),
        ("FP32", [2, 2], b"[[1, 2], 3]", "Expected `array`"),
        ("FP32", [4], b"[[1, 2], [3, 4]]", "Expected `float`, got `array`"),
        ("FP32", [1], b"[" * 100_000, "malformed|truncated|Expected|recursion"),
    ],
)
def test_json_that_does_not_fit_is_refused(datatype: str, shape: list[int], data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        tensors.from_json("x", datatype, shape, data)


def test_large_json_is_counted_before_it_is_read() -> None:
    many = b"[" + b"0, " * 100_000 + b"0]"
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=r"has 100001 elements in its data; its shape \[2, 3\] takes 6"):
            tensors.from_json("x", "FP32", [2, 3], many)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(many)
    finally:
        tracemalloc.stop()
    rows = b"[" + b", ".join([b"[1, 2]"] * 50_000) + b"]"
    assert tensors.from_json("x", "FP32", [50_000, 2], rows).sum() == 150_000


def test_large_integers_keep_all_digits() -> None:
    array = tensors.from_json("x", "UINT64", [2], b"[18446744073709551615, 9223372036854775809]")
    assert array.tolist() == [2**64 - 1, 2**63 + 1]


def test_bytes_that_are_not_text_have_no_json_form() -> None:
    array = np.array([b"\xff"], object)
    with pytest.raises(ValueError, match="ask for it as binary"):
        tensors.to_json("x", "BYTES", array)
    with pytest.raises(ValueError, match="holds int"):
        tensors.to_bytes("BYTES", np.array([1], object))
