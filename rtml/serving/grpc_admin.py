"""gRPC's calls that run no model: health, descriptions, statistics, the model repository.

They answer what the HTTP side answers: its JSON is converted into the messages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
from google.protobuf import json_format

from rtml.serving import descriptions, grpc_messages
from rtml.serving.adminroutes import AdminRoutes
from rtml.serving.ensembles import Ensembles, configure_function, describe_function
from rtml.serving.grpc_calls import Call, Calls
from rtml.serving.grpc_messages import Message
from rtml.serving.http import HttpError
from rtml.serving.registry import ModelVersion, Registry

#: Makes the fields of a response, or the response itself.
Handler = Callable[[Message], Awaitable[Mapping[str, Any]]]

#: What HTTP calls them: tokens are good for paths.
_PATHS: Final = {
    "ServerLive": "/v2/health/live",
    "ServerReady": "/v2/health/ready",
    "ServerMetadata": "/v2",
    "ModelReady": "/v2/models/{name}/ready",
    "ModelMetadata": "/v2/models/{name}",
    "ModelConfig": "/v2/models/{name}/config",
    "ModelStatistics": "/v2/models/{name}/stats",
    "RepositoryIndex": "/v2/repository/index",
    "RepositoryModelLoad": "/v2/repository/models/{name}/load",
    "RepositoryModelUnload": "/v2/repository/models/{name}/unload",
    "SystemSharedMemoryStatus": "/v2/systemsharedmemory/region/{name}/status",
    "SystemSharedMemoryRegister": "/v2/systemsharedmemory/region/{name}/register",
    "SystemSharedMemoryUnregister": "/v2/systemsharedmemory/region/{name}/unregister",
    "CudaSharedMemoryStatus": "/v2/cudasharedmemory/region/{name}/status",
    "CudaSharedMemoryRegister": "/v2/cudasharedmemory/region/{name}/register",
    "CudaSharedMemoryUnregister": "/v2/cudasharedmemory/region/{name}/unregister",
    "TraceSetting": "/v2/models/{name}/trace/setting",
    "LogSettings": "/v2/logging",
}
#: The same without a name: what is about all models, or all regions.
_PATHS_OF_ALL: Final = {
    "ModelStatistics": "/v2/models/stats",
    "TraceSetting": "/v2/trace/setting",
}
#: Answered however busy the gateway is.
_ALWAYS: Final = frozenset(("ServerLive", "ServerReady"))


def _path(method: str, request: Message) -> str:
    """What HTTP calls a request."""
    name = getattr(request, "name", "") or getattr(request, "model_name", "")
    if not name and method in _PATHS_OF_ALL:
        return _PATHS_OF_ALL[method]
    return _PATHS[method].replace("/region/{name}", f"/region/{name}" if name else "").replace("{name}", name)


class AdminCalls:
    """Answers about the gateway and its models.

    Args:
        calls: Those that run.
        registry: What is served.
        ensembles: Knows what graph programs call.
        admin: Does what changes the server.
        describe: The answer to `GET /v2`.
        ready: Whether requests should be sent here.
    """

    def __init__(
        self,
        calls: Calls,
        registry: Registry,
        ensembles: Ensembles,
        admin: AdminRoutes,
        describe: Callable[[], Mapping[str, Any]],
        ready: Callable[[], bool],
    ) -> None:
        self._calls = calls
        self._registry = registry
        self._ensembles = ensembles
        self._admin = admin
        self._describe = describe
        self._ready = ready
        self.handlers: dict[str, Handler] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._memory("SystemSharedMemoryStatus"),
            "SystemSharedMemoryRegister": self._memory("SystemSharedMemoryRegister"),
            "SystemSharedMemoryUnregister": self._memory("SystemSharedMemoryUnregister"),
            "CudaSharedMemoryStatus": self._memory("CudaSharedMemoryStatus"),
            "CudaSharedMemoryRegister": self._memory("CudaSharedMemoryRegister"),
            "CudaSharedMemoryUnregister": self._memory("CudaSharedMemoryUnregister"),
            "TraceSetting": self._traces,
            "LogSettings": self._log,
        }

    def rpc(self, method: grpc_messages.Method) -> Any:
        """The handler of a call, for grpc."""
        handler = self.handlers[method.name]

        async def answer(request: Message, context: Any) -> Message:
            async def handle(call: Call) -> Message:
                path = _path(method.name, request)
                with self._calls.request(call, path, request.ByteSize(), bounded=method.name not in _ALWAYS):
                    found = await handler(request)
                return json_format.ParseDict(found, method.response(), ignore_unknown_fields=True)

            return await self._calls.answer(method.name, context, handle)

        return grpc.unary_unary_rpc_method_handler(answer, method.request.FromString, _serialize)

    # --- the server ---------------------------------------------------------------------------------------------------

    async def _server_live(self, request: Message) -> Mapping[str, Any]:
        return {"live": True}

    async def _server_ready(self, request: Message) -> Mapping[str, Any]:
        return {"ready": self._ready()}

    async def _server_metadata(self, request: Message) -> Mapping[str, Any]:
        return self._describe()

    # --- models -------------------------------------------------------------------------------------------------------

    async def _model_ready(self, request: Message) -> Mapping[str, Any]:
        try:
            self._registry.find(request.name, request.version or None)
        except HttpError as error:
            if error.status != 503:
                raise
            return {"ready": False}
        return {"ready": self._ready()}

    async def _model_metadata(self, request: Message) -> Mapping[str, Any]:
        model = await self._find(request)
        if model is None:
            return describe_function(request.name)
        found = descriptions.describe_model(model.name, model.version, model.platform, model.inputs, model.outputs)
        found["versions"] = [model.version] if request.version else self._registry.versions(model.name)
        return found

    async def _model_config(self, request: Message) -> Mapping[str, Any]:
        model = await self._find(request)
        return {"config": configure_function(request.name) if model is None else await self._ensembles.config(model)}

    async def _find(self, request: Message) -> ModelVersion | None:
        """The model; None if it is a function that graph programs call."""
        name, version = request.name, request.version or None
        try:
            return self._registry.find(name, version)
        except HttpError as error:
            if error.status == 404 and self._ensembles.is_function(await self._ensembles.learned(), name, version):
                return None
            raise

    async def _model_statistics(self, request: Message) -> Mapping[str, Any]:
        return {"model_stats": await self._ensembles.statistics(request.name or None, request.version or None)}

    # --- the repository -----------------------------------------------------------------------------------------------

    async def _repository_index(self, request: Message) -> Mapping[str, Any]:
        return {"models": self._registry.index(request.ready)}

    async def _load(self, request: Message) -> Mapping[str, Any]:
        await self._repository(request, "Load")
        return {}

    async def _unload(self, request: Message) -> Mapping[str, Any]:
        await self._repository(request, "Unload")
        return {}

    async def _repository(self, request: Message, verb: str) -> None:
        path = _path(f"RepositoryModel{verb}", request)
        await self._admin.act("POST", path, {"parameters": _parameters(request)})

    # --- what operators allow -----------------------------------------------------------------------------------------

    def _memory(self, method: str) -> Handler:
        verb = method.rpartition("Memory")[2].lower()

        async def handler(request: Message) -> Mapping[str, Any]:
            fields = {name: getattr(request, name) for name in ("key", "offset", "byte_size") if hasattr(request, name)}
            found = await self._admin.act("GET" if verb == "status" else "POST", _path(method, request), fields)
            return {"regions": {region["name"]: region for region in found}} if verb == "status" else {}

        return handler

    async def _traces(self, request: Message) -> Mapping[str, Any]:
        fields = {name: _setting(name, list(setting.value)) for name, setting in request.settings.items()}
        if request.model_name:
            self._registry.find(request.model_name)  # or say that there is none
        found = await self._admin.act("POST" if fields else "GET", _path("TraceSetting", request), fields)
        return {"settings": {name: {"value": _texts(value)} for name, value in found.items()}}

    async def _log(self, request: Message) -> Mapping[str, Any]:
        fields = {}
        for name, setting in request.settings.items():
            choice = setting.WhichOneof("parameter_choice")
            fields[name] = None if choice is None else getattr(setting, choice)
        found = await self._admin.act("POST" if fields else "GET", "/v2/logging", fields)
        return {"settings": {name: {_kind(value): value} for name, value in found.items()}}


def _setting(name: str, values: list[str]) -> Any:
    """The value of a trace setting as JSON has it; without one it is as it was at the start."""
    if name == "trace_level":
        return values or None
    return values[0] if values else None


def _texts(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _kind(value: Any) -> str:
    """The field of a log setting for a value."""
    return {bool: "bool_param", int: "uint32_param"}.get(type(value), "string_param")


def _parameters(request: Message) -> dict[str, Any]:
    """Of a request to the repository; files come as bytes."""
    found = {}
    for name, value in request.parameters.items():
        choice = value.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(value, choice)
    return found


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]  # its class is made at run time
