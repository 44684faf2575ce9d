"""What a graph program returns, as the body of an HTTP answer: made in the executor that ran it.

A gateway unpickles nothing and has one core for everybody, so a program is served through a thin callable around it
(`served`) that encodes its result where it was made. The gateway forwards the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from rtml import codec
from rtml.client.functions import RemoteFunction
from rtml.codec.functions import import_path
from rtml.messages import Function

_MEDIA_TYPE = re.compile(r"[\w.+!#$&^-]+/[\w.+!#$&^*-]+( *;[ !-~]*)?", re.ASCII)

JSON = "application/json"
BYTES = "application/octet-stream"


class Content(NamedTuple):
    """A program's result that is a body already: ``return Content(png, "image/png")``."""

    body: bytes
    #: A media type, with parameters if need be: "text/html; charset=utf-8".
    type: str = BYTES


def to_content(value: Any) -> tuple[bytes, str]:
    """The body and media type for a result: bytes as they are, everything else as JSON (arrays as nested lists).

    Raises:
        TypeError: the value, or something in it, has no JSON form, or a `Content` holds no bytes.
        ValueError: the value has text that is no Unicode, or a `Content` has a type that is no media type.
    """
    if isinstance(value, Content):
        body, kind = value
        if not isinstance(body, bytes | bytearray | memoryview):
            raise TypeError(f"the body of a Content must be bytes, not {type(body).__name__}")
        if not isinstance(kind, str) or not _MEDIA_TYPE.fullmatch(kind):
            raise ValueError(f"the type of a Content must be a media type like 'image/png', not {kind!r}")
        return bytes(body), kind
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), BYTES
    return encode_json(value), JSON


def _encode_other(value: Any) -> Any:
    """The hook of msgspec for what it does not know: numpy's arrays and scalars."""
    to_list = getattr(value, "tolist", None)
    if to_list is None:
        raise TypeError(f"a result with a {type(value).__name__} in it cannot be answered as JSON")
    return to_list()


_encode = msgspec.json.Encoder(enc_hook=_encode_other).encode


def encode_json(value: Any) -> bytes:
    """JSON of plain data, structs, dataclasses and arrays.

    Raises:
        TypeError: the value, or something in it, has no JSON form.
        ValueError: it has text that is no Unicode, or contains itself.
    """
    try:
        return _encode(value)
    except UnicodeEncodeError as error:
        wrong = ascii(error.object[error.start : error.end][:10])
        raise ValueError(f"a result with text that is no Unicode ({wrong}) cannot be answered as JSON") from None
    except RecursionError:
        message = "a result that is nested so deeply, or contains itself, cannot be answered as JSON"
        raise ValueError(message) from None


class LargeBody(NamedTuple):
    """A request's JSON that the executor reads, so that the gateway's loop goes on meanwhile."""

    content_type: str
    #: Its bytes.
    body: Any


class Served:
    """A program whose result is encoded for HTTP. Pickles to the program's import path where it has one.

    Args:
        program: The plain function.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        functools.update_wrapper(self, program)
        self.program = program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        args, kwargs = self.arguments(args, kwargs)
        return to_content(self.program(*args, **kwargs))

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The program's own arguments: `args` and `kwargs`, or what stands in a `LargeBody`.

        Raises:
            InvalidInput: that does not fit.
        """
        if len(args) != 1 or not isinstance(args[0], LargeBody):
            return args, kwargs
        from rtml.serving.inputs import ProgramInput  # here: few programs ever need it

        return ProgramInput(self.program).decode(args[0].content_type, args[0].body.data, {})

    def __reduce__(self) -> tuple[Any, ...]:
        path = import_path(self.program)
        return (_load, (type(self), path)) if path else (type(self), (self.program,))


class ServedAsync(Served):
    """The same for an async program."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        args, kwargs = self.arguments(args, kwargs)
        return to_content(await self.program(*args, **kwargs))


class ServedStream(Served):
    """The same for a generator: each item is encoded for an event."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        args, kwargs = self.arguments(args, kwargs)
        for item in self.program(*args, **kwargs):
            yield to_content(item)


class ServedAsyncStream(Served):
    """The same for an async generator."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        args, kwargs = self.arguments(args, kwargs)
        async with contextlib.aclosing(self.program(*args, **kwargs)) as items:
            async for item in items:
                yield to_content(item)


def is_stream(program: Any) -> bool:
    """Whether a program, a function or remote function, is a generator, so that it has several answers."""
    function = getattr(program, "function", program)
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _load(kind: type[Served], path: str) -> Served:
    return kind(codec.load_function(Function(0, path, path), None))


def served(program: RemoteFunction[..., Any]) -> RemoteFunction[..., Any]:
    """The remote function to submit for a request to `program`: same options, result as body and media type.

    Raises:
        TypeError: it is a batch function, which takes and returns lists.
    """
    if program.defaults.batch or (program.overrides is not None and program.overrides.batch):
        raise TypeError(f"{program!r} is a batch function; serve a program that submits to it")
    asynchronous = codec.is_async(program.function)
    if is_stream(program):
        kind: type[Served] = ServedAsyncStream if asynchronous else ServedStream
    else:
        kind = ServedAsync if asynchronous else Served
    return RemoteFunction(kind(program.function), program.defaults, program.overrides)
