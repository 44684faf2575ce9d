"""Models whose rows depend on each other are found out; those that only look strange are not."""

from __future__ import annotations

import pytest

import rtml
from rtml.errors import RowsDepend
from tests.unit import tiny_onnx
from tests.unit.tiny_onnx import FLOAT, INT64, STRING, node, tensor, weight

pytest.importorskip("onnxruntime")


def one(op: str, *weights: tuple[str, list[int]], kind: int = FLOAT, width: tuple[str, ...] = ("W",)) -> bytes:
    """y = op(x, weights...)."""
    shape = ("N", *width)
    names = ["x", *(name for name, _ in weights)]
    constants = [weight(name, values) for name, values in weights]
    return tiny_onnx.model([node(op, names, ["y"])], [tensor("x", kind, shape)], [tensor("y", kind, shape)], constants)


DEPENDENT = {
    "each row is added to the next": (one("CumSum", ("axis", [0])), "output 'y' of a row changes with the rows"),
    "they come out sorted, once each": (one("Unique", kind=INT64, width=()), "output 'y' of"),
    "all in one": (one("ReduceSum", ("axis", [0])), "another shape"),
    "two for one": (one("Tile", ("times", [2, 1])), "does not have a row for each row"),
    "every row with every other": (
        tiny_onnx.model(
            [node("Transpose", ["x"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
            [tensor("x", FLOAT, ("N", 2))],
            [tensor("y", FLOAT, ("N", "M"))],
        ),
        "another shape",
    ),
    "one row is written into it": (one("Reshape", ("shape", [1, 3])), "takes one row, but not two"),
}

INDEPENDENT = {
    "numbers": tiny_onnx.doubler(("N", 3, "W")),
    "two inputs": tiny_onnx.sum_and_product(),
    "indices": tiny_onnx.picker(),
    "text": one("Identity", kind=STRING),
    "within a row": one("CumSum", ("axis", [1])),
    "chance": one("RandomNormalLike"),
    "only wide rows": one("Slice", ("starts", [40]), ("ends", [50]), ("axes", [1])),
    "nothing that can be made up": one("Gather", ("indices", [1 << 40])),
}


@pytest.mark.parametrize(("content", "reason"), DEPENDENT.values(), ids=DEPENDENT)
def test_dependent(content: bytes, reason: str) -> None:
    model = rtml.model(content, batch=4, check_rows=True)
    for _ in range(2):
        with pytest.raises(RowsDepend, match=f"calls of model 'model' cannot share a run: .*{reason}"):
            model.function.__rtml_load__()  # type: ignore[attr-defined]  # it is a Model


@pytest.mark.parametrize("content", INDEPENDENT.values(), ids=INDEPENDENT)
def test_independent(content: bytes) -> None:
    rtml.model(content, batch=4, check_rows=True).function.__rtml_load__()  # type: ignore[attr-defined]  # as above


def test_unless_asked_nothing_is_checked() -> None:
    content, _ = DEPENDENT["each row is added to the next"]
    rtml.model(content, batch=4).function.__rtml_load__()  # type: ignore[attr-defined]  # as above
