"""What a gateway has its executors keep ready: the functions of its models, and the version set of its graphs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rtml import codec
from rtml.client.served import ServedVersion, encode_versions
from rtml.errors import ConnectionLost, RtmlError, TaskError
from rtml.messages import Forgot, Function, Kept, Message

if TYPE_CHECKING:
    from rtml.client.client import Client

_logger = logging.getLogger("rtml.serving")

#: A version set is made anew at most every so many times what that takes: it is as long as there are models, and when
#: thousands are loaded each of them changes it.
_PAUSE: Final = 20


class Keeping:
    """Everything here belongs to the gateway's event loop."""

    def __init__(self) -> None:
        self.client: Client | None = None
        #: The definition that says which versions graphs work with; 0: no models.
        self._context = 0
        #: What it is made from, if it is not made from that yet.
        self._versions: Callable[[], Mapping[str, ServedVersion]] | None = None
        self._due: asyncio.TimerHandle | None = None
        #: When the next one may be made without being asked for.
        self._next = 0.0
        #: How many times each function is kept.
        self._kept: dict[int, int] = {}
        self._waiting: dict[int, list[asyncio.Future[int]]] = {}
        self._forgotten: dict[int, list[Callable[[], None]]] = {}
        #: What a version set is kept for, by function: to say which executor has which model's trouble.
        self._names: dict[int, str] = {}

    async def keep(self, function: Function) -> int:
        """Have it ready in executors; returns in how many.

        Raises:
            RtmlError: it cannot be made ready, and is not kept.
        """
        number = function.id
        self._define(function)
        self._kept[number] = self._kept.get(number, 0) + 1
        self._names[number] = function.name
        # A callback of an earlier life of the same function would remove what this one needs.
        self._forgotten.pop(number, None)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(number, []).append(answer)
        self._send([number])
        try:
            return await answer
        except BaseException:
            self._unkeep(number)
            if number not in self._kept:
                self._send([], [number])
            raise

    def drop(self, function: Function, forgotten: Callable[[], None]) -> None:
        """It need not be ready any more; `forgotten` is called when no process has it and no graph can want it."""
        self._unkeep(function.id)
        if function.id in self._kept:
            return  # kept under another name, too
        self._forgotten.setdefault(function.id, []).append(forgotten)
        self._send([], [function.id])

    def publish(self, versions: Callable[[], Mapping[str, ServedVersion]]) -> None:
        """Graphs that begin from now on work with the versions that this gives: it is asked once, at once or later."""
        self._versions = versions
        if self._due is not None:
            return
        pause = self._next - time.perf_counter()
        if pause <= 0:
            self._renew()
        else:
            self._due = asyncio.get_running_loop().call_later(pause, self._renew)

    @property
    def context(self) -> int:
        """The definition that says which versions graphs which begin now work with; 0: no models."""
        if self._versions is not None:
            self._renew()
        return self._context

    def _renew(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        make, self._versions = self._versions, None
        if make is None:
            return
        begin = time.perf_counter()
        self._make_context(make())
        now = time.perf_counter()
        self._next = now + _PAUSE * (now - begin)

    def close(self) -> None:
        """Make no more version sets."""
        self._versions = None
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _make_context(self, versions: Mapping[str, ServedVersion]) -> None:
        before = self._context
        self._context = 0
        if versions:
            content = encode_versions(dict(versions))
            members = [served.function.id for served in versions.values()]
            context = Function(0, "versions", pickled=content, members=members)
            context.id = codec.function_id(context)
            for served in versions.values():
                self._define(served.function)
            self._define(context)
            self._context = context.id
        if self._context != before:
            self._send([self._context] if self._context else [], [before] if before else [])

    def _define(self, function: Function) -> None:
        client = self.client
        assert client is not None
        with client.lock:
            client.core.define(function)

    def _unkeep(self, number: int) -> None:
        left = self._kept.get(number, 0) - 1
        if left > 0:
            self._kept[number] = left
        else:
            self._kept.pop(number, None)

    def _send(self, kept: Sequence[int], dropped: Sequence[int] = ()) -> None:
        client = self.client
        assert client is not None
        with client.lock:
            client.core.keep_ready(kept, dropped)
        client.driver.flush()

    # --- what the dispatcher says

    def receive(self, message: Message) -> None:
        """A message that is no client's."""
        if isinstance(message, Kept):
            self._told(message)
        elif isinstance(message, Forgot):
            for number in message.functions:
                if number not in self._kept:
                    self._names.pop(number, None)
                    for callback in self._forgotten.pop(number, ()):
                        callback()

    def _told(self, message: Kept) -> None:
        waiting = [answer for answer in self._waiting.pop(message.function, ()) if not answer.done()]
        if message.error is None:
            for answer in waiting:
                answer.set_result(message.executors)
            return
        error: BaseException = codec.decode_error(message.error)
        if type(error) is TaskError or not isinstance(error, RtmlError):
            error = TaskError(f"{message.error.type}: {message.error.message}")
        for answer in waiting:
            answer.set_exception(error)
        if not waiting:
            name = self._names.get(message.function, "?")
            _logger.warning("an executor cannot load model %s: %s", name, message.error.message)

    def lost(self) -> None:
        """The engine is gone: nobody will answer."""
        waiting, self._waiting = self._waiting, {}
        for answers in waiting.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(ConnectionLost("the engine is gone"))
