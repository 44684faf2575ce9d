"""Exceptions as `ErrorInfo`: readable by every peer, and rebuilt with their own type by Python clients.

An exception is pickled and unpickled once on the spot, since many can be pickled but not unpickled (a constructor with
other parameters than `args`), which would otherwise show only at the submitter. What fails is tried again without its
constructor, and without the attributes that cannot be pickled. If nothing helps, the submitter gets a `TaskError` with
the same text.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rtml.codec import explain
from rtml.codec.pickling import Pickled, dump, load
from rtml.errors import RtmlError, TaskError, by_name
from rtml.messages import INLINE_MAX, ErrorInfo

#: Longest message and traceback that are sent, in characters. Of a traceback the end is kept.
MESSAGE_MAX: Final = 4 * 1024
TRACEBACK_MAX: Final = 16 * 1024

_PACKAGE: Final = str(Path(__file__).parents[1])

#: They would end the program, or the event loop, that waits for a task; `sys.exit` is meant for the task's process.
_ENDS_PROGRAMS: Final = (SystemExit, KeyboardInterrupt, GeneratorExit)


class RemoteTraceback(Exception):
    """The cause of a remote exception: shows the traceback of the process that raised it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def encode_error(error: BaseException, chain: Sequence[str] = (), *, pickle: bool = True) -> ErrorInfo:
    """What to send of an exception.

    Args:
        error: as it was caught, with its traceback.
        chain: names of the tasks that led here, root first, the failing task last.
        pickle: False for a reader that unpickles nothing.
    """
    return ErrorInfo(
        type=_type_name(type(error)),
        message=_message(error)[:MESSAGE_MAX],
        traceback=_traceback_text(error)[-TRACEBACK_MAX:],
        chain=list(chain),
        pickled=_pickled(error) if pickle else b"",
        details=error.details or None if isinstance(error, RtmlError) else None,
    )


def decode_error(info: ErrorInfo) -> BaseException:
    """The exception to raise for an error, with the remote traceback as its cause.

    Its own type where that exists here too, else `TaskError`. Each call makes a new one: tracebacks do not grow. What
    ends a program (`SystemExit`, `KeyboardInterrupt`) has ended the task; whoever waits for it gets a `TaskError`.
    """
    error = _rebuilt(info)
    if isinstance(error, _ENDS_PROGRAMS):
        shown = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        error = TaskError(f"{shown} (raised in the task, which it has ended)")
    text = info.traceback
    if len(info.chain) > 1:
        text = f"In task {' -> '.join(info.chain)}:\n{text}"
    if text:
        error.__cause__ = RemoteTraceback(text)
    return error


def raise_remote(info: ErrorInfo) -> None:
    """Raise the exception of an error.

    Raises:
        BaseException: what `decode_error` makes of it.
    """
    raise decode_error(info)


def _rebuilt(info: ErrorInfo) -> BaseException:
    if info.pickled:
        try:
            error = load(info.pickled, iter(()))
        except Exception:  # noqa: BLE001 - its class is missing here, or its constructor objects: the text remains
            error = None
        if isinstance(error, BaseException):
            return error
    own = by_name(info.type)
    if own is not None:
        return own.made(info.message, info.details)
    return TaskError(f"{info.type}: {info.message}" if info.message else info.type)


def _pickled(error: BaseException) -> bytes:
    """The exception as a pickle that is known to unpickle to the same type, or b""."""
    if isinstance(error, RtmlError) and by_name(type(error).__name__) is type(error) and error.args == (str(error),):
        # Its name, message and details say it all, to every peer.
        return b"" if vars(type(error).made(str(error), error.details)) == vars(error) else _proven(error)
    pickled = _proven(error)
    if pickled:
        return pickled
    kind = type(error)
    args = tuple(value if _travels(value) else explain.short(value) for value in error.args)
    state = {name: value for name, value in vars(error).items() if _travels(value)}
    # Many small ones may still be too much together; then the type is worth more than what it carries.
    return _proven(_Remade(kind, args, state)) or _proven(_Remade(kind, (_message(error)[:MESSAGE_MAX],), {}))


def _travels(value: object) -> bool:
    """Whether one argument or attribute can be sent along."""
    if explain.failure(value, None) is not None:
        return False
    pickled = Pickled()
    return len(dump(value, pickled)) <= INLINE_MAX // 4 and not pickled.slots


class _Remade:
    """Pickles to an exception of `kind` that is made without calling its constructor."""

    def __init__(self, kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> None:
        self.kind = kind
        self.args = args
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.kind, self.args, self.state)


def _remake(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


def _proven(error: BaseException | _Remade) -> bytes:
    kind = error.kind if isinstance(error, _Remade) else type(error)
    pickled = Pickled()
    try:
        stream = dump(error, pickled)
        if len(stream) > INLINE_MAX or pickled.slots:
            return b""
        return stream if type(load(stream, iter(()))) is kind else b""
    except Exception:  # noqa: BLE001 - whatever a class raises here, the answer is that it does not work
        return b""


def _type_name(kind: type[BaseException]) -> str:
    """As in a traceback, but with the bare name for rtml's own."""
    if kind.__module__ == "builtins" or by_name(kind.__name__) is kind:
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - a broken __str__ must not replace the error
        return f"<{type(error).__name__} whose str() raises {type(broken).__name__}>"


def _traceback_text(error: BaseException) -> str:
    """The formatted traceback with its chain of causes, without the frames of the executor above the user's code."""
    shown = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        shown = shown.tb_next
    try:
        return "".join(_formatted(error, shown or error.__traceback__))
    except Exception as broken:  # noqa: BLE001 - __str__ of user exceptions, linecache on strange files
        return f"{type(error).__name__} (no traceback: {type(broken).__name__}: {broken})\n"


def _formatted(error: BaseException, shown: TracebackType | None) -> list[str]:
    return traceback.format_exception(type(error), error, shown)
