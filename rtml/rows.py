"""Whether a model's rows can be joined: does what comes out for a row depend on the rows beside it?

An open first dimension of inputs and outputs is a batch in most models, but time, points or words in others, and some
compute over the whole batch. Their files look the same, and joining the calls of strangers would give each a wrong
answer without a word. So such a model is tried: made-up rows alone, and the same rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from rtml.onnxfile import TensorInfo

Array = np.ndarray[Any, Any]
#: Runs the model on inputs by name; an exception is why it could not.
Run = Callable[[dict[str, Array]], dict[str, Array] | Exception]

#: What stands for the open dimensions behind the first, until the model takes it.
_SIZES: Final = (3, 1, 32, 64)
#: Elements of the inputs together: larger ones are not tried.
_ELEMENTS_MAX: Final = 1 << 22
#: Of the largest number of an output: sums in another order differ by less.
_TOLERANCE: Final = 1e-3


def dependence(inputs: Sequence[TensorInfo], run: Run) -> str:
    """Why the rows of a model cannot be joined; "" if they can, or if the model takes none of what is made up here.

    Args:
        inputs: The model's; the first dimension of all is open.
        run: Runs it.
    """
    for size in _SIZES:
        pair = _made(inputs, size)
        if pair is None:
            continue
        alone = [run({name: array[row : row + 1] for name, array in pair.items()}) for row in (0, 1)]
        if any(isinstance(outputs, Exception) for outputs in alone):
            continue
        together = run(pair)
        if isinstance(together, Exception):
            return f"it takes one row, but not two: {together}"
        reason = _difference(alone, together)
        if reason:
            again = run(pair)
            by_chance = isinstance(again, Exception) or not all(map(_alike, together.values(), again.values()))
            return "" if by_chance else reason
        return ""
    return ""


def _made(inputs: Sequence[TensorInfo], size: int) -> dict[str, Array] | None:
    """Two rows that differ; None if that cannot be made."""
    random = np.random.default_rng(1)
    made: dict[str, Array] = {}
    for tensor in inputs:
        shape = (2, *(size if dimension < 0 else dimension for dimension in (tensor.shape or ())[1:]))
        dtype = np.dtype({"bfloat16": "float32"}.get(tensor.dtype, tensor.dtype or "void"))
        if sum(array.size for array in made.values()) + np.prod(shape, dtype=object) > _ELEMENTS_MAX:
            return None
        if dtype.kind == "f":
            made[tensor.name] = random.standard_normal(shape).astype(dtype)
        elif dtype.kind in "biuO":
            # Small numbers are indices of everything. The second row is the opposite of the first.
            first = random.integers(0, 2, shape[1:])
            first.flat[:1] = 1
            numbers = np.stack((first, 1 - first))
            made[tensor.name] = (
                np.where(numbers, "b", "a").astype(object) if dtype.kind == "O" else numbers.astype(dtype)
            )
        else:
            return None
    return made


def _difference(parts: Sequence[Any], whole: Any) -> str:
    """What is different between the outputs of one row each, and those of all of them together."""
    for name, found in whole.items():
        rows = [part[name] for part in parts]
        if not all(isinstance(row, np.ndarray) and row.ndim and len(row) == 1 for row in rows):
            return f"output {name!r} does not have a row for each row that goes in"
        if found.ndim == 0 or len(found) != len(rows) or any(row.shape[1:] != found.shape[1:] for row in rows):
            return f"output {name!r} of two rows has another shape than those of one row each"
        if not _alike(np.concatenate(rows), found):
            return f"output {name!r} of a row changes with the rows beside it"
    return ""


def _alike(expected: Array, found: Array) -> bool:
    if expected.shape != found.shape:
        return False
    if expected.dtype.kind != "f":
        return bool(np.array_equal(expected, found))
    finite = expected[np.isfinite(expected)].astype(np.float64)
    near = _TOLERANCE * max(float(np.abs(finite).max()) if finite.size else 0.0, 1e-6)
    return bool(np.allclose(found.astype(np.float64), expected.astype(np.float64), 0.0, near, equal_nan=True))
