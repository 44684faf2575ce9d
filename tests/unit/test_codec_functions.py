"""Functions of every kind as definitions: by import path, by value, and from the main module of another process."""

from __future__ import annotations

import functools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtml import codec
from rtml.codec.functions import import_path
from rtml.errors import SerializationError
from rtml.messages import INLINE_MAX, Function, ObjectRef, Options
from rtml.store import Store


class Handle:
    """As much of a future as the codec sees."""

    def __init__(self, number: int) -> None:
        self.id = number


def plain(x: int) -> int:
    return x + 1


async def coroutine(x: int) -> int:
    return x


def wrapped_by_user(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args) * 10

    return wrapper


@wrapped_by_user
def decorated(x: int) -> int:
    return x + 1


class Remote:
    """A wrapper as the client's decorator makes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("the wrapper itself must not be called")


@Remote
def remote(x: int) -> int:
    return x + 2


class Machine:
    def __init__(self, start: int) -> None:
        self.start = start

    def method(self, x: int) -> int:
        return self.start + x

    @classmethod
    def of_class(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    @staticmethod
    def static(x: int) -> int:
        return x * 2

    def __call__(self, x: int) -> int:
        return self.start * x


class AsyncMachine:
    async def __call__(self) -> None:
        pass


def load(function: Callable[..., Any], **options: Any) -> tuple[Function, Callable[..., Any]]:
    described = codec.describe_function(function, Options(**options))
    return described, codec.load_function(described, None)


def test_functions_by_reference() -> None:
    for function in (plain, coroutine, math.sqrt, Machine, Machine.static, Machine.method, decorated, len):
        described, loaded = load(function)
        assert loaded is function
        assert described.ref
        assert not described.pickled
    described, loaded = load(remote.function)
    assert described.ref.endswith(":remote:function")
    assert loaded is remote.function
    # Here the module's name leads to the user's wrapper, which keeps the function in __wrapped__.
    described, loaded = load(decorated.__wrapped__)  # type: ignore[attr-defined]
    assert described.ref.endswith(":decorated:__wrapped__")
    assert loaded(1) == 2
    assert codec.load_function(codec.describe_function(decorated, Options()), None)(1) == 20


def test_functions_by_value() -> None:
    offset = 5

    def local(x: int) -> int:
        return plain(x) + offset

    cases: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (local, (1,), 7),
        (lambda x: x * offset, (2,), 10),
        (functools.partial(plain, 3), (), 4),
        (Machine(10).method, (1,), 11),
        (Machine.of_class, (1,), ("Machine", 1)),
        (Machine(3), (4,), 12),
        ("abc".upper, (), "ABC"),
    ]
    for function, args, expected in cases:
        described, loaded = load(function)
        assert not described.ref
        assert loaded(*args) == expected


def test_recursive_closure() -> None:
    def factorial(n: int) -> int:
        return 1 if n == 0 else n * factorial(n - 1)

    assert load(factorial)[1](5) == 120


def test_names_and_kinds() -> None:
    assert codec.function_name(plain) == "plain"
    assert codec.function_name(Machine(1).method) == "Machine.method"
    assert codec.function_name(functools.partial(plain, 1)) == "plain"
    assert codec.function_name(Machine(1)) == "Machine"
    assert codec.function_name(lambda: 1) == "<lambda>"
    assert load(plain, name="shown")[0].name == "shown"
    for function in (coroutine, functools.partial(coroutine, 1), AsyncMachine(), AsyncMachine().__call__):
        assert codec.is_async(function)
    for synchronous in (plain, Machine, Machine(1), len, AsyncMachine, functools.partial(plain), np.add):
        assert not codec.is_async(synchronous)


def test_function_ids() -> None:
    first, same = (codec.describe_function(plain, Options()) for _ in range(2))
    assert first.id == same.id == codec.function_id(first)
    others = [
        codec.describe_function(plain, Options(cpu=2)),
        codec.describe_function(coroutine, Options()),
        codec.describe_function(lambda: 1, Options()),
        codec.describe_function(lambda: 2, Options()),
    ]
    assert len({first.id, *(function.id for function in others)}) == 5
    assert all(0 < function.id < 1 << 63 for function in (first, *others))


def test_big_functions_and_futures_in_closures(store: Store, other: Store) -> None:
    table = np.arange(INLINE_MAX)
    future = Handle(9)
    handles: list[int] = []
    described = codec.describe_function(lambda i: (table[i], future), Options(), store, Handle, handles)
    assert isinstance(described.pickled, ObjectRef)
    assert handles == [9]
    value, handle = codec.load_function(described, other, Handle)(3)
    assert value == 3
    assert handle.id == 9


def test_functions_that_cannot_be_loaded() -> None:
    for ref, reason in (
        ("no.such.module:f", "No module named"),
        ("math:nothing", "no attribute"),
        ("math:pi", "callable"),
    ):
        with pytest.raises(SerializationError, match=reason):
            codec.load_function(Function(1, "f", ref), None)


def test_modules_that_are_not_files() -> None:
    module = type(sys)("made_up")
    exec("def f(): return 3", module.__dict__)
    sys.modules["made_up"] = module
    try:
        described, loaded = load(module.f)
        assert not described.ref
        assert loaded() == 3
    finally:
        del sys.modules["made_up"]


def test_cloudpickle_by_value_modules() -> None:
    import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        assert not import_path(plain)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert import_path(plain)


PROGRAM = """
import asyncio, pickle, sys
from dataclasses import dataclass
from rtml import codec
from rtml.messages import Options

@dataclass
class Item:
    value: int

class Trouble(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"trouble {code}")
        self.code, self.detail = code, detail

factor = 3
def scale(item):
    return Item(item.value * factor)
def fail():
    raise Trouble(7, detail=Item(1))
async def later(x):
    return Item(x)

if sys.argv[1] == "send":
    functions = [codec.describe_function(f, Options()) for f in (scale, fail, later, Item(2).__eq__)]
    assert not any(f.ref for f in functions)
    call = codec.encode_call((Item(4),), {}, None)
    pickle.dump((functions, call.payload), open(sys.argv[2], "wb"))
else:
    (result, error) = pickle.load(open(sys.argv[2], "rb"))
    value = codec.decode_value(result, None)
    print(value, type(value).__name__)
    try:
        raise codec.decode_error(error)
    except Exception as e:
        print(type(e).__name__, e, e.code, e.detail.value, "in fail" in str(e.__cause__))
"""


def test_main_functions_reach_another_process(tmp_path: Path) -> None:
    """A program's own functions, classes and exceptions work in a process whose __main__ is another one, and back."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    sent, answer = tmp_path / "sent", tmp_path / "answer"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=60, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("send", str(sent))
    (scale, fail, later, equal), payload = pickle.loads(sent.read_bytes())
    args, kwargs = codec.decode_call(payload, (), None)
    result = codec.load_function(scale, None)(*args, **kwargs)
    assert result.value == 12
    assert later.asynchronous
    assert codec.load_function(equal, None)(result) is False
    with pytest.raises(Exception, match="trouble 7") as caught:
        codec.load_function(fail, None)()
    answer.write_bytes(
        pickle.dumps((codec.encode_value(result, None).payload, codec.encode_error(caught.value, ["fail"])))
    )
    assert run("receive", str(answer)).splitlines() == [
        "Item(value=12) Item",
        "Trouble trouble 7 7 1 True",
    ]


def test_a_name_that_cannot_be_sent_is_replaced() -> None:
    def odd() -> None: ...

    odd.__qualname__ = "caf\ud800"
    assert codec.function_name(odd) == "caf?"
