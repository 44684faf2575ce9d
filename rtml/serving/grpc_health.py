"""The standard health service of gRPC, which orchestrators and load balancers ask: `Check`, and `Watch` for changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc

from rtml.serving import grpc_messages
from rtml.serving.grpc_messages import Message

HealthResponse: Final = grpc_messages.message("grpc.health.v1.HealthCheckResponse")
#: The whole gateway is "".
_SERVICES: Final = ("", grpc_messages.INFERENCE, grpc_messages.HEALTH)


class Health:
    """Answers `grpc.health.v1`.

    Args:
        ready: Whether requests should be sent here.
    """

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._known = ready()
        self._closed = False
        #: Done when `_known` has changed; None if nobody watches.
        self._changed: asyncio.Future[None] | None = None

    def look(self) -> None:
        """Tell those who watch, if readiness has changed."""
        if self._ready() != self._known:
            self._known = not self._known
            self._tell()

    def close(self) -> None:
        """Tell those who watch that this is the end."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set_result(None)

    async def check(self, request: Message, context: Any) -> Message:
        """The state now; NOT_FOUND for services that nobody knows."""
        if request.service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:200]!r}")
        return HealthResponse(status=self._state(request.service))

    async def watch(self, request: Message, context: Any) -> None:
        """The state now, and again whenever it changes."""
        last = None
        while True:
            state = self._state(request.service)
            if state != last:
                await context.write(HealthResponse(status=state))
                last = state
            if self._closed:
                return
            if self._changed is None:
                self._changed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._changed)

    def _state(self, service: str) -> int:
        if service not in _SERVICES:
            found = HealthResponse.SERVICE_UNKNOWN
        else:
            found = HealthResponse.SERVING if self._ready() and not self._closed else HealthResponse.NOT_SERVING
        return int(found)
