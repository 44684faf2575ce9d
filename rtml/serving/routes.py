"""Requests that open a graph: what they share, and graph programs under their paths.

The way of a request: body and deadline are read, the arguments are made from them, the graph is opened with what is
left of the budget (`rtml.serving.inference`), its value is awaited and becomes the answer. `GraphRoute` holds what all
kinds share: counting, errors, the deadline, the response's headers. When the client goes away, aiohttp cancels the
handler, and with it the await: that cancels the graph.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from aiohttp import web

from rtml.metrics import Target
from rtml.serving import http
from rtml.serving.app import Endpoint
from rtml.serving.aside import READ_ASIDE, Aside
from rtml.serving.bodies import Buffer
from rtml.serving.engine import Prepared
from rtml.serving.inference import Inference, Progress
from rtml.serving.inputs import Call, ProgramInput
from rtml.serving.registry import ModelVersion
from rtml.serving.replies import respond
from rtml.serving.results import LargeBody
from rtml.serving.visits import VISIT


class Reading(NamedTuple):
    """How requests are named and read, the same for all routes of a gateway."""

    ids: http.RequestIds
    #: Seconds that a client may take to send a body.
    timeout: float
    #: Reads and writes large JSON.
    aside: Aside


class GraphRoute:
    """A handler that opens one graph per request.

    Args:
        target: Counts.
        reading: How requests are named and read.
        deadline: Seconds for requests without a deadline of their own.
    """

    def __init__(self, target: Target, reading: Reading, deadline: float | None) -> None:
        self._target = target
        self._ids = reading.ids
        self._read_timeout = reading.timeout
        self._deadline = deadline

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        progress = Progress(self._ids.of(request), self._deadline, http.arrived(request))
        visit = VISIT.get()
        if visit is not None:
            visit.progress = progress
        target = self._target
        if target.in_flight.value >= target.in_flight_max:
            target.refused()
            raise http.too_many(target.in_flight_max)
        target.in_flight.value += 1
        status = http.CLIENT_GONE
        try:
            own = http.deadline_of(request)
            if own is not None:
                progress.budget = own
            body: Buffer | None = request._read_bytes
            if body is None or len(body) > request.client_max_size or http.CONTENT_ENCODING in request.headers:
                body = await http.read_body(request, self._read_timeout)
            response = await self.answer(request, body, progress)
            status = response.status
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary between programs and clients
            http.log_error(request.path, progress.id, error)
            response = http.error_response(error)
            status = response.status
        finally:
            seconds = time.perf_counter() - progress.started
            missing = progress.missing
            target.in_flight.value -= 1
            target.ended(status, seconds, progress.budget, bool(missing))
        headers = response.headers
        headers[http.REQUEST_ID] = progress.id
        if missing:
            headers[http.MISSING_STEPS] = ",".join([quote(name, safe="") for name in missing])
        headers["Server-Timing"] = http.server_timing(progress.timing, seconds)
        return response

    async def answer(self, request: web.BaseRequest, body: Buffer, progress: Progress) -> web.StreamResponse:
        """The response to a request whose body has been read. Raises what `http.error_response` understands."""
        raise NotImplementedError


class ProgramRoute(GraphRoute):
    """`POST` of a graph program's endpoint."""

    def __init__(
        self, inference: Inference, prepared: Prepared, endpoint: Endpoint, model: ModelVersion, reading: Reading
    ) -> None:
        super().__init__(model.target, reading, endpoint.deadline)
        self._inference = inference
        self._model = model
        self._prepared = prepared
        self._input = ProgramInput(endpoint.function)

    def call(self, content_type: str, body: Buffer, query: Mapping[str, str]) -> Call:
        """The arguments for a request; a large body of JSON is one, and read where the program runs."""
        if len(body) >= READ_ASIDE and self._input.is_json(content_type):
            return (LargeBody(content_type, np.frombuffer(body, np.uint8)),), {}
        return self._input.decode(content_type, body, query)

    async def answer(self, request: web.BaseRequest, body: Buffer, progress: Progress) -> web.StreamResponse:
        """The program's result, which the executor has encoded (`rtml.serving.results`)."""
        query: Mapping[str, str] = request.query if "?" in request.raw_path else {}
        args, kwargs = self.call(request.headers.get("Content-Type", ""), body, query)
        content, content_type = await self._inference.run_program(self._model, self._prepared, args, kwargs, progress)
        return await respond(request, (content,), content_type)
