"""rtml.onnxfile: what an ONNX file says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtml.onnxfile import TensorInfo, describe
from tests.unit import tiny_onnx
from tests.unit.tiny_onnx import FLOAT, INT64, STRING, field, model, node, tensor


def test_inputs_and_outputs() -> None:
    info = describe(tiny_onnx.sum_and_product())
    assert info.inputs == (TensorInfo("a", "float32", (-1, 2)), TensorInfo("b", "float32", (-1, 2)))
    assert [output.name for output in info.outputs] == ["sum", "product"]


def test_properties() -> None:
    assert describe(tiny_onnx.picker()).properties == {"author": "somebody"}


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_onnx.doubler())
    assert describe(str(path)) == describe(tiny_onnx.doubler())


def test_weights_are_no_inputs() -> None:
    """Old files list the weights among the inputs."""
    data = model(
        [node("Gather", ["w", "x"], ["y"])],
        [tensor("w", INT64, (2,)), tensor("x", INT64, ("N",))],
        [tensor("y", INT64, ("N",))],
        weights=[tiny_onnx.weight("w", [1, 2])],
    )
    assert [each.name for each in describe(data).inputs] == ["x"]


def test_unknown_rank_and_strings() -> None:
    data = model([node("Identity", ["x"], ["y"])], [tensor("x", STRING, None)], [tensor("y", STRING, (0, "N"))])
    info = describe(data)
    assert info.inputs == (TensorInfo("x", "object", None),)
    assert info.outputs == (TensorInfo("y", "object", (-1, -1)),)


def test_what_is_no_tensor() -> None:
    sequence = field(1, "x") + field(2, field(4, field(1, tensor("", FLOAT, (1,)))))
    info = describe(model([], [sequence, tensor("f", 19, (2,)), tensor("z", 99, None)], []))
    assert info.inputs == (
        TensorInfo("x", "", None, "a sequence"),
        TensorInfo("f", "", (2,), "a tensor of float8e5m2"),
        TensorInfo("z", "", None, "a tensor of element type 99"),
    )


@pytest.mark.parametrize("data", [b"", b"\x00", b"hello, this is no model", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20])
def test_garbage(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"garbage\.onnx is no ONNX model"):
        describe(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        describe(str(tmp_path / "none.onnx"))


@given(st.data())
def test_damaged_files_raise_nothing_but_value_errors(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([tiny_onnx.picker(), tiny_onnx.sum_and_product()])))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        describe(bytes(whole[:cut]))
    except ValueError:
        pass
