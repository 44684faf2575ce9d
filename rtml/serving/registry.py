"""What a gateway serves now: models by name and version.

Models come from apps when the gateway starts, and from a model repository at run time. The registry answers three
questions: which version a request means, what there is (the protocol's repository index), and which versions a graph
that starts now will see. It knows neither HTTP paths nor files, and it never waits: whoever adds a version has made
sure that it can be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import numpy as np

from rtml.metrics import Target
from rtml.serving import descriptions, tensors
from rtml.serving.app import ServedModel, TensorSpec
from rtml.serving.engine import Engine, Prepared
from rtml.serving.http import HttpError
from rtml.serving.programs import ProgramTensors
from rtml.serving.results import is_stream
from rtml.serving.statistics import ModelStatistics

if TYPE_CHECKING:
    from rtml.serving.sequences import Stateful

State = Literal["READY", "LOADING", "UNAVAILABLE"]


class ModelVersion:
    """One version of a model as it is served now.

    Args:
        name: The model's name in paths.
        version: The version's name in paths; numbers compare as numbers.
        function: A remote function that takes the inputs by name (a single one alone) and returns an array (one output)
            or a dict of arrays.
        prepared: The same, known to the engine.
        inputs: What it takes; the batch dimension is part of the shapes.
        outputs: What it gives.
        platform: As clients are told: "onnxruntime_onnx", "python", "ensemble".
        target: Where its requests are counted.
        batch_max: Most rows of one run; 0: the first dimension is not a batch.
        config: Triton's ModelConfig as JSON, the answer to `GET .../config`.
        deadline: Seconds for requests that bring no deadline of their own.
        labels: The names of an output's classes, in order, by output.
        app: The app or repository that it belongs to.
        program: Of a graph program: how tensors become its arguments, and its result tensors.
        decoupled: A request has any number of answers, as Triton calls it.
    """

    def __init__(  # noqa: PLR0913  # a record; all by keyword
        self,
        *,
        name: str,
        version: str,
        function: Any,
        prepared: Prepared,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        platform: str,
        target: Target,
        batch_max: int = 0,
        config: dict[str, Any],
        deadline: float | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        app: str = "",
        program: ProgramTensors | None = None,
        decoupled: bool = False,
    ) -> None:
        self.name = name
        self.version = version
        self.function = function
        self.prepared = prepared
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.platform = platform
        self.target = target
        self.batch_max = batch_max
        self.config = config
        self.deadline = deadline
        self.labels = {output: list(names) for output, names in (labels or {}).items()}
        self.app = app
        self.program = program
        self.decoupled = decoupled
        self.statistics = ModelStatistics()
        #: Of a model that keeps state: its sequences.
        self.stateful: Stateful | None = None
        self.state: State = "READY"
        #: Why it is not ready, or what is the matter with a newer file under its name.
        self.reason = ""
        #: It is not served any more: whoever was about to call it looks again (`Registry.find`).
        self.retired = False

    def __repr__(self) -> str:
        return f"<ModelVersion {self.name!r} {self.version} {self.state}>"


class Status(NamedTuple):
    """What is known of a version that cannot be called."""

    state: State
    reason: str


class Repository(Protocol):
    """What loads and unloads models at run time."""

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model's versions anew; returns when they are served.

        Args:
            name: The model.
            parameters: Of the request: "config" (JSON text) overrides the model's own configuration,
                "file:<version>/<file>" (base64 text) brings files.

        Raises:
            HttpError: it cannot be loaded, and why; what was served before still is.
        """

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Serve a model no more; requests that run go on.

        Raises:
            HttpError: it is not known, or not the repository's.
        """


class Registry:
    """The models of a gateway. Everything here belongs to the gateway's event loop."""

    def __init__(self) -> None:
        #: Answers load and unload; None: the gateway serves what its apps say, for as long as it runs.
        self.repository: Repository | None = None
        #: Goes up with every change: what was looked up under another generation must be looked up again.
        self.generation = 0
        #: Called after every change of what can be called.
        self.on_change: Callable[[], None] = lambda: None
        self._ready: dict[str, dict[str, ModelVersion]] = {}
        self._others: dict[str, dict[str, Status]] = {}
        #: What a request without a version means.
        self._default: dict[str, ModelVersion] = {}
        #: Served no more, but sequences that began with them go on.
        self._draining: dict[str, ModelVersion] = {}

    # --- changes ------------------------------------------------------------------------------------------------------

    def add(self, version: ModelVersion, retire: Sequence[str] = ()) -> None:
        """Serve a version, in the place of one of the same name and number.

        Args:
            version: Ready.
            retire: Versions of the model that are not served any more, from the same moment on.
        """
        name = version.name
        before = self._ready.setdefault(name, {}).pop(version.version, None)
        if before is not None:
            before.retired = True
        self._ready[name][version.version] = version
        self._forget_status(name, version.version)
        for number in retire:
            self._take_out(name, number)
        self._changed(name)

    def remove(self, name: str, version: str) -> None:
        """Serve it no more. What was called goes on."""
        self._take_out(name, version)
        self._changed(name)

    def _take_out(self, name: str, version: str) -> None:
        before = self._ready.get(name, {}).pop(version, None)
        if before is not None:
            before.retired = True
        self._forget_status(name, version)

    def mark(self, name: str, version: str, state: State, reason: str = "") -> None:
        """Say of a version that cannot be called why; of one that is served, what is the matter with a newer file.

        Args:
            name: The model.
            version: "" if not even that is known.
            state: Its state in the index, unless it is served: then it stays READY.
            reason: For people.
        """
        served = self._ready.get(name, {}).get(version)
        if served is not None:
            served.reason = reason
        else:
            self._others.setdefault(name, {})[version] = Status(state, reason)
        self.generation += 1

    def unmark(self, name: str, version: str) -> None:
        """What `mark` said of a version that is not served is not so any more."""
        self._forget_status(name, version)
        self.generation += 1

    def drain(self, version: ModelVersion, on: bool) -> None:
        """A version that was removed still has sequences, or has none any more.

        As long as nothing else is served under its name, requests reach it: they say themselves what they cannot do.
        """
        if on:
            self._draining[version.name] = version
        elif self._draining.get(version.name) is version:
            del self._draining[version.name]
        self.generation += 1

    def _forget_status(self, name: str, version: str) -> None:
        statuses = self._others.get(name, {})
        statuses.pop(version, None)
        if not statuses:
            self._others.pop(name, None)

    def _changed(self, name: str) -> None:
        versions = self._ready.get(name)
        if versions:
            self._default[name] = versions[max(versions, key=version_order)]
        else:
            self._ready.pop(name, None)
            self._default.pop(name, None)
        self.generation += 1
        self.on_change()

    # --- questions ----------------------------------------------------------------------------------------------------

    def find(self, name: str, version: str | None = None) -> ModelVersion:
        """The version that a request means; without a number the highest that is ready.

        Raises:
            HttpError: 404 there is none; 503 it is not ready, with its state and the reason.
        """
        found = self._default.get(name) if version is None else self._ready.get(name, {}).get(version)
        if found is not None:
            return found
        draining = self._draining.get(name)
        if draining is not None and version in (None, draining.version):
            return draining
        others = self._others.get(name, {})
        status = others.get(version) if version is not None else _most_hopeful(others.values())
        if status is not None:
            where = f"model {name!r}" if version is None else f"model {name!r}, version {version},"
            raise HttpError(503, f"{where} is {status.state}: {status.reason or 'try again'}", "ModelNotReady")
        known = self.versions(name)
        if known:
            raise HttpError(404, f"model {name!r} has no version {version!r}, only {', '.join(known)}", "UnknownModel")
        raise HttpError(404, f"there is no model {name!r}, see GET /v2/models", "UnknownModel")

    def names(self) -> list[str]:
        """The models of which a version is ready."""
        return list(self._ready)

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are ready, lowest first."""
        return sorted(self._ready.get(name, ()), key=version_order)

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Everything that is known, as `POST /v2/repository/index` answers it.

        Args:
            ready: Only what can be called.
        """
        rows = []
        names = self._ready if ready else sorted({*self._ready, *self._others})
        for name in names:
            served = self._ready.get(name, {})
            others = {} if ready else self._others.get(name, {})
            for version in sorted({*served, *others}, key=version_order):
                state = served[version] if version in served else others[version]
                row = {"name": name, "version": version, "state": state.state, "reason": state.reason}
                rows.append(row if version else {key: value for key, value in row.items() if key != "version"})
        return rows

    def snapshot(self) -> dict[str, ModelVersion]:
        """The version of each model that a graph which starts now works with."""
        return dict(self._default)


#: The order of states when a model has no version that can be called.
_HOPE: Final[dict[str, int]] = {"LOADING": 0, "UNAVAILABLE": 1}


def _most_hopeful(statuses: Any) -> Status | None:
    return min(statuses, key=lambda status: _HOPE[status.state], default=None)


def version_order(version: str) -> tuple[bool, int, str]:
    """The key by which versions are sorted: numbers by their value, after all other names."""
    return (True, int(version), "") if version.isdecimal() else (False, 0, version)


def of_app(engine: Engine, target: Target, app: str, model: ServedModel) -> ModelVersion:
    """An app's model.

    Args:
        engine: Will run it.
        target: Where its requests are counted.
        app: The app's name.
        model: What the app says of it.

    Raises:
        ValueError: nobody says what it takes and gives.
        OSError: the model's file is not there.
    """
    inputs, outputs, platform = describe(model)
    prepared = engine.prepare(model.function)
    batch_max = int(getattr(model.function, "defaults", prepared.options).batch or 0)
    decoupled = is_stream(model.function)
    return ModelVersion(
        name=model.name,
        version=model.version,
        function=model.function,
        prepared=prepared,
        inputs=inputs,
        outputs=outputs,
        platform=platform,
        target=target,
        batch_max=batch_max,
        config=descriptions.describe_config(model.name, platform, batch_max, inputs, outputs, decoupled=decoupled),
        deadline=model.deadline,
        app=app,
        decoupled=decoupled,
    )


def describe(model: ServedModel) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec], str]:
    """A model's inputs and outputs, and its platform: as the app says, else as the model itself does.

    Raises:
        ValueError: neither says it.
        OSError: the model's file is not there.
    """
    ask = getattr(model.function, "metadata", None)
    platform = "python" if ask is None else "onnx"
    if model.inputs is not None and model.outputs is not None:
        return model.inputs, model.outputs, platform
    if ask is None:
        raise ValueError(f"model {model.name!r}: give its inputs and outputs to app.model(), it does not know them")
    info = ask()
    inputs = model.inputs or [spec_of(tensor) for tensor in info.inputs]
    outputs = model.outputs or [spec_of(tensor) for tensor in info.outputs]
    return inputs, outputs, platform


def spec_of(tensor: Any) -> TensorSpec:
    """The protocol's view of a model's tensor (`rtml.onnxfile.TensorInfo`).

    Raises:
        ValueError: it is no tensor of a datatype that the protocol has.
    """
    if tensor.dtype == "bfloat16":
        return TensorSpec(tensor.name, "BF16", tensor.shape)
    try:
        return TensorSpec(tensor.name, tensors.datatype_of(np.dtype(tensor.dtype)), tensor.shape)
    except (TypeError, ValueError):
        what = tensor.other or (
            f"a tensor of {tensor.dtype}" if tensor.dtype else "of a type that the file does not say"
        )
        raise ValueError(f"{tensor.name!r} is {what}, no tensor of a datatype that can be served") from None
