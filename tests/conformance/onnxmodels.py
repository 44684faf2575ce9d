"""A model repository of small models, made with the onnx package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.unit import tiny_onnx

#: Datatype -> a row that holds its extremes.
ROWS = {
    "BOOL": np.array([True, False]),
    "UINT8": np.array([0, 255], "u1"),
    "UINT16": np.array([0, 65535], "u2"),
    "UINT32": np.array([0, 2**32 - 1], "u4"),
    "UINT64": np.array([0, 2**64 - 1], "u8"),
    "INT8": np.array([-128, 127], "i1"),
    "INT16": np.array([-(2**15), 127], "i2"),
    "INT32": np.array([-(2**31), 127], "i4"),
    "INT64": np.array([-(2**63), 127], "i8"),
    "FP16": np.array([-1.5, 65504], "f2"),
    "FP32": np.array([-1.5, 3.4e38], "f4"),
    "FP64": np.array([-1.5, 1e300], "f8"),
    "BYTES": np.array([b"", "a\0é".encode()], object),
    "BF16": np.array([-1.5, 2.0**100], ml_dtypes.bfloat16),
    #: Not of ONNX, whose strings are text.
    "RAW": np.array([b"\0", b"\xff\0"], object),
}

_ELEMENTS = {
    "UINT8": TensorProto.UINT8,
    "BOOL": TensorProto.BOOL,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}


def write(repository: Path) -> None:
    """`same_DATATYPE`: its input, of shape [N, 2]. `double`: twice its input of shape [N, 4], version 1: once.

    `sum`, of shape [N, 1]: the sum of all inputs of a sequence.
    """
    (repository / "sum" / "1").mkdir(parents=True)
    (repository / "sum" / "1" / "model.onnx").write_bytes(tiny_onnx.accumulator())
    (repository / "sum" / "config.pbtxt").write_text(
        "max_batch_size: 8\nsequence_batching { oldest { max_candidate_sequences: 64 } max_sequence_idle_microseconds: "
        '60000000 state { input_name: "s" output_name: "t" dims: 1 data_type: TYPE_FP32 } }\n'
    )
    for datatype, element in _ELEMENTS.items():
        _put(repository, f"same_{datatype}", "1", _model(element, 2, [helper.make_node("Identity", ["x"], ["y"])]))
    factor = numpy_helper.from_array(np.array(1, "f4"), "factor"), numpy_helper.from_array(np.array(2, "f4"), "factor")
    for version, weight in zip("12", factor, strict=True):
        made = _model(TensorProto.FLOAT, 4, [helper.make_node("Mul", ["x", "factor"], ["y"])], [weight])
        _put(repository, "double", version, made)
    (repository / "double" / "config.pbtxt").write_text(
        "max_batch_size: 8\ndynamic_batching {}\nversion_policy { all {} }\n"
    )


def _model(element: int, width: int, nodes: list[Any], weights: list[Any] | None = None) -> bytes:
    x, y = (helper.make_tensor_value_info(name, element, ["N", width]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], weights or [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = made.SerializeToString()
    return content


def _put(repository: Path, model: str, version: str, content: bytes) -> None:
    path = repository / model / version / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
