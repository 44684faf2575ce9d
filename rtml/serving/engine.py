"""The gateway's hand on the engine: a client that never unpickles, on the gateway's own event loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from rtml import codec
from rtml.client import streams
from rtml.client.client import Client
from rtml.client.connecting import Connector, Peer
from rtml.client.embedded import Embedded, open_client
from rtml.client.functions import RemoteFunction
from rtml.client.future import Future
from rtml.client.loop import AsyncDriver
from rtml.client.served import ServedVersion
from rtml.errors import OutOfTime, TaskError
from rtml.messages import INLINE_MAX, ErrorInfo, Hello, Message, ObjectRef, Options, Timing
from rtml.serving.hosts import Host, HostPlan
from rtml.serving.keeping import Keeping
from rtml.serving.visits import VISIT


class Pending(Awaitable[Any], Protocol):
    """A submitted call: await it for its value; a cancelled await cancels the call."""

    @property
    def timing(self) -> Timing | None:
        """Where the time went, once it has ended."""


class Prepared(NamedTuple):
    """A remote function that is known to the engine."""

    function: Any
    #: What its calls ask for, before a request adds to it.
    options: Options

    @property
    def name(self) -> str:
        """Of the function, as errors call its step."""
        return str(getattr(self.function, "name", ""))


class Engine(Protocol):
    """What the gateway needs of an engine. `ClientEngine` is the real one; tests have one that runs calls inline."""

    def prepare(self, function: RemoteFunction[..., Any]) -> Prepared:
        """Make a function known; once, before its first call."""

    def submit(self, prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Pending:
        """Open a graph. Raises `RtmlError` if the call cannot be sent."""

    def stream(
        self,
        prepared: Prepared,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        timed: Callable[[Timing | None], None],
    ) -> AsyncGenerator[Any, None]:
        """Open a graph whose root is a generator; gives its items. Closing it ends the generator.

        `timed` is told where the time went, when the generator has ended by itself.
        """

    async def query(self, what: str) -> str:
        """Ask the dispatcher, see `rtml.messages.Query`. Raises `RtmlError` or `TimeoutError` if it does not answer."""

    async def keep(self, prepared: Prepared) -> int:
        """Have a function loaded and warm in executors from now on. Returns in how many, when all have it.

        Raises:
            RtmlError: it cannot be loaded, with the reason.
        """

    def drop(self, prepared: Prepared, forgotten: Callable[[], None]) -> None:
        """The opposite of `keep`; `forgotten` is called when no executor has it any more, and no graph can want it."""

    def publish(self, models: Callable[[], Mapping[str, tuple[str, Prepared]]]) -> None:
        """From now on graphs find these models, each (version, function), under these names by `rtml.served`.

        Args:
            models: Says which; called once, now or when a graph begins.
        """

    def host(self, plan: HostPlan, user: str) -> Host:
        """The handle of a named actor, to be connected."""

    @property
    def ready(self) -> bool:
        """Whether calls can be expected to run."""


class RemoteError(TaskError):
    """An exception of user code, as far as a gateway looks at it."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


class GatewayClient(Client):
    """A client that decodes plain data only: what comes from executors never runs code here (D10)."""

    def decode(self, payload: bytes | ObjectRef, owner: Future[Any] | None = None) -> Any:
        """The value of a payload.

        Raises:
            SerializationError: it is no data, but a pickle.
        """
        return codec.decode_data(payload, self.store)

    def decode_error(self, info: ErrorInfo) -> BaseException:
        """An error of rtml's own with its type; a user's as a `RemoteError`."""
        error = codec.decode_error(msgspec.structs.replace(info, pickled=b""))
        if isinstance(error, OutOfTime) and not error.missing:
            error.missing = info.chain[-1:]  # the task itself, as an executor says it
        return RemoteError(info) if type(error) is TaskError else error

    @property
    def engine_pid(self) -> int | None:
        """The process whose end is the end of an engine that was started here; None if it runs elsewhere."""
        return self._resource.pid if isinstance(self._resource, Embedded) else None


class _GatewayPeer(Peer):
    """Asks for results without pickles, and for the timing of each: gateways report it (`Server-Timing`)."""

    def __init__(self) -> None:
        self.keeping = Keeping()

    def receive(self, message: Message) -> None:
        self.keeping.receive(message)

    def introduce(self, client: Client) -> list[Message]:
        messages = super().introduce(client)
        for message in messages:
            if isinstance(message, Hello):
                message.timings = message.data_only = True
        return messages


class _Sending(Awaitable[Any]):
    """A call whose large arguments go to a node first: in a thread, so that the loop goes on."""

    def __init__(self, call: Callable[[], Future[Any]]) -> None:
        self._future: Future[Any] | None = None
        self._sent = asyncio.get_running_loop().run_in_executor(None, call)

    @property
    def timing(self) -> Timing | None:
        """Where the time went, once it has ended."""
        return None if self._future is None else self._future.timing

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            self._future = yield from asyncio.shield(self._sent).__await__()
        except asyncio.CancelledError:
            self._sent.add_done_callback(_give_up)
            raise
        return (yield from self._future.__await__())


def _give_up(sent: asyncio.Future[Future[Any]]) -> None:
    if not sent.cancelled() and sent.exception() is None:
        sent.result().cancel()


def _has_large(values: Iterable[Any]) -> bool:
    """Whether one of them, or something in a list of them, does not fit a message."""
    for value in values:
        size = getattr(value, "nbytes", None)
        if size is None and isinstance(value, str | bytes | bytearray):
            size = len(value)
        if isinstance(value, list | tuple | dict):
            if _has_large(value.values() if isinstance(value, dict) else value):
                return True
        elif isinstance(size, int) and size > INLINE_MAX:
            return True
    return False


class ClientEngine:
    """The engine behind a client. Make it with `ClientEngine.open` in the running loop.

    Args:
        client: Opened.
        driver: The client's.
        address: Of its dispatcher.
    """

    def __init__(
        self, client: GatewayClient, driver: AsyncDriver, address: str, keeping: Keeping | None = None
    ) -> None:
        self._client = client
        self._keeping = keeping or Keeping()
        self._keeping.client = client
        self._driver = driver
        #: Of the dispatcher.
        self.address = address
        #: Readable when the engine has ended; -1 if nobody asked.
        self._pidfd = -1

    @classmethod
    def open(cls, address: str | None, **settings: Any) -> ClientEngine:
        """Connect to a dispatcher, or start an engine; blocks the loop until that is done.

        Args:
            address: Of the dispatcher; None starts dispatcher and executors.
            **settings: As for `rtml.connect`.

        Raises:
            ConnectionLost: nobody answers.
            ProtocolError: the dispatcher refuses.
        """
        made: list[tuple[AsyncDriver, str, Keeping]] = []

        def make_driver(connector: Connector) -> AsyncDriver:
            peer = _GatewayPeer()
            made.append((AsyncDriver(connector, peer), connector.address, peer.keeping))
            return made[0][0]

        client = open_client(GatewayClient, make_driver, address, **settings)
        return cls(client, *made[0])

    def close(self) -> None:
        """Cancel what is unresolved, and end the engine if it was started here. Blocks until that is done."""
        self._forget_end()
        self._keeping.close()
        self._client.shutdown(wait=False, cancel_futures=True)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called by the loop once, if there will be no engine any more.

        That is when one that was started here ends by itself, or nobody answers at another's address for
        `reconnect_timeout`.
        """
        pid = self._client.engine_pid
        if pid is None:
            self._driver.on_lost = callback
        else:
            self._pidfd = os.pidfd_open(pid)

            def ended() -> None:
                self._forget_end()
                callback()

            asyncio.get_running_loop().add_reader(self._pidfd, ended)

    def _forget_end(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def prepare(self, function: RemoteFunction[..., Any]) -> Prepared:
        """Make a function known; once, before its first call."""
        own = function.overrides or Options()
        # Of what comes from outside only so much is let in as can be done in time.
        options = own if own.admission is not None else msgspec.structs.replace(own, admission=True)
        return Prepared(self._client.describe(function.function, function.defaults), options)

    def submit(self, prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Pending:
        """Open a graph.

        Raises:
            RtmlError: the call cannot be sent.
        """
        options, root = self._of_visit(prepared, options)
        if self._client.store.distant and _has_large((*args, *kwargs.values())):
            context = contextvars.copy_context()
            call = functools.partial(context.run, self._client.call, prepared.function, args, kwargs, options, *root)
            return _Sending(call)
        return self._client.call(prepared.function, args, kwargs, options, *root)

    async def stream(
        self,
        prepared: Prepared,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        timed: Callable[[Timing | None], None],
    ) -> AsyncGenerator[Any, None]:
        """Open a graph whose root is a generator; gives its items. Closing it ends the generator.

        Raises:
            RtmlError: the call cannot be sent, or how the generator ended, after its items.
        """
        options, root = self._of_visit(prepared, options)
        items = streams.start(self._client, prepared.function, args, kwargs, options, None, root)
        try:
            async for item in items:
                yield item
            timed(items.future.timing)
        finally:
            items.close()

    def _of_visit(self, prepared: Prepared, options: Options) -> tuple[Options, tuple[str, int]]:
        """The options of a call for whoever asks, its trace, and the context of its graph."""
        visit = VISIT.get()
        if visit is not None and visit.tenant:
            options = msgspec.structs.replace(options, tenant=visit.tenant)
        trace = "" if visit is None or visit.trace is None else visit.trace.id
        # A model calls no other one.
        return options, (trace, 0 if prepared.function.rows else self._keeping.context)

    async def keep(self, prepared: Prepared) -> int:
        """Have a function loaded and warm in executors from now on. Returns in how many, when all have it.

        Raises:
            RtmlError: it cannot be loaded, with the reason.
        """
        return await self._keeping.keep(prepared.function)

    def drop(self, prepared: Prepared, forgotten: Callable[[], None]) -> None:
        """The opposite of `keep`; `forgotten` is called when no executor has it any more, and no graph can want it."""
        self._keeping.drop(prepared.function, forgotten)

    def publish(self, models: Callable[[], Mapping[str, tuple[str, Prepared]]]) -> None:
        """From now on graphs find these models, each (version, function), under these names by `rtml.served`."""

        def versions() -> dict[str, ServedVersion]:
            return {
                name: ServedVersion(version, prepared.function, prepared.options)
                for name, (version, prepared) in models().items()
            }

        self._keeping.publish(versions)

    def host(self, plan: HostPlan, user: str) -> Host:
        """The handle of a named actor, to be connected."""
        return Host(self._client, plan, user)

    async def query(self, what: str) -> str:
        """Ask the dispatcher, see `rtml.messages.Query`.

        Raises:
            TimeoutError: no answer.
        """
        # The client's question blocks; it is rare enough to have a thread.
        return await asyncio.to_thread(self._client.query, what)

    @property
    def ready(self) -> bool:
        """Whether there is a connection now."""
        return self._driver.connected
