"""Graph programs as models: what clients of the Open Inference Protocol see of them.

A program is an ensemble whose steps nobody wrote down. They are learned: the dispatcher knows which functions the
tasks of each graph called (`rtml.graph.calls`), and a gateway asks it when a client asks for a configuration or for
statistics. A step that is a served model stands under the model's name; every other function stands under its own,
and can be asked for its configuration and statistics like a model, as load generators do with each step of an
ensemble.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container
from typing import Any, Final, NamedTuple

import msgspec

from rtml.codec import function_name
from rtml.errors import RtmlError
from rtml.metrics import Target
from rtml.serving import descriptions
from rtml.serving.app import Endpoint
from rtml.serving.engine import Engine
from rtml.serving.programs import ProgramTensors
from rtml.serving.registry import ModelVersion, Registry
from rtml.serving.statistics import BatchStatistics, Duration, ModelStatistics
from rtml.serving.together import Together

_logger = logging.getLogger("rtml.serving")

PLATFORM: Final = "ensemble"
#: Programs, and functions that are no models, have no versions of their own.
VERSION: Final = "1"


def of_endpoint(engine: Engine, target: Target, app: str, endpoint: Endpoint, name: str) -> ModelVersion:
    """A graph program as a model.

    Args:
        engine: Will run it.
        target: Where its requests are counted.
        app: The app's name.
        endpoint: What the app says of it.
        name: The model's name.

    Raises:
        TypeError: its signature cannot be served.
    """
    program = ProgramTensors(endpoint.function)
    return ModelVersion(
        name=name,
        version=VERSION,
        function=endpoint.function,
        prepared=engine.prepare(endpoint.function),
        inputs=program.inputs,
        outputs=program.outputs,
        platform=PLATFORM,
        target=target,
        config=descriptions.describe_config(
            name, PLATFORM, 0, program.inputs, program.outputs, decoupled=program.stream
        ),
        deadline=endpoint.deadline,
        app=app,
        program=program,
        decoupled=program.stream,
    )


def model_name_of(endpoint: Endpoint, taken: Container[str]) -> str:
    """The name of a program as a model: the one it was given, the last part of its path, or else the whole path.

    Raises:
        ValueError: the given name is taken, or all are.
    """
    path = re.sub(r"[^A-Za-z0-9._/-]", "_", endpoint.path).strip("/")
    for name in [endpoint.model] if endpoint.model else [path.rpartition("/")[2], path.replace("/", ".")]:
        if name not in taken:
            return name
    raise ValueError(f"endpoint {endpoint.path!r} needs a name of its own as a model: app.endpoint(..., model=...)")


class Called(msgspec.Struct):
    """What one function's calls by tasks came to, as the dispatcher says it."""

    ok: int
    failed: int
    seconds: float
    failed_seconds: float
    queued: float
    transfer: float
    run: float
    batches: dict[int, tuple[float, float, float]]

    def statistics(self) -> ModelStatistics:
        """The same as the statistics of a model; a call is one inference."""
        found = ModelStatistics()
        found.rows = self.ok
        for step, seconds in (
            ("success", self.seconds),
            ("queue", self.queued),
            ("compute_input", self.transfer),
            ("compute_infer", self.run),
            ("compute_output", 0.0),
        ):
            found.steps[step].merge(Duration(self.ok, seconds))
        found.steps["fail"].merge(Duration(self.failed, self.failed_seconds))
        for size, (calls, transfer, run) in self.batches.items():
            # Calls that shared a run brought its times each.
            runs = calls / size
            found.executions += runs
            batch = found.batches[size] = BatchStatistics()
            batch.input.merge(Duration(runs, transfer / size))
            batch.infer.merge(Duration(runs, run / size))
            batch.output.merge(Duration(runs))
        return found


class Learned(msgspec.Struct):
    """What the dispatcher has learned so far."""

    #: Root function -> functions of the tasks below -> in how many graphs.
    steps: dict[str, dict[str, int]] = {}
    called: dict[str, Called] = {}


class Step(NamedTuple):
    """A function that graphs call."""

    #: Of the model, or of the function if it is none.
    name: str
    version: str


class Ensembles:
    """Answers questions about programs and their steps.

    Args:
        engine: Whose dispatcher learns.
        registry: Knows the models.
        together: The gateway's processes.
    """

    def __init__(self, engine: Engine, registry: Registry, together: Together) -> None:
        self._engine = engine
        self._registry = registry
        self._together = together
        together.answer("statistics", self._own)

    async def learned(self) -> Learned:
        """What is known now; nothing, while the dispatcher does not answer."""
        try:
            return msgspec.json.decode(await self._engine.query("calls"), type=Learned)
        except (RtmlError, TimeoutError, msgspec.MsgspecError) as error:
            _logger.warning("the dispatcher does not say what graphs call: %r", error)
            return Learned()

    async def config(self, model: ModelVersion) -> dict[str, Any]:
        """A model's configuration; of a program with the steps that its graphs were seen to take."""
        if model.platform != PLATFORM:
            return model.config
        learned = await self.learned()
        models = self._models()
        found = [models.get(function, Step(function, VERSION)) for function in learned.steps.get(name_of(model), {})]
        steps = [
            {"model_name": name, "model_version": -1, "input_map": {}, "output_map": {}}
            for name, _ in dict(found).items()
        ]
        return {**model.config, "ensemble_scheduling": {"step": steps}}

    async def statistics(self, name: str | None, version: str | None) -> list[dict[str, Any]]:
        """The entries of `model_stats`: of one model, of one version, or of everything (`name` None).

        Raises:
            HttpError: there is no such model, and no such function.
        """
        learned = await self.learned()
        models = self._models()
        if name is not None and self.is_function(learned, name, version):
            return [learned.called[name].statistics().describe(name, VERSION)]
        registry = self._registry
        names = registry.names() if name is None else [name]
        wanted = [
            registry.find(each, number)
            for each in names
            for number in ([version] if version is not None else registry.versions(each))
        ]
        if name is not None and not wanted:
            registry.find(name)  # says why
        # What graphs called of a model counts for the version that they find by default.
        called: dict[Step, ModelStatistics] = {}
        for function, step in models.items():
            if function in learned.called:
                called.setdefault(step, ModelStatistics()).merge(learned.called[function].statistics())
        for own in await self._together.ask("statistics"):
            for row in own:
                counted = called.setdefault(Step(row["name"], row["version"]), ModelStatistics())
                counted.merge(ModelStatistics.of(row))
        nothing = ModelStatistics()
        rows = [
            called.get(Step(model.name, model.version), nothing).describe(model.name, model.version) for model in wanted
        ]
        if name is None:
            # perf_analyzer looks for every step of an ensemble among these.
            functions = [function for function in self._functions(learned) if function not in models]
            rows += [learned.called[function].statistics().describe(function, VERSION) for function in functions]
        return rows

    def _functions(self, learned: Learned) -> list[str]:
        """What the graphs of the programs that are served call."""
        registry = self._registry
        programs = [model for model in map(registry.find, registry.names()) if model.platform == PLATFORM]
        found = dict.fromkeys(step for program in programs for step in learned.steps.get(name_of(program), {}))
        return [function for function in found if self.is_function(learned, function, None)]

    def _own(self) -> list[dict[str, Any]]:
        """What this process has counted."""
        registry = self._registry
        found = [registry.find(name, version) for name in registry.names() for version in registry.versions(name)]
        return [model.statistics.describe(model.name, model.version) for model in found]

    def is_function(self, learned: Learned, name: str, version: str | None) -> bool:
        """Whether this is no model, but a function that graphs have called."""
        return name in learned.called and name not in self._registry.names() and version in (None, VERSION)

    def _models(self) -> dict[str, Step]:
        """Function -> the model that it is."""
        found = {}
        for name in self._registry.names():
            model = self._registry.find(name)
            if model.platform != PLATFORM:
                found[name_of(model)] = Step(name, model.version)
        return found


def describe_function(name: str) -> dict[str, Any]:
    """The metadata of a function that is no model."""
    return descriptions.describe_model(name, VERSION, "python", (), ())


def configure_function(name: str) -> dict[str, Any]:
    """The configuration of a function that is no model."""
    return descriptions.describe_config(name, "python", 0, (), ())


def name_of(model: ModelVersion) -> str:
    """What the engine calls a model's function."""
    for options in (getattr(model.function, "overrides", None), getattr(model.function, "defaults", None)):
        if options is not None and options.name:
            return str(options.name)
    return function_name(getattr(model.function, "function", model.function))
