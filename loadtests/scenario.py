"""What a scenario is, and how it is read from a file (TOML, YAML or JSON)."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

#: Scenarios that come with the project.
FOLDER: Final = Path(__file__).parent / "scenarios"

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class Constant(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="constant"):
    """A request every `1 / rate` seconds."""

    rate: Positive
    seconds: Positive

    @property
    def mean(self) -> float:
        """Requests a second."""
        return self.rate


class Poisson(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="poisson"):
    """Independent requests, `rate` a second on average."""

    rate: Positive
    seconds: Positive

    @property
    def mean(self) -> float:
        """Requests a second."""
        return self.rate


class Bursts(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="bursts"):
    """Groups of requests at one moment: sizes are geometric with mean `size`, groups come independently.

    `rate` counts requests a second, not groups.
    """

    rate: Positive
    seconds: Positive
    size: Annotated[float, Meta(ge=1)] = 20.0

    @property
    def mean(self) -> float:
        """Requests a second."""
        return self.rate


class Ramp(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="ramp"):
    """Independent requests whose rate goes from `rate` to `to` in a straight line."""

    rate: Annotated[float, Meta(ge=0)]
    to: Annotated[float, Meta(ge=0)]
    seconds: Positive

    @property
    def mean(self) -> float:
        """Requests a second over the whole ramp."""
        return (self.rate + self.to) / 2


Phase = Constant | Poisson | Bursts | Ramp


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of request.

    Either `model` (Open Inference Protocol: inputs are made from the server's description, seeded), or `path` with a
    `json` body.

    Attributes:
        name: What tables call it.
        weight: How often it comes, relative to the others.
        deadline_ms: Budgets in milliseconds; each request has one of them. Empty: none.
        rows: Size of a model's first dimension, if it is variable.
        sizes: Sizes of a model's further variable dimensions, by the input's name (the whole shape).
        binary: Binary tensors instead of JSON.
        headers: Further headers.
    """

    name: str
    weight: Positive = 1.0
    model: str | None = None
    path: str | None = None
    json: Any = None
    deadline_ms: list[Positive] = []
    rows: Count = 1
    sizes: dict[str, list[int]] = {}
    binary: bool = True
    headers: dict[str, str] = {}

    def __post_init__(self) -> None:
        if (self.model is None) == (self.path is None):
            raise ValueError(f"request {self.name!r} needs either `model` or `path`")
        if self.path is not None and not self.path.startswith("/"):
            raise ValueError(f"the path of request {self.name!r} begins with /, not {self.path!r}")


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    """What is sent, and when.

    Attributes:
        phases: One after the other.
        requests: Kinds of requests, mixed by their weights.
        seed: Of arrivals, kinds, deadlines and inputs.
        warmup: Seconds at the beginning (at the first phase's rate) that are sent but not counted.
        timeout: Seconds after which the client gives a request up.
        late_ms: A request that the client sent later than this after its time is a client-side miss.
        app: `MODULE:APP` that is served when no url is given.
    """

    name: str
    phases: Annotated[list[Phase], Meta(min_length=1)]
    requests: Annotated[list[Request], Meta(min_length=1)]
    about: str = ""
    seed: int = 1
    warmup: Annotated[float, Meta(ge=0)] = 2.0
    timeout: Positive = 10.0
    late_ms: Positive = 5.0
    app: str = "loadtests.app:app"

    @property
    def seconds(self) -> float:
        """How long all phases take."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def mean(self) -> float:
        """Requests a second, on average over all phases."""
        return sum(phase.mean * phase.seconds for phase in self.phases) / self.seconds


def read(source: str) -> Scenario:
    """The scenario in a file, or the one of that name which comes with the project.

    Raises:
        ValueError: there is no such file, or it does not say what a scenario is; the message says where.
    """
    path = Path(source)
    if not path.is_file() and (FOLDER / f"{source}.toml").is_file():
        path = FOLDER / f"{source}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise ValueError(f"there is no scenario {source!r}: name a file, or one of {known}")
    try:
        return msgspec.convert(_parsed(path), Scenario)
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parsed(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {error}") from None
    return tomllib.loads(text)


def scaled(scenario: Scenario, rate: float) -> Scenario:
    """The same with `rate` requests a second on average."""
    factor = rate / scenario.mean
    phases: list[Phase] = []
    for phase in scenario.phases:
        if isinstance(phase, Ramp):
            phases.append(msgspec.structs.replace(phase, rate=phase.rate * factor, to=phase.to * factor))
        else:
            phases.append(msgspec.structs.replace(phase, rate=phase.rate * factor))
    return msgspec.structs.replace(scenario, phases=phases)


def lasting(scenario: Scenario, seconds: float) -> Scenario:
    """The same with all phases stretched or shortened to `seconds` together."""
    factor = seconds / scenario.seconds
    phases: list[Phase] = [msgspec.structs.replace(phase, seconds=phase.seconds * factor) for phase in scenario.phases]
    return msgspec.structs.replace(scenario, phases=phases)
