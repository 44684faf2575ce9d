"""The generate extension: JSON with a model's inputs as plain fields, and its outputs as such. Pure.

    {"text_input": "Once", "temperature": 0.5, "id": "7"}  ->  {"model_name": ..., "text_output": "upon", "id": "7"}

A field called like an input is that input's value; what stands in `parameters` counts the same. Every other field is a
parameter of the request. `text_input` stands for the only BYTES input of a model that has none of this name, and
`text_output` for its only BYTES output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from rtml.errors import InvalidInput
from rtml.serving import oip, tensors
from rtml.serving.app import TensorSpec
from rtml.serving.bodies import Buffer

TEXT_INPUT: Final = "text_input"
TEXT_OUTPUT: Final = "text_output"

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


def decode(body: Buffer, specs: Sequence[TensorSpec]) -> oip.Request:
    """The inference request that a generate request is.

    Args:
        body: JSON.
        specs: The model's inputs.

    Raises:
        InvalidInput: it is no such request, or does not fit the model; the message names the field.
    """
    try:
        fields = _decode(body or b"{}")
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"a generate request is a JSON object: {error}") from None
    number = fields.pop("id", "")
    if not isinstance(number, str | int) or isinstance(number, bool):
        raise InvalidInput(f"id must be text, not {repr(number)[:40]}")
    nested = fields.pop("parameters", None)
    if nested is None:
        nested = {}
    if not isinstance(nested, dict):
        raise InvalidInput(f"parameters must be an object, not {repr(nested)[:40]}")
    given = {**nested, **fields}
    alias = _alias(specs, TEXT_INPUT)
    if alias and TEXT_INPUT in given:
        given[alias] = given.pop(TEXT_INPUT)
    by_name = {spec.name: spec for spec in specs}
    arrays = {name: _tensor(by_name[name], value) for name, value in given.items() if name in by_name}
    parameters = {name: value for name, value in given.items() if name not in by_name}
    oip.check_parameters(parameters)
    datatypes = {spec.name: spec.datatype for spec in specs}
    return oip.Request(str(number), oip.fit(arrays, datatypes, specs), parameters)


def encode(reply: oip.Reply, request: oip.Request) -> bytes:
    """The answer, or an event of a stream of answers, as JSON.

    Raises:
        InvalidInput: an output has no JSON form.
        ValueError: an array is not of its datatype.
    """
    answer: dict[str, Any] = {"model_name": reply.model, "model_version": reply.version}
    if request.id:
        answer["id"] = request.id
    alias = _alias(reply.specs, TEXT_OUTPUT)
    for output, datatype, array in oip.requested(reply, request):
        values = tensors.to_json(output.name, datatype, array)
        name = TEXT_OUTPUT if output.name == alias else output.name
        answer[name] = values[0] if len(values) == 1 else values
    return _encode(answer)


def _alias(specs: Sequence[TensorSpec], name: str) -> str:
    """The tensor that `name` stands for; "" if it stands for itself or nothing."""
    texts = [spec.name for spec in specs if spec.datatype == "BYTES"]
    return texts[0] if len(texts) == 1 and all(spec.name != name for spec in specs) else ""


def _tensor(spec: TensorSpec, value: Any) -> tensors.Array:
    """A field's value as a tensor: its own shape, with ones in front of it up to the input's number of dimensions."""
    shape: list[int] = []
    values = [value]
    while values and all(isinstance(inner, list) for inner in values):
        size = len(values[0])
        if any(len(inner) != size for inner in values):
            raise InvalidInput(f"input {spec.name!r}: lists of different lengths are no tensor")
        shape.append(size)
        values = [element for inner in values for element in inner]
        if len(shape) > tensors.RANK_MAX:
            raise InvalidInput(f"input {spec.name!r} is nested too deeply")
    rank = 1 if spec.shape is None else len(spec.shape)
    shape = [1] * (rank - len(shape)) + shape
    return tensors.from_json(spec.name, spec.datatype, shape, _encode(values))
