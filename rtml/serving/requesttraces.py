"""Traces of inference requests, as Triton's trace extension writes them: when each step of sampled requests was.

Settings hold for all models, or for one. The file is the operator's: a client can switch tracing on and off and say
how many requests are traced, but not where anything is written.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from rtml.errors import InvalidInput
from rtml.messages import Timing

_logger = logging.getLogger("rtml.serving")

#: Traces that wait for being written; then the oldest go.
TRACES_MAX: Final = 10_000
_DEFAULTS: Final[dict[str, Any]] = {"trace_level": ["OFF"], "trace_rate": 1000, "trace_count": -1, "log_frequency": 0}
_LEAST: Final = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
_NUMBER_MAX: Final = 1 << 62
_NANO: Final = 1e9


class RequestTraces:
    """Takes traces.

    Args:
        file: What they are written to; with `log_frequency` also FILE.0, FILE.1, ...
        suffix: Of this process's files.
    """

    def __init__(self, file: str, suffix: str = "") -> None:
        #: As clients are told.
        self._name = file
        self._file = file + suffix
        self._settings: dict[str, Any] = dict(_DEFAULTS)
        self._of_models: dict[str, dict[str, Any]] = {}
        #: Requests seen since the settings were changed, by model; "" where no model has settings of its own.
        self._seen: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        self._traces: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)
        self._files = itertools.count()
        # One thread: files are written in order, and off the event loop. It starts with the first.
        self._writer = ThreadPoolExecutor(1, "rtml-traces")

    # --- settings -----------------------------------------------------------------------------------------------------

    def settings(self, model: str | None) -> dict[str, Any]:
        """What holds now, for a model or (None) for those without settings of their own; numbers as text."""
        found = self._holding(model or "")
        shown = {name: value if isinstance(value, list) else str(value) for name, value in found.items()}
        return {"trace_file": self._name, "trace_mode": "triton", **shown}

    def change(self, model: str | None, wanted: dict[str, Any]) -> None:
        """Change settings.

        Args:
            model: For this model; None: for all without settings of their own.
            wanted: Name -> value, numbers as such or as text; None takes the setting back.

        Raises:
            InvalidInput: a setting is unknown or impossible; nothing is changed then.
        """
        changes = {name: _checked(name, value, self._name) for name, value in wanted.items()}
        settings = self._of_models.get(model, {}) if model else self._settings
        settings = dict(settings)
        for name, value in changes.items():
            if name not in _DEFAULTS:
                continue
            if value is not None:
                settings[name] = value
            elif model:
                settings.pop(name, None)
            else:
                settings[name] = _DEFAULTS[name]
        if not model:
            self._settings = settings
        elif settings:
            self._of_models[model] = settings
        else:
            self._of_models.pop(model, None)
        self._seen = {}
        self._taken = {}
        if self._traces:
            self._flush(self._file)

    def _holding(self, model: str) -> dict[str, Any]:
        return {**self._settings, **self._of_models.get(model, {})}

    # --- traces -------------------------------------------------------------------------------------------------------

    def record(self, model: tuple[str, str], request_id: str, started: float, timing: Timing | None) -> None:
        """A request was answered.

        Args:
            model: Name and version.
            request_id: Of the request.
            started: When it came, in seconds of `time.perf_counter`.
            timing: Where the engine spent the time.
        """
        name = model[0]
        settings = self._holding(name)
        if "TIMESTAMPS" not in settings["trace_level"] or timing is None:
            return
        key = name if name in self._of_models else ""
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        taken, count = self._taken.get(key, 0), settings["trace_count"]
        if seen % settings["trace_rate"] or 0 <= count <= taken:
            return
        self._taken[key] = taken + 1
        trace = {"id": next(self._numbers), "model_name": name, "model_version": model[1], "request_id": request_id}
        self._traces.append({**trace, "timestamps": _timestamps(started, time.perf_counter(), timing)})
        frequency = settings["log_frequency"]
        if frequency and len(self._traces) >= frequency:
            self._flush(f"{self._file}.{next(self._files)}")
        elif taken + 1 == count:
            self._flush(self._file)
        elif len(self._traces) > TRACES_MAX:
            del self._traces[: TRACES_MAX // 10]

    def _flush(self, file: str) -> None:
        traces, self._traces = self._traces, []
        self._writer.submit(_write, file, traces)

    def close(self) -> None:
        """Write what is left. Blocks until it is written."""
        if self._traces:
            self._flush(self._file)
        self._writer.shutdown()


def _timestamps(started: float, ended: float, timing: Timing) -> list[dict[str, Any]]:
    """When each step was, in nanoseconds. The engine says how long its steps took; they end with the request."""
    queue = ended - timing.waiting - timing.queued - timing.transfer - timing.run
    compute = queue + timing.waiting + timing.queued
    infer = compute + timing.transfer
    times = {
        "REQUEST_START": started,
        "QUEUE_START": queue,
        "COMPUTE_START": compute,
        "COMPUTE_INPUT_END": infer,
        "COMPUTE_OUTPUT_START": infer + timing.run,
        "COMPUTE_END": ended,
        "REQUEST_END": ended,
    }
    return [{"name": name, "ns": round(at * _NANO)} for name, at in times.items()]


def _write(file: str, traces: list[dict[str, Any]]) -> None:
    try:
        Path(file).write_bytes(msgspec.json.encode(traces))
    except OSError as error:
        _logger.error("cannot write %d traces to %s: %s", len(traces), file, error.strerror)


def _checked(name: str, value: Any, file: str) -> Any:
    """The value of a setting, None to take it back."""
    check: Callable[[str, Any, str], Any] | None = {"trace_level": _level, "trace_file": _own_file}.get(name)
    if value is None or check is not None:
        return None if value is None or check is None else check(name, value, file)
    if name == "trace_mode" and value == "triton":
        return value
    if name not in _LEAST:
        raise InvalidInput(f"there is no trace setting {name[:40]!r}; there are trace_level, {', '.join(_LEAST)}")
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) < 20:
        value = int(value)
    least = _LEAST[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _NUMBER_MAX:
        raise InvalidInput(f"{name} must be a whole number from {least} on, not {repr(value)[:40]}")
    return value


def _level(name: str, value: Any, file: str) -> list[str]:
    levels = [value] if isinstance(value, str) else value
    if not isinstance(levels, list) or not levels or any(level not in ("OFF", "TIMESTAMPS") for level in levels):
        raise InvalidInput(f"{name} must be OFF or TIMESTAMPS, not {repr(value)[:40]}")
    return ["OFF"] if "OFF" in levels else ["TIMESTAMPS"]


def _own_file(name: str, value: Any, file: str) -> None:
    if value not in ("", file):
        raise InvalidInput(f"{name} cannot be changed by clients; --trace-file of the gateway says where traces go")
