"""The test cases of the onnx package: models of one operator or a few, with inputs and the outputs they must give."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

#: Numpy types whose values BF16, FP16 ... carry; what the protocol has no name for is not among them.
_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "object": "BYTES",
    "bfloat16": "BF16",
}


class Case(NamedTuple):
    """A model, and what it must answer."""

    name: str
    model: bytes
    #: Input and output arrays, by name.
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    rtol: float
    atol: float


def datatype_of(array: Any) -> str:
    """The protocol's name for the array's type; "" if it has none."""
    return _DATATYPES.get(array.dtype.name if array.dtype.kind not in "US" else "object", "")


def node_cases() -> Iterator[Case]:
    """Those of single operators, made in memory by the package (takes seconds)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they overflow and divide by zero on purpose
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    for case in found:
        inputs, outputs = (case.data_sets or ())[0]
        yield _case(case.name, case.model, list(inputs), list(outputs), case.rtol, case.atol)


def file_cases() -> Iterator[Case]:
    """Those that lie in the package as files: several operators, and layers that PyTorch exported."""
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for kind in ("simple", "pytorch-operator", "pytorch-converted"):
        for directory in sorted((data / kind).iterdir()):
            if not (directory / "model.onnx").exists():
                continue
            model = onnx.load(directory / "model.onnx")
            first = directory / "test_data_set_0"
            inputs = _values(first, "input", model.graph.input)
            outputs = _values(first, "output", model.graph.output)
            yield _case(f"{kind}/{directory.name}", model, inputs, outputs, 1e-3, 1e-5)


def light_cases() -> Iterator[Case]:
    """Whole architectures with constant weights: every answer is the same, so they show that a model loads and runs."""
    data = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(data.glob("*.onnx")):
        model = onnx.load(path)
        (info,) = [i for i in model.graph.input if i.name not in {w.name for w in model.graph.initializer}]
        shape = [dimension.dim_value for dimension in info.type.tensor_type.shape.dim]
        size = int(np.prod(shape))
        output = path.with_name(f"{path.stem}_output_0.pb")
        expected = _value(output, model.graph.output[0])
        array = (np.arange(size).reshape(shape) / size).astype(np.float32)
        yield Case(path.stem, path.read_bytes(), {info.name: array}, {model.graph.output[0].name: expected}, 1e-3, 1e-5)


def _case(name: str, model: Any, inputs: list[Any], outputs: list[Any], rtol: float, atol: float) -> Case:
    weights = {weight.name for weight in model.graph.initializer}
    names = [info.name for info in model.graph.input if info.name not in weights]
    return Case(
        name.removeprefix("test_"),
        model.SerializeToString(),
        dict(zip(names, map(_array, inputs))),
        dict(zip([info.name for info in model.graph.output], map(_array, outputs))),
        rtol,
        atol,
    )


def _array(value: Any) -> Any:
    """Numpy's array of a tensor, of what it stands for; sequences and absent values stay what they are."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return value if value is None or isinstance(value, list | dict) else np.asarray(value)


def _values(directory: Path, what: str, infos: Any) -> list[Any]:
    paths = sorted(directory.glob(f"{what}_*.pb"), key=_number)
    return [_value(path, info) for path, info in zip(paths, infos)]


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _value(path: Path, info: Any) -> Any:
    """What is in a file of the package: a tensor, or something else, for which the text of its type stands."""
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        return [kind]
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def _texts(array: Any) -> list[bytes]:
    return [text if isinstance(text, bytes) else str(text).encode() for text in array.flat]


def same(found: Any, expected: Any, rtol: float, atol: float) -> bool:
    """Whether an answer is what the case wants, as the package's own runner compares them."""
    if not hasattr(found, "dtype") or not hasattr(expected, "dtype"):
        return False  # a sequence, or nothing
    if expected.dtype.kind in "OUS":
        return found.shape == expected.shape and _texts(found) == _texts(expected)
    if found.shape != expected.shape:
        return False
    if expected.dtype == ml_dtypes.bfloat16:
        expected = expected.astype(np.float32)
        rtol = max(rtol, 2**-7)
    if expected.dtype.kind in "biu":
        return bool((found == expected).all())
    with np.errstate(all="ignore"):
        return bool(np.allclose(found, expected, rtol, atol, equal_nan=True))
