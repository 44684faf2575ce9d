"""Finding the part of a value that cannot be pickled, for a message that helps. Only runs after a failure."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from rtml.codec import data
from rtml.codec.pickling import SCALARS, Pickled, dump
from rtml.errors import SerializationError

_DEPTH_MAX: Final = 12
_CHILDREN_MAX: Final = 1000
_REPR_MAX: Final = 80

_ALLOWED: Final = (
    "Endpoint results must be made of None, bool, int (of 64 bits), float, str, bytes, list, tuple, dict, set, date and"
    " time, UUID, Decimal, Enum, msgspec.Struct, dataclass, and numpy arrays of these."
)


def cannot_pickle(what: str, value: Any, error: BaseException, future_type: type | None) -> SerializationError:
    """The error for `value`, which `what` names ("argument 1", "the result"), and whose pickling raised `error`."""

    def fails(part: Any) -> BaseException | None:
        return None if type(part) in SCALARS else failure(part, future_type)

    path, culprit, reason = _deepest(value, fails, _children)
    message = f"{what} cannot be pickled: {_say(reason or error)}"
    if path:
        message += f" - at {path.removeprefix(', ')} of the {type(value).__name__}: {short(culprit)}"
    elif culprit is not None:
        message += f" - {short(culprit)}"
    return SerializationError(message)


def no_data(what: str, value: Any, error: BaseException) -> SerializationError:
    """The error for `value`, which somebody wants who unpickles nothing, and which is not made of data alone."""
    if isinstance(error, RecursionError):
        return SerializationError(f"{what} is nested too deeply")
    path, culprit, reason = _deepest(value, _data_failure, _data_children)
    message = f"{what} is no plain data: {reason or error}"
    if path:
        message += f" - at {path} of the {type(value).__name__}: {short(culprit)}"
    return SerializationError(f"{message}. {_ALLOWED}")


def _data_failure(value: Any) -> BaseException | None:
    try:
        data.place(value, None)
    except Exception as error:  # noqa: BLE001 - properties of user classes raise anything
        return error
    return None


def failure(value: Any, future_type: type | None) -> BaseException | None:
    """What pickling the value raises, or None."""
    try:
        dump(value, Pickled(), future_type)
    except Exception as error:  # noqa: BLE001 - __reduce__ of user classes raises anything
        return error
    return None


def _deepest(
    value: Any,
    fails: Callable[[Any], BaseException | None],
    children: Callable[[Any], Iterator[tuple[str, Any]]],
) -> tuple[str, Any, BaseException | None]:
    """Follow the first child that fails too, down to one whose children do not."""
    path = ""
    reason: BaseException | None = None
    seen = {id(value)}
    for _ in range(_DEPTH_MAX):
        for step, child in children(value):
            if id(child) in seen:
                continue
            found = fails(child)
            if found is not None:
                seen.add(id(child))
                path, value, reason = path + step, child, found
                break
        else:
            break
    return path, value, reason


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """The direct parts of a value that its pickle would contain, each with how to say where it is."""
    if isinstance(value, dict):
        for key, child in list(value.items())[:_CHILDREN_MAX]:
            yield f"[{short(key)}]", child
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, child in enumerate(list(value)[:_CHILDREN_MAX]):
            yield f"[{index}]", child
    elif isinstance(value, types.FunctionType):
        yield from _captured(value)
    elif isinstance(value, (types.MethodType, types.MethodWrapperType, types.BuiltinMethodType)):
        yield ".__self__", value.__self__
    elif not isinstance(value, type):
        for name, child in list(getattr(value, "__dict__", {}).items())[:_CHILDREN_MAX]:
            yield f".{name}", child
        if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
            yield ".func", value.func
            yield ".args", value.args
            yield ".keywords", value.keywords


def _data_children(value: Any) -> Iterator[tuple[str, Any]]:
    """The direct parts of a value that is data but for its parts."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        yield from _children(value)
    elif not isinstance(value, type) and (isinstance(value, msgspec.Struct) or dataclasses.is_dataclass(value)):
        fields: Any = value.__struct_fields__ if isinstance(value, msgspec.Struct) else value.__dataclass_fields__
        for name in fields:
            yield f".{name}", getattr(value, name, None)


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield f", captured variable {name!r}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f", global {name!r}", function.__globals__[name]
    yield ", default arguments", function.__defaults__
    yield ", default arguments", function.__kwdefaults__


def _say(error: BaseException) -> str:
    text = str(error)
    return text if text.startswith("cannot") else f"{type(error).__name__}: {text}"


def short(value: Any) -> str:
    """The beginning of its repr."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a broken __repr__ must not hide the error
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _REPR_MAX else text[: _REPR_MAX - 3] + "..."
