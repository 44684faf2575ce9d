"""What a gateway serves as an OpenAPI 3.1 document. Pure: descriptions in, JSON-ready dicts out.

Graph programs are described by their type hints, models by their inputs and outputs; each with all that it can answer,
errors too, so that clients and tests can be made from the document alone. What every operation shares (headers, errors,
the tensors of the protocol) stands in `components` once.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from rtml.serving import openapi_parts as parts
from rtml.serving.app import App, Endpoint, TensorSpec
from rtml.serving.inputs import ProgramInput, is_array
from rtml.serving.openapi_parts import JSON, OCTETS, Schema
from rtml.serving.registry import ModelVersion
from rtml.serving.results import Content

_SCHEMAS: Final = "#/components/schemas/"
_ANY: Final = "*/*"
#: Elements of a tensor for which an example is spelt out.
_EXAMPLE_MAX: Final = 64
_BYTES: Final = (bytes, bytearray, memoryview)


class Program(NamedTuple):
    """A graph program under its path."""

    app: str
    endpoint: Endpoint
    input: ProgramInput


class Described(NamedTuple):
    """A model with its versions."""

    model: ModelVersion
    versions: Sequence[str]


def programs_of(apps: Iterable[App]) -> list[Program]:
    """The graph programs of some apps."""
    return [
        Program(app.name, endpoint, ProgramInput(endpoint.function))
        for app in apps
        for endpoint in app.endpoints.values()
    ]


def document(apps: Sequence[App], models: Iterable[Described], version: str, *, secured: bool) -> Schema:
    """The whole document.

    Args:
        apps: What is served beside the protocol.
        models: By the protocol; graph programs among them.
        version: Of the server.
        secured: Bearer tokens are asked for.
    """
    programs = programs_of(apps)
    types = _Types(programs)
    paths: dict[str, Schema] = {}
    for program in programs:
        paths[program.endpoint.path] = {"post": _program_operation(program, types, secured)}
    paths |= parts.server_paths(secured) | parts.admin_paths(secured)
    for described in models:
        paths |= _model_paths(described, secured)
    found: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": ", ".join(app.title or app.name for app in apps) or "rtml",
            "version": ", ".join(app.version for app in apps if app.version) or version,
            "description": "Graph programs under their paths, models by the Open Inference Protocol V2.",
        },
        "servers": [{"url": "/"}],
        "tags": [
            *({"name": app.name, "description": app.title or "Graph programs"} for app in apps if app.endpoints),
            *parts.TAGS,
        ],
        "paths": paths,
        "components": {**parts.COMPONENTS, "schemas": {**parts.SCHEMAS, **types.components}},
    }
    if secured:
        found["security"] = [{"token": []}]
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return found


# --- graph programs ---------------------------------------------------------------------------------------------------


def _program_operation(program: Program, types: _Types, secured: bool) -> Schema:
    endpoint, reads = program.endpoint, program.input
    documentation = inspect.getdoc(inspect.unwrap(endpoint.function)) or ""
    content: Schema = {JSON: {"schema": types.request_of(program)}}
    parameters: list[Schema] = list(parts.REQUEST_HEADERS)
    if reads.raw is not None:
        content = {OCTETS: {}, **content}
        for name, (annotation, _) in reads.fields().items():
            if name != reads.raw:
                text = f"`{name}`, beside a body that is not JSON"
                schema = types.input(annotation)
                parameters.append({"name": name, "in": "query", "description": text, "schema": schema})
    description = documentation.partition("\n")[2].strip()
    if endpoint.deadline is not None:
        description = f"{description}\n\nDeadline by default: {endpoint.deadline:g} s.".strip()
    required = reads.raw is not None or any(needed for _, needed in reads.fields().values())
    found: Schema = {
        "tags": [program.app],
        "summary": documentation.partition("\n")[0] or endpoint.path,
        "operationId": "post" + endpoint.path.replace("/", "_"),
        "parameters": parameters,
        "requestBody": {"required": required, "content": content},
        "responses": parts.answers(types.answer_of(program), parts.GRAPH_ERRORS, secured),
    }
    if description:
        found["description"] = description
    return found


class _Types:
    """The schemas of what programs take and give.

    Requests and answers have schemas of their own: NaN is null in an answer, but null is no number in a request.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        asked = [annotation for program in programs for annotation in _taken(program)]
        given = [program.input.result for program in programs]
        self._inputs, inputs = _schemas(asked, "")
        self._outputs, outputs = _schemas(given, "Answer")
        self.components: dict[str, Schema] = {**inputs, **_with_nulls(outputs)}

    def input(self, annotation: Any) -> Schema:
        """Of a parameter."""
        return self._inputs.get(_key(annotation), {})

    def request_of(self, program: Program) -> Schema:
        """Of a JSON body."""
        reads = program.input
        if reads.whole is not None:
            return self.input(reads.record)
        fields = reads.fields()
        required = [name for name, (_, needed) in fields.items() if needed]
        return {
            "type": "object",
            "properties": {name: self.input(annotation) for name, (annotation, _) in fields.items()},
            **({"required": required} if required else {}),
            "additionalProperties": False,
        }

    def answer_of(self, program: Program) -> Schema:
        """The content of a success, by media type."""
        result = program.input.result
        members = set(typing.get_args(result)) or {result}
        if members <= {*_BYTES, type(None)}:
            return {OCTETS: {}}
        if result is Content:
            return {_ANY: {}}
        found = {JSON: {"schema": _with_nulls(self._outputs.get(_key(result), {}))}}
        # What a program without an annotation returns may be bytes.
        return {**found, _ANY: {}} if result is Any or members & {*_BYTES, Content} else found


def _taken(program: Program) -> list[Any]:
    reads = program.input
    return [reads.record] if reads.whole is not None else [annotation for annotation, _ in reads.fields().values()]


def _key(annotation: Any) -> str:
    # Annotations need not be hashable, and equal ones may be unequal objects.
    return f"{getattr(annotation, '__module__', '')} {annotation!r}"


def _schemas(annotations: Iterable[Any], suffix: str) -> tuple[dict[str, Schema], dict[str, Schema]]:
    """The schema of each annotation, and the components that they refer to, whose names end in `suffix`."""
    known = {_key(annotation): annotation for annotation in annotations}
    described = {key: annotation for key, annotation in known.items() if _is_describable(annotation)}
    template = _SCHEMAS + "{name}" + suffix
    schemas, components = msgspec.json.schema_components(
        described.values(), schema_hook=_array_schema, ref_template=template
    )
    return dict(zip(described, schemas)), {name + suffix: schema for name, schema in components.items()}


def _is_describable(annotation: Any) -> bool:
    try:
        msgspec.json.schema(annotation, schema_hook=_array_schema)
    except (TypeError, NotImplementedError):
        return False
    return True


def _array_schema(kind: Any) -> Schema:
    """The hook of msgspec for types it does not know: numpy's."""
    if is_array(kind):
        return {"type": "array", "description": "an array, as nested lists of numbers"}
    if isinstance(kind, type) and issubclass(kind, np.generic):
        return {"type": "boolean"} if issubclass(kind, np.bool_) else {"type": "number"}
    return {}


def _with_nulls(schema: Any) -> Any:
    """The schema with null for what is no number: JSON has no NaN and no infinities."""
    if isinstance(schema, dict):
        found = {key: _with_nulls(value) for key, value in schema.items()}
        if found.get("type") == "number":
            found["type"] = ["number", "null"]
        return found
    return [_with_nulls(each) for each in schema] if isinstance(schema, list) else schema


# --- models -----------------------------------------------------------------------------------------------------------


def _model_paths(described: Described, secured: bool) -> dict[str, Schema]:
    """All paths of a model, with and without a version."""
    model = described.model
    operations = parts.model_operations(model.name, secured)
    operations["/infer"] = {"post": _infer_operation(model, secured)}
    operations |= parts.generate_operations(model.name, secured)
    versions = {
        "name": "version",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": list(described.versions)},
    }
    found: dict[str, Schema] = {}
    for rest, methods in operations.items():
        found[f"/v2/models/{model.name}{rest}"] = methods
        versioned = {method: _versioned(operation) for method, operation in methods.items()}
        found[f"/v2/models/{model.name}/versions/{{version}}{rest}"] = {"parameters": [versions], **versioned}
    return found


def _versioned(operation: Schema) -> Schema:
    return {**operation, "operationId": operation["operationId"] + "_version"}


def _infer_operation(model: ModelVersion, secured: bool) -> Schema:
    inputs = [_tensor_schema(spec) for spec in model.inputs]
    required = sum(not spec.optional for spec in model.inputs)
    schema: Schema = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "parameters": {"$ref": _SCHEMAS + "rtml.InferenceParameters"},
            "inputs": {
                "type": "array",
                "minItems": required,
                "maxItems": len(inputs),
                **({"items": {"oneOf": inputs} if len(inputs) > 1 else inputs[0]} if inputs else {}),
            },
            "outputs": {"type": "array", "items": {"$ref": _SCHEMAS + "rtml.RequestedOutput"}},
        },
        "required": ["inputs"],
    }
    content: Schema = {"schema": schema}
    example = _example(model.inputs)
    if example is not None:
        content["example"] = example
    gives = ", ".join(f"{spec.name} ({spec.datatype} {_shown(spec)})" for spec in model.outputs)
    return {
        "tags": ["Models"],
        "summary": f"Inference by {model.name}",
        "description": f"Outputs: {gives or 'none'}.",
        "operationId": f"infer_{model.name}",
        "parameters": [*parts.REQUEST_HEADERS, {"$ref": "#/components/parameters/BinaryHeader"}],
        "requestBody": {"required": True, "content": {JSON: content, OCTETS: {}}},
        "responses": parts.answers(
            {JSON: {"schema": {"$ref": _SCHEMAS + "rtml.InferenceReply"}}, OCTETS: {}}, parts.INFER_ERRORS, secured
        ),
    }


def _shown(spec: TensorSpec) -> str:
    return "of any shape" if spec.shape is None else str(list(spec.shape))


_ELEMENTS: Final[Mapping[str, Schema]] = {
    "BOOL": {"type": "boolean"},
    "BYTES": {"type": "string"},
    "FP16": {"type": "number"},
    "FP32": {"type": "number"},
    "FP64": {"type": "number"},
    "BF16": {"type": "number"},
}
_ZEROS: Final[Mapping[str, Any]] = {"BOOL": False, "BYTES": "", "FP16": 0.0, "FP32": 0.0, "FP64": 0.0, "BF16": 0.0}


def _tensor_schema(spec: TensorSpec) -> Schema:
    """An input of a model as it stands in a request."""
    shape: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    if spec.shape is not None:
        sizes = [{"type": "integer", "minimum": 0} if size < 0 else {"const": size} for size in spec.shape]
        shape = {"type": "array", "minItems": len(sizes), "maxItems": len(sizes)}
        if sizes:
            shape |= {"prefixItems": sizes}
    return {
        "type": "object",
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": shape,
            "data": {
                "type": "array",
                "description": "row-major, flat or nested as the shape says",
                "items": _ELEMENTS.get(spec.datatype, {"type": "integer"}),
            },
            "parameters": {"$ref": _SCHEMAS + "rtml.InferenceParameters"},
        },
        "required": ["name", "datatype", "shape"],
    }


def _example(specs: Sequence[TensorSpec]) -> Schema | None:
    """A request with tensors of nothing but zeros; None if that would be long."""
    tensors = []
    for name, datatype, shape, optional in specs:
        if optional:
            continue
        sizes = [1 if size < 0 else size for size in shape or (1,)]
        count = int(np.prod(sizes, dtype=object))
        if count > _EXAMPLE_MAX:
            return None
        zeros = [_ZEROS.get(datatype, 0)] * count
        tensors.append({"name": name, "datatype": datatype, "shape": sizes, "data": zeros})
    return {"inputs": tensors}
