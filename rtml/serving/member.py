"""One of several processes of a gateway: what it says to its supervisor, and hears.

The two talk over a Unix socket that the process inherits, in frames of a length and a msgpack message.
`rtml.serving.processes` is the other side.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec

from rtml.metrics import GatewayMetrics
from rtml.serving.pages import Page, Series
from rtml.settings import HttpSettings

#: Seconds that the supervisor may take for the sums, and all processes for a command.
_SCRAPE_TIMEOUT: Final = 2.0
_COMMAND_TIMEOUT: Final = 600.0
_LENGTH: Final = 4
_FRAME_MAX: Final = 1 << 30


class Start(msgspec.Struct, tag="start", array_like=True):
    """What a process is to serve; the first message that it gets."""

    apps: list[str]
    http: HttpSettings
    #: Of the dispatcher.
    address: str
    #: Further arguments for its client.
    engine: dict[str, Any]


class Whole(msgspec.Struct, tag="whole", array_like=True):
    """How many processes serve, and how many there should be."""

    serving: int
    wanted: int


class Serving(msgspec.Struct, tag="serving", array_like=True):
    """The process listens."""


class Counted(msgspec.Struct, tag="counted", array_like=True):
    """A new series in the process's page."""

    series: Series


class Ask(msgspec.Struct, tag="ask", array_like=True):
    """A question to the supervisor: the metrics of all processes."""

    id: int


class Command(msgspec.Struct, tag="command", array_like=True):
    """Something that every process is to do.

    From a process to the supervisor it asks for it; from the supervisor to a process it says it. Every process that
    starts later does it, too, unless another command with the same key came after it.
    """

    id: int
    kind: str
    #: What it is about, like the name of a model.
    key: str
    payload: bytes = b""
    #: It is a question: nothing is done by processes that start later, and all answers are told.
    ask: bool = False


class Answer(msgspec.Struct, tag="answer", array_like=True):
    """The answer to `Ask` or `Command` with that id; an error if it could not be done."""

    id: int
    text: str = ""
    error: str = ""
    status: int = 500
    #: Of all processes, to a `Command` that is a question.
    texts: list[str] = []


#: What a process does at a command: its key and payload -> its answer, if the command is a question.
Do = Callable[[str, bytes], Awaitable[str | None]]

Message = Start | Whole | Serving | Counted | Ask | Command | Answer
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class CommandFailed(Exception):
    """A process could not do what all were to do.

    Args:
        message: Why.
        status: As an HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Pipe:
    """Messages over a socket, in both processes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, descriptor: int) -> Pipe:
        """Over an inherited descriptor."""
        return cls(*await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor)))

    def send(self, message: Message) -> None:
        """Send; does not wait. To a process that is gone it does nothing."""
        frame = _encode(message)
        if not self._writer.is_closing():
            self._writer.write(len(frame).to_bytes(_LENGTH) + frame)

    async def receive(self) -> Message | None:
        """The next message; None when the other side is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH))
            if length > _FRAME_MAX:
                return None
            message: Message = _decode(await self._reader.readexactly(length))
            return message
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        """End it."""
        self._writer.close()


class Peers(Protocol):
    """What a gateway asks of the others, if it is one of several processes."""

    async def metrics(self) -> str:
        """The metrics of all of them, as text. Raises `OSError` or `TimeoutError` without a supervisor."""

    def on_command(self, kind: str, do: Do) -> None:
        """Have `do(key, payload)` called for each command of this kind."""

    async def broadcast(self, kind: str, key: str, payload: bytes = b"") -> None:
        """Have every process do something. Raises `CommandFailed` or `TimeoutError`."""

    async def collect(self, kind: str) -> list[str]:
        """What every process answers. Raises `CommandFailed` or `TimeoutError`."""

    async def caught_up(self) -> None:
        """Return when all commands are done that processes got before this one began."""

    @property
    def whole(self) -> Whole:
        """How many there are."""


class Member:
    """This process, as one of several.

    Args:
        pipe: To the supervisor.
        number: Of this process, from 0.
        page: Descriptor of the memory for metrics.
        quotas: Descriptor of the memory for quotas; -1 if there are none.
    """

    def __init__(self, pipe: Pipe, number: int, page: int, quotas: int) -> None:
        self._pipe = pipe
        self.number = number
        self.quotas = quotas
        self._page = Page(page, lambda series: pipe.send(Counted(series)))
        os.close(page)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._commands: dict[str, Do] = {}
        self._doing: set[asyncio.Task[None]] = set()
        self._hearing: asyncio.Task[None] | None = None
        #: The supervisor has said all that it had to say at the start.
        self._told = asyncio.Event()
        self.whole = Whole(0, 0)

    def share(self, metrics: GatewayMetrics) -> None:
        """Let the supervisor see what is counted."""
        self._page.share(metrics)

    def on_command(self, kind: str, do: Do) -> None:
        """Have `do(key, payload)` called for each command of this kind, wherever it came from.

        What it raises is told to who gave the command; an attribute `status` is taken as the HTTP status.
        """
        self._commands[kind] = do

    async def caught_up(self) -> None:
        """Return when all commands are done that processes got before this one began."""
        await self._told.wait()
        if self._doing:
            await asyncio.wait(set(self._doing))

    def serving(self) -> None:
        """Tell that this process listens."""
        self._pipe.send(Serving())

    def run_until_gone(self, gone: Callable[[], None]) -> None:
        """Begin to hear the supervisor; `gone` is called when it has ended."""
        self._hearing = asyncio.create_task(self._hear())
        self._hearing.add_done_callback(lambda task: None if task.cancelled() else gone())

    async def _hear(self) -> None:
        while (message := await self._pipe.receive()) is not None:
            if isinstance(message, Whole):
                self.whole = message
                self._told.set()
            elif isinstance(message, Answer):
                waiter = self._waiting.pop(message.id, None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(message)
            elif isinstance(message, Command):
                task = asyncio.create_task(self._do(message))
                self._doing.add(task)
                task.add_done_callback(self._doing.discard)
        for waiter in self._waiting.values():
            waiter.cancel()

    async def _do(self, command: Command) -> None:
        try:
            do = self._commands.get(command.kind)
            text = None if do is None else await do(command.key, command.payload)
        except Exception as error:  # noqa: BLE001 - whatever it was, who asked is told
            status = getattr(error, "status", 500)
            self._pipe.send(Answer(command.id, error=str(error) or type(error).__name__, status=status))
        else:
            self._pipe.send(Answer(command.id, text or ""))

    async def metrics(self) -> str:
        """The metrics of all processes.

        Raises:
            TimeoutError: the supervisor does not answer.
        """
        number = next(self._ids)
        return (await self._ask(number, Ask(number), _SCRAPE_TIMEOUT)).text

    async def broadcast(self, kind: str, key: str, payload: bytes = b"") -> None:
        """Have every process do something; returns when all have done it.

        Raises:
            CommandFailed: one of them could not.
            TimeoutError: it takes too long.
        """
        number = next(self._ids)
        answer = await self._ask(number, Command(number, kind, key, payload), _COMMAND_TIMEOUT)
        if answer.error:
            raise CommandFailed(answer.error, answer.status)

    async def collect(self, kind: str) -> list[str]:
        """What every process answers; of those that end meanwhile nothing.

        Raises:
            CommandFailed: one of them could not.
            TimeoutError: it takes too long.
        """
        number = next(self._ids)
        answer = await self._ask(number, Command(number, kind, "", ask=True), _SCRAPE_TIMEOUT)
        if answer.error:
            raise CommandFailed(answer.error, answer.status)
        return answer.texts

    async def _ask(self, number: int, message: Message, timeout: float) -> Answer:
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiter
        self._pipe.send(message)
        try:
            async with asyncio.timeout(timeout):
                return await waiter
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """End what is under way."""
        tasks = [*self._doing, *([self._hearing] if self._hearing is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pipe.close()
