"""The settings of processes: structs that are filled from arguments, else from `RTML_*`, else from defaults.

A command has one or more of them. A field is an option: `body_max` is `--body-max` and `RTML_BODY_MAX`. Its type
converts and checks the text, its description is the help. A field that is a dict is given one entry at a time:
`limits` is `--limit NAME=VALUE`, repeated, and `RTML_LIMITS`. Nothing else in rtml reads the environment.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

_Settings = TypeVar("_Settings", bound="Settings")

PREFIX = "RTML_"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all settings."""


class EngineSettings(Settings, frozen=True, kw_only=True):
    """An engine that is started here."""

    workers: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="executor processes; by default one per usable cpu")
    ] = None
    link: Annotated[
        typing.Literal["unix", "zmq"], Meta(description="what processes of this machine talk through: unix or zmq")
    ] = "unix"
    async_executors: Annotated[int, Meta(ge=1, description="processes that run async functions")] = 1
    listen: Annotated[
        tuple[str, ...], Meta(description="further addresses of the dispatcher, like tcp://127.0.0.1:7411")
    ] = ()
    preimport: Annotated[
        tuple[str, ...], Meta(description="modules that executors import before they are forked; no threads, please")
    ] = ()
    cpu: Annotated[
        Annotated[float, Meta(gt=0)] | None, Meta(description="cpus that tasks may ask for; by default one per worker")
    ] = None
    gpu: Annotated[float, Meta(ge=0, description="gpus that tasks may ask for")] = 0.0
    resources: Annotated[
        dict[str, Annotated[float, Meta(ge=0)]], Meta(description="amount of a label of your own, like licence=1")
    ] = {}
    blocked_max: Annotated[
        int, Meta(ge=0, description="executors beyond workers for tasks that are blocked in get")
    ] = 64
    policy: Annotated[
        typing.Literal["fifo", "edf", "slack", "deferred"],
        Meta(description="in which order tasks run: fifo, edf, slack or deferred"),
    ] = "edf"
    tenant_weights: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=1000)]],
        Meta(description="turns in a row of a tenant's tasks where others wait too, like gold=4"),
    ] = {}
    limits: Annotated[dict[str, float], Meta(description="limit of the dispatcher, like depth_max=5000")] = {}
    logs: Annotated[bool, Meta(description="show what tasks print and log")] = True

    def for_connect(self) -> dict[str, Any]:
        """As arguments of `rtml.connect`."""
        given = msgspec.structs.asdict(self)
        names = ("workers", "link", "async_executors", "logs", "blocked_max", "policy")
        optional = ("listen", "preimport", "cpu", "gpu", "resources", "limits", "tenant_weights")
        return {name: given[name] for name in names} | {name: given[name] for name in optional if given[name]}


class HttpSettings(Settings, frozen=True, kw_only=True):
    """The HTTP side of a gateway."""

    host: Annotated[str, Meta(description="address to listen on; 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 picks one")] = 8000
    grpc_port: Annotated[
        int,
        Meta(ge=0, le=65535, description="port to listen on for gRPC, which pip install 'rtml[grpc]' brings; 0: none"),
    ] = 0
    body_max: Annotated[int, Meta(ge=1, description="largest request body, decompressed, in bytes")] = 64 * 1024 * 1024
    read_timeout: Annotated[
        float, Meta(gt=0, description="seconds that a client may take to send a request's head, and again its body")
    ] = 60.0
    drain_timeout: Annotated[
        float, Meta(ge=0, description="seconds that running requests get when the gateway stops")
    ] = 30.0
    processes: Annotated[int, Meta(ge=1, le=64, description="gateway processes that share the port")] = 1
    linger: Annotated[
        float, Meta(ge=0, description="seconds that idle connections may bring a last request when the gateway stops")
    ] = 1.0
    concurrency_max: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="requests that a process answers at a time; others get 503")
    ] = None
    queue_max: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="the same for each model and endpoint; by default any"),
    ] = None
    queues: Annotated[
        dict[str, Annotated[int, Meta(ge=1)]], Meta(description="the same for one of them, like faces=32")
    ] = {}
    connections_max: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="connections that a process has at a time; others get 503")
    ] = None
    header_max: Annotated[int, Meta(ge=256, description="longest line of a request's head, in bytes")] = 8190
    triton_metrics: Annotated[
        bool, Meta(description="show metrics of models under Triton's names, too (nv_inference_...)")
    ] = False
    access_log: Annotated[
        str, Meta(description="file to append a JSON line for each request to; - for standard output")
    ] = ""
    tokens: Annotated[
        str, Meta(description="file of bearer tokens (rtml tokens make); without it nobody needs one")
    ] = ""
    open_health: Annotated[bool, Meta(description="questions about health need no token")] = True
    open_metrics: Annotated[bool, Meta(description="/metrics needs no token")] = False
    allow_shared_memory: Annotated[
        bool, Meta(description="clients may register shared memory of this machine, for tensors")
    ] = False
    allow_trace: Annotated[bool, Meta(description="clients may have requests traced, to --trace-file")] = False
    trace_file: Annotated[str, Meta(description="where traces of requests are written")] = "rtml-trace.json"
    allow_logging: Annotated[bool, Meta(description="clients may change what is logged")] = False
    allow_model_upload: Annotated[bool, Meta(description="load requests may bring model files")] = False
    tls_cert: Annotated[str, Meta(description="certificate chain as PEM: serve https")] = ""
    tls_key: Annotated[str, Meta(description="its key as PEM")] = ""
    tls_client_ca: Annotated[
        str, Meta(description="authorities as PEM: clients must show a certificate of one of them")
    ] = ""
    model_repository: Annotated[tuple[str, ...], Meta(description="directory of models: MODEL/VERSION/model.onnx")] = ()
    model_control: Annotated[
        typing.Literal["none", "poll", "explicit"],
        Meta(
            description="none: loaded is what is there at first; poll: what changes, too; explicit: what requests name"
        ),
    ] = "none"
    repository_poll_secs: Annotated[float, Meta(gt=0, description="seconds between two looks in poll mode")] = 5.0
    load_model: Annotated[
        tuple[str, ...], Meta(description="model to load at the start in explicit mode; * for all")
    ] = ()
    model_cache: Annotated[
        str, Meta(description="directory for copies of what is loaded, for executors to read; by default a new one")
    ] = ""
    model_bytes_max: Annotated[int, Meta(ge=1, description="largest size of a version's files, in bytes")] = 8 << 30


class ObjectSettings(Settings, frozen=True, kw_only=True):
    """Large objects of a node: where they lie, and how they come and go."""

    data: Annotated[
        str, Meta(description="host:port for large objects of others; by default any port, if others are let in at all")
    ] = ""
    advertise: Annotated[str, Meta(description="host by which others reach it; by default the one it listens on")] = ""
    object_memory: Annotated[
        int, Meta(ge=0, description="most bytes of shared memory for objects; 0: half of it for each process")
    ] = 0
    spill_dir: Annotated[
        str, Meta(description="directory for objects that have no room there; by default a temporary one")
    ] = ""
    spill_max: Annotated[
        int, Meta(ge=0, description="most bytes of objects in it; 0: half of what is free there at first")
    ] = 0

    def for_connect(self) -> dict[str, Any]:
        """As arguments of `rtml.connect`: what differs from the defaults."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value}


class NodeSettings(Settings, frozen=True, kw_only=True):
    """A node that works for a dispatcher elsewhere."""

    dispatcher: Annotated[str, Meta(description="address of the dispatcher to work for, like tcp://host:7411")] = ""
    name: Annotated[str, Meta(description="the node's name; by default after its machine and process")] = ""
    cpu: Annotated[
        Annotated[float, Meta(gt=0)] | None, Meta(description="cpus that tasks may ask for; by default the usable ones")
    ] = None
    gpu: Annotated[float, Meta(ge=0, description="gpus that tasks may ask for")] = 0.0
    memory: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="bytes that tasks may ask for; by default the machine's")
    ] = None
    labels: Annotated[
        dict[str, str], Meta(description="label of the node, like zone=a; tasks ask for the resource 'zone=a'")
    ] = {}
    resources: Annotated[
        dict[str, Annotated[float, Meta(ge=0)]], Meta(description="amount of a resource of your own, like licence=1")
    ] = {}
    workers: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="executor processes; by default one per cpu")
    ] = None
    async_executors: Annotated[int, Meta(ge=1, description="processes that run async functions")] = 1
    preimport: Annotated[
        tuple[str, ...], Meta(description="modules that executors import before they are forked; no threads, please")
    ] = ()
    logs: Annotated[bool, Meta(description="send what tasks print and log to their submitters")] = True
    drain_timeout: Annotated[float, Meta(ge=0, description="seconds that running tasks get when the node stops")] = 30.0
    metrics_host: Annotated[str, Meta(description="address for metrics and health")] = "127.0.0.1"
    metrics_port: Annotated[
        int, Meta(ge=0, le=65535, description="port for /metrics, /healthz and /readyz; 0 for none")
    ] = 0


class DispatcherAddress(Settings, frozen=True, kw_only=True):
    """Which engine a command speaks to."""

    address: Annotated[
        str, Meta(description="of the dispatcher, like unix:/path or tcp://host:port; by default the only one here")
    ] = ""


class KeySettings(Settings, frozen=True, kw_only=True):
    """Who may talk over tcp."""

    keys: Annotated[
        str, Meta(description="directory of keys (rtml keys make) for tcp addresses that other machines reach")
    ] = ""


class BenchSettings(Settings, frozen=True, kw_only=True):
    """How long to measure."""

    seconds: Annotated[float, Meta(gt=0, description="seconds for each figure")] = 2.0


def option_of(name: str, kind: type[Settings]) -> str:
    """The option of a field: a dict's is in the singular, as it is repeated for each entry."""
    return "--" + (name.removesuffix("s") if _is_dict(name, kind) else name).replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Give `parser` the options of `kind`."""
    for name, annotation in typing.get_type_hints(kind, include_extras=True).items():
        base, meta = typing.get_args(annotation)[:2]
        option = option_of(name, kind)
        default = next(field.default for field in msgspec.structs.fields(kind) if field.name == name)
        text = f"{meta.description} ({PREFIX}{name.upper()}"
        text += f"; default {default})" if default not in (None, (), "", msgspec.NODEFAULT) else ")"
        text = text.replace("%", "%%")
        if base is bool:
            parser.add_argument(option, default=None, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(base) is tuple:
            parser.add_argument(option, default=None, action="append", metavar=name.upper(), help=f"{text}; repeatable")
        elif typing.get_origin(base) is dict:
            text += "; repeatable"
            parser.add_argument(option, dest=name, default=None, action="append", metavar="NAME=VALUE", help=text)
        else:
            parser.add_argument(option, default=None, metavar=name.upper(), help=text)


def load(kind: type[_Settings], given: Mapping[str, Any], environment: Mapping[str, str]) -> _Settings:
    """The settings: what is given, else what the environment says, else defaults.

    Args:
        kind: Which settings.
        given: Parsed arguments; None is not given.
        environment: Variables; lists are separated by commas.

    Raises:
        ValueError: a value does not fit; the message names the option.
    """
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        value = given.get(field.name)
        if value is None:
            value = environment.get(PREFIX + field.name.upper())
            if value is not None and (isinstance(field.default, tuple) or _is_dict(field.name, kind)):
                value = [part.strip() for part in value.split(",") if part.strip()]
        if value is not None:
            values[field.name] = _entries(value, field.name, kind) if _is_dict(field.name, kind) else value
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        raise ValueError(f"{_named(place.partition('[')[0].rstrip('`'), kind)}: {message}") from None


def _is_dict(name: str, kind: type[Settings]) -> bool:
    annotation = typing.get_type_hints(kind, include_extras=True)[name]
    return typing.get_origin(typing.get_args(annotation)[0]) is dict


def _named(name: str, kind: type[Settings]) -> str:
    return f"{option_of(name, kind)} ({PREFIX}{name.upper()})"


def _entries(parts: Sequence[str], name: str, kind: type[Settings]) -> dict[str, str]:
    """What "name=value" each say."""
    entries = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"{_named(name, kind)}: expected NAME=VALUE, got {part!r}")
        entries[key.strip()] = value.strip()
    return entries


def plain(number: float) -> str:
    """A number for people: without an exponent, and a whole one without a point."""
    return str(int(number)) if number == int(number) else f"{number:.15g}" if abs(number) >= 1e-4 else str(number)


def show(*settings: Settings) -> str:
    """One line for the start of a process's log."""
    values = [item for part in settings for item in msgspec.structs.asdict(part).items()]
    return " ".join(f"{name}={_shown(value)}" for name, value in values)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name}={entry if isinstance(entry, str) else plain(entry)}" for name, entry in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(value) or "-"
    return "-" if value in (None, "") else str(value)
