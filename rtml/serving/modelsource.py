"""Where a model's version comes from: its files and configuration, as they lie there or as a load request brings them.

Everything here blocks, and is called in threads.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

import rtml
from rtml import onnxfile
from rtml.serving import modelconfig, modelfiles, sequenceconfig
from rtml.serving.modelconfig import ModelConfig
from rtml.serving.modelfiles import Copy, Found

_logger = logging.getLogger("rtml.serving")

#: Names of classes, by output.
Labels = dict[str, list[str]]
#: The beginning of the names of parameters that bring files.
FILE: Final = "file:"
_REASON_MAX: Final = 1000


class Source(NamedTuple):
    """Where a model's versions come from."""

    found: Found
    config: ModelConfig | None
    #: Of a load request: changes what the files say.
    overridden: bool = False
    #: Without a configuration: an open first dimension is a batch.
    joins: bool = True


def override(parameters: Mapping[str, Any]) -> ModelConfig | None:
    """The configuration of a load request, if it brings one.

    Raises:
        ValueError: it is none.
    """
    text = parameters.get("config")
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"the parameter 'config' is JSON as a string, not {type(text).__name__}")
    config, unused = modelconfig.read(text, "json")
    _log_unused("of a load request", unused)
    return config


def bytes_of(place: str, content: Any) -> bytes:
    """The content of a file of a load request: bytes, or base64 text.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(content, bytes):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError(f"the parameter {FILE}{place} is no base64 text") from None


def config_of(name: str, found: Found) -> ModelConfig | None:
    """The configuration in a model's directory, if there is one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
    """
    given = modelfiles.config_text(found.path)
    if given is None:
        return None
    config, unused = modelconfig.read(*given)
    _log_unused(f"of model {name}", unused)
    return config


def _log_unused(which: str, unused: list[str]) -> None:
    if unused:
        _logger.warning("the configuration %s has fields that are not used here: %s", which, ", ".join(unused))


def prepare(name: str, copy: Copy, source: Source) -> tuple[modelconfig.Plan, Any, dict[str, list[str]]]:
    """How to serve a version, its remote function, and the names of its classes. Reads the files."""
    file = copy.path / ((source.config or ModelConfig()).default_model_filename or modelfiles.MODEL_FILE)
    if not file.is_file():
        there = ", ".join(sorted(entry.name for entry in copy.path.iterdir())) or "nothing"
        raise ValueError(f"there is no {file.name} in its directory, only {there}")
    try:
        info = onnxfile.describe(str(file))
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), file.name)) from None
    batching = source.config.sequence_batching if source.config is not None else None
    initial = {}
    if batching is not None:
        for place in sequenceconfig.initial_files(batching):
            initial[place] = modelfiles.inside(source.found.path / "initial_state", place).read_bytes()
    plan = modelconfig.plan(name, source.config, info, initial, joins=source.joins)
    labels = {output: modelfiles.labels(source.found.path, place) for output, place in plan.label_files.items()}
    return plan, rtml.model(file, **plan.arguments), labels


def reason_of(error: Exception) -> str:
    """What the index says of a version that could not be loaded."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, msgspec.MsgspecError):
        text = f"wrong configuration: {text}"
    return text[:_REASON_MAX]
