"""The codec: values, calls with futures, functions of every kind, exceptions of every kind, and its error messages."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtml import codec, errors
from rtml.codec import explain, failures, functions, pickling, values
from rtml.errors import SerializationError, TaskError, WorkerDied
from rtml.messages import INLINE_MAX, ErrorInfo, Function, ObjectRef, Options
from rtml.store import Store


class Handle:
    """As much of a future as the codec sees."""

    def __init__(self, number: int) -> None:
        self.id = number

    def __reduce__(self) -> NoReturn:
        raise AssertionError("the codec never pickles a future")


@pytest.fixture
def directory() -> Iterator[str]:
    made = tempfile.mkdtemp(dir="/dev/shm", prefix="test-codec-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def store(directory: str) -> Iterator[Store]:
    made = Store(directory, 1)
    yield made
    made.close()


@pytest.fixture
def other(directory: str) -> Iterator[Store]:
    made = Store(directory, 2)
    yield made
    made.close()


def value_trip(value: Any, store: Store | None = None) -> Any:
    return codec.decode_value(codec.encode_value(value, store, Handle).payload, store, Handle)


def call_trip(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Through the codec without a store; dependencies become ("value", id)."""
    encoded = codec.encode_call(args, kwargs, None, Handle)
    return codec.decode_call(encoded.payload, [("value", dep.id) for dep in encoded.deps], None, Handle)


# --- values -----------------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
hashables = scalars | st.tuples(scalars, scalars) | st.frozensets(scalars, max_size=3)
trees = st.recursive(
    scalars | st.sets(hashables, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_values_round_trip(value: Any) -> None:
    assert value_trip(value) == value
    assert call_trip(value, name=value) == ((value,), {"name": value})
    assert codec.decode_data(codec.encode_value(value, None).payload, None) == value


arrays = hnp.arrays(
    dtype=hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.datetime64_dtypes(endianness="="),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)


@settings(max_examples=150, deadline=None)
@given(arrays, st.booleans(), st.booleans())
def test_arrays_round_trip(array: np.ndarray[Any, Any], transposed: bool, shared: bool) -> None:
    if transposed:
        array = array.T
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-codec-") as directory:
        store = Store(directory, 1)
        if shared and array.nbytes:
            array = np.tile(array, (INLINE_MAX // array.nbytes + 1,) + (1,) * array.ndim)
        payload = codec.encode_value(array, store).payload
        assert isinstance(payload, ObjectRef) == (shared and array.nbytes > 0)
        for back in (
            codec.decode_value(payload, store),
            codec.decode_data(payload, store),
            codec.decode_call(codec.encode_call((array,), {}, store).payload, (), store)[0][0],
        ):
            assert back.dtype == array.dtype
            assert back.shape == array.shape
            assert np.array_equal(back, array, equal_nan=array.dtype.kind in "fM")
        store.close()


def test_small_arrays_are_writable_and_big_ones_are_views(store: Store, other: Store) -> None:
    small, big = np.arange(10), np.arange(INLINE_MAX)
    makers: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
        (lambda a: a, lambda back: back),
        (lambda a: {"a": a}, lambda back: back["a"]),
        (lambda a: (a, object), lambda back: back[0]),
    ]
    for make, take in makers:
        array = take(codec.decode_value(codec.encode_value(make(small), store).payload, other))
        array += 1
        array = take(codec.decode_value(codec.encode_value(make(big), store).payload, other))
        assert np.array_equal(array, big)
        assert not array.flags.writeable
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_medium_buffers_inline(store: Store) -> None:
    value: dict[str, Any] = {
        "a": np.arange(pickling.BUFFER_MIN // 8),
        "b": [np.arange(1500.0), "x"],
        "c": bytearray(9000),
    }
    encoded = codec.encode_value(value, store)
    assert isinstance(encoded.payload, bytes)
    back = codec.decode_value(encoded.payload, store)
    assert np.array_equal(back["a"], value["a"])
    assert np.array_equal(back["b"][0], np.arange(1500.0))
    back["b"][0][0] = 5
    assert back["c"] == bytes(9000)


def test_big_plain_values_go_to_the_store(store: Store, other: Store) -> None:
    for value in ("x" * 100_000, b"y" * 100_000, list(range(50_000)), {"k": "z" * 100_000}):
        encoded = codec.encode_value(value, store)
        assert isinstance(encoded.payload, ObjectRef)
        assert codec.decode_value(encoded.payload, other) == value
        call = codec.encode_call((value,), {"k": value}, store)
        assert isinstance(call.payload, ObjectRef)
        assert codec.decode_call(call.payload, (), other) == ((value,), {"k": value})
        assert isinstance(codec.encode_value(value, None).payload, bytes)


def test_dtypes_that_are_not_numeric() -> None:
    for array in (
        np.array(["a", "bc"]),
        np.array([{"a": 1}, None], dtype=object),
        np.zeros(3, dtype=[("x", "f4"), ("y", "i2")]),
    ):
        assert (value_trip(array) == array).all()
        assert (call_trip(array)[0][0] == array).all()
    assert isinstance(value_trip(np.float32(3)), np.float32)
    masked = np.ma.masked_array([1, 2], mask=[True, False])
    assert value_trip(masked).mask.tolist() == [True, False]


def test_none_is_one_byte() -> None:
    assert codec.encode_value(None, None).payload == b"N"
    assert value_trip(None) is None


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: Any


class Pair(NamedTuple):
    a: Any
    b: Any


def test_objects() -> None:
    for value in (Colour.RED, Point(1, [2]), Pair(1, 2), collections.OrderedDict(a=1), range(3), Path("/a"), int):
        assert value_trip(value) == value
        assert call_trip([value], k=value) == (([value],), {"k": value})


def test_facts() -> None:
    image = np.zeros((8, 4, 3), np.uint8)
    value = codec.encode_value(image, None)
    assert (value.batch_key, value.items) == ("|u1(4, 3)", 8)
    call = codec.encode_call((image, 1, Handle(1)), {"z": np.zeros(5), "a": Handle(2)}, None, Handle)
    assert (call.batch_key, call.items) == ("|u1(4, 3)||?|a=?|z=<f8()", 8)
    scalar = codec.encode_call((np.zeros(()),), {}, None, Handle)
    assert (scalar.batch_key, scalar.items) == ("<f8", 1)
    plain = codec.encode_call((1, [image]), {}, None, Handle)
    assert (plain.batch_key, plain.items) == ("", 1)


def test_plain_data_only() -> None:
    image = np.zeros((20, 30))
    value = {"a": [1, "b", (2.5, None)], "image": image}
    back = codec.decode_data(codec.encode_value(value, None).payload, None)
    assert (back["image"] == image).all()
    assert codec.decode_data(codec.encode_value(np.float32(2), None).payload, None) == 2
    for bad in (Point(1, 2), os.system, lambda: 1, Colour.RED):
        with pytest.raises(SerializationError, match="no plain data"):
            codec.decode_data(codec.encode_value([bad], None).payload, None)


def test_garbage() -> None:
    for payload in (
        b"",
        b"\x80",
        b"\x80\x05garbage",
        b"Znope",
        b"Nx",
        b"X\x01",
        b"X\x05\x00\x00\x00hello",
        b"T\x09\x09",
    ):
        with pytest.raises(SerializationError):
            codec.decode_value(payload, None)
        with pytest.raises(SerializationError):
            codec.decode_call(payload, (), None)
        with pytest.raises(SerializationError):
            codec.decode_data(payload, None)
    with pytest.raises(SerializationError, match="no access"):
        codec.decode_value(ObjectRef(1, 1, "x"), None)


# --- futures ----------------------------------------------------------------------------------------------------------


def test_dependencies_at_any_depth() -> None:
    a, b = Handle(1), Handle(2)
    inner: list[Any] = [b, {"k": (a, 3)}]
    encoded = codec.encode_call((a, inner, "plain"), {"z": [[b]], "q": 1}, None, Handle)
    assert encoded.deps == [a, b]
    assert not encoded.handles
    back: Any = codec.decode_call(encoded.payload, ["A", ["B"]], None)
    assert back == (("A", [["B"], {"k": ("A", 3)}], "plain"), {"z": [[["B"]]], "q": 1})
    # The arguments themselves are as they were, and one value is one object.
    assert inner[0] is b
    assert back[0][1][0] is back[1]["z"][0][0]


future_trees = st.recursive(
    scalars | st.integers(1, 5).map(lambda n: ("future", n)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(future_trees, st.booleans())
def test_dependencies_in_random_trees(tree: Any, with_object: bool) -> None:
    pool = {n: Handle(n) for n in range(1, 6)}

    def grown(node: Any, leaf: Callable[[int], Any]) -> Any:
        if isinstance(node, tuple) and len(node) == 2 and node[0] == "future":
            return leaf(node[1])
        if isinstance(node, (list, tuple)):
            return type(node)([grown(child, leaf) for child in node])
        if isinstance(node, dict):
            return {key: grown(child, leaf) for key, child in node.items()}
        return node

    extra = (Colour.RED,) if with_object else ()
    encoded = codec.encode_call((grown(tree, pool.__getitem__), *extra), {}, None, Handle)
    assert len({dep.id for dep in encoded.deps}) == len(encoded.deps)
    args, kwargs = codec.decode_call(encoded.payload, [("value", dep.id) for dep in encoded.deps], None)
    assert args == (grown(tree, lambda n: ("value", n)), *extra)
    assert kwargs == {}


def test_futures_elsewhere_stay_futures() -> None:
    future = Handle(7)
    captured = lambda: future  # noqa: E731
    args = (Point(1, future), Pair(future, 2), {future}, captured, {future: 1}, [future])
    encoded = codec.encode_call(args, {}, None, Handle)
    assert encoded.deps == [future]
    assert {handle.id for handle in encoded.handles} == {7}
    made: list[Handle] = []

    def make(number: int) -> Handle:
        made.append(Handle(number))
        return made[-1]

    (point, pair, members, function, keyed, values), _ = codec.decode_call(encoded.payload, ["value"], None, make)
    assert len(made) == 1
    new = made[0]
    assert new.id == 7
    assert point.y is pair.a is function() is new
    assert members == {new}
    assert list(keyed) == [new]
    assert values == ["value"]


def test_futures_in_results_are_handles(store: Store) -> None:
    value = [Handle(1), {"k": Handle(2)}, np.zeros(INLINE_MAX)]
    encoded = codec.encode_value(value, store, Handle)
    assert encoded.handles == [1, 2]
    back = codec.decode_value(encoded.payload, store, Handle)
    assert [back[0].id, back[1]["k"].id, back[2].sum()] == [1, 2, 0]
    assert codec.encode_value(Handle(3), store, Handle).handles == [3]
    with pytest.raises(SerializationError, match="contains futures"):
        codec.decode_value(encoded.payload, store)
    with pytest.raises(SerializationError, match="no plain data"):
        codec.decode_data(encoded.payload, store)


def test_dependencies_next_to_big_arrays(store: Store, other: Store) -> None:
    big = np.arange(INLINE_MAX)
    future = Handle(1)
    encoded = codec.encode_call((big, future, [big[::2], future]), {"o": Point(1, big)}, store, Handle)
    assert isinstance(encoded.payload, ObjectRef)
    args, kwargs = codec.decode_call(encoded.payload, [big[:3]], other)
    assert np.array_equal(args[0], big)
    assert np.array_equal(args[1], big[:3])
    assert np.array_equal(args[2][0], big[::2])
    assert args[2][1] is args[1]
    assert np.array_equal(kwargs["o"].y, big)


def test_shared_and_cyclic_containers() -> None:
    shared = [Handle(1)]
    (first, second), _ = call_trip(shared, shared)
    assert first is second
    assert first == [("value", 1)]
    cycle: list[Any] = [1]
    cycle.append(cycle)
    (back,), _ = call_trip(cycle)
    assert back[1] is back
    cycle.append(Handle(2))
    with pytest.raises(SerializationError, match="contains itself"):
        call_trip(cycle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError, match="deep"):
        call_trip(deep)


# --- functions --------------------------------------------------------------------------------------------------------


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
        assert not functions.import_path(plain)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert functions.import_path(plain)


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


# --- errors -----------------------------------------------------------------------------------------------------------


class Odd(Exception):
    """Pickles, but its constructor does not accept what was pickled."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"odd {code}")
        self.code = code
        self.detail = detail


class Locked(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message, threading.Lock())
        self.lock = threading.Lock()
        self.note = "kept"


class Never(Exception):
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("never")


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("broken")


class Liar(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("not an exception",)


def caught(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        return raised


def error_trip(error: BaseException, chain: tuple[str, ...] = ()) -> BaseException:
    return codec.decode_error(codec.encode_error(caught(error), chain))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad", 3),
        KeyError("k"),
        FileNotFoundError(2, "No such file", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "reason"),
        StopIteration(5),
        SystemExit(3),
        KeyboardInterrupt(),
        ExceptionGroup("several", [ValueError(1), TypeError(2)]),
        errors.LimitExceeded("too many"),
        WorkerDied("signal SIGSEGV"),
        errors.TaskCancelled("no longer wanted"),
    ],
    ids=repr,
)
def test_exceptions_keep_type_and_content(error: BaseException) -> None:
    back = error_trip(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    if not isinstance(error, ExceptionGroup):
        assert back.args == error.args
    assert "in caught" in str(back.__cause__)
    assert isinstance(back.__cause__, codec.RemoteTraceback)


def test_exceptions_with_other_constructors() -> None:
    back = error_trip(Odd(4, detail="d"))
    assert isinstance(back, Odd)
    assert (str(back), back.code, back.detail) == ("odd 4", 4, "d")


def test_exceptions_with_unpicklable_parts() -> None:
    back = error_trip(Locked("stuck"))
    assert isinstance(back, Locked)
    assert back.args[0] == "stuck"
    assert "lock" in back.args[1]
    assert back.note == "kept"
    assert not hasattr(back, "lock")


def test_exceptions_that_cannot_travel() -> None:
    info = codec.encode_error(caught(Never("lost", 1)))
    remade = codec.decode_error(info)
    assert isinstance(remade, Never)  # without its own __reduce__
    assert remade.args == ("lost", 1)
    lied = error_trip(Liar("x"))
    assert isinstance(lied, Liar)
    broken = codec.encode_error(caught(Broken(1)))
    assert "whose str() raises RuntimeError" in broken.message
    huge = codec.encode_error(caught(ValueError("x" * 10 * INLINE_MAX)))
    assert not huge.pickled
    assert len(huge.message) == failures.MESSAGE_MAX
    assert len(huge.traceback) <= failures.TRACEBACK_MAX
    back = codec.decode_error(huge)
    assert isinstance(back, TaskError)
    assert str(back).startswith("ValueError: xxx")


def test_types_that_do_not_exist_here() -> None:
    foreign = ErrorInfo("lib.Strange", "what", "Traceback: ...", [], pickle.dumps(1)[:-1])
    back = codec.decode_error(foreign)
    assert type(back) is TaskError
    assert str(back) == "lib.Strange: what"
    assert "Traceback: ..." in str(back.__cause__)
    own = codec.decode_error(ErrorInfo("WorkerDied", "signal 11"))
    assert type(own) is WorkerDied
    assert str(own) == "signal 11"
    assert own.__cause__ is None
    assert type(codec.decode_error(ErrorInfo("KeyError", ""))) is TaskError


def test_remote_tracebacks() -> None:
    def inner() -> None:
        raise ValueError("deep")

    def outer() -> None:
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("above") from error

    try:
        # The frame of the codec stands for those of the executor: what calls user code is not shown.
        codec.load_function(codec.describe_function(outer, Options()), None)()
    except RuntimeError as error:
        info = codec.encode_error(error, ["root", "middle", "leaf"])
    for text in ("in inner", "deep", "direct cause", "in outer", "above"):
        assert text in info.traceback
    assert info.chain == ["root", "middle", "leaf"]
    with pytest.raises(RuntimeError, match="above") as raised:
        codec.raise_remote(info)
    assert "In task root -> middle -> leaf:" in str(raised.value.__cause__)


def test_executor_frames_are_not_shown() -> None:
    """The frames of rtml above the user's code are cut off. (Unpickling calls user code from inside rtml.)"""

    class Entry:
        def __reduce__(self) -> tuple[Any, ...]:
            return divide, (1, 0)

    with pytest.raises(SerializationError) as raised:
        codec.decode_value(codec.encode_value([Entry()], None).payload, None)
    error = raised.value.__cause__
    assert isinstance(error, ZeroDivisionError)
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_frame.f_code.co_filename == values.__file__
    info = codec.encode_error(error)
    assert values.__file__ not in info.traceback
    assert "in divide" in info.traceback


def divide(a: int, b: int) -> float:
    return a / b


def test_each_decoding_is_a_new_exception() -> None:
    info = codec.encode_error(caught(ValueError(1)))
    assert codec.decode_error(info) is not codec.decode_error(info)


# --- messages ---------------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, content: Any) -> None:
        self.content = content
        self.other = 1

    def act(self) -> None:
        pass


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, threading.Lock()), {}, ["argument 2", "cannot pickle '_thread.lock' object"]),
        ((), {"where": [1, {"k": threading.Lock()}]}, ["argument 'where'", "at [1]['k'] of the list"]),
        ((Holder(Holder((0, threading.Lock()))),), {}, ["argument 1", "at .content.content[1] of the Holder"]),
        ((Never(),), {}, ["argument 1", "RuntimeError: never"]),
        (((i for i in range(3)),), {}, ["argument 1", "generator"]),
        ((Handle(1), threading.Lock()), {}, ["argument 2"]),
    ],
)
def test_messages_name_the_part(args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(SerializationError) as raised:
        codec.encode_call(args, kwargs, None, Handle)
    for text in expected:
        assert text in str(raised.value)


def test_messages_for_results_and_functions() -> None:
    with pytest.raises(SerializationError, match=r"the result cannot be pickled: .*lock.* at \['a'\] of the dict"):
        codec.encode_value({"a": threading.Lock()}, None)
    lock = threading.Lock()

    def locking() -> None:
        with lock:
            pass

    with pytest.raises(SerializationError, match=r"the function 'locking' .* its captured variable 'lock'"):
        codec.describe_function(locking, Options())
    with pytest.raises(SerializationError, match=r"\.__self__\.content"):
        codec.describe_function(Holder(lock).act, Options())
    space: dict[str, Any] = {"connection": lock, "__name__": "__main__"}
    exec(textwrap.dedent("def query():\n    return connection"), space)
    with pytest.raises(SerializationError, match="its global 'connection'"):
        codec.describe_function(space["query"], Options())


def test_explaining_survives_anything() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

        def __reduce__(self) -> NoReturn:
            raise TypeError("no")

    cycle: list[Any] = [Rude()]
    cycle.append(cycle)
    error = explain.cannot_pickle("it", cycle, ValueError("x"), None)
    assert "TypeError: no - at [0] of the list: <Rude>" in str(error)
    assert "ValueError: x" in str(explain.cannot_pickle("it", 3, ValueError("x"), None))
    assert explain.failure(3, None) is None


def test_inline_limit_is_exact(store: Store) -> None:
    overhead = len(pickle.dumps(b"x" * 1000, 5)) - 1000
    for size in (INLINE_MAX - overhead - 3, INLINE_MAX + 1):
        payload = codec.encode_value(b"x" * size, store).payload
        assert isinstance(payload, bytes) == (size < INLINE_MAX)
        assert values.decode_value(payload, store) == b"x" * size
