"""The typed input of a graph program: its signature read once, then request bodies -> arguments.

What a program's parameters are annotated with decides what a request looks like (`App.endpoint` says how). msgspec
checks and converts; whatever does not fit is an `InvalidInput` that says where. Pure: no HTTP here beyond media types.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from rtml.errors import InvalidInput
from rtml.serving.bodies import Buffer

#: Arguments of one call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class ProgramInput:
    """How to make the arguments of one program from a request.

    Args:
        program: A function or remote function with annotated parameters.

    Raises:
        TypeError: the signature cannot be served (`*args`, positional-only or unresolvable annotations).
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        parameters, self.result = _signature(program)
        self._parameters = parameters
        raw = [name for name, (annotation, _) in parameters.items() if annotation is bytes or is_array(annotation)]
        #: The parameter that takes a body which is not JSON.
        self.raw = raw[0] if len(raw) == 1 else None
        #: Its elements if it is an array: bytes, unless the annotation says otherwise.
        self._raw_dtype: np.dtype[Any] | None = None
        if self.raw and is_array(parameters[self.raw][0]):
            self._raw_dtype = array_dtype(parameters[self.raw][0]) or np.dtype("u1")
        #: The one parameter that is the whole JSON body.
        self.whole = next((name for name, (kind, _) in parameters.items() if is_record(kind)), None)
        if len(parameters) != 1:
            self.whole = None
        self._struct = _struct(program, parameters)
        self._decoder: msgspec.json.Decoder[Any]
        if self.whole:
            self._decoder = msgspec.json.Decoder(parameters[self.whole][0], dec_hook=_decode_array)
        else:
            self._decoder = msgspec.json.Decoder(self._struct, dec_hook=_decode_array)
        self._beside = _struct(program, {name: kind for name, kind in parameters.items() if name != self.raw})

    def is_json(self, content_type: str) -> bool:
        """Whether a body of this type is read as JSON."""
        return self.raw is None or _is_json(content_type)

    def decode(self, content_type: str, body: Buffer, query: Mapping[str, str]) -> Call:
        """The arguments for one request.

        Args:
            content_type: The header as it came; "" without one.
            body: The whole body, decompressed.
            query: The query string; read only beside a raw body.

        Raises:
            InvalidInput: the request does not fit the signature.
        """
        if not self.is_json(content_type):
            assert self.raw is not None
            return (), {self.raw: self._read_raw(body), **self._read_query(query)}
        try:
            decoded = self._decoder.decode(body or b"{}")
        except msgspec.ValidationError as error:
            raise InvalidInput(str(error)) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the body is no JSON: {error}") from None
        if self.whole is not None:
            return (decoded,), {}
        return (), _given(decoded)

    @property
    def record(self) -> Any:
        """The annotation of the parameter that is the whole JSON body."""
        return None if self.whole is None else self._parameters[self.whole][0]

    def fields(self) -> dict[str, tuple[Any, bool]]:
        """What a request names: (annotation, required) of each parameter, or of each field of the one record."""
        if self.whole is None:
            return self._parameters
        fields = fields_of(self._parameters[self.whole][0])
        return {field.encode_name: (annotation, field.required) for field, annotation in fields}

    def convert(self, values: dict[str, Any]) -> Call:
        """The arguments from plain values by name, of which those with a default may be missing.

        Raises:
            InvalidInput: they do not fit the signature.
        """
        kind = self._struct if self.whole is None else self._parameters[self.whole][0]
        try:
            converted = msgspec.convert(values, kind, dec_hook=_decode_array)
        except msgspec.ValidationError as error:
            raise InvalidInput(str(error)) from None
        return ((), _given(converted)) if self.whole is None else ((converted,), {})

    def _read_raw(self, body: Buffer) -> Any:
        if self._raw_dtype is None:
            return bytes(body)
        try:
            return np.frombuffer(body, self._raw_dtype)
        except ValueError:
            raise InvalidInput(f"{len(body)} bytes are no whole number of {self._raw_dtype} elements") from None

    def _read_query(self, query: Mapping[str, str]) -> dict[str, Any]:
        try:
            # From text: "3" is a number where a number is asked for.
            return _given(msgspec.convert(dict(query), self._beside, strict=False, dec_hook=_decode_array))
        except msgspec.ValidationError as error:
            raise InvalidInput(f"{error} in the query string") from None


def _signature(program: Callable[..., Any]) -> tuple[dict[str, tuple[Any, bool]], Any]:
    """Name -> (annotation, required) of the program's parameters, and the annotation of what it returns."""
    function = inspect.unwrap(program)
    name = getattr(program, "__qualname__", repr(program))
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function)
    except (TypeError, ValueError, NameError) as error:
        raise TypeError(f"cannot read the signature of {name}: {error}") from error
    found = {}
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name} cannot be served: its parameter {parameter} has no name that a request can use")
        annotation = _spelled_out(hints.get(parameter.name, Any))
        found[parameter.name] = (annotation, parameter.default is parameter.empty)
    return found, _spelled_out(hints.get("return", Any))


def _spelled_out(annotation: Any) -> Any:
    """The annotation without the name of a `type` statement (from Python 3.12 on numpy's `NDArray` is one)."""
    origin = typing.get_origin(annotation)
    value = getattr(annotation if origin is None else origin, "__value__", None)
    if value is None or isinstance(annotation, type):
        return annotation
    return value if origin is None else value[typing.get_args(annotation)]


def _struct(program: Callable[..., Any], parameters: Mapping[str, tuple[Any, bool]]) -> type[msgspec.Struct]:
    """A struct of the parameters, in which those with a default may be missing."""
    fields: list[Any] = []
    for name, (annotation, required) in parameters.items():
        optional = (name, annotation | msgspec.UnsetType, msgspec.UNSET)
        fields.append((name, annotation) if required else optional)
    try:
        struct = msgspec.defstruct("Body", fields, kw_only=True, forbid_unknown_fields=True)
        msgspec.json.Decoder(struct, dec_hook=_decode_array)
    except TypeError as error:
        raise TypeError(f"cannot serve {getattr(program, '__qualname__', program)!r}: {error}") from error
    return struct


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def is_record(kind: Any) -> bool:
    """Whether an annotation is a type with named fields."""
    return isinstance(kind, type) and (
        issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)
    )


def fields_of(record: Any) -> list[tuple[Any, Any]]:
    """What msgspec knows of a record's fields (name, encode_name, required), and the annotation of each."""
    hints = typing.get_type_hints(record)
    order = list(hints)  # msgspec sorts those of a TypedDict
    fields = sorted(getattr(msgspec.inspect.type_info(record), "fields", ()), key=lambda field: order.index(field.name))
    return [(field, _spelled_out(hints.get(field.name, Any))) for field in fields]


def is_array(annotation: Any) -> bool:
    """Whether an annotation is a numpy array."""
    return annotation is np.ndarray or typing.get_origin(annotation) is np.ndarray


def array_dtype(annotation: Any) -> np.dtype[Any] | None:
    """The declared dtype of elements, if there is one: `NDArray[float32]` says float32."""
    for argument in typing.get_args(annotation):
        if typing.get_origin(argument) is np.dtype:
            (scalar,) = typing.get_args(argument)
            if isinstance(scalar, type) and issubclass(scalar, np.generic):
                return np.dtype(scalar)
    return None


def _given(decoded: msgspec.Struct) -> dict[str, Any]:
    """The fields that the request brought; the others keep the program's own defaults."""
    found = {name: getattr(decoded, name) for name in decoded.__struct_fields__}
    return {name: value for name, value in found.items() if value is not msgspec.UNSET}


def _decode_array(kind: Any, value: Any) -> Any:
    """The hook of msgspec for types it does not know: nested lists -> arrays. It adds the place to what is raised."""
    if not is_array(kind):
        raise NotImplementedError(f"requests cannot bring a {kind}")
    try:
        # Without a declared dtype numpy finds one.
        array = np.asarray(value, array_dtype(kind))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"not an array of numbers: {error}") from None
    if array.dtype.kind not in "biuf":
        raise ValueError("not an array of numbers")
    return array
