"""Inference messages of gRPC <-> what the gateway works with (`oip.Request`, `oip.Reply`).

Elements come in one of two ways for all tensors of a request: raw, which is what Triton's clients send, or as typed
contents; replies are always raw. The checks are those of the REST side (`rtml.serving.oip`, `tensors`): a tensor that
lies is an `InvalidInput` that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from rtml.errors import InvalidInput
from rtml.serving import grpc_wire, oip, tensors
from rtml.serving.app import TensorSpec
from rtml.serving.grpc_messages import Message, message
from rtml.serving.oip import Parameters
from rtml.serving.tensors import Array, Buffer

InferRequest: Final = message("inference.ModelInferRequest")
InferResponse: Final = message("inference.ModelInferResponse")
_InferParameter: Final = message("inference.InferParameter")

#: Datatype -> the field of `InferTensorContents` with its elements; those without one travel raw only.
CONTENTS: Final = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
#: Below this, two copies cost less than walking the message.
_SPLIT_FROM: Final = 16 * 1024
_INT64_MAX: Final = 2**63 - 1


class Received:
    """A `ModelInferRequest` as it came.

    Args:
        data: Serialised.

    Raises:
        InvalidInput: it is no such message.
    """

    __slots__ = ("message", "raw")

    def __init__(self, data: bytes) -> None:
        self.raw: Sequence[Buffer] | None = None
        if len(data) >= _SPLIT_FROM:
            data, self.raw = grpc_wire.split(data)
        try:
            #: Without its raw contents.
            self.message = InferRequest.FromString(data)
        except DecodeError:
            raise InvalidInput("the message is no inference.ModelInferRequest") from None
        #: In the order of its inputs.
        self.raw = self.message.raw_input_contents if self.raw is None else self.raw


def decode_request(received: Received, specs: Sequence[TensorSpec], regions: oip.Regions | None = None) -> oip.Request:
    """The request, checked against the model's inputs.

    Args:
        received: The message. Arrays of large raw tensors are views of it.
        specs: The model's inputs.
        regions: Where tensors may lie that are not in the message; None: nowhere.

    Raises:
        InvalidInput: it does not fit the model; the message names the tensor.
    """
    sent, raw = received.message, received.raw
    places = [read_parameters(tensor.parameters) if tensor.parameters else {} for tensor in sent.inputs]
    within = sum(oip.REGION not in place for place in places)
    if raw and len(raw) != within:
        raise InvalidInput(
            f"raw_input_contents has {len(raw)} entries for {within} inputs; one for each that is in the message, "
            "or none at all"
        )
    following = iter(raw or ())
    arrays: dict[str, Array] = {}
    datatypes: dict[str, str] = {}
    for place, tensor in zip(places, sent.inputs):
        name, datatype = tensor.name, tensor.datatype
        shape = list(tensor.shape[: tensors.RANK_MAX + 1])  # enough to be refused
        if name in arrays:
            raise InvalidInput(f"tensor {name!r} is given twice")
        if oip.REGION in place:
            shared = oip.open_regions(regions).read(*oip.region_of(name, place))
            arrays[name] = tensors.from_bytes(name, datatype, shape, shared)
        elif raw:
            if tensor.HasField("contents"):
                raise InvalidInput(f"tensor {name!r} has both contents and raw_input_contents")
            arrays[name] = tensors.from_bytes(name, datatype, shape, next(following))
        else:
            arrays[name] = _from_contents(name, datatype, shape, tensor.contents)
        datatypes[name] = datatype
    parameters = read_parameters(sent.parameters)
    oip.check_parameters(parameters)
    outputs = [oip.RequestOutput(output.name, read_parameters(output.parameters)) for output in sent.outputs]
    return oip.Request(sent.id, oip.fit(arrays, datatypes, specs), parameters, outputs or None, binary=True)


def _from_contents(name: str, datatype: str, shape: list[int], contents: Message) -> Array:
    """The array in typed contents."""
    dtype = tensors.dtype_of(name, datatype)
    count = tensors.check_shape(name, shape)
    field = CONTENTS.get(datatype)
    if field is None:
        raise InvalidInput(f"tensor {name!r}: {datatype} has no typed contents, send it in raw_input_contents")
    strange = [other.name for other, _ in contents.ListFields() if other.name != field]
    if strange:
        raise InvalidInput(f"tensor {name!r} is {datatype}; its elements belong into {field}, not {strange[0]}")
    values = getattr(contents, field)
    if len(values) != count:
        raise InvalidInput(f"tensor {name!r} has {len(values)} elements; its shape {shape} takes {count}")
    if datatype == "BYTES":
        array: Array = np.empty(count, object)
        array[:] = list(values)
        return array.reshape(shape)
    try:
        return np.array(values, dtype).reshape(shape)
    except OverflowError:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        raise InvalidInput(f"tensor {name!r} has an element outside of {datatype}: {low} to {high}") from None


def read_parameters(entries: Mapping[str, Message]) -> Parameters:
    """Parameters of a message by name; one without a value is None."""
    found: Parameters = {}
    for name, value in entries.items():
        choice = value.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(value, choice)
    return found


def write_parameters(entries: Any, parameters: Parameters) -> None:
    """Put parameters into a message's map: lists and the like as JSON text, those without a value not at all."""
    for name, value in parameters.items():
        if isinstance(value, bool):
            entries[name].bool_param = value
        elif isinstance(value, int):
            setattr(entries[name], "int64_param" if value <= _INT64_MAX else "uint64_param", value)
        elif isinstance(value, float):
            entries[name].double_param = value
        elif isinstance(value, str):
            entries[name].string_param = value
        elif value is not None:
            entries[name].string_param = msgspec.json.encode(value).decode()


def encode_reply(
    reply: oip.Reply, request: oip.Request, regions: oip.Regions | None = None
) -> tuple[Message, list[Buffer]]:
    """The reply without its raw contents, and these in order; of an output in shared memory they are empty.

    Raises:
        InvalidInput: the request asks for an output that the model does not have, or for one in an impossible form.
        ValueError: an array is not of its datatype.
    """
    response = InferResponse(model_name=reply.model, model_version=reply.version, id=request.id)
    if reply.parameters:
        write_parameters(response.parameters, reply.parameters)
    raw: list[Buffer] = []
    for output, datatype, array in oip.requested(reply, request):
        response.outputs.add(name=output.name, datatype=datatype, shape=array.shape)
        data = tensors.to_bytes(datatype, array)
        if output.parameters and oip.REGION in output.parameters:
            oip.open_regions(regions).write(*oip.region_of(output.name, output.parameters), data)
            data = b""
        raw.append(data)
    return response, raw
