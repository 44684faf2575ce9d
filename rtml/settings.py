"""The settings of processes: structs that are filled from arguments, else from `RTML_*`, else from defaults.

A command has one or more of them. A field is an option: `body_max` is `--body-max` and `RTML_BODY_MAX`. Its type
converts and checks the text, its description is the help. Nothing else in rtml reads the environment.
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
    gpu: Annotated[float, Meta(ge=0, description="gpus that tasks may ask for")] = 0.0
    logs: Annotated[bool, Meta(description="show what tasks print and log")] = True

    def for_connect(self) -> dict[str, Any]:
        """As arguments of `rtml.connect`."""
        given = msgspec.structs.asdict(self)
        names = ("workers", "link", "async_executors", "logs")
        return {name: given[name] for name in names} | {
            name: given[name] for name in ("listen", "preimport", "gpu") if given[name]
        }


class HttpSettings(Settings, frozen=True, kw_only=True):
    """The HTTP side of a gateway."""

    host: Annotated[str, Meta(description="address to listen on; 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 picks one")] = 8000
    body_max: Annotated[int, Meta(ge=1, description="largest request body, decompressed, in bytes")] = 64 * 1024 * 1024
    drain_timeout: Annotated[
        float, Meta(ge=0, description="seconds that running requests get when the gateway stops")
    ] = 30.0


class DispatcherAddress(Settings, frozen=True, kw_only=True):
    """Which engine a command speaks to."""

    address: Annotated[
        str, Meta(description="of the dispatcher, like unix:/path or tcp://host:port; by default the only one here")
    ] = ""


class BenchSettings(Settings, frozen=True, kw_only=True):
    """How long to measure."""

    seconds: Annotated[float, Meta(gt=0, description="seconds for each figure")] = 2.0


def add_arguments(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Give `parser` the options of `kind`."""
    for name, annotation in typing.get_type_hints(kind, include_extras=True).items():
        base, meta = typing.get_args(annotation)[:2]
        option = "--" + name.replace("_", "-")
        default = next(field.default for field in msgspec.structs.fields(kind) if field.name == name)
        text = f"{meta.description} ({PREFIX}{name.upper()}"
        text += f"; default {default})" if default not in (None, (), "") else ")"
        text = text.replace("%", "%%")
        if base is bool:
            parser.add_argument(option, default=None, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(base) is tuple:
            parser.add_argument(option, default=None, action="append", metavar=name.upper(), help=f"{text}; repeatable")
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
            if value is not None and isinstance(field.default, tuple):
                value = [part.strip() for part in value.split(",") if part.strip()]
        if value is not None:
            values[field.name] = value
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        name = place.partition("[")[0].rstrip("`")
        raise ValueError(f"--{name.replace('_', '-')} ({PREFIX}{name.upper()}): {message}") from None


def show(*settings: Settings) -> str:
    """One line for the start of a process's log."""
    values = [item for part in settings for item in msgspec.structs.asdict(part).items()]
    return " ".join(f"{name}={_shown(value)}" for name, value in values)


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(value) or "-"
    return "-" if value in (None, "") else str(value)
