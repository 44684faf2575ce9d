"""Requests that open a graph: graph programs under their paths, and models by the Open Inference Protocol.

The way of a request: body and deadline are read, the arguments are made from them, the graph is opened with what is
left of the budget, its value is awaited and becomes the answer. `GraphRoute` holds what both kinds share: counting,
errors, the deadline, the response's headers. When the client goes away, aiohttp cancels the handler, and with it the
await: that cancels the graph.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from aiohttp import web

from rtml.errors import DeadlineExceeded, InvalidInput, RtmlError, SerializationError
from rtml.metrics import Target
from rtml.serving import http, oip, tensors
from rtml.serving.app import Endpoint
from rtml.serving.engine import Engine, Prepared
from rtml.serving.inputs import ProgramInput
from rtml.serving.registry import ModelVersion
from rtml.serving.results import served

#: Seconds that the engine may be late with its own answer to a deadline, which knows more about it than the gateway.
_GRACE: Final = 0.005


class Reading(NamedTuple):
    """How requests are named and read, the same for all routes of a gateway."""

    ids: http.RequestIds
    #: Seconds that a client may take to send a body.
    timeout: float


class Progress:
    """One request on its way."""

    __slots__ = ("budget", "id", "started", "timing")

    def __init__(self, request_id: str, budget: float | None) -> None:
        self.id = request_id
        self.started = time.perf_counter()
        #: Seconds from `started` in which the answer is wanted.
        self.budget = budget
        #: Of the graph's root, once that has ended.
        self.timing: Any = None

    def remaining(self) -> float | None:
        """Seconds left.

        Raises:
            DeadlineExceeded: none.
        """
        if self.budget is None:
            return None
        left = self.budget - (time.perf_counter() - self.started)
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        return left


class GraphRoute:
    """A handler that opens one graph per request.

    Args:
        engine: Runs the graph.
        prepared: The function to submit.
        target: Counts.
        reading: How requests are named and read.
        deadline: Seconds for requests without a deadline of their own.
    """

    def __init__(
        self, engine: Engine, prepared: Prepared, target: Target, reading: Reading, deadline: float | None
    ) -> None:
        self._engine = engine
        self._prepared = prepared
        self._target = target
        self._ids = reading.ids
        self._read_timeout = reading.timeout
        self._deadline = deadline

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        """Answer a request."""
        progress = Progress(self._ids.of(request), self._deadline)
        target = self._target
        target.in_flight.value += 1
        status = http.CLIENT_GONE
        try:
            response = await self._answer(request, progress)
            status = response.status
        finally:
            seconds = time.perf_counter() - progress.started
            target.in_flight.value -= 1
            target.ended(status, seconds, progress.budget)
        response.headers[http.REQUEST_ID] = progress.id
        response.headers["Server-Timing"] = http.server_timing(progress.timing, seconds)
        return response

    async def _answer(self, request: web.BaseRequest, progress: Progress) -> web.Response:
        try:
            own = http.deadline_of(request)
            if own is not None:
                progress.budget = own
            return await self.answer(request, await http.read_body(request, self._read_timeout), progress)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary between programs and clients
            http.log_error(request.path, progress.id, error)
            return http.error_response(error)

    async def answer(self, request: web.BaseRequest, body: bytes, progress: Progress) -> web.Response:
        """The response to a request whose body has been read. Raises what `http.error_response` understands."""
        raise NotImplementedError

    async def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], progress: Progress) -> Any:
        """The value of the graph, within the request's budget.

        Raises:
            DeadlineExceeded: it is not there in time.
            RtmlError: it ended in another way.
        """
        options = self._prepared.options
        remaining = progress.remaining()
        if remaining is not None:
            options = msgspec.structs.replace(options, deadline=remaining)
        try:
            pending = self._engine.submit(self._prepared, args, kwargs, options)
        except SerializationError as error:
            # They were made from plain data a moment ago, so it is the data: JSON that is nested too deeply.
            raise InvalidInput(str(error)) from None
        try:
            if remaining is None:
                return await pending
            async with asyncio.timeout(remaining + _GRACE):
                return await pending
        except TimeoutError as error:
            if isinstance(error, RtmlError):
                raise
            raise DeadlineExceeded("the deadline passed before the graph ended") from None
        finally:
            progress.timing = pending.timing


class ProgramRoute(GraphRoute):
    """`POST` of a graph program's endpoint."""

    def __init__(self, engine: Engine, endpoint: Endpoint, target: Target, reading: Reading) -> None:
        super().__init__(engine, engine.prepare(served(endpoint.function)), target, reading, endpoint.deadline)
        self._input = ProgramInput(endpoint.function)

    async def answer(self, request: web.BaseRequest, body: bytes, progress: Progress) -> web.Response:
        """The program's result, which the executor has encoded (`rtml.serving.results`)."""
        query: Mapping[str, str] = request.query if "?" in request.raw_path else {}
        args, kwargs = self._input.decode(request.headers.get("Content-Type", ""), body, query)
        content, content_type = await self.call(args, kwargs, progress)
        return web.Response(body=content, headers={"Content-Type": content_type})


class ModelRoute(GraphRoute):
    """A model's paths; calling it is `POST .../infer`."""

    def __init__(self, engine: Engine, model: ModelVersion, reading: Reading) -> None:
        super().__init__(engine, model.prepared, model.target, reading, model.deadline)
        self._model = model

    async def answer(self, request: web.BaseRequest, body: bytes, progress: Progress) -> web.Response:
        """The model's outputs, in the form that the request asks for."""
        model = self._model
        header_length = oip.parse_header_length(request.headers.get(oip.HEADER_LENGTH))
        inference = oip.decode_request(body, header_length, model.inputs)
        own = oip.budget_of(inference.parameters)
        if own is not None:
            progress.budget = own if progress.budget is None else min(own, progress.budget)
        arrays = inference.inputs
        args, kwargs = ((), arrays) if len(arrays) > 1 else (tuple(arrays.values()), {})
        value = await self.call(args, kwargs, progress)
        reply = oip.Reply(model.name, model.version, self._named(value), model.outputs)
        head, data = oip.encode_reply(reply, inference)
        if not data:
            return web.Response(body=head, content_type="application/json")
        return web.Response(
            body=b"".join([head, *data]),
            content_type="application/octet-stream",
            headers={oip.HEADER_LENGTH: str(len(head))},
        )

    def _named(self, value: Any) -> dict[str, tensors.Array]:
        """A model's result as arrays by name."""
        if isinstance(value, dict):
            return {name: np.asarray(array) for name, array in value.items()}
        name, outputs = self._model.name, self._model.outputs
        if len(outputs) != 1:
            raise TypeError(f"model {name!r} returned one {type(value).__name__}, not {len(outputs)} arrays")
        return {outputs[0].name: np.asarray(value)}

    def add_to(self, routes: http.Routes) -> None:
        """Serve the model's paths, with and without its version."""
        model = self._model
        metadata = oip.describe_model(model.name, model.version, model.platform, model.inputs, model.outputs)
        for base in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
            routes.add("GET", base, http.constant(metadata))
            routes.add("GET", f"{base}/config", http.constant(model.config))
            routes.add("GET", f"{base}/ready", self._ready)
            routes.add("POST", f"{base}/infer", self)

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        ready = self._engine.ready
        return http.json_response({"name": self._model.name, "ready": ready}, 200 if ready else 503)
