"""The models that load tests serve, rtml and peers alike: perceptrons with seeded weights, written as ONNX files.

`four`: 4 numbers in and out, next to no work. `mlp`: 64 - 128 - 10, the size of a classifier of digits.
`wide`: 1,024 numbers through layers whose weights do not fit into a cache, some milliseconds: a run of eight rows takes
little longer than a run of one, so that batches pay. `heavy`: one layer's weights over and over, ten milliseconds for
each row: much more than a request costs the gateway.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

#: Widths of the layers, of each model.
WIDTHS: Final = {
    "four": (4, 4),
    "mlp": (64, 128, 10),
    "wide": (1024, *[2048] * 5, 1024),
    "heavy": (256, *[1024] * 200, 256),
}
#: Models whose inner layers are all the same.
_SHARED: Final = ("heavy",)


def made(name: str) -> bytes:
    """A model as an ONNX file: input `x` float32 [N, first width], output `y` float32 [N, last width].

    Raises:
        KeyError: there is none of that name.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    widths = WIDTHS[name]
    rng = np.random.default_rng(len(widths) * 1000 + widths[0])
    nodes: list[Any] = []
    weights: list[Any] = []
    names: set[str] = set()
    last = "x"
    for number, (rows, columns) in enumerate(pairwise(widths)):
        weight = f"w{number}"
        if name in _SHARED and rows == columns:
            weight = "inner"
        if weight not in names:
            values = rng.normal(0, (2 / rows) ** 0.5, (rows, columns)).astype(np.float32)
            weights.append(numpy_helper.from_array(values, weight))
            names.add(weight)
        output = "y" if number == len(widths) - 2 else f"h{number}"
        nodes.append(helper.make_node("MatMul", [last, weight], [output]))
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"r{number}"]))
        last = f"r{number}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", widths[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", widths[-1]])
    graph = helper.make_graph(nodes, name, [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def file(name: str, folder: Path) -> Path:
    """The model's file in a folder, written if it is not there."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_bytes(made(name))
        new.rename(path)
    return path
