"""gRPC's calls that run no model: health, descriptions, statistics, the model repository.

They answer what the HTTP side answers: its JSON is converted into the messages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
from google.protobuf import json_format

from rtml.serving import grpc_messages, oip
from rtml.serving.ensembles import Ensembles, configure_function, describe_function
from rtml.serving.grpc_calls import Call, Calls
from rtml.serving.grpc_messages import Message
from rtml.serving.http import HttpError
from rtml.serving.registry import ModelVersion, Registry

#: Makes the fields of a response, or the response itself.
Handler = Callable[[Message], Awaitable[Mapping[str, Any]]]

#: Of calls that this gateway does not answer: which, and why.
_NOT_SERVED: Final = {
    "SystemSharedMemory": "tensors in shared memory are not enabled here; send them in the request",
    "CudaSharedMemory": "tensors in CUDA shared memory are not supported; send them in the request",
    "TraceSetting": "traces are not set here but asked for: run `rtml trace`, or read the server-timing of each reply",
    "LogSettings": "logs are not set here: they are the gateway's own, see its operator's manual",
}

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
    "TraceSetting": "/v2/trace/setting",
    "LogSettings": "/v2/logging",
}
#: Answered however busy the gateway is.
_ALWAYS: Final = frozenset(("ServerLive", "ServerReady"))


def _path(method: str, request: Message) -> str:
    """What HTTP calls a request."""
    name = getattr(request, "name", "") or getattr(request, "model_name", "")
    if method == "ModelStatistics" and not name:
        return "/v2/models/stats"
    return _PATHS.get(method, f"/v2/{method.lower()}").replace("{name}", name)


class AdminCalls:
    """Answers about the gateway and its models.

    Args:
        calls: Those that run.
        registry: What is served.
        ensembles: Knows what graph programs call.
        describe: The answer to `GET /v2`.
        ready: Whether requests should be sent here.
    """

    def __init__(
        self,
        calls: Calls,
        registry: Registry,
        ensembles: Ensembles,
        describe: Callable[[], Mapping[str, Any]],
        ready: Callable[[], bool],
    ) -> None:
        self._calls = calls
        self._registry = registry
        self._ensembles = ensembles
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
        }

    def rpc(self, method: grpc_messages.Method) -> Any:
        """The handler of a call, for grpc."""
        handler = self.handlers.get(method.name) or _not_served(method.name)

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
        found = oip.describe_model(model.name, model.version, model.platform, model.inputs, model.outputs)
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
        await self._registry.loader().load(request.model_name, _parameters(request))
        return {}

    async def _unload(self, request: Message) -> Mapping[str, Any]:
        dependents = bool(_parameters(request).get("unload_dependents", False))
        await self._registry.loader().unload(request.model_name, dependents)
        return {}


def _parameters(request: Message) -> dict[str, Any]:
    """Of a request to the repository; files come as bytes."""
    found = {}
    for name, value in request.parameters.items():
        choice = value.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(value, choice)
    return found


def _not_served(name: str) -> Handler:
    text = next((text for prefix, text in _NOT_SERVED.items() if name.startswith(prefix)), f"{name} is not served here")

    async def handler(request: Message) -> Mapping[str, Any]:
        raise HttpError(501, text, "NotSupported")

    return handler


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]  # its class is made at run time
