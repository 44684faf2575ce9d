"""The gateway's hand on the engine: a client that never unpickles, on the gateway's own event loop."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, NamedTuple, Protocol

import msgspec

from rtml import codec
from rtml.client.client import Client
from rtml.client.functions import RemoteFunction
from rtml.client.future import Future
from rtml.errors import TaskError
from rtml.messages import ErrorInfo, ObjectRef, Options, Timing


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


class Engine(Protocol):
    """What the gateway needs of an engine. `ClientEngine` is the real one; tests have one that runs calls inline."""

    def prepare(self, function: RemoteFunction[..., Any]) -> Prepared:
        """Make a function known; once, before its first call."""

    def submit(self, prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Pending:
        """Open a graph. Raises `RtmlError` if the call cannot be sent."""

    async def query(self, what: str) -> str:
        """Ask the dispatcher, see `rtml.messages.Query`. Raises `RtmlError` or `TimeoutError` if it does not answer."""

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
            SerializationError: it is anything but containers, scalars and arrays.
        """
        return codec.decode_data(payload, self.store)

    def decode_error(self, info: ErrorInfo) -> BaseException:
        """An error of rtml's own with its type; a user's as a `RemoteError`."""
        error = codec.decode_error(msgspec.structs.replace(info, pickled=b""))
        return RemoteError(info) if type(error) is TaskError else error
