"""Many values into one: operations, and arrays that are folded block by block, in place, as far as they are there.

Numpy's operations work on arrays of equal shape, or on lists, tuples and dicts of arrays and numbers, alike at each
place. Functions of the user take two values and return one; any grouping and order must be right for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

#: Bytes of each operand that are folded at once: all of them together stay in a core's cache.
_BLOCK: Final = 128 * 1024

#: Names of operations, and numpy's for them.
_NAMES: Final = {
    "add": "add", "sum": "add", "mean": "add", "multiply": "multiply", "prod": "multiply", "minimum": "minimum",
    "min": "minimum", "maximum": "maximum", "max": "maximum", "logical_and": "logical_and", "all": "logical_and",
    "logical_or": "logical_or", "any": "logical_or", "logical_xor": "logical_xor", "bitwise_and": "bitwise_and",
    "bitwise_or": "bitwise_or", "bitwise_xor": "bitwise_xor", "fmin": "fmin", "fmax": "fmax",
}  # fmt: skip


class UnlikeError(Exception):
    """These cannot be folded as blocks of arrays: one is no array, or their shapes differ."""


class MisguessedError(UnlikeError):
    """They can, but what was begun before all of them were seen does not fit."""


class Operation(msgspec.Struct, frozen=True):
    """How two values become one."""

    name: str
    #: The user's; else numpy's of that name is meant.
    function: Callable[[Any, Any], Any] | None = None
    #: Blocks of arrays can be folded one by one.
    elementwise: bool = True

    @property
    def call(self) -> Callable[..., Any]:
        """What takes two arrays, or two values if it is not elementwise."""
        if self.function is not None:
            return self.function
        import numpy

        ufunc: Callable[..., Any] = getattr(numpy, _NAMES.get(self.name, self.name))
        return ufunc

    def partial(self, dtypes: Sequence[Any]) -> Any:
        """The dtype of a partial result of arrays of these dtypes."""
        import numpy

        dtype = numpy.result_type(*dtypes)
        if self.name == "mean" and self.function is None and dtype.kind in "biu":
            return numpy.dtype(numpy.float64)
        if len(dtypes) == 1 or self.function is not None:
            return dtype
        empty = numpy.empty(0, dtype)
        return numpy.asarray(self.call(empty, empty)).dtype

    def fold(self, values: Sequence[Any]) -> Any:
        """All of them, from left to right, as one."""
        result = values[0]
        for value in values[1:]:
            result = self._pair(result, value)
        return result

    def _pair(self, left: Any, right: Any) -> Any:
        if self.function is not None and not self.elementwise:
            return self.function(left, right)
        kind = type(left)
        if kind in (list, tuple, dict) and kind is type(right):
            if len(left) != len(right) or (kind is dict and left.keys() != right.keys()):
                raise ValueError(f"{self.name}: two {kind.__name__}s with different entries cannot be one")
            if kind is dict:
                return {name: self._pair(value, right[name]) for name, value in left.items()}
            return kind([self._pair(*both) for both in zip(left, right)])
        return self.call(left, right)

    def finish(self, value: Any, count: int) -> Any:
        """The result, of what `fold` has made of `count` values."""
        if self.name != "mean" or self.function is not None:
            return value
        kind = type(value)
        if kind is dict:
            return {name: self.finish(one, count) for name, one in value.items()}
        if kind in (list, tuple):
            return kind([self.finish(one, count) for one in value])
        return value / count


def operation(op: Any, elementwise: bool | None) -> Operation:
    """What the caller means by `op`.

    Raises:
        ValueError: there is no such operation, or it takes another number of operands.
        TypeError: it is nothing that can be called.
    """
    if isinstance(op, str):
        if op not in _NAMES:
            raise ValueError(f"no operation {op!r}; there are {', '.join(sorted(_NAMES))}, and functions of two values")
        return Operation(op)
    if not callable(op):
        raise TypeError(f"op is the name of an operation or a function of two values, not {type(op).__name__}")
    numbers = getattr(op, "nin", None), getattr(op, "nout", None)
    if type(op).__name__ == "ufunc":
        if numbers != (2, 1):
            raise ValueError(
                f"numpy.{op.__name__} takes {numbers[0]} arrays and gives {numbers[1]}: two and one are needed"
            )
        return Operation(op.__name__)
    return Operation(getattr(op, "__name__", type(op).__name__), op, bool(elementwise))


class Feed(Protocol):
    """An array that is there, or arriving."""

    @property
    def array(self) -> Any:
        """All of it; what has not arrived may be read as anything."""

    @property
    def flat(self) -> Any:
        """The same with one dimension."""

    def wait(self, at: int) -> int:
        """How many elements are there, as soon as those are more than `at`."""


class Whole:
    """An array that is there.

    Args:
        array: of any shape.
    """

    def __init__(self, array: Any) -> None:
        alike([array])
        self.array = array
        self.flat = array.reshape(-1)

    def wait(self, at: int) -> int:
        """All are."""
        return int(self.flat.size)


def fold_into(
    out: Any,
    feeds: Sequence[Feed],
    operation: Operation,
    divide: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fold arrays into `out` from front to back, each block as soon as it is there in all of them.

    Args:
        out: one-dimensional, of the dtype that is wanted.
        feeds: of the same length.
        operation: elementwise.
        divide: by what to divide at the end; 0: by nothing.
        progress: told how many elements are done.
    """
    import numpy

    total = out.size
    call, blocks = operation.call, operation.function is not None
    kind = {"dtype": out.dtype} if operation.name == "mean" and not blocks else {}  # sums must not overflow
    step = max(1, _BLOCK // max(1, out.itemsize))
    first, rest = feeds[0].flat, [feed.flat for feed in feeds[1:]]
    at = 0
    while at < total:
        upto = min([feed.wait(at) for feed in feeds])
        for low in range(at, upto, step):
            high = min(low + step, upto)
            piece = out[low:high]
            if not rest:
                piece[:] = first[low:high]
            elif blocks:
                value = first[low:high]
                for other in rest:
                    value = call(value, other[low:high])
                piece[:] = value
            else:
                call(first[low:high], rest[0][low:high], out=piece, **kind)
                for other in rest[1:]:
                    call(piece, other[low:high], out=piece, **kind)
            if divide:
                numpy.true_divide(piece, divide, out=piece)
        at = upto
        if progress is not None:
            progress(at)


def alike(arrays: Sequence[Any]) -> None:
    """Check that these can be folded as blocks.

    Raises:
        UnlikeError: they cannot.
    """
    import numpy

    for array in arrays:
        if type(array) is not numpy.ndarray or array.dtype.kind not in "biufcmM" or array.shape != arrays[0].shape:
            raise UnlikeError
