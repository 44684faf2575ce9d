"""What makes a model stateful: which tensors are its state, and how long sequences last. Pure.

`SequenceSpec` is what an app says; `layout_of` holds it against what the ONNX file says of itself, and fills in what
need not be said: the datatypes of states, their shapes, and along which axis those of several sequences are joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from rtml.onnxfile import ModelInfo, TensorInfo
from rtml.sequences import Control, Layout, State

#: Kinds of `SequenceSpec.controls`.
KINDS: Final = ("start", "end", "ready", "corrid")


class SequenceSpec(NamedTuple):
    """How an app's ONNX model keeps state: ``app.model("vad", model, sequence=SequenceSpec({"state": "stateN"}))``."""

    #: Outputs by the inputs whose next values they are. Clients see neither.
    states: Mapping[str, str]
    #: Inputs that the gateway fills in: "start", "end", "ready" (1 for yes), "corrid" (the sequence's id).
    controls: Mapping[str, str] = {}
    #: Inputs that are the same in every call. Clients do not see them.
    constants: Mapping[str, Any] = {}
    #: Arrays that states begin with, by input; else zeros.
    initial: Mapping[str, Any] = {}
    #: Seconds without a request after which a sequence ends.
    idle: float = 30.0
    #: Most sequences at a time.
    live_max: int = 1024
    #: Processes that hold states and run steps.
    holders: int = 1
    #: Most sequences in one run; 1: each step runs alone.
    batch: int = 32


class GivenState(NamedTuple):
    """What is said of a state beside its names."""

    #: Of one sequence, without the axis of the batch; None: as in the file.
    dims: tuple[int, ...] | None = None
    initial: Any = None


class Fields(NamedTuple):
    """What a layout is made of."""

    states: Mapping[str, str]
    given: Mapping[str, GivenState]
    controls: Sequence[tuple[str, str, tuple[float, float]]]
    constants: Mapping[str, Any]
    idle: float
    live_max: int
    holders: int
    batch: int


def layout_of(name: str, spec: SequenceSpec, info: ModelInfo) -> Layout:
    """How to run a model under an app's `SequenceSpec`.

    Args:
        name: The model's.
        spec: What the app says.
        info: What the file says of itself.

    Raises:
        ValueError: they contradict each other; the message says where.
    """
    import numpy as np

    if not spec.states:
        raise ValueError(f"model {name!r}: it has no states; a model without any needs no sequences")
    stray = sorted(spec.initial.keys() - spec.states.keys())
    if stray:
        raise ValueError(f"model {name!r}: initial names {stray[0]!r}, which is no state; states: {list(spec.states)}")
    wrong = sorted(set(spec.controls.values()) - set(KINDS))
    if wrong:
        raise ValueError(f"model {name!r}: a control is one of {', '.join(KINDS)}, not {wrong[0]!r}")
    given = {key: GivenState(initial=np.asarray(value)) for key, value in spec.initial.items()}
    controls = [(key, kind, (0.0, 1.0)) for key, kind in spec.controls.items()]
    fields = Fields(spec.states, given, controls, spec.constants, spec.idle, spec.live_max, spec.holders, spec.batch)
    return make_layout(name, fields, info)


def make_layout(name: str, fields: Fields, info: ModelInfo) -> Layout:
    """As `layout_of`, from what a configuration says."""
    inputs = {tensor.name: tensor for tensor in info.inputs}
    outputs = {tensor.name: tensor for tensor in info.outputs}
    where = f"model {name!r}: "
    for what, names, known in (
        ("input", [*fields.states, *(control[0] for control in fields.controls), *fields.constants], inputs),
        ("output", fields.states.values(), outputs),
    ):
        for one in names:
            if one not in known:
                raise ValueError(f"{where}the file has no {what} {one!r}; it has {', '.join(known)}")
    for label, number, least in (
        ("holders", fields.holders, 1),
        ("batch", fields.batch, 1),
        ("live_max", fields.live_max, 1),
    ):
        if number < least:
            raise ValueError(f"{where}{label} is {least} or more, not {number}")
    if not 0 < fields.idle < math.inf:
        raise ValueError(f"{where}idle is a positive number of seconds, not {fields.idle}")
    hidden = {*fields.states, *(control[0] for control in fields.controls), *fields.constants}
    asked = [tensor for tensor in info.inputs if tensor.name not in hidden]
    batched = tuple(tensor.name for tensor in asked if _is_open(tensor))
    joins = fields.batch > 1
    if joins and not batched:
        raise ValueError(f"{where}no input has an open first dimension, so batch must be 1, not {fields.batch}")
    states = tuple(
        _state(where, inputs[one], outputs[other], fields.given.get(one, GivenState()), joins)
        for one, other in fields.states.items()
    )
    for tensor in info.outputs:
        if joins and tensor.name not in fields.states.values() and not _is_open(tensor):
            raise ValueError(f"{where}output {tensor.name!r} has no open first dimension, so batch must be 1")
    return Layout(
        name,
        states,
        batched,
        tuple(tensor.name for tensor in info.outputs if tensor.name not in fields.states.values()),
        tuple(_control(where, inputs[one], kind, values) for one, kind, values in fields.controls),
        {one: _constant(where, inputs[one], value) for one, value in fields.constants.items()},
        fields.batch,
        fields.idle,
        math.ceil(fields.live_max / fields.holders),
        fields.holders,
    )


def hidden_inputs(layout: Layout) -> set[str]:
    """Inputs that requests do not bring."""
    return {state.input for state in layout.states} | {one.input for one in layout.controls} | set(layout.constants)


def described(layout: Layout) -> dict[str, Any]:
    """`sequence_batching` of `GET .../config`."""
    found: dict[str, Any] = {
        "max_sequence_idle_microseconds": int(layout.idle * 1e6),
        "oldest": {
            "max_candidate_sequences": layout.live_max * layout.holders,
        },
        "state": [
            {
                "input_name": state.input,
                "output_name": state.output,
                "data_type": _triton_type(state.dtype),
                "dims": [size for axis, size in enumerate(state.shape) if axis != state.axis],
            }
            for state in layout.states
        ],
        "control_input": [
            {"name": control.input, "control": [{"kind": f"CONTROL_SEQUENCE_{control.kind.upper()}"}]}
            for control in layout.controls
        ],
    }
    return found


def _is_open(tensor: TensorInfo) -> bool:
    return bool(tensor.shape) and tensor.shape is not None and tensor.shape[0] < 0


def _state(where: str, tensor: TensorInfo, output: TensorInfo, given: GivenState, joins: bool) -> State:
    """A state of one sequence: its shape, and the axis along which several are joined."""
    if tensor.dtype != output.dtype:
        message = f"state {tensor.name!r} is {tensor.dtype}, but its output {output.name!r} is {output.dtype}"
        raise ValueError(where + message)
    if tensor.dtype in {"", "bfloat16"}:
        raise ValueError(f"{where}state {tensor.name!r} is no tensor that can be kept: {tensor.dtype or 'no tensor'}")
    shape = tensor.shape
    if given.initial is not None:
        first = given.initial.shape
        axis = None if shape is None else _axis(shape, given.dims)
        if given.dims is not None and axis is not None and joins:
            first = (*first[:axis], 1, *first[axis:])
        if shape is not None and not _fits(first, shape):
            raise ValueError(f"{where}the initial {tensor.name!r} has shape {list(first)}, the file says {list(shape)}")
        if joins and (axis is None or first[axis] != 1):
            raise ValueError(f"{where}the initial {tensor.name!r} is of one sequence: 1 along the batch's axis")
        return State(tensor.name, output.name, tensor.dtype, tuple(first), axis, given.initial)
    if shape is None and given.dims is None:
        raise ValueError(f"{where}the file does not say the shape of state {tensor.name!r}: give its initial value")
    if shape is None:
        assert given.dims is not None
        shape = (-1, *given.dims) if joins else given.dims
    axis = _axis(shape, given.dims) if joins or given.dims is None or len(given.dims) < len(shape) else None
    if joins and axis is None and given.dims is not None:
        dims = list(given.dims)
        raise ValueError(f"{where}state {tensor.name!r} has shape {list(shape)} in the file: not {dims} and a batch")
    if joins and axis is None:
        raise ValueError(
            f"{where}state {tensor.name!r} has shape {list(shape)} in the file: no axis is open for a batch"
        )
    if given.dims is not None:
        rest = [size for place, size in enumerate(shape) if place != axis]
        if not _fits(given.dims, rest):
            raise ValueError(f"{where}state {tensor.name!r} has the dims {rest} in the file, not {list(given.dims)}")
        sizes = [max(0, size) for size in given.dims]
        if axis is not None:
            sizes.insert(axis, 1)
    else:
        open_axes = [place for place, size in enumerate(shape) if size < 0]
        if len(open_axes) > 1:
            raise ValueError(
                f"{where}state {tensor.name!r} has shape {list(shape)}: more than one dimension is open, so say what "
                "sequences begin with (initial)"
            )
        sizes = [1 if size < 0 else size for size in shape]
    return State(tensor.name, output.name, tensor.dtype, tuple(sizes), axis)


def _axis(shape: Sequence[int], dims: Sequence[int] | None) -> int | None:
    """The axis of the batch: the first one that is open, and without which the shape is `dims`."""
    for place, size in enumerate(shape):
        if size < 0 and (dims is None or _fits(dims, [*shape[:place], *shape[place + 1 :]])):
            return place
    return None


def _fits(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    return len(sizes) == len(shape) and all(a == b or -1 in (a, b) for a, b in zip(sizes, shape))


def _control(where: str, tensor: TensorInfo, kind: str, values: tuple[float, float]) -> Control:
    if not tensor.dtype or tensor.dtype == "bfloat16" or (tensor.dtype == "object" and kind != "corrid"):
        raise ValueError(f"{where}control input {tensor.name!r} cannot be of type {tensor.dtype or 'unknown'}")
    shape = tuple(1 if size < 0 else size for size in tensor.shape or (1,))
    return Control(tensor.name, kind, tensor.dtype, values, shape)


def _constant(where: str, tensor: TensorInfo, value: Any) -> Any:
    import numpy as np

    try:
        array = np.asarray(value, tensor.dtype or None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}constant {tensor.name!r} is {tensor.dtype}: {error}") from None
    if tensor.shape is not None and math.prod(tensor.shape) == array.size and not _fits(array.shape, tensor.shape):
        array = array.reshape(tensor.shape)
    if tensor.shape is not None and not _fits(array.shape, tensor.shape):
        raise ValueError(f"{where}constant {tensor.name!r} has shape {list(array.shape)}, not {list(tensor.shape)}")
    return array


def _triton_type(dtype: str) -> str:
    names = {"object": "STRING", "bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
    return f"TYPE_{names.get(dtype, dtype.upper())}"


def visible(tensors: Iterable[TensorInfo], hidden: set[str]) -> list[TensorInfo]:
    """The tensors that clients see."""
    return [tensor for tensor in tensors if tensor.name not in hidden]
