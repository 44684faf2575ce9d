"""The gRPC messages: the same on the wire as those of the public clients, walked and converted right."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from rtml.errors import InvalidInput
from rtml.serving import grpc_codec, grpc_messages, grpc_wire, oip, tensors
from rtml.serving.app import TensorSpec
from rtml.serving.grpc_codec import InferRequest, InferResponse, Received

PROTOS = Path(grpc_messages.__file__).parent / "protos"


# --- the protocol -----------------------------------------------------------------------------------------------------


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    compiled = tmp_path / "messages.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={compiled}"]
    subprocess.run([*command, "health.proto", "inference.proto"], check=True, cwd=PROTOS)
    assert compiled.read_bytes() == (PROTOS / "messages.binpb").read_bytes(), "run `make proto`"


def described(field: Any) -> tuple[Any, ...]:
    kind = field.message_type or field.enum_type
    return field.number, field.type, field.is_repeated, kind.full_name if kind else ""


@pytest.mark.parametrize("file", [service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR], ids=lambda file: file.name)
def test_every_field_is_the_public_ones(file: Any) -> None:
    """Number, type and place; what the public protocol has and we do not is an unknown field, which is skipped."""
    compared = 0
    todo = list(file.message_types_by_name.values())
    while todo:
        theirs = todo.pop()
        try:
            ours = grpc_messages.pool.FindMessageTypeByName(theirs.full_name)
        except KeyError:
            continue
        todo += theirs.nested_types
        for field in ours.fields:
            assert described(field) == described(theirs.fields_by_name[field.name]), field.full_name
            compared += 1
        if file is service_pb2.DESCRIPTOR:
            assert {field.name for field in ours.fields} == {field.name for field in theirs.fields}, theirs.full_name
    assert compared > 90


def test_every_call_is_the_public_ones() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    ours = {method.name: method for method in grpc_messages.methods(grpc_messages.INFERENCE)}
    assert set(ours) == {method.name for method in theirs.methods}
    for method in theirs.methods:
        name, request, response, streams_requests, streams_responses = ours[method.name]
        assert request.DESCRIPTOR.full_name == method.input_type.full_name, name
        assert response.DESCRIPTOR.full_name == method.output_type.full_name
        assert (streams_requests, streams_responses) == (method.client_streaming, method.server_streaming)


# --- on the wire ------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), max_size=4), st.text(max_size=20), st.integers(-(2**63), 2**63 - 1))
def test_raw_contents_are_taken_out_and_nothing_else(raw: list[bytes], name: str, dimension: int) -> None:
    message = InferRequest(model_name=name, id="7", raw_input_contents=raw)
    message.inputs.add(name="x", datatype="FP32", shape=[dimension, 2])
    message.parameters["priority"].uint64_param = 2**64 - 1
    rest, found = grpc_wire.split(message.SerializeToString())
    assert [bytes(data) for data in found] == raw
    message.ClearField("raw_input_contents")
    assert InferRequest.FromString(rest) == message


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_raw_contents_are_put_behind_the_rest(raw: list[bytes]) -> None:
    message = InferResponse(model_name="m", id="7")
    found = InferResponse.FromString(grpc_wire.join(message.SerializeToString(), raw))
    message.raw_output_contents.extend(raw)
    assert found == message


@given(st.binary(max_size=200))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    try:
        rest, _ = grpc_wire.split(data)
    except InvalidInput:
        return
    assert len(rest) <= len(data)


@pytest.mark.parametrize("data", [b"\xff" * 32_000, b"\x3a\xff\xff\xff\xff\x0f" * 4000, b"\x0a\x02\xff\xff" * 8000])
def test_large_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"no inference\.ModelInferRequest|more than 4096 inputs"):
        Received(data)


# --- conversions ------------------------------------------------------------------------------------------------------

VALUES = {
    "BOOL": [True, False, True],
    "UINT8": [0, 7, 255],
    "UINT16": [0, 7, 65535],
    "UINT32": [0, 7, 2**32 - 1],
    "UINT64": [0, 7, 2**64 - 1],
    "INT8": [-128, 0, 127],
    "INT16": [-32768, 0, 32767],
    "INT32": [-(2**31), 0, 2**31 - 1],
    "INT64": [-(2**63), 0, 2**63 - 1],
    "FP16": [-1.5, 0.0, 65504.0],
    "FP32": [-1.5, 0.0, 2.0**100],
    "FP64": [-1.5, 0.0, 1e300],
    "BYTES": [b"", b"a\0b", b"\xff\xfe"],
    "BF16": [-1.5, 0.0, 2.0],
}


def array_of(datatype: str) -> Any:
    return np.array(VALUES[datatype], tensors.DTYPES[datatype])


def asking(datatype: str, shape: list[int], *raw: bytes, **contents: Any) -> Received:
    message = InferRequest(model_name="m", id="9", raw_input_contents=raw)
    tensor = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return Received(message.SerializeToString())


def decode(received: Received, datatype: str, shape: tuple[int, ...] | None = None) -> Any:
    return grpc_codec.decode_request(received, [TensorSpec("x", datatype, shape)])


@pytest.mark.parametrize("datatype", VALUES)
def test_raw_tensors_of_every_datatype(datatype: str) -> None:
    raw = bytes(tensors.to_bytes(datatype, array_of(datatype)))
    request = decode(asking(datatype, [3], raw), datatype)
    assert request.inputs["x"].tolist() == VALUES[datatype]
    assert request.inputs["x"].dtype == tensors.DTYPES[datatype]
    assert request.id == "9"


@pytest.mark.parametrize("datatype", sorted(set(VALUES) - {"FP16", "BF16"}))
def test_typed_contents_of_every_datatype_that_has_them(datatype: str) -> None:
    contents = {grpc_codec.CONTENTS[datatype]: VALUES[datatype]}
    request = decode(asking(datatype, [3, 1], **contents), datatype, (-1, 1))
    assert request.inputs["x"].ravel().tolist() == VALUES[datatype]
    assert request.inputs["x"].dtype == tensors.DTYPES[datatype]
    assert request.inputs["x"].shape == (3, 1)


@pytest.mark.parametrize("datatype", VALUES)
def test_replies_are_raw(datatype: str) -> None:
    reply = oip.Reply("m", "3", {"y": array_of(datatype)}, [TensorSpec("y", datatype, (3,))])
    response, raw = grpc_codec.encode_reply(reply, oip.Request("9", {}, {}))
    found = InferResponse.FromString(grpc_wire.join(response.SerializeToString(), raw))
    assert (found.model_name, found.model_version, found.id) == ("m", "3", "9")
    (output,) = found.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", datatype, [3])
    assert tensors.from_bytes("y", datatype, [3], found.raw_output_contents[0]).tolist() == VALUES[datatype]


def test_large_tensors_are_not_copied() -> None:
    data = np.arange(50_000, dtype="<f4")
    message = InferRequest(model_name="m", raw_input_contents=[data.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[50_000])
    sent = message.SerializeToString()
    array = decode(Received(sent), "FP32").inputs["x"]
    assert np.shares_memory(array, np.frombuffer(sent, "u1"))
    assert (array == data).all()


@pytest.mark.parametrize(
    ("received", "text"),
    [
        (asking("FP32", [2], fp32_contents=[1]), r"has 1 elements; its shape \[2\] takes 2"),
        (asking("FP32", [1], int_contents=[1]), "belong into fp32_contents, not int_contents"),
        (asking("FP16", [1], fp32_contents=[1]), "FP16 has no typed contents"),
        (asking("INT8", [1], int_contents=[200]), "outside of INT8: -128 to 127"),
        (asking("FP32", [1], struct.pack("<f", 1), fp32_contents=[1]), "both contents and raw_input_contents"),
        (asking("FP32", [1], b"abcd", b"abcd"), "2 entries for 1 inputs"),
        (asking("FP32", [2], b"abcd"), "brings 4 bytes"),
        (asking("FP32", [-1], b"abcd"), "negative dimension"),
        (asking("FP32", [2**62, 2**62], b"abcd"), "impossible shape"),
        (asking("FP99", [1], b"abcd"), "unknown datatype"),
        (asking("BYTES", [1], b"\xff\xff\xff\x7fa"), "reaches beyond the data"),
        (asking("INT64", [1], b"abcdefgh"), "is INT64; the model takes FP32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_lie_are_refused_by_name(received: Received, text: str) -> None:
    with pytest.raises(InvalidInput, match=text) as caught:
        decode(received, "FP32")
    assert "x" in str(caught.value) or "raw_input_contents" in str(caught.value)


def test_parameters_there_and_back() -> None:
    parameters: oip.Parameters = {"a": True, "b": -5, "c": 2**64 - 1, "d": 1.5, "e": "text", "f": 0}
    message = InferResponse()
    grpc_codec.write_parameters(message.parameters, {**parameters, "nothing": None})
    assert grpc_codec.read_parameters(message.parameters) == parameters
    assert isinstance(grpc_codec.read_parameters(message.parameters)["a"], bool)


def test_impossible_parameters_are_refused() -> None:
    message = InferRequest(model_name="m")
    message.parameters["timeout"].string_param = "soon"
    with pytest.raises(InvalidInput, match="timeout"):
        grpc_codec.decode_request(Received(message.SerializeToString()), [])
