"""`sequence_batching` of Triton's model configuration, and what it comes to with the ONNX file. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from rtml.onnxfile import ModelInfo
from rtml.sequences import Layout
from rtml.serving.sequencespec import Fields, GivenState, make_layout

#: As in Triton, where nothing is said.
IDLE_MICROSECONDS: Final = 1_000_000
#: Sequences at a time where nothing is said. (Triton's direct strategy has as many as its batch; others wait.)
LIVE_MAX: Final = 1024
#: A parameter `constant.NAME` is the value of an input that clients do not see.
CONSTANT: Final = "constant."
_MILLION: Final = 1e6


class InitialState(msgspec.Struct):
    """What a sequence begins with."""

    name: str = ""
    data_type: str = ""
    dims: list[int] = []
    zero_data: bool = False
    data_file: str = ""


class StateTensor(msgspec.Struct):
    """An output that is an input of the next step; `dims` without the batch dimension."""

    input_name: str
    output_name: str
    data_type: str = ""
    dims: list[int] = []
    initial_state: list[InitialState] = []


class ControlTensor(msgspec.Struct):
    """What an input tells the model."""

    kind: Literal[
        "CONTROL_SEQUENCE_START", "CONTROL_SEQUENCE_READY", "CONTROL_SEQUENCE_END", "CONTROL_SEQUENCE_CORRID"
    ] = "CONTROL_SEQUENCE_START"
    int32_false_true: list[int] = []
    fp32_false_true: list[float] = []
    bool_false_true: list[bool] = []
    data_type: str = ""


class ControlInput(msgspec.Struct):
    """An input that the server fills in."""

    name: str
    control: list[ControlTensor]


class Direct(msgspec.Struct):
    """A sequence keeps a place in the batch."""


class Oldest(msgspec.Struct):
    """Batches are made of whatever sequences have a request."""

    max_candidate_sequences: int = 0


class SequenceBatching(msgspec.Struct):
    """How a stateful model is run. Both strategies come to the same here: runs are made of what waits."""

    max_sequence_idle_microseconds: int = 0
    control_input: list[ControlInput] = []
    state: list[StateTensor] = []
    direct: Direct | None = None
    oldest: Oldest | None = None


def layout(
    name: str,
    given: SequenceBatching,
    batch_max: int,
    holders: int,
    parameters: Mapping[str, str],
    info: ModelInfo,
    initial: Mapping[str, bytes],
) -> Layout:
    """How to run a model.

    Args:
        name: The model's.
        given: Its configuration's.
        batch_max: Its `max_batch_size`.
        holders: How many processes.
        parameters: Of the configuration.
        info: What the file says of itself.
        initial: Contents of the files in `initial_state`, by name.

    Raises:
        ValueError: they contradict each other.
    """
    states = {state.input_name: state.output_name for state in given.state}
    dtypes = {tensor.name: tensor.dtype for tensor in info.inputs}
    candidates = given.oldest.max_candidate_sequences if given.oldest is not None else 0
    controls = [(one.name, *_control(one)) for one in given.control_input]
    fields = Fields(
        states=states,
        given={state.input_name: _given(state, dtypes.get(state.input_name, ""), initial) for state in given.state},
        controls=controls,
        constants={
            key.removeprefix(CONSTANT): _number(key, value)
            for key, value in parameters.items()
            if key.startswith(CONSTANT)
        },
        idle=(given.max_sequence_idle_microseconds or IDLE_MICROSECONDS) / _MILLION,
        live_max=candidates or LIVE_MAX,
        holders=holders,
        batch=max(1, batch_max),
    )
    return make_layout(name, fields, info)


def initial_files(given: SequenceBatching) -> list[str]:
    """Files with the beginnings of states, in the model's directory `initial_state`."""
    return [one.data_file for state in given.state for one in state.initial_state if one.data_file]


def _given(state: StateTensor, dtype: str, initial: Mapping[str, bytes]) -> GivenState:
    import numpy as np

    dims = tuple(state.dims) if state.dims else None
    first = state.initial_state[0] if state.initial_state else None
    if first is None or not first.data_file:
        return GivenState(dims if first is None or not first.dims else tuple(first.dims))
    sizes = tuple(first.dims or state.dims)
    if dtype in {"", "object", "bfloat16"}:
        raise ValueError(f"state {state.input_name!r}: a data_file has numbers, and the state is {dtype or 'unknown'}")
    try:
        array = np.frombuffer(initial[first.data_file], dtype).reshape(sizes)
    except ValueError as error:
        raise ValueError(f"state {state.input_name!r}: initial_state/{first.data_file}: {error}") from None
    return GivenState(sizes, array)


def _control(given: ControlInput) -> tuple[str, tuple[float, float]]:
    if len(given.control) != 1:
        raise ValueError(f"control input {given.name!r} has {len(given.control)} controls, one is expected")
    control = given.control[0]
    kind = control.kind.removeprefix("CONTROL_SEQUENCE_").lower()
    values: list[Any] = control.int32_false_true or control.fp32_false_true or control.bool_false_true or [0, 1]
    if len(values) != 2:
        raise ValueError(f"control input {given.name!r}: two values are expected, for false and true, not {values}")
    return kind, (float(values[0]), float(values[1]))


def _number(key: str, value: str) -> float | int:
    try:
        return float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        raise ValueError(f"parameter {key} is a number, not {value!r}") from None
