"""The Open Inference Protocol V2: request bodies -> arrays, arrays -> reply bodies. Pure: bytes in, bytes out.

An inference request is a JSON object, followed, with the binary tensor extension, by the raw data of those tensors that
say so, in the order of the JSON; the header `Inference-Header-Content-Length` tells where the JSON ends. Absent means
all JSON; 0 means that the whole body is the data of the model's only input. A reply has the same form.

    request = decode_request(body, header_length, inputs)
    head, data = encode_reply(reply, request)         # the body is both; with data, len(head) goes into the header

Rules that clients depend on: `parameters` of a reply's output holds nothing but `binary_data_size` (Triton's C++
client stops at anything else), so what rtml has to add goes to the top-level `parameters`; `id` is echoed; extra fields
are ignored. What a tensor's data may look like stands in `rtml.serving.tensors`.
"""

from __future__ import annotations

import functools
import math
from collections import abc
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from rtml.errors import InvalidInput
from rtml.serving import tensors
from rtml.serving.app import TensorSpec
from rtml.serving.features import NotEnabled
from rtml.serving.tensors import Array, Buffer

#: Of a request, an input or an output. The protocol knows text, numbers and booleans; what clients send beyond that is
#: none of the gateway's business, and ignored.
Parameters = dict[str, Any]

#: Numbers of the protocol are unsigned, of 64 bits.
_NUMBER_MAX: Final = 1 << 64
#: The engine's least urgent priority.
_PRIORITY_MIN: Final = -(1 << 31)

#: Classes that one output may be answered with: each is text that is made for it.
_CLASSES_MAX: Final = 100_000

#: Parameters of a request that change what is done; the others say how tensors travel, or mean nothing here.
_WISHES: Final = frozenset({"timeout", "priority", "sequence_id", "sequence_start", "sequence_end"})

#: Seconds; more is as good as that, and the engine's messages have a limit, too.
_TIMEOUT_MAX: Final = 1e9
#: The parameter of a tensor that is not in the body.
REGION: Final = "shared_memory_region"

#: The name of the header that ends the JSON part of a body.
HEADER_LENGTH: Final = "Inference-Header-Content-Length"


class Regions(Protocol):
    """Memory that clients share with the gateway: where tensors may lie that do not travel."""

    def read(self, name: str, offset: int, size: int) -> Buffer:
        """A part of a region. Raises `InvalidInput` if there is none."""

    def write(self, name: str, offset: int, size: int, data: Buffer) -> None:
        """Put a tensor into a part of a region. Raises `InvalidInput` if that is not there, or too small."""


class RequestInput(msgspec.Struct):
    """A tensor of a request as it stands in the JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: Parameters | None = None


class RequestOutput(msgspec.Struct):
    """An output that a request asks for."""

    name: str
    parameters: Parameters | None = None


class RequestHead(msgspec.Struct):
    """The JSON of a request."""

    inputs: list[RequestInput]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[RequestOutput] | None = None


class Sequence(msgspec.Struct, frozen=True):
    """The place of a request in a sequence, which a model with state answers in order."""

    id: int | str
    start: bool = False
    end: bool = False


class Request(msgspec.Struct):
    """A decoded inference request."""

    id: str
    #: By name, in the order of the model's inputs.
    inputs: dict[str, Array]
    parameters: Parameters
    #: What is asked for, in this order; None: all outputs of the model.
    outputs: list[RequestOutput] | None = None
    #: How outputs travel that say nothing themselves.
    binary: bool = False

    @property
    def wishes(self) -> bool:
        """Whether it says more than what is to be run."""
        return not _WISHES.isdisjoint(self.parameters)

    @property
    def sequence(self) -> Sequence | None:
        """The sequence that it belongs to, if it says one."""
        number = self.parameters.get("sequence_id")
        if not number:
            return None
        start, end = (self.parameters.get(key, False) for key in ("sequence_start", "sequence_end"))
        return Sequence(number, start, end)


class Reply(msgspec.Struct):
    """What a model answered, to be encoded for a `Request`."""

    model: str
    version: str
    #: By name; more than were asked for is fine.
    outputs: dict[str, Array]
    specs: abc.Sequence[TensorSpec]
    #: Top-level parameters of the reply.
    parameters: Parameters | None = None
    #: Names of classes in order, by output, for the classification extension.
    labels: Mapping[str, abc.Sequence[str]] = {}


_decode_head = msgspec.json.Decoder(RequestHead).decode
_encode_json = msgspec.json.Encoder().encode


# --- requests ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(256)
def parse_header_length(text: str | None) -> int | None:
    """The value of the header `Inference-Header-Content-Length`.

    Raises:
        InvalidInput: it is not a number of bytes.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidInput(f"{HEADER_LENGTH} must be a number of bytes, not {text[:40]!r}")
    return int(text)


def decode_request(
    body: Buffer, header_length: int | None, specs: abc.Sequence[TensorSpec], regions: Regions | None = None
) -> Request:
    """The request in `body`, checked against the model's inputs.

    Args:
        body: The whole body, decompressed. Arrays of binary tensors are views of it.
        header_length: The value of `Inference-Header-Content-Length`; None without the header.
        specs: The model's inputs.
        regions: Where tensors may lie that are not in the body; None: nowhere.

    Raises:
        InvalidInput: it is not a request, or does not fit the model; the message names the tensor.
    """
    if header_length == 0:
        return _decode_raw(body, specs)
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise InvalidInput(f"{HEADER_LENGTH} is {end}, but the body has only {len(body)} bytes")
    view = memoryview(body)
    try:
        head = _decode_head(view[:end])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the request is not an inference request: {error}") from None
    inputs = _decode_inputs(head.inputs, view[end:], specs, regions)
    parameters = head.parameters or {}
    binary = False
    if parameters:
        binary = parameters.get("binary_data_output", False)
        if not isinstance(binary, bool):
            raise InvalidInput(f"parameter binary_data_output must be true or false, not {binary!r}")
        if not _WISHES.isdisjoint(parameters):
            check_parameters(parameters)
    datatypes = {tensor.name: tensor.datatype for tensor in head.inputs}
    return Request(head.id or "", fit(inputs, datatypes, specs), parameters, head.outputs or None, binary)


def _decode_raw(body: Buffer, specs: abc.Sequence[TensorSpec]) -> Request:
    """A request that is nothing but the data of the only input."""
    if len(specs) != 1:
        raise InvalidInput(
            f"a raw request ({HEADER_LENGTH}: 0) needs a model with one input; this one has {len(specs)}"
        )
    name, datatype, declared, _ = specs[0]
    shape = (-1,) if declared is None else declared
    if datatype == "BYTES":  # the body is the one element itself, without a length before it
        array: Array = np.empty(1, object)
        array[0] = bytes(body)
        return Request("", {name: array.reshape([1] * max(len(shape), 1))}, {}, None, True)
    # The first open dimension is the batch where there is more than one; a raw request is a batch of one.
    open_dimensions = [index for index, dimension in enumerate(shape) if dimension < 0]
    resolved = list(shape)
    if len(open_dimensions) > 1:
        resolved[open_dimensions[0]] = 1
        open_dimensions = open_dimensions[1:]
    if len(open_dimensions) > 1:
        raise InvalidInput(
            f"a raw request cannot say the shape of {name!r}: more than one dimension of {shape} is open"
        )
    if open_dimensions:
        width = 2 if datatype == "BF16" else tensors.dtype_of(name, datatype).itemsize
        rest = math.prod(dimension for dimension in resolved if dimension >= 0)
        if rest == 0 or len(body) % (rest * width):
            raise InvalidInput(f"{len(body)} bytes are no whole number of {datatype} rows of shape {list(shape)}")
        resolved[open_dimensions[0]] = len(body) // (rest * width)
    return Request("", {name: tensors.from_bytes(name, datatype, resolved, body)}, {}, None, True)


def _decode_inputs(
    inputs: list[RequestInput], binary: memoryview, specs: abc.Sequence[TensorSpec], regions: Regions | None
) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    position = 0
    for tensor in inputs:
        if tensor.name in arrays:
            raise InvalidInput(f"tensor {tensor.name!r} is given twice")
        parameters = tensor.parameters or {}
        size = parameters.get("binary_data_size")
        if REGION in parameters:
            if tensor.data or size is not None:
                raise InvalidInput(f"tensor {tensor.name!r} is in shared memory and in the body, too")
            if all(tensor.name != spec.name for spec in specs):  # a small request must not have large copies made
                raise InvalidInput(f"input {tensor.name!r} is unknown; the model takes {_names(specs)}")
            shared = open_regions(regions).read(*region_of(tensor.name, parameters))
            arrays[tensor.name] = tensors.from_bytes(tensor.name, tensor.datatype, tensor.shape, shared)
            continue
        if size is None:
            if not tensor.data:
                raise InvalidInput(f"tensor {tensor.name!r} has neither data nor binary_data_size")
            arrays[tensor.name] = tensors.from_json(tensor.name, tensor.datatype, tensor.shape, memoryview(tensor.data))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InvalidInput(f"tensor {tensor.name!r}: binary_data_size must be a number of bytes, not {size!r}")
        if tensor.data and bytes(tensor.data) != b"null":  # which KServe's client sends with an empty tensor
            raise InvalidInput(f"tensor {tensor.name!r} has both data and binary_data_size")
        if size > len(binary) - position:
            raise InvalidInput(
                f"tensor {tensor.name!r}: binary_data_size is {size}, but only {len(binary) - position} bytes are left"
            )
        data = binary[position : position + size]
        arrays[tensor.name] = tensors.from_bytes(tensor.name, tensor.datatype, tensor.shape, data)
        position += size
    if position != len(binary):
        raise InvalidInput(f"{len(binary) - position} bytes of the body belong to no tensor")
    return arrays


def region_of(name: str, parameters: Parameters) -> tuple[str, int, int]:
    """Region, offset and size of a tensor that is in shared memory.

    Raises:
        InvalidInput: its parameters do not say that well.
    """
    region = parameters[REGION]
    offset, size = parameters.get("shared_memory_offset", 0), parameters.get("shared_memory_byte_size")
    if not isinstance(region, str):
        raise InvalidInput(f"tensor {name!r}: {REGION} must be the name of a region, not {repr(region)[:40]}")
    for what, number in (("offset", offset), ("byte_size", size)):
        if not _is_number(number):
            raise InvalidInput(f"tensor {name!r}: shared_memory_{what} must be a number, not {repr(number)[:40]}")
    return region, offset, size  # type: ignore[return-value]  # numbers, as was just checked


def open_regions(regions: Regions | None) -> Regions:
    """The regions, or `NotEnabled`."""
    if regions is None:
        raise NotEnabled("shared memory of clients is off here; --allow-shared-memory of the gateway turns it on")
    return regions


def fit(arrays: dict[str, Array], datatypes: Mapping[str, str], specs: abc.Sequence[TensorSpec]) -> dict[str, Array]:
    """A request's inputs in the model's order.

    Args:
        arrays: By name.
        datatypes: What the request says that they are, by name.
        specs: The model's inputs.

    Raises:
        InvalidInput: names, datatypes or shapes are not the model's.
    """
    fitting = {}
    for name, datatype, shape, optional in specs:
        array = arrays.get(name)
        if array is None:
            if optional:
                continue
            raise InvalidInput(f"input {name!r} is missing; the model takes {_names(specs)}")
        if datatypes[name] != datatype:
            raise InvalidInput(f"input {name!r} is {datatypes[name]}; the model takes {datatype}")
        if shape is not None and not _matches(array.shape, shape):
            raise InvalidInput(f"input {name!r} has shape {list(array.shape)}; the model takes {list(shape)}")
        fitting[name] = array
    if len(arrays) != len(fitting):
        unknown = next(name for name in arrays if name not in fitting)
        raise InvalidInput(f"input {unknown!r} is unknown; the model takes {_names(specs)}")
    return fitting


def _matches(found: abc.Sequence[int], expected: abc.Sequence[int]) -> bool:
    """Whether a shape is the expected one, in which -1 is any size."""
    if len(found) != len(expected):
        return False
    for size, actual in zip(expected, found, strict=True):  # noqa: SIM110 - half the time of `all`
        if size not in (-1, actual):
            return False
    return True


def _names(specs: abc.Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs) or "no inputs"


def check_parameters(parameters: Parameters) -> None:
    """Look at the parameters that mean something to the gateway.

    Raises:
        InvalidInput: one has an impossible value.
    """
    for key in ("timeout", "priority"):
        if not _is_number(parameters.get(key, 0)):
            shown = repr(parameters[key])[:40]
            raise InvalidInput(f"parameter {key} must be a whole number from 0 to 2**64 - 1, not {shown}")
    number = parameters.get("sequence_id", 0)
    if not isinstance(number, str) and not _is_number(number):
        shown = repr(number)[:40]
        raise InvalidInput(f"parameter sequence_id must be text or a whole number from 0 to 2**64 - 1, not {shown}")
    for key in ("sequence_start", "sequence_end"):
        if not isinstance(parameters.get(key, False), bool):
            raise InvalidInput(f"parameter {key} must be true or false, not {repr(parameters[key])[:40]}")


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _NUMBER_MAX


def budget_of(parameters: Parameters) -> float | None:
    """Seconds from the parameter `timeout` (microseconds; 0 means none)."""
    timeout = parameters.get("timeout")
    return min(timeout / 1e6, _TIMEOUT_MAX) if isinstance(timeout, int) and timeout > 0 else None


def priority_of(parameters: Parameters) -> int | None:
    """The engine's priority, where higher is more urgent, from the parameter `priority`; None without one.

    Clients say 1 for what is most urgent and more for what is less; 0 is the model's default. Here 2 is the engine's
    default, so that 1 is above what says nothing, and from 3 on below.
    """
    priority = parameters.get("priority")
    return max(2 - priority, _PRIORITY_MIN) if isinstance(priority, int) and priority > 0 else None


# --- replies ----------------------------------------------------------------------------------------------------------


def encode_reply(reply: Reply, request: Request, regions: Regions | None = None) -> tuple[bytes, list[Buffer]]:
    """The JSON part of the reply, and the data of its binary tensors in order.

    Raises:
        InvalidInput: the request asks for an output that the model does not have, or for one in an impossible form.
        ValueError: an array is not of its datatype.
    """
    described: list[dict[str, Any]] = []
    binary: list[Buffer] = []
    for output, datatype, array in requested(reply, request):
        description: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": array.shape}
        described.append(description)
        as_bytes = request.binary
        if parameters := output.parameters:
            if REGION in parameters:
                # Nothing more is said of it: Triton's C++ client stops at parameters without binary_data_size.
                place = region_of(output.name, parameters)
                open_regions(regions).write(*place, tensors.to_bytes(datatype, array))
                continue
            as_bytes = parameters.get("binary_data", as_bytes)
            if not isinstance(as_bytes, bool):
                raise InvalidInput(f"output {output.name!r}: binary_data must be true or false, not {as_bytes!r}")
        if as_bytes:
            data = tensors.to_bytes(datatype, array)
            description["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            description["data"] = tensors.to_json(output.name, datatype, array)
    head: dict[str, Any] = {"model_name": reply.model, "model_version": reply.version}
    if request.id:
        head["id"] = request.id
    if reply.parameters:
        head["parameters"] = reply.parameters
    head["outputs"] = described
    return _encode_json(head), binary


def requested(reply: Reply, request: Request) -> Iterator[tuple[RequestOutput, str, Array]]:
    """What the request asks for of the reply, in its order: the output, its datatype, its elements.

    Raises:
        InvalidInput: the request asks for an output that the model does not have, or for one in an impossible form.
        ValueError: an array is not of its datatype.
    """
    if request.outputs is None and reply.specs:
        for name, datatype, _, _ in reply.specs:
            array = reply.outputs.get(name)
            if array is None:
                raise _left_out(name, reply)
            yield RequestOutput(name), datatype, tensors.as_datatype(name, datatype, array)
        return
    datatypes = {spec.name: spec.datatype for spec in reply.specs}
    seen: set[str] = set()
    for output in request.outputs or [RequestOutput(name) for name in (datatypes or reply.outputs)]:
        if output.name in seen:  # a small request must not have an answer of any size
            raise InvalidInput(f"output {output.name!r} is asked for twice")
        seen.add(output.name)
        array = reply.outputs.get(output.name)
        if array is None and output.name in datatypes:
            raise _left_out(output.name, reply)
        if array is None:
            raise InvalidInput(f"output {output.name!r} is unknown; the model gives {_given(reply)}")
        datatype = datatypes.get(output.name) or tensors.datatype_of(array.dtype)
        classes = (output.parameters or {}).get("classification", 0)
        if classes:
            array, datatype = _classify(output.name, array, classes, reply.labels.get(output.name, ())), "BYTES"
        yield output, datatype, tensors.as_datatype(output.name, datatype, array)


def _left_out(name: str, reply: Reply) -> ValueError:
    """The model's own fault."""
    return ValueError(f"output {name!r} is declared, but the model returned {_given(reply)}")


def _given(reply: Reply) -> str:
    return ", ".join(map(repr, reply.outputs)) or "nothing"


def _classify(name: str, array: Array, classes: object, names: abc.Sequence[str]) -> Array:
    """The `classes` largest values as BYTES "value:index" or "value:index:name"; of each row, if there are rows."""
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0 or array.dtype.kind not in "fiu":
        raise InvalidInput(f"output {name!r}: classification takes a number of classes, on numeric outputs")
    rows = array.reshape(array.shape[0], -1) if array.ndim > 1 and array.shape[0] else array.reshape(1, -1)
    count = min(classes, rows.shape[1])
    if count * len(rows) > _CLASSES_MAX:
        raise InvalidInput(f"output {name!r}: at most {_CLASSES_MAX} classes can be named, not {count * len(rows)}")
    best = np.argsort(-rows.astype("f8"), axis=1, kind="stable")[:, :count]
    labels = np.empty(best.shape, object)
    for row, indices in enumerate(best):
        for column, index in enumerate(indices):
            label = b"%f:%d" % (rows[row, index], index)
            labels[row, column] = label + b":" + names[index].encode() if index < len(names) else label
    return labels if array.ndim > 1 else labels.reshape(-1)
