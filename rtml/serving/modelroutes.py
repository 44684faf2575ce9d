"""The paths of models by the Open Inference Protocol: `/v2/models/NAME[/versions/VERSION]/...`.

Models come and go while the gateway runs, so their paths are no entries of a table: `ModelRoutes.find` takes a path
apart, asks the registry for the version that it means, and remembers the answer until the registry changes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final

from aiohttp import web

from rtml.errors import DeadlineExceeded
from rtml.serving import descriptions, generate, http, oip
from rtml.serving.adminroutes import AdminRoutes
from rtml.serving.aside import READ_ASIDE, Form, Unfit, worth_writing
from rtml.serving.bodies import COMPRESS_MIN, Buffer
from rtml.serving.ensembles import Ensembles, configure_function, describe_function
from rtml.serving.inference import Inference, Progress
from rtml.serving.registry import ModelVersion, Registry
from rtml.serving.repeats import Forms
from rtml.serving.replies import respond
from rtml.serving.routes import GraphRoute, Reading

PREFIX: Final = "/v2/models/"
#: Paths to remember: every verb of many models. Whoever asks for others only costs time.
_PATHS_MAX: Final = 10_000
_JSON: Final = {"Content-Type": "application/json"}
_BINARY: Final = {"Content-Type": "application/octet-stream"}
_EVENTS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class VersionRoute(GraphRoute):
    """A handler that runs one version of a model.

    Args:
        inference: Runs the model.
        model: What to run.
        reading: How requests are named and read.
        again: Finds what is served in its place, if it is not served any more when the body has been read.
    """

    def __init__(
        self, inference: Inference, model: ModelVersion, reading: Reading, again: Callable[[], ModelVersion]
    ) -> None:
        super().__init__(model.target, reading, model.deadline)
        self._aside = reading.aside
        self._inference = inference
        self._model = model
        self._again = again

    def current(self) -> ModelVersion:
        """What is served now. Between this and the engine's queue nothing may be awaited: it could be forgotten."""
        return self._again() if self._model.retired else self._model

    async def _in_time(
        self, reading: Coroutine[Any, Any, tuple[ModelVersion, oip.Request]], progress: Progress
    ) -> tuple[ModelVersion, oip.Request]:
        """What is read, if that takes no longer than the request has: others may be read before it."""
        try:
            left = progress.remaining(self._model.name)
        except DeadlineExceeded:
            reading.close()
            raise
        try:
            async with asyncio.timeout(left):
                return await reading
        except TimeoutError:
            message = "the deadline passed while the request was read"
            raise DeadlineExceeded(message, missing=[self._model.name]) from None

    async def _read_aside(
        self, form: Form, body: Buffer, header_length: int | None, here: Callable[..., oip.Request]
    ) -> tuple[ModelVersion, oip.Request]:
        """A large request, and the model that is served when it has been read; by `here` if it must be read here."""
        model = self.current()
        try:
            request = await self._aside.read(form, body, header_length, model.inputs)
        except Unfit:
            model = self.current()
            return model, here(body, header_length, model)
        now = self.current()
        return now, request if now.inputs == model.inputs else here(body, header_length, now)


class InferRoute(VersionRoute):
    """`POST .../infer`.

    Args:
        *version: As `VersionRoute`.
        regions: Memory shared with clients, if that is allowed.
    """

    def __init__(self, *version: Any, regions: oip.Regions | None) -> None:
        super().__init__(*version)
        self._regions = regions
        self._forms = Forms()

    async def answer(self, request: web.BaseRequest, body: Buffer, progress: Progress) -> web.Response:
        """The model's outputs, in the form that the request asks for."""
        header_length = oip.parse_header_length(request.headers.get(oip.HEADER_LENGTH))
        model = self.current()
        form = self._forms.find(body, header_length, model) if header_length else None
        if form is not None:
            inference = form.request(body)  # type: ignore[arg-type]  # only bytes have a form
            reply = await self._inference.run(model, inference, progress)
            whole = form.answer(reply)
            if whole is not None and len(whole[0]) < COMPRESS_MIN:
                return http.PlainResponse(whole[0], {oip.HEADER_LENGTH: whole[1], **_BINARY})
            return await self._encoded(request, reply, inference)
        if len(body) >= READ_ASIDE and (header_length is None or header_length >= READ_ASIDE):
            reading = self._read_aside("infer", body, header_length, self._read)
            model, inference = await self._in_time(reading, progress)
        else:
            inference = oip.decode_request(body, header_length, model.inputs, self._regions)
            if header_length:
                self._forms.learn(body, header_length, model, inference)
        return await self._encoded(request, await self._inference.run(model, inference, progress), inference)

    async def _encoded(self, request: web.BaseRequest, reply: oip.Reply, inference: oip.Request) -> web.Response:
        head: Buffer
        data: list[Buffer]
        if worth_writing(reply, inference):
            try:
                head, data = await self._aside.write("infer", reply, inference)
            except Unfit:
                head, data = oip.encode_reply(reply, inference, self._regions)
        else:
            head, data = oip.encode_reply(reply, inference, self._regions)
        if not data:
            if len(head) < COMPRESS_MIN:
                return http.PlainResponse(bytes(head), _JSON)
            return await respond(request, (head,), "application/json")
        headers = {oip.HEADER_LENGTH: str(len(head))}
        if len(head) + sum(map(len, data)) < COMPRESS_MIN:
            return http.PlainResponse(b"".join((head, *data)), {**headers, **_BINARY})
        return await respond(request, (head, *data), "application/octet-stream", headers)

    def _read(self, body: Buffer, header_length: int | None, model: ModelVersion) -> oip.Request:
        return oip.decode_request(body, header_length, model.inputs, self._regions)


class GenerateRoute(VersionRoute):
    """`POST .../generate` and `.../generate_stream`.

    Args:
        *version: As `VersionRoute`.
        stream: Answer with an event for each result.
    """

    def __init__(self, *version: Any, stream: bool) -> None:
        super().__init__(*version)
        self._stream = stream

    async def answer(self, request: web.BaseRequest, body: Buffer, progress: Progress) -> web.StreamResponse:
        """The model's outputs as JSON, at once or as server-sent events."""
        if len(body) >= READ_ASIDE:
            reading = self._read_aside("generate", body, None, _read_generate)
            model, inference = await self._in_time(reading, progress)
        else:
            model = self.current()
            inference = generate.decode(body, model.inputs)
        if not self._stream:
            reply = await self._only(model, inference, progress)
            return await respond(request, (await self._encoded(reply, inference),), "application/json")
        async with contextlib.aclosing(self._inference.stream(model, inference, progress)) as replies:
            # What goes wrong before the first event still has a status of its own.
            first = await anext(replies, None)
            event = None if first is None else _event(await self._encoded(first, inference))
            response = web.StreamResponse(headers={**_EVENTS, http.REQUEST_ID: progress.id})
            await response.prepare(request)
            try:
                if event is not None:
                    await response.write(event)
                async for reply in replies:
                    await response.write(_event(await self._encoded(reply, inference)))
            except ConnectionError:
                raise  # the client has gone
            except Exception as error:  # noqa: BLE001 - the status has been sent: the error is an event
                http.log_error(request.path, progress.id, error)
                await response.write(_event(http.error_json(error)))
        await response.write_eof()
        return response

    async def _encoded(self, reply: oip.Reply, inference: oip.Request) -> bytes:
        if worth_writing(reply, inference):
            with contextlib.suppress(Unfit):
                return bytes((await self._aside.write("generate", reply, inference))[0])
        return generate.encode(reply, inference)

    async def _only(self, model: ModelVersion, inference: oip.Request, progress: Progress) -> oip.Reply:
        """The model's one answer.

        Raises:
            HttpError: it has another number of answers.
        """
        if not model.decoupled:
            return await self._inference.run(model, inference, progress)
        async with contextlib.aclosing(self._inference.stream(model, inference, progress)) as replies:
            reply = await anext(replies, None)
            if reply is not None and await anext(replies, None) is None:
                return reply
        how_many = "no answer" if reply is None else "several answers"
        message = f"model {model.name!r} has {how_many} to this request, and generate gives one: ask generate_stream"
        raise http.HttpError(400, message, "Decoupled")


def _read_generate(body: Buffer, header_length: int | None, model: ModelVersion) -> oip.Request:
    return generate.decode(body, model.inputs)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class ModelRoutes:
    """What is below `/v2/models/`.

    Args:
        registry: Knows the models.
        inference: Runs them.
        ensembles: Knows what graph programs call.
        admin: Has the settings of traces.
        reading: How requests are named and read.
        ready: Whether the gateway's engine takes calls now.
    """

    def __init__(
        self,
        registry: Registry,
        inference: Inference,
        ensembles: Ensembles,
        admin: AdminRoutes,
        reading: Reading,
        ready: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._inference = inference
        self._ensembles = ensembles
        self._admin = admin
        self._reading = reading
        self._ready = ready
        self._found: dict[str, http.Methods] = {}
        self._generation = -1

    def add_to(self, routes: http.Routes) -> None:
        """Serve these paths, and the list of models."""
        routes.add("GET", "/v2/models", self._list)
        routes.add("GET", "/v2/models/stats", self._statistics(None))
        routes.add_below(PREFIX, self.find)

    def find(self, path: str) -> http.Methods:
        """The handlers of a path.

        Raises:
            HttpError: 404 there is nothing; 503 the model is not ready.
        """
        if self._generation != self._registry.generation:
            self._generation = self._registry.generation
            self._found = {}
        methods = self._found.get(path)
        if methods is None:
            methods = self._make(path)
            if len(self._found) >= _PATHS_MAX:
                self._found = {}
            self._found[path] = methods
        return methods

    def _make(self, path: str) -> http.Methods:
        name, _, rest = path[len(PREFIX) :].partition("/")
        version = None
        if rest.startswith("versions/"):
            version, _, rest = rest.removeprefix("versions/").partition("/")
        if rest == "ready":
            return _get(self._readiness(name, version))
        if rest == "stats":
            return _get(self._statistics(name, version))
        try:
            model = self._registry.find(name, version)
        except http.HttpError as error:
            if error.status == 404 and rest in ("", "config"):
                return _get(self._function(name, version, rest, error))
            raise

        def again() -> ModelVersion:
            return self._registry.find(name, version)

        parts = (self._inference, model, self._reading, again)
        if rest == "infer":
            return {"POST": InferRoute(*parts, regions=self._admin.hands.shared_memory)}
        if rest in ("generate", "generate_stream"):
            return {"POST": GenerateRoute(*parts, stream=rest == "generate_stream")}
        if rest == "trace/setting":
            return self._admin.trace_settings(name)
        if rest == "":
            return _get(http.constant(self._describe(model, version)))
        if rest == "config":
            return _get(self._config(model))
        raise http.HttpError(404, f"there is nothing at {path[:200]}", "NotFound")

    def _describe(self, model: ModelVersion, version: str | None) -> dict[str, Any]:
        metadata = descriptions.describe_model(model.name, model.version, model.platform, model.inputs, model.outputs)
        metadata["versions"] = self._registry.versions(model.name) if version is None else [model.version]
        return metadata

    def _readiness(self, name: str, version: str | None) -> http.Handler:
        async def handler(request: web.BaseRequest) -> web.Response:
            reason = ""
            try:
                ready = self._registry.find(name, version).state == "READY" and self._ready()
            except http.HttpError as error:
                if error.status != 503:
                    raise
                ready, reason = False, str(error)
            found = {"name": name, "ready": ready, **({"reason": reason} if reason else {})}
            return http.json_response(found, 200 if ready else 503)

        return handler

    def _config(self, model: ModelVersion) -> http.Handler:
        async def handler(request: web.BaseRequest) -> web.Response:
            return http.json_response(await self._ensembles.config(model))

        return handler

    def _statistics(self, name: str | None, version: str | None = None) -> http.Handler:
        async def handler(request: web.BaseRequest) -> web.Response:
            return http.json_response({"model_stats": await self._ensembles.statistics(name, version)})

        return handler

    def _function(self, name: str, version: str | None, what: str, unknown: http.HttpError) -> http.Handler:
        """Of a step of programs that is no model of its own."""

        async def handler(request: web.BaseRequest) -> web.Response:
            if not self._ensembles.is_function(await self._ensembles.learned(), name, version):
                raise unknown
            describe = configure_function if what else describe_function
            return http.json_response(describe(name))

        return handler

    async def _list(self, request: web.BaseRequest) -> web.Response:
        return http.json_response({"models": self._registry.names()})


def _get(handler: http.Handler) -> http.Methods:
    return {"GET": handler, "HEAD": handler}
