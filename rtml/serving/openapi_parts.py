"""The parts of the gateway's OpenAPI document that are the same for everything that is served. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

#: A part of the document.
Schema = dict[str, Any]

JSON: Final = "application/json"
OCTETS: Final = "application/octet-stream"

TAGS: Final = (
    {"name": "Models", "description": "The Open Inference Protocol V2"},
    {"name": "Server", "description": "What there is, and is it well"},
    {"name": "Operations", "description": "Repository, shared memory, traces and logs; 501 where they are not enabled"},
)

#: Status -> what it means.
_ERRORS: Final[Mapping[int, str]] = {
    400: "The request does not fit; the message says where",
    401: "A bearer token is needed",
    403: "The token is not good for this",
    404: "There is no such thing",
    408: "The request did not arrive in time",
    413: "The body is larger than the gateway allows",
    415: "The body is compressed in a way that is not known",
    429: "Refused at once: above a quota, or it could not be answered in time",
    500: "The program failed",
    501: "Not enabled, or not possible for this model",
    503: "Not now: not ready, too many requests, or refused as it could not be answered in time",
    504: "The deadline passed",
}
_QUESTION: Final = (400, 408, 503)
#: Of what reads a body and opens a graph.
GRAPH_ERRORS: Final = (400, 408, 413, 415, 429, 500, 503, 504)
INFER_ERRORS: Final = (*GRAPH_ERRORS, 404, 501)
_MODEL_ERRORS: Final = (*_QUESTION, 404)
_ADMIN_ERRORS: Final = (*_QUESTION, 404, 413, 415, 501, 503)

_HEADERS: Final = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
REQUEST_HEADERS: Final = (
    {"$ref": "#/components/parameters/Deadline"},
    {"$ref": "#/components/parameters/RequestId"},
    {"$ref": "#/components/parameters/TraceParent"},
)


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/rtml.{name}"}


_TEXT: Final = {"type": "string"}
_FLAG: Final = {"type": "boolean"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_DURATION: Final = _object({"count": _COUNT, "ns": _COUNT}, "count", "ns")
_TENSOR: Final = {"name": _TEXT, "datatype": _TEXT, "shape": _list_of({"type": "integer"})}

#: Their names begin with what no type of a program is called.
SCHEMAS: Final[Mapping[str, Schema]] = {
    "rtml.Error": _object({"error": _TEXT, "type": {**_TEXT, "description": "of the error"}}, "error", "type"),
    "rtml.Health": _object({"live": _FLAG, "ready": _FLAG}, "live", "ready"),
    "rtml.Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _list_of(_TEXT)}, "name", "version"),
    "rtml.ModelReady": _object({"name": _TEXT, "ready": _FLAG, "reason": _TEXT}, "name", "ready"),
    "rtml.ModelMetadata": _object(
        {
            "name": _TEXT,
            "versions": _list_of(_TEXT),
            "platform": _TEXT,
            "inputs": _list_of(_ref("TensorMetadata")),
            "outputs": _list_of(_ref("TensorMetadata")),
        },
        "name",
        "platform",
        "inputs",
        "outputs",
    ),
    "rtml.TensorMetadata": _object(_TENSOR, *_TENSOR),
    "rtml.ModelConfig": {
        **_object({"name": _TEXT, "max_batch_size": _COUNT}, "name", "max_batch_size"),
        "description": "Triton's ModelConfig",
    },
    "rtml.ModelStatistics": _object(
        {
            "model_stats": _list_of(
                _object(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "last_inference": _COUNT,
                        "inference_stats": {"type": "object", "additionalProperties": _DURATION},
                    },
                    "name",
                    "version",
                )
            )
        },
        "model_stats",
    ),
    "rtml.InferenceParameters": {
        "type": "object",
        "properties": {
            "timeout": {**_COUNT, "description": "the request's budget in microseconds; 0: none"},
            "priority": {**_COUNT, "description": "1 is the highest; 0: as the model says"},
        },
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    },
    "rtml.RequestedOutput": _object({"name": _TEXT, "parameters": {"type": "object"}}, "name"),
    "rtml.InferenceReply": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "parameters": {"type": "object"},
            "outputs": _list_of(
                _object(
                    {
                        **_TENSOR,
                        "data": _list_of({"type": ["string", "number", "boolean", "null"]}),
                        "parameters": {"type": "object"},
                    },
                    *_TENSOR,
                )
            ),
        },
        "model_name",
        "outputs",
    ),
    "rtml.GenerateReply": _object({"model_name": _TEXT, "model_version": _TEXT}, "model_name"),
}

COMPONENTS: Final[Mapping[str, Schema]] = {
    "headers": {
        "RequestId": {"description": "the request's name in logs", "schema": _TEXT},
        "RetryAfter": {"description": "seconds after which to come back", "schema": _COUNT},
        "ServerTiming": {"description": "where the time went, in milliseconds", "schema": _TEXT},
        "Challenge": {"description": "what kind of token is needed", "schema": _TEXT},
    },
    "parameters": {
        "Deadline": {
            "name": "x-rtml-deadline-ms",
            "in": "header",
            "description": "The request's budget in milliseconds, for everything that follows from it",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        },
        "RequestId": {
            "name": "x-request-id",
            "in": "header",
            "description": "Echoed; errors are logged under it",
            "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,128}$"},
        },
        "TraceParent": {
            "name": "traceparent",
            "in": "header",
            "description": "W3C trace context",
            "schema": {"type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"},
        },
        "BinaryHeader": {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of JSON before binary tensors; 0: the body is the only input, raw",
            "schema": _COUNT,
        },
    },
    "responses": {
        f"Error{status}": {
            "description": text,
            "headers": _HEADERS
            | ({"Retry-After": {"$ref": "#/components/headers/RetryAfter"}} if status in (429, 503) else {})
            | ({"WWW-Authenticate": {"$ref": "#/components/headers/Challenge"}} if status == 401 else {}),
            "content": {JSON: {"schema": _ref("Error")}},
        }
        for status, text in _ERRORS.items()
    },
}


def answers(content: Schema, errors: Sequence[int], secured: bool, status: int = 200) -> Schema:
    """The responses of an operation.

    Args:
        content: Of a success, by media type.
        errors: What else it may answer.
        secured: Tokens are asked for.
        status: Of a success.
    """
    timing = {"Server-Timing": {"$ref": "#/components/headers/ServerTiming"}} if 500 in errors else {}
    found: Schema = {str(status): {"description": "Success", "headers": {**_HEADERS, **timing}, "content": content}}
    for error in sorted({*errors, *((401, 403, 429) if secured else ())}):
        found[str(error)] = {"$ref": f"#/components/responses/Error{error}"}
    return found


def _question(tag: str, summary: str, schema: str, errors: Sequence[int], secured: bool) -> Schema:
    return {
        "tags": [tag],
        "summary": summary,
        "responses": answers({JSON: {"schema": _ref(schema)}}, errors, secured),
    }


def server_paths(secured: bool) -> dict[str, Schema]:
    """The paths that every gateway has."""
    health = _question("Server", "Is the process alive", "Health", (400, 408), False)
    ready = _question("Server", "Should it get requests", "Health", (400, 408), False)
    ready["responses"]["503"] = {**health["responses"]["200"], "description": "No, not now"}
    models = _question("Models", "The models that are ready", "Error", _QUESTION, secured)
    names = {JSON: {"schema": _object({"models": _list_of(_TEXT)}, "models")}}
    models["responses"]["200"]["content"] = names
    plain = {"text/plain": {"schema": _TEXT}}
    found = {
        "/healthz": health,
        "/readyz": ready,
        "/v2/health/live": health,
        "/v2/health/ready": ready,
        "/v2": _question("Server", "Name, version, extensions", "Server", _QUESTION, secured),
        "/v2/models": models,
        "/v2/models/stats": _question("Models", "Statistics of all models", "ModelStatistics", _QUESTION, secured),
        "/metrics": _page("Metrics for Prometheus", plain, secured),
        "/openapi.json": _page("This document", {JSON: {"schema": {"type": "object"}}}, secured),
        "/docs": _page("This document as a page", {"text/html": {"schema": _TEXT}}, False),
    }
    return {path: {"get": {**operation, "operationId": "get" + _named(path)}} for path, operation in found.items()}


def _page(summary: str, content: Schema, secured: bool) -> Schema:
    return {"tags": ["Server"], "summary": summary, "responses": answers(content, _QUESTION, secured)}


def _named(path: str) -> str:
    return path.replace("/", "_").replace(".", "_").rstrip("_")


def _change(summary: str, answer: Schema, body: Schema, secured: bool, tag: str = "Operations") -> Schema:
    """An operation that takes an object, or nothing."""
    return {
        "tags": [tag],
        "summary": summary,
        "requestBody": {"content": {JSON: {"schema": body}}},
        "responses": answers({JSON: {"schema": answer}}, _ADMIN_ERRORS, secured),
    }


def admin_paths(secured: bool) -> dict[str, dict[str, Schema]]:
    """The paths that change the server, as far as an operator allows it."""
    parameters = _object({"parameters": {"type": "object"}})
    states = {"type": "string", "enum": ["READY", "LOADING", "UNAVAILABLE"]}
    index = _list_of(_object({"name": _TEXT, "version": _TEXT, "state": states, "reason": _TEXT}, "name", "state"))
    region = _object({"key": _TEXT, "offset": _COUNT, "byte_size": _COUNT}, "key", "byte_size")
    anything: Schema = {"type": "object"}
    regions = _list_of(anything)
    show_traces = _change("The settings of traces", anything, anything, secured)
    show_log = _change("The settings of the log", anything, anything, secured)
    found: dict[str, dict[str, Schema]] = {
        "/v2/repository/index": {
            "post": _change("All models, and in what state they are", index, _object({"ready": _FLAG}), secured)
        },
        "/v2/repository/models/{model}/load": {"post": _change("Load a model", anything, parameters, secured)},
        "/v2/repository/models/{model}/unload": {"post": _change("Unload a model", anything, parameters, secured)},
        "/v2/trace/setting": {"get": show_traces, "post": {**show_traces, "summary": "Change the settings of traces"}},
        "/v2/logging": {"get": show_log, "post": {**show_log, "summary": "Change the settings of the log"}},
    }
    for kind in ("system", "cuda"):
        base = f"/v2/{kind}sharedmemory"
        status = _change(f"The regions of {kind} shared memory", regions, anything, secured)
        for place in ("", "/region/{region}"):
            found[f"{base}{place}/status"] = {"get": status}
            found[f"{base}{place}/unregister"] = {"post": _change("Forget regions", anything, anything, secured)}
        found[f"{base}/region/{{region}}/register"] = {"post": _change("Register one", anything, region, secured)}
    return {path: _complete(path, methods) for path, methods in found.items()}


def _complete(path: str, methods: dict[str, Schema]) -> dict[str, Any]:
    """The operations of a path with ids and the parameters that stand in the path; a GET has no body."""
    names = re.findall(r"{(\w+)}", path)
    found: dict[str, Any] = {}
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    for method, operation in methods.items():
        operation_id = method + _named(re.sub(r"[{}]", "", path))
        found[method] = {key: value for key, value in operation.items() if (method, key) != ("get", "requestBody")}
        found[method]["operationId"] = operation_id
    return found


def generate_operations(name: str, secured: bool) -> dict[str, dict[str, Schema]]:
    """The generate extension of a model, as `model_operations`."""
    fields: Schema = {
        "type": "object",
        "description": "inputs by name; what is no input is a parameter",
        "properties": {
            "id": _TEXT,
            "text_input": {"description": "the only BYTES input", "type": ["string", "array"]},
            "parameters": {"type": "object"},
        },
    }
    events = {"text/event-stream": {"schema": _object({"data": {**_TEXT, "contentMediaType": JSON}}, "data")}}
    found: dict[str, dict[str, Schema]] = {}
    for rest, content in {"/generate": {JSON: {"schema": _ref("GenerateReply")}}, "/generate_stream": events}.items():
        found[rest] = {
            "post": {
                "tags": ["Models"],
                "summary": f"Inference by {name} with plain fields" + (", as events" if content is events else ""),
                "operationId": f"{rest[1:]}_{name}",
                "parameters": list(REQUEST_HEADERS),
                "requestBody": {"required": True, "content": {JSON: {"schema": fields}}},
                "responses": answers(content, INFER_ERRORS, secured),
            }
        }
    return found


def model_operations(name: str, secured: bool) -> dict[str, dict[str, Schema]]:
    """What every model has below its path, but for inference: rest of the path -> method -> operation."""
    ready = _question("Models", f"Is {name} ready", "ModelReady", (400, 404, 408), secured)
    ready["responses"]["503"] = {**ready["responses"]["200"], "description": "No, not now"}
    questions = {
        "": _question("Models", f"What {name} takes and gives", "ModelMetadata", _MODEL_ERRORS, secured),
        "/config": _question("Models", f"Configuration of {name}", "ModelConfig", _MODEL_ERRORS, secured),
        "/ready": ready,
        "/stats": _question("Models", f"Statistics of {name}", "ModelStatistics", _MODEL_ERRORS, secured),
    }
    return {
        rest: {"get": {**operation, "operationId": f"get_{name}{_named(rest)}"}}
        for rest, operation in questions.items()
    }
