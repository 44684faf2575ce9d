"""The paths of the Open Inference Protocol that change the server: repository, shared memory, traces, the log.

What an operator has not allowed answers 501 and says how to allow it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec
from aiohttp import web

from rtml.errors import InvalidInput
from rtml.serving import http
from rtml.serving.features import Features, NotEnabled
from rtml.serving.logsettings import LogSettings
from rtml.serving.registry import Registry, Repository
from rtml.serving.requesttraces import RequestTraces
from rtml.serving.routes import Reading
from rtml.serving.sharedmemory import SharedMemory
from rtml.serving.together import Together

#: What a handler here does: the request's fields -> the answer.
Action = Callable[[dict[str, Any]], Awaitable[Any]]
#: By method.
Actions = dict[str, Action]

_TRACES: Final = "/v2/trace/setting"
_EXACT: Final = ("/v2/repository/index", _TRACES, "/v2/logging")
_MODELS: Final = "/v2/repository/models/"
_SYSTEM: Final = "/v2/systemsharedmemory/"
_CUDA: Final = "/v2/cudasharedmemory/"
_NO_REPOSITORY: Final = "this server has no model repository; start it with --model-repository DIR"
_NO_CUDA: Final = "CUDA shared memory cannot be registered here; send tensors in the body or in system shared memory"

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Hands(NamedTuple):
    """What clients may get their hands on; None is off."""

    shared_memory: SharedMemory | None = None
    traces: RequestTraces | None = None
    log: LogSettings | None = None

    @classmethod
    def open(cls, features: Features, region_max: int, *, alone: bool = True) -> Hands:
        """What is allowed.

        Args:
            features: By whom it is allowed.
            region_max: Largest region of shared memory, in bytes.
            alone: There are no other processes, which would write to the same file of traces.
        """
        log = LogSettings() if features.logging else None
        if log is not None:
            log.open()
        return cls(
            SharedMemory(region_max) if features.shared_memory else None,
            RequestTraces(features.trace_file, "" if alone else f"-{os.getpid()}") if features.trace else None,
            log,
        )

    def close(self) -> None:
        """Let go of files and the log."""
        for hand in self:
            if hand is not None:
                hand.close()


class AdminRoutes:
    """Serves these paths.

    Args:
        registry: Knows the models and their repository.
        hands: What is allowed.
        features: The same, as settings.
        reading: How requests are read.
        together: The gateway's processes.
    """

    def __init__(
        self, registry: Registry, hands: Hands, features: Features, reading: Reading, together: Together
    ) -> None:
        self._registry = registry
        self.hands = hands
        self._features = features
        self._timeout = reading.timeout
        self._together = together
        together.on("admin", self._apply)

    def add_to(self, routes: http.Routes) -> None:
        """Serve these paths."""
        for path in _EXACT:
            for method, action in self._find(path).items():
                routes.add(method, path, self._on(action))
        for prefix in (_MODELS, _SYSTEM, _CUDA):
            routes.add_below(prefix, lambda path: self._methods(self._find(path)))

    async def act(self, method: str, path: str, fields: dict[str, Any]) -> Any:
        """Do what a request does, for other protocols.

        Args:
            method: GET or POST.
            path: Its own.
            fields: Of its body.

        Raises:
            HttpError, RtmlError: as the request.
        """
        return await self._find(path)[method](fields)

    def _find(self, path: str) -> Actions:
        """What the methods of a path do."""
        if path == "/v2/repository/index":
            return {"POST": self._index}
        if path.endswith("/trace/setting"):
            return self._trace_actions(path.removeprefix("/v2/models/").partition("/")[0] if path != _TRACES else None)
        if path == "/v2/logging":
            return {"GET": self._logging, "POST": self._change_logging}
        if path.startswith(_MODELS):
            return self._find_model(path)
        return self._find_system(path) if path.startswith(_SYSTEM) else self._find_cuda(path)

    def _methods(self, actions: Actions) -> http.Methods:
        return {method: self._on(action) for method, action in actions.items()}

    def _on(self, action: Action) -> http.Handler:
        """A handler that reads a request's fields, of which there may be none."""

        async def handler(request: web.BaseRequest) -> web.Response:
            fields: dict[str, Any] = {}
            body = await http.read_body(request, self._timeout)
            if body:
                try:
                    fields = _decode(body)
                except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                    raise InvalidInput(f"the body must be a JSON object: {error}") from None
            return http.json_response(await action(fields))

        return handler

    async def _apply(self, key: str, fields: dict[str, Any]) -> None:
        """Do here what all processes do."""
        verb, subject, wanted = fields["verb"], fields["subject"], fields["wanted"]
        if verb == "register":
            self._memory().register(subject, wanted.get("key"), wanted.get("offset", 0), wanted.get("byte_size"))
        elif verb == "unregister":
            self._memory().unregister(subject)
        elif verb == "trace":
            self._traces().change(subject, wanted)
        else:
            self._log().change(wanted)

    async def _everywhere(self, verb: str, subject: str | None, wanted: dict[str, Any]) -> None:
        """Have all processes do something about a region or model (None: all)."""
        # Settings that were changed are changed in processes that start later, too, one after the other.
        about = "region" if verb.endswith("register") else f"{verb} {','.join(sorted(wanted))}"
        fields = {"verb": verb, "subject": subject, "wanted": wanted}
        await self._together.do("admin", f"{about} {subject}", fields)

    # --- the repository -----------------------------------------------------------------------------------------------

    async def _index(self, fields: dict[str, Any]) -> Any:
        ready = fields.get("ready", False)
        if not isinstance(ready, bool):
            raise InvalidInput(f"ready must be true or false, not {repr(ready)[:40]}")
        return self._registry.index(ready)

    def _find_model(self, path: str) -> Actions:
        name, _, verb = path[len(_MODELS) :].rpartition("/")
        if not name or verb not in ("load", "unload"):
            raise http.HttpError(404, f"there is nothing at {path[:200]}", "NotFound")

        async def act(fields: dict[str, Any]) -> Any:
            parameters = fields.get("parameters")
            if parameters is None:
                parameters = {}
            if not isinstance(parameters, dict):
                raise InvalidInput(f"parameters must be an object, not {repr(parameters)[:40]}")
            repository = self._repository()
            if verb == "load":
                if not self._features.model_upload and any(key.startswith("file:") for key in parameters):
                    raise NotEnabled("requests may not bring files; --allow-model-upload of the gateway lets them")
                await repository.load(name, parameters)
            else:
                dependents = parameters.get("unload_dependents", False)
                if not isinstance(dependents, bool):
                    raise InvalidInput(f"unload_dependents must be true or false, not {repr(dependents)[:40]}")
                await repository.unload(name, dependents)
            return {"name": name, verb: True}

        return {"POST": act}

    def _repository(self) -> Repository:
        if self._registry.repository is None:
            raise NotEnabled(_NO_REPOSITORY)
        return self._registry.repository

    # --- shared memory ------------------------------------------------------------------------------------------------

    def _memory(self) -> SharedMemory:
        if self.hands.shared_memory is None:
            raise NotEnabled("shared memory of clients is off here; --allow-shared-memory of the gateway turns it on")
        return self.hands.shared_memory

    def _find_system(self, path: str) -> Actions:
        region, verb = _region_of(path, _SYSTEM)

        async def status(fields: dict[str, Any]) -> Any:
            return self._memory().status(region)

        async def register(fields: dict[str, Any]) -> Any:
            self._memory()  # or say that it is off
            await self._everywhere("register", region, fields)
            return {}

        async def unregister(fields: dict[str, Any]) -> Any:
            self._memory()
            await self._everywhere("unregister", region, {})
            return {}

        return self._region_methods(
            path, region, verb, {"status": status, "register": register, "unregister": unregister}
        )

    def _find_cuda(self, path: str) -> Actions:
        region, verb = _region_of(path, _CUDA)

        async def nothing(fields: dict[str, Any]) -> Any:
            return [] if verb == "status" else {}

        async def refuse(fields: dict[str, Any]) -> Any:
            raise NotEnabled(_NO_CUDA)

        return self._region_methods(path, region, verb, {"status": nothing, "register": refuse, "unregister": nothing})

    def _region_methods(self, path: str, region: str | None, verb: str, actions: dict[str, Action]) -> Actions:
        if verb not in actions or (verb == "register" and region is None):
            raise http.HttpError(404, f"there is nothing at {path[:200]}", "NotFound")
        return {"GET" if verb == "status" else "POST": actions[verb]}

    # --- traces and the log -------------------------------------------------------------------------------------------

    def trace_settings(self, model: str | None) -> http.Methods:
        """The handlers of the trace settings, of a model or (None) of all."""
        return self._methods(self._trace_actions(model))

    def _trace_actions(self, model: str | None) -> Actions:
        async def show(fields: dict[str, Any]) -> Any:
            return self._traces().settings(model)

        async def change(fields: dict[str, Any]) -> Any:
            self._traces()
            await self._everywhere("trace", model, fields)
            return self._traces().settings(model)

        return {"GET": show, "POST": change}

    def _traces(self) -> RequestTraces:
        if self.hands.traces is None:
            raise NotEnabled("traces of requests are off here; --allow-trace of the gateway lets clients use them")
        return self.hands.traces

    def _log(self) -> LogSettings:
        if self.hands.log is None:
            raise NotEnabled("the log's settings are the operator's; --allow-logging of the gateway opens them")
        return self.hands.log

    async def _logging(self, fields: dict[str, Any]) -> Any:
        return self._log().settings()

    async def _change_logging(self, fields: dict[str, Any]) -> Any:
        self._log()
        await self._everywhere("log", None, fields)
        return self._log().settings()


def _region_of(path: str, prefix: str) -> tuple[str | None, str]:
    """Region (None: all) and verb of a path of shared memory."""
    rest = path[len(prefix) :]
    if not rest.startswith("region/"):
        return None, rest
    region, _, verb = rest.removeprefix("region/").rpartition("/")
    return (region, verb) if region else (None, "")
