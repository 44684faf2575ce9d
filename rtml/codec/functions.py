"""Functions as definitions: by import path where the workers have the code, else by value.

An import path is "module:qualname", or "module:qualname:attribute" where the module's name is bound to a wrapper (a
decorated task) that keeps the function itself in that attribute.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Callable
from typing import Any, Final

from rtml.codec.values import MakeHandle, decode_value, encode_value
from rtml.errors import SerializationError
from rtml.messages import Function, ObjectRef, Options
from rtml.store import Store

#: Where a wrapper may keep the function that it wraps.
_WRAPPED: Final = ("function", "__wrapped__")

#: Attribute of callables whose calls count for as many items as their arrays have rows.
ROWS: Final = "__rtml_rows__"

#: Coroutines and async generators.
_CO_ASYNC: Final = 0x80 | 0x200


def describe_function(
    function: Callable[..., Any],
    options: Options,
    store: Store | None = None,
    future_type: type | None = None,
    handles: list[int] | None = None,
) -> Function:
    """The definition of any callable: function, lambda, closure, method, partial, class, callable object.

    Args:
        function: what to call.
        options: the defaults of its tasks.
        store: takes a definition larger than `INLINE_MAX` (big arrays in a closure); None keeps it inline.
        future_type: its instances in closures travel as handles.
        handles: if given, the ids of those are appended to it: they must stay alive as long as the definition is used.

    Raises:
        SerializationError: neither importable nor picklable; the message names the captured part.
    """
    name = options.name or function_name(function)
    ref = import_path(function)
    pickled: bytes | ObjectRef = b""
    if not ref:
        encoded = encode_value(function, store, future_type, what=f"the function {name!r}")
        pickled = encoded.payload
        if handles is not None:
            handles.extend(encoded.handles)
    described = Function(0, name, ref, pickled, is_async(function), options, getattr(function, ROWS, False) is True)
    described.id = function_id(described)
    return described


def function_id(function: Function) -> int:
    """63 bits that name the definition: a hash of all of it but its id. Never 0."""
    parts = (function.name, function.ref, function.pickled, function.asynchronous, function.options, function.rows)
    if function.method:
        parts += (function.method,)  # type: ignore[assignment]
    content = repr(parts)
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) or 1


def describe_method(name: str, method: str, options: Options, concurrent: bool = False) -> Function:
    """The definition of the method `method` of any actor; `concurrent` ones may be called out of order."""
    described = Function(0, name, options=options, method=method, asynchronous=concurrent)
    described.id = function_id(described)
    return described


def load_function(function: Function, store: Store | None, make_handle: MakeHandle | None = None) -> Callable[..., Any]:
    """The callable of a definition.

    Raises:
        SerializationError: it cannot be imported or unpickled in this process.
        ObjectLost: its pickle is gone from the store.
    """
    if not function.ref:
        loaded = decode_value(function.pickled, store, make_handle)
    else:
        module, qualname, *wrapper = function.ref.split(":")
        try:
            found: Any = importlib.import_module(module)
            for attribute in (*qualname.split("."), *wrapper):
                found = getattr(found, attribute)
        except Exception as error:
            raise SerializationError(
                f"the worker cannot import {function.ref}: {type(error).__name__}: {error}."
                " Is the same code installed there, on its sys.path?"
            ) from error
        loaded = found
    if not callable(loaded):
        raise SerializationError(f"{function.name} is no callable but a {type(loaded).__name__}")
    return loaded  # type: ignore[no-any-return]


def function_name(function: Callable[..., Any]) -> str:
    """What to show of a callable, like "Reader.read" or "crop"."""
    if isinstance(function, functools.partial):
        return function_name(function.func)
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or type(function).__qualname__
    # Python takes any text for a name; the wire takes what can be encoded.
    return str(name).rpartition("<locals>.")[2].encode(errors="replace").decode()


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it makes a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    if _has_coroutine_code(function):
        return True
    return not isinstance(function, type) and _has_coroutine_code(vars(type(function)).get("__call__"))


def _has_coroutine_code(function: Any) -> bool:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is not None and bool(code.co_flags & _CO_ASYNC)


def import_path(function: Any) -> str:
    """Under which path another process finds the very same function; "" if there is none."""
    module_name = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(module_name, str) or not isinstance(qualname, str) or "<" in qualname:
        return ""
    module = sys.modules.get(module_name)
    if module_name == "__main__" or module is None or getattr(module, "__spec__", None) is None:
        return ""
    if _is_by_value(module_name):
        return ""
    found: Any = module
    for attribute in qualname.split("."):
        found = getattr(found, attribute, None)
    path = f"{module_name}:{qualname}"
    if found is function:
        return path
    for attribute in _WRAPPED:
        if getattr(found, attribute, None) is function:
            return f"{path}:{attribute}"
    return ""


def _is_by_value(module_name: str) -> bool:
    """Whether the user asked cloudpickle to carry this module's code along."""
    cloudpickle = sys.modules.get("cloudpickle")
    if cloudpickle is None:
        return False
    registered = cloudpickle.list_registry_pickle_by_value()
    return any(module_name == name or module_name.startswith(f"{name}.") for name in registered)
