"""Exceptions of every kind on their way to the submitter, and the messages about what cannot be pickled."""

from __future__ import annotations

import pickle
import textwrap
import threading
from typing import Any, NoReturn

import pytest

from rtml import codec, errors
from rtml.codec import values
from rtml.codec.explain import cannot_pickle, failure
from rtml.codec.failures import MESSAGE_MAX, TRACEBACK_MAX
from rtml.errors import SerializationError, TaskError, WorkerDied
from rtml.messages import INLINE_MAX, ErrorInfo, Options


class Handle:
    """As much of a future as the codec sees."""

    def __init__(self, number: int) -> None:
        self.id = number


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(3), "SystemExit: 3 (raised in the task, which it has ended)"),
        (SystemExit(), "SystemExit (raised in the task, which it has ended)"),
        (KeyboardInterrupt(), "KeyboardInterrupt (raised in the task, which it has ended)"),
        (GeneratorExit("x"), "GeneratorExit: x (raised in the task, which it has ended)"),
    ],
    ids=repr,
)
def test_what_ends_a_program_does_not_end_the_one_that_waits(error: BaseException, message: str) -> None:
    back = error_trip(error)
    assert type(back) is errors.TaskError
    assert str(back) == message
    assert "in caught" in str(back.__cause__)


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
    assert len(huge.pickled) < INLINE_MAX
    assert len(huge.message) == MESSAGE_MAX
    assert len(huge.traceback) <= TRACEBACK_MAX
    back = codec.decode_error(huge)
    assert type(back) is ValueError  # the type is kept, what it carried is shortened
    assert str(back).startswith("'xxx")
    many = codec.decode_error(codec.encode_error(caught(KeyError(*[str(n) * 4000 for n in range(60)]))))
    assert type(many) is KeyError


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

    with pytest.raises(SerializationError, match=r"the function 'locking' .* at captured variable 'lock' of"):
        codec.describe_function(locking, Options())
    with pytest.raises(SerializationError, match=r"\.__self__\.content"):
        codec.describe_function(Holder(lock).act, Options())
    space: dict[str, Any] = {"connection": lock, "__name__": "__main__"}
    exec(textwrap.dedent("def query():\n    return connection"), space)
    with pytest.raises(SerializationError, match="at global 'connection' of the function"):
        codec.describe_function(space["query"], Options())


def test_explaining_survives_anything() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

        def __reduce__(self) -> NoReturn:
            raise TypeError("no")

    cycle: list[Any] = [Rude()]
    cycle.append(cycle)
    error = cannot_pickle("it", cycle, ValueError("x"), None)
    assert "TypeError: no - at [0] of the list: <Rude>" in str(error)
    assert "ValueError: x" in str(cannot_pickle("it", 3, ValueError("x"), None))
    assert failure(3, None) is None
