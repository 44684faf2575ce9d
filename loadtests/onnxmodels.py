"""The models that load tests serve, rtml and peers alike: networks with seeded weights, written as ONNX files.

`four`: 4 numbers in and out, next to no work. `mlp`: 64 - 128 - 10, the size of a classifier of digits.
`wide`: 1,024 numbers through layers whose weights do not fit into a cache, some milliseconds: a run of eight rows takes
little longer than a run of one, so that batches pay. These are perceptrons. `heavy` is a convolutional network as those
for images, some ten milliseconds for each row: much more than a request costs the gateway. Its weights fit into a
core's own cache, so that two runs beside each other, or others' programs, do not slow it down much.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

#: Part of the files' names: another one when the models change.
EDITION: Final = 2
#: Widths of the layers, of each model; of `heavy` those at its ends.
WIDTHS: Final = {
    "four": (4, 4),
    "mlp": (64, 128, 10),
    "wide": (1024, *[2048] * 5, 1024),
    "heavy": (256, 10),
}
#: Of `heavy`: pixels of a side, channels, and layers; all but the first have the same weights.
_SIDE, _CHANNELS, _LAYERS = 16, 64, 112


def made(name: str) -> bytes:
    """A model as an ONNX file: input `x` float32 [N, first width], output `y` float32 [N, last width].

    Raises:
        KeyError: there is none of that name.
    """
    from onnx import TensorProto, checker, helper

    widths = WIDTHS[name]
    rng = np.random.default_rng(len(widths) * 1000 + widths[0])
    nodes, weights = _convolutions(widths[-1], rng) if name == "heavy" else _perceptron(widths, rng)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", widths[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", widths[-1]])
    graph = helper.make_graph(nodes, name, [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _perceptron(widths: Sequence[int], rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Nodes and weights of layers of these widths."""
    from onnx import helper

    nodes: list[Any] = []
    weights: list[Any] = []
    last = "x"
    for number, (rows, columns) in enumerate(pairwise(widths)):
        weights.append(_weight(f"w{number}", (rows, columns), rows, rng))
        output = "y" if number == len(widths) - 2 else f"h{number}"
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [output]))
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"r{number}"]))
        last = f"r{number}"
    return nodes, weights


def _convolutions(classes: int, rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Nodes and weights of a network that looks at `_SIDE` x `_SIDE` pixels."""
    from onnx import helper, numpy_helper

    weights = [
        numpy_helper.from_array(np.array([-1, 1, _SIDE, _SIDE], np.int64), "image"),
        _weight("first", (_CHANNELS, 1, 3, 3), 9, rng),
        _weight("inner", (_CHANNELS, _CHANNELS, 3, 3), 9 * _CHANNELS, rng),
        _weight("last", (_CHANNELS, classes), _CHANNELS, rng),
    ]
    nodes = [helper.make_node("Reshape", ["x", "image"], ["r0"])]
    for number in range(1, _LAYERS + 1):
        weight = "first" if number == 1 else "inner"
        nodes.append(helper.make_node("Conv", [f"r{number - 1}", weight], [f"h{number}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"]))
    nodes.append(helper.make_node("ReduceMean", [f"r{_LAYERS}"], ["mean"], axes=[2, 3], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["mean", "last"], ["y"]))
    return nodes, weights


def _weight(name: str, shape: tuple[int, ...], inputs: int, rng: np.random.Generator) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(rng.normal(0, (2 / inputs) ** 0.5, shape).astype(np.float32), name)


def file(name: str, folder: Path) -> Path:
    """The model's file in a folder, written if it is not there."""
    # One that an older commit has written may be another model.
    path = folder / f"{name}-{EDITION}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_bytes(made(name))
        new.rename(path)
    return path
