"""Inference requests whose JSON came before, byte for byte: clients that send binary tensors repeat it.

What such a request says was read and checked once (`rtml.serving.oip`); of the next ones only the tensors differ, which
lie where they lay. So is the JSON of their answers the same as long as shapes are. Nothing here reads JSON in another
way than `oip` does: what is not remembered is left to it.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np

from rtml.serving import oip, tensors
from rtml.serving.registry import ModelVersion
from rtml.serving.tensors import Array, Buffer

#: Forms that are remembered of a model's requests, and answers' heads of a form; bytes of the former's JSON.
_FORMS_MAX: Final = 64
_HEADS_MAX: Final = 64
_JSON_MAX: Final = 2048
#: Bytes of an answer's tensor that are copied behind its head.
_COPIED_MAX: Final = 64 * 1024
#: Their bytes are not their elements.
_OTHERS: Final = frozenset({"BYTES", "BF16", "BOOL"})

_decode_head = msgspec.json.Decoder(oip.RequestHead).decode


class Form:
    """What the JSON of requests to a model says.

    Args:
        model: Whose.
        head: As the JSON says it.
        request: A request with this head, decoded.
        length: Bytes of the JSON.
    """

    __slots__ = ("_heads", "_inputs", "_outputs", "_parameters", "_request", "model", "size")

    def __init__(self, model: ModelVersion, head: oip.RequestHead, request: oip.Request, length: int) -> None:
        self.model = model
        places: dict[str, int] = {}
        position = length
        for tensor in head.inputs:
            places[tensor.name] = position
            position += (tensor.parameters or {})["binary_data_size"]
        #: Bytes of a whole body.
        self.size = position
        #: Name, type, number of elements, place in the body, shape.
        self._inputs = [
            (name, array.dtype, math.prod(array.shape), places[name], array.shape)
            for name, array in request.inputs.items()
        ]
        self._parameters = request.parameters
        self._request = request.outputs, request.binary
        plain = request.binary and request.outputs is None and bool(model.outputs)
        #: Name and type of what is answered in binary; empty: something else is.
        self._outputs = (
            [(spec.name, tensors.DTYPES[spec.datatype]) for spec in model.outputs]
            if plain and all(spec.datatype not in _OTHERS for spec in model.outputs)
            else []
        )
        #: The JSON of an answer, with its length as text, by the shapes of its outputs.
        self._heads: dict[tuple[tuple[int, ...], ...], tuple[bytes, str]] = {}

    def request(self, body: bytes) -> oip.Request:
        """The request whose body this is. Its arrays are views of it."""
        arrays: dict[str, Array] = {}
        for name, dtype, count, place, shape in self._inputs:
            arrays[name] = np.frombuffer(body, dtype, count, place).reshape(shape)
        return oip.Request("", arrays, self._parameters, *self._request)

    def answer(self, reply: oip.Reply) -> tuple[bytes, str] | None:
        """The whole body of the answer, and the length of its JSON as text; None: let `oip` make it."""
        if reply.parameters is not None or not self._outputs or reply.version != self.model.version:
            return None
        found = reply.outputs
        shapes: tuple[tuple[int, ...], ...] = ()
        data = b""
        for name, dtype in self._outputs:
            array = found.get(name)
            if array is None or array.dtype != dtype or array.nbytes > _COPIED_MAX:
                return None
            shapes += (array.shape,)
            data += array.tobytes()
        head = self._heads.get(shapes)
        if head is None:
            made, _ = oip.encode_reply(reply, oip.Request("", {}, self._parameters, *self._request))
            if len(self._heads) >= _HEADS_MAX:
                del self._heads[next(iter(self._heads))]
            head = self._heads[shapes] = made, str(len(made))
        return head[0] + data, head[1]


class Forms:
    """The forms of the requests that come to one path."""

    def __init__(self) -> None:
        self._forms: dict[bytes, Form] = {}
        #: JSON that came once: what comes once more is remembered.
        self._before = b""

    def __len__(self) -> int:
        return len(self._forms)

    def find(self, body: Buffer, length: int, model: ModelVersion) -> Form | None:
        """What is known of a request by its JSON, the first `length` bytes of its body."""
        if body.__class__ is not bytes:
            return None
        form = self._forms.get(body[:length])
        return form if form is not None and form.model is model and form.size == len(body) else None

    def learn(self, body: Buffer, length: int, model: ModelVersion, request: oip.Request) -> None:
        """Remember the form of a request that `oip` has decoded, if it is one whose JSON says all but the elements."""
        if length > _JSON_MAX or request.id or model.decoupled or model.stateful is not None or request.wishes:
            return
        head = bytes(body[:length])
        if head != self._before:
            self._before = head
            return
        read = _decode_head(head)
        for tensor in read.inputs:
            if tensor.data or tensor.datatype in _OTHERS or "binary_data_size" not in (tensor.parameters or {}):
                return
        if not all(array.size for array in request.inputs.values()):
            return
        if len(self._forms) >= _FORMS_MAX:
            del self._forms[next(iter(self._forms))]
        self._forms[head] = Form(model, read, request, length)
