"""Finding the part of a value that cannot be pickled, for a message that helps. Only runs after a failure."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Final

from rtml.codec.pickling import SCALARS, Pickled, dump
from rtml.errors import SerializationError

_DEPTH_MAX: Final = 12
_CHILDREN_MAX: Final = 1000
_REPR_MAX: Final = 80


def cannot_pickle(what: str, value: Any, error: BaseException, future_type: type | None) -> SerializationError:
    """The error for `value`, which `what` names ("argument 1", "the result"), and whose pickling raised `error`."""
    path, culprit, reason = _deepest(value, future_type)
    message = f"{what} cannot be pickled: {_say(reason or error)}"
    if path:
        message += f" - at {path} of the {type(value).__name__}: {short(culprit)}"
    elif culprit is not None:
        message += f" - {short(culprit)}"
    return SerializationError(message)


def failure(value: Any, future_type: type | None) -> BaseException | None:
    """What pickling the value raises, or None."""
    try:
        dump(value, Pickled(), future_type)
    except Exception as error:  # noqa: BLE001 - __reduce__ of user classes raises anything
        return error
    return None


def _deepest(value: Any, future_type: type | None) -> tuple[str, Any, BaseException | None]:
    """Follow the first child that cannot be pickled either, down to one whose children can."""
    path = ""
    reason: BaseException | None = None
    seen = {id(value)}
    for _ in range(_DEPTH_MAX):
        for step, child in _children(value):
            if type(child) in SCALARS or id(child) in seen:
                continue
            found = failure(child, future_type)
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


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield f", its captured variable {name!r}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f", its global {name!r}", function.__globals__[name]
    yield ", its default arguments", function.__defaults__
    yield ", its default arguments", function.__kwdefaults__


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
