"""A model's configuration as Triton knows it (`config.pbtxt`, `config.json`), and what it comes to with the ONNX file.

`read` makes a `ModelConfig` of a text, whatever its form; fields that nobody here knows are named, not refused. `plan`
holds it against what the file says of itself, fills in what it leaves out, and refuses what contradicts the file. Both
are pure: no file is opened here.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from rtml.onnxfile import ModelInfo, TensorInfo
from rtml.sequences import Layout
from rtml.serving import descriptions, oip, sequenceconfig, sequencespec
from rtml.serving.app import TensorSpec
from rtml.serving.registry import spec_of, version_order

PLATFORM: Final = "onnxruntime_onnx"
#: Most rows of a run where nobody says it and the file leaves the first dimension open.
BATCH_MAX_DEFAULT: Final = 32

_MILLION: Final = 1e6


class ConfigError(ValueError):
    """A configuration that cannot be used: what was wrong, and what was expected."""


class Tensor(msgspec.Struct):
    """An input or output; `dims` without the batch dimension."""

    name: str
    data_type: str = ""
    dims: list[int] = []
    label_filename: str = ""
    optional: bool = False
    format: str = "FORMAT_NONE"


class QueuePolicy(msgspec.Struct):
    """What becomes of requests that wait."""

    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"
    default_timeout_microseconds: int = 0


class DynamicBatching(msgspec.Struct):
    """How requests are put together."""

    preferred_batch_size: list[int] = []
    max_queue_delay_microseconds: int = 0
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = msgspec.field(default_factory=QueuePolicy)


class InstanceGroup(msgspec.Struct):
    """Where the model runs."""

    name: str = ""
    kind: Literal["KIND_AUTO", "KIND_CPU", "KIND_GPU", "KIND_MODEL"] = "KIND_AUTO"
    count: int = 1


class Latest(msgspec.Struct):
    """The newest versions."""

    num_versions: int = 1


class Specific(msgspec.Struct):
    """These versions."""

    versions: list[int]


class VersionPolicy(msgspec.Struct):
    """Which versions are served: one of the three."""

    latest: Latest | None = None
    all: dict[str, Any] | None = None
    specific: Specific | None = None


class Parameter(msgspec.Struct):
    """The value of a parameter."""

    string_value: str = ""


class WarmupInput(msgspec.Struct, omit_defaults=True):  # Triton takes no more than one of the last three
    """What one input of a warm-up run gets; `dims` without the batch dimension."""

    data_type: str = ""
    dims: list[int] = []
    zero_data: bool = False
    random_data: bool = False
    input_data_file: str = ""


class Warmup(msgspec.Struct):
    """A run before the model is ready."""

    inputs: dict[str, WarmupInput]
    name: str = ""
    batch_size: int = 0
    count: int = 1


class ModelConfig(msgspec.Struct):
    """The fields that are used here."""

    name: str = ""
    platform: str = ""
    backend: str = ""
    max_batch_size: int | None = None
    input: list[Tensor] = []
    output: list[Tensor] = []
    version_policy: VersionPolicy = msgspec.field(default_factory=VersionPolicy)
    instance_group: list[InstanceGroup] = []
    default_model_filename: str = ""
    dynamic_batching: DynamicBatching | None = None
    sequence_batching: sequenceconfig.SequenceBatching | None = None
    parameters: dict[str, Parameter] = {}
    model_warmup: list[Warmup] = []

    def missing(self, versions: Sequence[str]) -> list[int]:
        """Versions that the policy names, and that are none of these."""
        named = self.version_policy.specific.versions if self.version_policy.specific else []
        return [version for version in named if str(version) not in versions]

    def chosen(self, versions: Sequence[str]) -> list[str]:
        """Those of the versions that the policy serves, lowest first."""
        ordered = sorted(versions, key=version_order)
        policy = self.version_policy
        if policy.all is not None:
            return ordered
        if policy.specific is not None:
            return [version for version in ordered if int(version) in policy.specific.versions]
        return ordered[-(policy.latest or Latest()).num_versions :]


#: Fields of Triton's configuration that change nothing here, and need no word.
_QUIET: Final = frozenset(
    {
        "name",
        "model_transaction_policy",
        "metric_tags",
        "response_cache",
        "optimization",
        # A request's own deadline counts always.
        "dynamic_batching.default_queue_policy.allow_timeout_override",
    }
)
_REFUSED: Final = {
    "ensemble_scheduling": "an ensemble is a graph program here: @app.endpoint(...)",
    "model_operations": "custom operators are not loaded",
}


def read(text: str, form: Literal["pbtxt", "json"]) -> tuple[ModelConfig, list[str]]:
    """The configuration of a text, and the fields in it that are not used.

    Args:
        text: Content of a `config.pbtxt` or `config.json`.
        form: Which.

    Raises:
        ConfigError: it is none, or a field has a wrong type.
    """
    given, unused = _of_pbtxt(text) if form == "pbtxt" else (_of_json(text), [])
    for name, reason in _REFUSED.items():
        if given.get(name):
            raise ConfigError(f"{name}: {reason}")
    try:
        config = msgspec.convert(given, ModelConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`")) from None
    unused += [field for field in _unused(given, ModelConfig, "") if field not in _QUIET]
    _check(config)
    return config, unused


def _of_json(text: str) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise ConfigError(f"this is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError("a configuration is a JSON object")
    return given


def _of_pbtxt(text: str) -> tuple[dict[str, Any], list[str]]:
    """The text as the JSON form has it, and what Triton's own schema does not know."""
    try:
        from google.protobuf import json_format, text_format

        from rtml.serving.grpc_messages import message
    except ImportError as missing:
        wanted = "config.pbtxt needs protobuf: pip install 'rtml[grpc]'; a config.json needs nothing"
        raise ConfigError(wanted) from missing
    parsed = message("inference.ModelConfig")()
    unknown: list[str] = []
    try:
        text_format.Parse(text, parsed)
    except text_format.ParseError as strict:
        parsed.Clear()
        try:
            text_format.Parse(text, parsed, allow_unknown_field=True)
        except text_format.ParseError as error:
            raise ConfigError(f"config.pbtxt, line:column {error}") from None
        unknown.append(str(strict))
    found: dict[str, Any] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    return found, unknown


def _unused(given: dict[str, Any], kind: Any, place: str) -> Iterator[str]:
    """The fields that a struct does not have, with their place."""
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        hint = hints.get(name)
        if hint is None:
            yield f"{place}{name}"
            continue
        kinds = (hint, *typing.get_args(hint))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)), None)
        if inner is None:
            continue
        if isinstance(value, list):
            parts = [(f"{place}{name}[{index}].", part) for index, part in enumerate(value)]
        elif typing.get_origin(hint) is dict:
            parts = [(f"{place}{name}.{key}.", part) for key, part in value.items()]
        else:
            parts = [(f"{place}{name}.", value)]
        for where, part in parts:
            if isinstance(part, dict):
                yield from _unused(part, inner, where)


def _check(config: ModelConfig) -> None:
    """What a field's type alone does not say."""
    if config.backend not in {"", "onnxruntime"} or config.platform not in {"", PLATFORM, "onnx"}:
        which = config.backend or config.platform
        raise ConfigError(f"backend {which!r}: only onnxruntime is served here (platform {PLATFORM!r})")
    if config.max_batch_size is not None and config.max_batch_size < 0:
        raise ConfigError(f"max_batch_size is 0 or more, not {config.max_batch_size}")
    if (config.version_policy.latest or Latest()).num_versions < 1:
        raise ConfigError("version_policy.latest.num_versions is 1 or more")
    file = config.default_model_filename
    if "/" in file or file in {".", ".."} or "\0" in file:
        raise ConfigError(f"default_model_filename {file!r} is a file's name, not a path")


class Plan(NamedTuple):
    """How a version is served."""

    #: Batch dimension included.
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: Most rows of a request; 0: the first dimension is not a batch.
    batch_max: int
    #: Arguments of `rtml.model`.
    arguments: dict[str, Any]
    #: Seconds for requests without a deadline of their own.
    deadline: float | None
    #: File with the names of classes, by output.
    label_files: dict[str, str]
    #: The answer to `GET .../config`.
    config: dict[str, Any]
    #: Of a model that keeps state.
    layout: Layout | None = None


def plan(
    name: str,
    config: ModelConfig | None,
    info: ModelInfo,
    initial: Mapping[str, bytes] | None = None,
    *,
    joins: bool = True,
) -> Plan:
    """How to serve a file under a configuration, or under none.

    Args:
        name: The model's.
        config: None: all is taken from the file.
        info: What the file says of itself.
        initial: Contents of the files that states begin with, by name.
        joins: Without a configuration: an open first dimension is a batch.

    Raises:
        ConfigError: they contradict each other, or the file has no plain tensors.
    """
    given = config or ModelConfig()
    if given.name not in {"", name}:
        raise ConfigError(f"the configuration is of model {given.name!r}, its directory is {name!r}")
    layout = _layout(name, given, info, initial or {})
    if layout is not None:
        hidden = sequencespec.hidden_inputs(layout)
        outputs_seen = tuple(tensor for tensor in info.outputs if tensor.name in layout.outputs)
        info = info._replace(inputs=tuple(one for one in info.inputs if one.name not in hidden), outputs=outputs_seen)
    try:
        known_in = {tensor.name: spec_of(tensor) for tensor in info.inputs}
        known_out = _known_outputs(given, info)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    open_first = all(_is_open(tensor) for tensor in info.inputs) and bool(info.inputs)
    batch_max = given.max_batch_size
    if batch_max is None:
        # A configuration without it means 0, as in Triton; without a configuration the file decides.
        batches = config is None and joins and open_first and all(_is_open(tensor) for tensor in info.outputs)
        batch_max = BATCH_MAX_DEFAULT if batches else 0
    elif batch_max and not open_first:
        fixed = next((tensor.name for tensor in info.inputs if not _is_open(tensor)), "")
        raise ConfigError(f"max_batch_size is {batch_max}, but input {fixed!r} of the file has no open first dimension")
    inputs = _matched("input", given.input, known_in, batch_max)
    if len(inputs) < len(known_in):
        missing = sorted(known_in.keys() - {spec.name for spec in inputs})
        raise ConfigError(f"the file also has the inputs {', '.join(missing)}; list all of them, or none")
    outputs = _matched("output", given.output, known_out, batch_max)
    policy = given.dynamic_batching.default_queue_policy if given.dynamic_batching else QueuePolicy()
    deadline = _number(given, "deadline_ms", 1e3)
    if deadline is None and policy.timeout_action == "REJECT" and policy.default_timeout_microseconds:
        deadline = policy.default_timeout_microseconds / _MILLION
    arguments: dict[str, Any] = {"name": name, **_resources(given.instance_group), **_batching(config, batch_max)}
    if given.output and layout is None:
        arguments["outputs"] = [spec.name for spec in outputs]
    threads = _number(given, "threads") or _number(given, "intra_op_thread_count")
    if threads:
        arguments["threads"] = int(threads)
    if given.model_warmup:
        arguments["warmup"] = [_warmup(sample, known_in, batch_max) for sample in given.model_warmup]
    labels = {tensor.name: tensor.label_filename for tensor in given.output if tensor.label_filename}
    described = _described(name, given, batch_max, inputs, outputs)
    if layout is not None:
        described.pop("dynamic_batching", None)
        described["sequence_batching"] = sequencespec.described(layout)
        arguments = {key: value for key, value in arguments.items() if key not in {"batch", "batch_delay", "warmup"}}
    return Plan(inputs, outputs, batch_max, arguments, deadline, labels, described, layout)


def _layout(name: str, given: ModelConfig, info: ModelInfo, initial: Mapping[str, bytes]) -> Layout | None:
    """How a model that keeps state is run."""
    if given.sequence_batching is None:
        return None
    if given.dynamic_batching is not None:
        raise ConfigError("a model has dynamic_batching or sequence_batching, not both")
    holders = max(1, sum(group.count for group in given.instance_group))
    texts = {key: parameter.string_value for key, parameter in given.parameters.items()}
    try:
        return sequenceconfig.layout(
            name, given.sequence_batching, given.max_batch_size or 0, holders, texts, info, initial
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _batching(config: ModelConfig | None, batch_max: int) -> dict[str, Any]:
    """How requests are put together, and in which order."""
    batching = DynamicBatching() if config is None else config.dynamic_batching
    if batching is None:
        return {}
    arguments: dict[str, Any] = {}
    if batch_max:
        arguments["batch"] = max([n for n in batching.preferred_batch_size if 0 < n <= batch_max], default=batch_max)
        arguments["batch_delay"] = batching.max_queue_delay_microseconds / _MILLION
        if config is None:
            arguments["check_rows"] = True  # the first dimension may be something else
    if batching.default_priority_level:
        arguments["priority"] = oip.priority_of({"priority": batching.default_priority_level})
    return arguments


def _known_outputs(given: ModelConfig, info: ModelInfo) -> dict[str, TensorSpec]:
    """The file's outputs that can be served; those that cannot may be left out by a configuration that lists others."""
    listed = {tensor.name for tensor in given.output}
    known = {}
    for tensor in info.outputs:
        try:
            known[tensor.name] = spec_of(tensor)
        except ValueError as error:
            if not listed and len(info.outputs) > 1:
                raise ConfigError(f"{error}; a configuration may leave it out: its output lists the others") from None
            if not listed or tensor.name in listed:
                raise
    return known


def _is_open(tensor: TensorInfo) -> bool:
    return bool(tensor.shape) and tensor.shape is not None and tensor.shape[0] < 0


def _matched(
    what: str, wanted: Sequence[Tensor], known: dict[str, TensorSpec], batch_max: int
) -> tuple[TensorSpec, ...]:
    """The tensors that the configuration lists, as the file has them; all of the file's if it lists none."""
    found = []
    for tensor in wanted:
        spec = known.get(tensor.name)
        if spec is None:
            raise ConfigError(f"the file has no {what} {tensor.name!r}; it has {', '.join(known)}")
        datatype = {"TYPE_STRING": "BYTES"}.get(tensor.data_type, tensor.data_type.removeprefix("TYPE_"))
        if datatype not in {"", "INVALID", spec.datatype}:
            raise ConfigError(f"{what} {tensor.name!r} is {spec.datatype} in the file, not {datatype}")
        if tensor.dims:
            dims = [-1, *tensor.dims] if batch_max else list(tensor.dims)
            if spec.shape is not None and not (
                len(dims) == len(spec.shape) and all(a == b or -1 in (a, b) for a, b in zip(dims, spec.shape))
            ):
                shown = list(spec.shape[1:] if batch_max else spec.shape)
                raise ConfigError(f"{what} {tensor.name!r} has the dims {shown} in the file, not {tensor.dims}")
            if any(size == 0 or size < -1 for size in dims):
                raise ConfigError(f"{what} {tensor.name!r}: dims are positive or -1, not {tensor.dims}")
            shape = spec.shape or (-1,) * len(dims)
            spec = spec._replace(shape=tuple(max(a, b) for a, b in zip(dims, shape)))
        found.append(spec)
    return tuple(found) or tuple(known.values())


def _number(config: ModelConfig, name: str, divisor: float = 1.0) -> float | None:
    """A parameter that is a positive number."""
    parameter = config.parameters.get(name)
    if parameter is None:
        return None
    try:
        number = float(parameter.string_value) / divisor
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"parameter {name} is a positive number, not {parameter.string_value!r}")
    return number


def _resources(groups: Sequence[InstanceGroup]) -> dict[str, Any]:
    """What a run needs. How many run at a time is the number of executors, not `count`."""
    if any(group.kind == "KIND_GPU" for group in groups):
        return {"gpu": 1.0}
    if any(group.kind == "KIND_CPU" for group in groups):
        return {"providers": ["CPUExecutionProvider"]}
    return {}


def _warmup(sample: Warmup, known: dict[str, TensorSpec], batch_max: int) -> dict[str, list[int]]:
    """The shapes of a warm-up run. The values are zeros: what takes time is the first run of a shape."""
    shapes = {}
    for name, given in sample.inputs.items():
        if name not in known:
            raise ConfigError(f"model_warmup: the file has no input {name!r}; it has {', '.join(known)}")
        shapes[name] = [max(1, sample.batch_size), *given.dims] if batch_max else given.dims
    return shapes


def _described(
    name: str, given: ModelConfig, batch_max: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    described = descriptions.describe_config(name, PLATFORM, batch_max, inputs, outputs)
    described["backend"] = "onnxruntime"
    described["default_model_filename"] = given.default_model_filename or "model.onnx"
    for field in ("dynamic_batching", "instance_group", "parameters", "model_warmup"):
        value = getattr(given, field)
        if value:
            described[field] = msgspec.to_builtins(value)
    policy = {key: value for key, value in msgspec.to_builtins(given.version_policy).items() if value is not None}
    described["version_policy"] = policy or {"latest": {"num_versions": 1}}
    labels = {tensor.name: tensor.label_filename for tensor in given.output if tensor.label_filename}
    for output in described["output"]:
        if output["name"] in labels:
            output["label_filename"] = labels[output["name"]]
    return described
