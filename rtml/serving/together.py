"""What all processes of a gateway do alike, and know together.

A client's request reaches one process; a region of shared memory that it registers, or a model that it has loaded, is
there for requests that reach the others, too. With one process everything here is a plain call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from rtml.serving import http
from rtml.serving.member import CommandFailed, Peers
from rtml.serving.registry import Repository

Do = Callable[[str, dict[str, Any]], Awaitable[None]]


class Together:
    """Has things done by all processes.

    Args:
        peers: The others; None: there are none.
    """

    def __init__(self, peers: Peers | None) -> None:
        self._peers = peers
        self._actions: dict[str, Do] = {}
        self._answers: dict[str, Callable[[], Any]] = {}

    def on(self, kind: str, do: Do) -> None:
        """Have `do(key, fields)` called wherever `do` of this kind is asked for."""
        self._actions[kind] = do
        if self._peers is not None:
            self._peers.on_command(kind, self._told(do))

    def answer(self, kind: str, tell: Callable[[], Any]) -> None:
        """Have `tell()` called for each `ask` of this kind; its plain data is this process's answer."""
        self._answers[kind] = tell

        async def told(key: str, payload: bytes) -> str:
            return msgspec.json.encode(tell()).decode()

        if self._peers is not None:
            self._peers.on_command(kind, told)

    async def do(self, kind: str, key: str, fields: dict[str, Any]) -> None:
        """Have every process do something, and those that start later, unless it is done again for the same key.

        Args:
            kind: Of `on`.
            key: What it is about.
            fields: Plain data.

        Raises:
            HttpError: one of them could not, and why.
            TimeoutError: it takes too long.
        """
        if self._peers is None:
            await self._actions[kind](key, fields)
            return
        try:
            await self._peers.broadcast(kind, key, msgspec.json.encode(fields))
        except CommandFailed as error:
            raise http.HttpError(error.status, str(error), "InvalidInput" if error.status < 500 else "") from None

    async def ask(self, kind: str) -> list[Any]:
        """What each process answers; that of this process alone if the others cannot be asked."""
        if self._peers is None:
            return [self._answers[kind]()]
        try:
            return [msgspec.json.decode(text) for text in await self._peers.collect(kind)]
        except (TimeoutError, CommandFailed):
            return [self._answers[kind]()]

    def _told(self, do: Do) -> Callable[[str, bytes], Awaitable[str | None]]:
        async def told(key: str, payload: bytes) -> None:
            try:
                await do(key, msgspec.json.decode(payload))
            except Exception as error:
                # As the client will hear it, which asked another process.
                failure = http.explain(error)
                raise http.HttpError(failure.status, failure.message, failure.kind) from error

        return told


class EverywhereRepository:
    """A repository of which every process has its own.

    Args:
        own: This process's.
        together: All processes.
        check: Raises `HttpError` if requests may not load and unload.
    """

    def __init__(self, own: Repository, together: Together, check: Callable[[], None] = lambda: None) -> None:
        self._together = together
        self._check = check

        async def act(key: str, fields: dict[str, Any]) -> None:
            name = fields["name"]
            if fields["verb"] == "load":
                await own.load(name, fields["parameters"])
            else:
                await own.unload(name, fields["unload_dependents"])

        together.on("repository", act)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """As `Repository.load`, in every process."""
        self._check()
        fields = {"verb": "load", "name": name, "parameters": dict(parameters)}
        await self._together.do("repository", f"model {name}", fields)

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """As `Repository.unload`, in every process."""
        self._check()
        fields = {"verb": "unload", "name": name, "unload_dependents": unload_dependents}
        await self._together.do("repository", f"model {name}", fields)
