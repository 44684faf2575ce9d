"""Graph programs as models of the Open Inference Protocol: what their type hints mean as tensors. Pure.

Each parameter (of a program whose one parameter is a record: each field of it) is an input, each field of a returned
record an output; anything else that is returned is the one output "output":

    bool, int, float            BOOL, INT64, FP64 of shape [1]
    str, bytes, Content         BYTES of shape [1]
    list, tuple, set of these   the same of shape [-1]
    NDArray[numpy.float32]      FP32, ..., of any number of dimensions
    numpy.ndarray               UINT8 as an input (bytes of a picture), FP64 as an output
    everything else             BYTES of shape [1]: JSON text

An input with a default may be left out. What the tensors hold is then checked by the annotations, as JSON would be.
A generator's answers are its items, so its outputs are those of what it yields.
"""

from __future__ import annotations

import types
import typing
from collections import abc
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from rtml.errors import InvalidInput
from rtml.serving import tensors
from rtml.serving.app import TensorSpec
from rtml.serving.inputs import Call, ProgramInput, array_dtype, fields_of, is_array, is_record
from rtml.serving.results import Content, encode_json, is_stream
from rtml.serving.tensors import Array

#: What an output is called that has no name of its own.
OUTPUT: Final = "output"

_SCALARS: Final = {bool: "BOOL", int: "INT64", float: "FP64", str: "BYTES", bytes: "BYTES"}
_STREAMS: Final = (
    abc.Iterator, abc.Iterable, abc.Generator, abc.AsyncIterator, abc.AsyncIterable, abc.AsyncGenerator,
)  # fmt: skip
_LISTS: Final = (list, tuple, set, frozenset, abc.Sequence, abc.Iterable)


class Field(NamedTuple):
    """One tensor of a program, and what it means."""

    spec: TensorSpec
    #: "array", "scalar", "list", "json", "content".
    kind: str
    #: Of a scalar, or of a list's elements: the type.
    element: type = bytes


def field_of(name: str, annotation: Any, *, optional: bool = False, untyped: str = "UINT8") -> Field:
    """The tensor for an annotation.

    Args:
        name: Of the tensor.
        annotation: What the program says.
        optional: Whether a request may leave it out.
        untyped: The datatype of arrays that do not say theirs.
    """
    inner = _without_none(annotation)
    if is_array(inner):
        dtype = array_dtype(inner)
        datatype = untyped if dtype is None else _datatype(dtype)
        if datatype is not None:
            return Field(TensorSpec(name, datatype, None, optional), "array")
    elif inner is Content:
        return Field(TensorSpec(name, "BYTES", (1,), optional), "content")
    elif inner in _SCALARS:
        # A result that may be None is an empty tensor then.
        shape = (1,) if inner is annotation else (-1,)
        return Field(TensorSpec(name, _SCALARS[inner], shape, optional), "scalar", inner)
    elif typing.get_origin(inner) in _LISTS:
        elements = {argument for argument in typing.get_args(inner) if argument is not Ellipsis}
        if len(elements) == 1 and (element := elements.pop()) in _SCALARS:
            return Field(TensorSpec(name, _SCALARS[element], (-1,), optional), "list", element)
    return Field(TensorSpec(name, "BYTES", (1,), optional), "json")


class ProgramTensors:
    """How tensors become the arguments of one program, and its result tensors.

    Args:
        program: A function or remote function with annotated parameters.

    Raises:
        TypeError: the signature cannot be served, as `ProgramInput` says.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        self._input = ProgramInput(program)
        self._inputs = {
            name: field_of(name, annotation, optional=not required)
            for name, (annotation, required) in self._input.fields().items()
        }
        #: It has several answers.
        self.stream = is_stream(program)
        result = _item_of(self._input.result) if self.stream else self._input.result
        #: A record's outputs are its fields.
        self._outputs: dict[str, Field] | None = None
        if is_record(result):
            self._outputs = {
                field.encode_name: field_of(field.encode_name, annotation, untyped="FP64")
                for field, annotation in fields_of(result)
            }
        self._output = field_of(OUTPUT, result, untyped="FP64")
        self.inputs = tuple(field.spec for field in self._inputs.values())
        self.outputs = tuple(field.spec for field in (self._outputs or {OUTPUT: self._output}).values())

    def call(self, arrays: dict[str, Array]) -> Call:
        """The arguments for a request's tensors.

        Raises:
            InvalidInput: they do not fit the program's annotations.
        """
        return self._input.convert({name: _value(self._inputs[name], array) for name, array in arrays.items()})

    def results(self, value: Any) -> dict[str, Array]:
        """The tensors for what the program returned, or yielded.

        Raises:
            TypeError, ValueError: it is not what its annotation says.
        """
        if self._outputs is None:
            return {OUTPUT: _array(self._output, value)}
        found = value if isinstance(value, dict) else {name: getattr(value, name) for name in self._outputs}
        return {name: _array(field, found[name]) for name, field in self._outputs.items() if name in found}


def _value(field: Field, array: Array) -> Any:
    """What an input's tensor says, as plain data."""
    name, kind = field.spec.name, field.kind
    if kind == "array":
        return array
    if kind == "list":
        return [_text(name, element) for element in array.ravel().tolist()] if field.element is str else array.tolist()
    if array.size != 1:
        if array.size == 0 and kind == "scalar" and field.spec.shape == (-1,):
            return None
        raise InvalidInput(f"input {name!r} is one value, so its tensor must have one element, not {array.size}")
    element = array.ravel()[0]
    if kind == "scalar":
        if field.element is str:
            return _text(name, element)
        return element if field.element is bytes else element.item()
    try:
        return msgspec.json.decode(element)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"input {name!r} is JSON text, but: {error}") from None


def _text(name: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"input {name!r} is text, but its bytes are not UTF-8") from None


def _array(field: Field, value: Any) -> Array:
    """A result, or a field of it, as its tensor."""
    if field.kind == "array":
        return np.asarray(value)
    if field.kind == "json":
        elements = [encode_json(value)]
    elif field.kind == "content":
        # A tuple in the program, a list when it came as data.
        elements = [bytes(value[0])]
    elif field.kind == "list":
        elements = list(value)
    else:
        elements = [] if value is None else [value]
    if field.spec.datatype == "BYTES":
        array: Array = np.empty(len(elements), object)
        array[:] = elements
        return array
    try:
        return np.array(elements, tensors.DTYPES[field.spec.datatype])
    except (TypeError, ValueError, OverflowError) as error:
        name, datatype, *_ = field.spec
        raise ValueError(f"output {name!r} is declared as {datatype}, but the program returned: {error}") from None


def _item_of(annotation: Any) -> Any:
    """`X` of `Iterator[X]` and the like."""
    arguments = typing.get_args(annotation)
    return arguments[0] if arguments and typing.get_origin(annotation) in _STREAMS else Any


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation


def _datatype(dtype: np.dtype[Any]) -> str | None:
    try:
        return tensors.datatype_of(dtype)
    except ValueError:
        return None
