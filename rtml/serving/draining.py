"""The requests that a server answers now, and how they end when the gateway stops."""

from __future__ import annotations

import asyncio
from typing import Any


class Draining:
    """The tasks that answer requests, of one protocol.

    `enter` and `leave` are on the way of every request, so they are two plain calls: a context manager costs as much as
    all that they do.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        #: Set when nothing runs any more; None before the end has begun.
        self._idle: asyncio.Event | None = None
        self._given_up = False

    @property
    def begun(self) -> bool:
        """Whether the end has begun: clients are told that their connections end."""
        return self._idle is not None

    def enter(self) -> asyncio.Task[Any]:
        """The running task begins to answer; returns it, for `leave`."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        return task

    def leave(self, task: asyncio.Task[Any]) -> None:
        """It has answered."""
        self._running.discard(task)
        if self._idle is not None and not self._running:
            self._idle.set()

    def given_up(self, task: asyncio.Task[Any]) -> bool:
        """Whether `task` was cancelled here, because it took too long; then it goes on, to say so to its client."""
        if self._given_up:
            task.uncancel()
        return self._given_up

    def begin(self) -> None:
        """The end has begun; what comes is answered all the same."""
        if self._idle is None:
            self._idle = asyncio.Event()

    async def drain(self, timeout: float) -> None:
        """Let what runs end; cancel the rest after `timeout` seconds."""
        self._idle = asyncio.Event()  # a new one: that of `begin` has been set whenever nothing ran
        if not self._running:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            self._given_up = True
            for task in self._running:
                task.cancel()
            await self._idle.wait()
