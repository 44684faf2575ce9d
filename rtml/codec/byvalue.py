"""What cloudpickle does not carry by value, or carries wrongly, though the programs of users are full of it.

All of these are pickled by their name in a module that workers can import. These are for those that have no such name:
they are defined in `__main__`, in a notebook, or inside a function.
"""

from __future__ import annotations

import abc
import functools
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Final

#: The function of cloudpickle that makes a class of a pickle by value; its fourth argument is the class's namespace.
_SKELETON: Final = "_make_skeleton_class"
_NAMESPACE: Final = 3

#: The code of what `functools.singledispatch` makes.
_DISPATCHES: Final = getattr(functools.singledispatch(len), "__code__")  # noqa: B009 - a function, which typeshed does not know
#: The type of what `functools.lru_cache` and `functools.cache` make.
CACHED: Final = type(functools.lru_cache(len))


def reduction(value: Any) -> Any:
    """How to pickle something that is no class, as its `__reduce__` would say it; None: as cloudpickle does."""
    kind = type(value)
    if kind is types.FunctionType:
        if value.__code__ is _DISPATCHES and not has_name(value):
            return _dispatching, (value.registry[object], list(value.registry.items()))
        return None
    if kind is functools.cached_property:
        # It has a lock (Python 3.11), or at least state that belongs to the class's copy.
        return _property, (value.func, value.attrname)
    if kind is CACHED and not has_name(value):
        parameters = value.cache_parameters()
        return _cached, (value.__wrapped__, parameters["maxsize"], parameters["typed"])
    if kind is typing.NewType and not has_name(value):
        return _new_type, (value.__qualname__, value.__supertype__, value.__module__)
    return None


def with_slots(value: type, reduced: Any) -> Any:
    """The reduction of a class by cloudpickle, which forgets `__slots__`: its copies would get a `__dict__` instead."""
    if isinstance(reduced, tuple) and getattr(reduced[0], "__name__", "") == _SKELETON:
        slots = vars(value).get("__slots__")
        # Empty ones hold nothing, and a `NamedTuple` must not name them. Other metaclasses make their own.
        if slots and type(value) in (type, abc.ABCMeta):
            reduced[1][_NAMESPACE]["__slots__"] = slots
    return reduced


def has_name(value: Any) -> bool:
    """Whether other processes find it by its module and name."""
    module = value.__module__
    if module == "__main__":
        return False
    found: Any = sys.modules.get(module)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


def _cached(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _dispatching(function: Callable[..., Any], implementations: list[tuple[type, Callable[..., Any]]]) -> Any:
    made = functools.singledispatch(function)
    for kind, implementation in implementations:
        made.register(kind, implementation)
    return made


def _property(function: Callable[[Any], Any], name: str | None) -> functools.cached_property[Any]:
    made = functools.cached_property(function)
    made.attrname = name
    return made


def _new_type(qualname: str, supertype: Any, module: str) -> Any:
    new_type: Any = typing.NewType
    made = new_type(qualname, supertype)
    made.__module__ = module
    return made
