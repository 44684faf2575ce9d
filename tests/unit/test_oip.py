"""Requests and replies of the Open Inference Protocol, as bytes."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from rtml.errors import InvalidInput
from rtml.serving import descriptions, oip
from rtml.serving.app import TensorSpec

ROWS = [TensorSpec("x", "FP32", (-1, 2))]
PAIR = [TensorSpec("a", "INT64", (2,)), TensorSpec("b", "BYTES", (-1,))]


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": inputs, **more}).encode()


def tensor(name: str = "x", datatype: str = "FP32", shape: Any = (1, 2), **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


def test_a_json_request() -> None:
    raw = body(tensor(data=[1, 2]), id="7", parameters={"timeout": 1500, "priority": 1}, outputs=[{"name": "y"}])
    request = oip.decode_request(raw, None, ROWS)
    assert request.id == "7"
    assert request.inputs["x"].tolist() == [[1, 2]]
    assert request.outputs == [oip.RequestOutput("y")]
    assert oip.budget_of(request.parameters) == pytest.approx(0.0015)
    assert request.binary is False


@pytest.mark.parametrize("extra", [{}, {"id": None}, {"id": "", "outputs": [], "unheard_of": [1]}])
def test_what_may_be_left_out(extra: dict[str, Any]) -> None:
    request = oip.decode_request(body(tensor(data=[[1, 2]]), **extra), None, ROWS)
    assert (request.id, request.outputs, oip.budget_of(request.parameters)) == ("", None, None)


def test_binary_and_json_tensors_in_one_request() -> None:
    head = body(
        tensor("b", "BYTES", [2], parameters={"binary_data_size": 11}),
        tensor("a", "INT64", [2], data=[1, 2]),
        parameters={"binary_data_output": True},
    )
    data = b"\x03\0\0\0a\0b\x00\x00\x00\x00"
    request = oip.decode_request(head + data, len(head), PAIR)
    assert list(request.inputs) == ["a", "b"]  # the model's order
    assert request.inputs["b"].tolist() == [b"a\0b", b""]
    assert request.binary is True


def test_binary_tensors_lie_in_the_order_of_the_json() -> None:
    specs = [TensorSpec("p", "FP32", (1,)), TensorSpec("q", "FP32", (1,))]
    size = {"binary_data_size": 4}
    head = body(tensor("q", shape=[1], parameters=size), tensor("p", shape=[1], parameters=size))
    request = oip.decode_request(head + struct.pack("<2f", 1, 2), len(head), specs)
    assert (request.inputs["p"][0], request.inputs["q"][0]) == (2, 1)


@pytest.mark.parametrize(
    ("spec", "raw", "shape"),
    [
        (TensorSpec("x", "FP32", (2,)), b"12345678", (2,)),
        (TensorSpec("x", "FP32", (-1, 2)), b"12345678" * 3, (3, 2)),
        (TensorSpec("x", "UINT8", (-1, -1)), b"12345678", (1, 8)),
        (TensorSpec("x", "BF16", (-1,)), b"1234", (2,)),
    ],
)
def test_a_raw_request_is_the_only_input(spec: TensorSpec, raw: bytes, shape: tuple[int, ...]) -> None:
    request = oip.decode_request(raw, 0, [spec])
    assert request.inputs["x"].shape == shape
    assert request.binary is True


def test_a_raw_request_of_bytes_is_one_element() -> None:
    request = oip.decode_request(b"\xff\0any", 0, [TensorSpec("x", "BYTES", (-1, 1))])
    assert request.inputs["x"].tolist() == [[b"\xff\0any"]]


@pytest.mark.parametrize(
    ("specs", "raw", "message"),
    [
        (PAIR, b"", "needs a model with one input; this one has 2"),
        ([TensorSpec("x", "FP32", (-1, -1, -1))], b"1234", "more than one dimension"),
        (ROWS, b"12345", "no whole number of FP32 rows"),
        ([TensorSpec("x", "FP32", (2,))], b"12345", "brings 5 bytes"),
        ([TensorSpec("x", "FP32", (-1, 0))], b"1234", "no whole number"),
    ],
)
def test_raw_requests_that_do_not_fit(specs: list[TensorSpec], raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        oip.decode_request(raw, 0, specs)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an inference request"),
        (b"[]", "not an inference request: Expected `object`"),
        (b"[" * 100_000, "not an inference request"),
        (b'{"inputs":' + b"[" * 100_000, "not an inference request"),
        (
            b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": ' + b"[" * 100_000,
            "not an inference",
        ),
        (b'{"id": "\xff", "inputs": []}', "not an inference request: 'utf-8' codec"),
        (
            b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "BYTES", "data": ["\xff", "a"]}]}',
            "'x': 'utf-8' codec",
        ),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": [{"name": "x"}]}', "missing required field `shape`"),
        (body(tensor(shape=[1.5], data=[1])), "Expected `int`, got `float`"),
        (body(), "input 'x' is missing; the model takes 'x'"),
        (body(tensor()), "neither data nor binary_data_size"),
        (body(tensor(data=None)), "Expected `array`, got `null`"),
        (body(tensor(data=[1, 2]), tensor(data=[1, 2])), "'x' is given twice"),
        (body(tensor(data=[1, 2]), tensor("y", data=[1, 2])), "input 'y' is unknown"),
        (body(tensor(datatype="FP64", data=[1, 2])), "is FP64; the model takes FP32"),
        (body(tensor(shape=[1, 3], data=[1, 2, 3])), "shape \\[1, 3\\]; the model takes \\[-1, 2\\]"),
        (body(tensor(shape=[2], data=[1, 2])), "shape \\[2\\]; the model takes"),
        (body(tensor(data=[1, 2], parameters={"binary_data_size": 8})), "both data and binary_data_size"),
        (body(tensor(parameters={"binary_data_size": 8})), "only 0 bytes are left"),
        (body(tensor(parameters={"binary_data_size": -1})), "must be a number of bytes, not -1"),
        (body(tensor(parameters={"binary_data_size": True})), "must be a number of bytes, not True"),
        (body(tensor(data=[1, 2]), parameters={"timeout": -1}), "parameter timeout"),
        (body(tensor(data=[1, 2]), parameters={"timeout": "soon"}), "parameter timeout"),
        (body(tensor(data=[1, 2]), parameters={"priority": 1.5}), "parameter priority"),
        (body(tensor(data=[1, 2]), parameters={"binary_data_output": 1}), "parameter binary_data_output"),
    ],
)
def test_requests_that_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        oip.decode_request(raw, None, ROWS)


def test_the_header_must_end_within_the_body() -> None:
    raw = body(tensor(data=[1, 2]))
    with pytest.raises(InvalidInput, match="has only"):
        oip.decode_request(raw, len(raw) + 1, ROWS)
    with pytest.raises(InvalidInput, match="1 bytes of the body belong to no tensor"):
        oip.decode_request(raw + b"x", len(raw), ROWS)
    with pytest.raises(InvalidInput, match="not an inference request"):
        oip.decode_request(raw, len(raw) - 1, ROWS)


@pytest.mark.parametrize("text", ["", "-1", "1.0", "x", "٣", "9" * 16, "+1", " 1"])
def test_header_lengths_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        oip.parse_header_length(text)


def test_header_lengths() -> None:
    assert oip.parse_header_length(None) is None
    assert oip.parse_header_length("120") == 120


# --- replies ----------------------------------------------------------------------------------------------------------


def reply(**outputs: Any) -> oip.Reply:
    specs = [TensorSpec(name, "FP32", (-1,)) for name in outputs]
    return oip.Reply("m", "1", {name: np.array(value, "f4") for name, value in outputs.items()}, specs)


def wants(*outputs: oip.RequestOutput, binary: bool = False, id: str = "") -> oip.Request:
    return oip.Request(id, {}, {}, list(outputs) or None, binary)


def test_a_json_reply() -> None:
    head, data = oip.encode_reply(reply(y=[[1, 2]]), wants(id="7"))
    assert data == []
    assert json.loads(head) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}],
    }


def test_no_id_and_no_parameters_unless_there_are_some() -> None:
    answer = reply(y=[1])
    assert set(json.loads(oip.encode_reply(answer, wants())[0])) == {"model_name", "model_version", "outputs"}
    answer.parameters = {"deadline_outcome": "met"}
    assert json.loads(oip.encode_reply(answer, wants())[0])["parameters"] == {"deadline_outcome": "met"}


def test_the_outputs_choice_of_form_beats_the_requests() -> None:
    ask = wants(oip.RequestOutput("b", {"binary_data": False}), oip.RequestOutput("a"), binary=True)
    head, data = oip.encode_reply(reply(a=[1], b=[2], c=[3]), ask)
    outputs = json.loads(head)["outputs"]
    assert [output["name"] for output in outputs] == ["b", "a"]
    assert outputs[0]["data"] == [2]
    assert "parameters" not in outputs[0]
    assert outputs[1]["parameters"] == {"binary_data_size": 4}
    assert [bytes(part) for part in data] == [struct.pack("<f", 1)]


def test_a_raw_request_and_its_reply_can_be_read_by_the_rules_of_the_extension() -> None:
    request = oip.decode_request(struct.pack("<4f", 1, 2, 3, 4), 0, ROWS)
    head, data = oip.encode_reply(reply(y=request.inputs["x"] * 2, z=[9]), request)
    rest = b"".join(bytes(part) for part in data)
    for output in json.loads(head)["outputs"]:
        size = output["parameters"]["binary_data_size"]
        array, rest = np.frombuffer(rest[:size], "f4").reshape(output["shape"]), rest[size:]
        assert array.tolist() == {"y": [[2, 4], [6, 8]], "z": [9]}[output["name"]]
    assert rest == b""


def test_classification_names_the_largest() -> None:
    ask = wants(oip.RequestOutput("y", {"classification": 2}))
    head, _ = oip.encode_reply(reply(y=[[0.1, 0.5, 0.2], [3, 1, 2]]), ask)
    (output,) = json.loads(head)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["0.500000:1", "0.200000:2", "3.000000:0", "2.000000:2"]
    head, _ = oip.encode_reply(reply(y=[1, 5]), wants(oip.RequestOutput("y", {"classification": 9})))
    assert json.loads(head)["outputs"][0]["data"] == ["5.000000:1", "1.000000:0"]


def test_classes_have_names_where_the_model_knows_them() -> None:
    found = reply(y=[[0.1, 0.5, 0.2]])
    found.labels = {"y": ["cat", "döner"]}
    head, _ = oip.encode_reply(found, wants(oip.RequestOutput("y", {"classification": 3})))
    assert json.loads(head)["outputs"][0]["data"] == ["0.500000:1:döner", "0.200000:2", "0.100000:0:cat"]


@pytest.mark.parametrize("classes", [-1, True, "x"])
def test_classification_takes_a_number(classes: Any) -> None:
    with pytest.raises(InvalidInput, match="classification"):
        oip.encode_reply(reply(y=[1]), wants(oip.RequestOutput("y", {"classification": classes})))


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(InvalidInput, match="output 'q' is unknown; the model gives 'y'"):
        oip.encode_reply(reply(y=[1]), wants(oip.RequestOutput("q")))


def test_an_output_that_the_model_left_out_is_its_own_fault() -> None:
    lacking = reply(z=[1])
    lacking.specs = (TensorSpec("y", "FP32", (1,)),)
    with pytest.raises(ValueError, match="output 'y' is declared, but the model returned 'z'") as caught:
        oip.encode_reply(lacking, wants())
    assert not isinstance(caught.value, InvalidInput)


def test_without_specs_the_arrays_say_their_datatype() -> None:
    answer = oip.Reply("m", "1", {"y": np.array([1], "i2"), "s": np.array(["ab"])}, [])
    outputs = json.loads(oip.encode_reply(answer, wants())[0])["outputs"]
    assert [(output["name"], output["datatype"]) for output in outputs] == [("y", "INT16"), ("s", "BYTES")]


def test_an_array_that_is_not_of_the_declared_datatype_is_converted() -> None:
    answer = oip.Reply("m", "1", {"y": np.array([1.5], "f8")}, [TensorSpec("y", "FP32", (-1,))])
    _, data = oip.encode_reply(answer, wants(binary=True))
    assert bytes(data[0]) == struct.pack("<f", 1.5)


# --- descriptions -----------------------------------------------------------------------------------------------------


def test_the_configuration_leaves_the_batch_dimension_out() -> None:
    outputs = [TensorSpec("y", "BYTES", (-1, 1))]
    config = descriptions.describe_config("m", "onnx", 8, ROWS, outputs)
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_STRING", "dims": [1]}]
    assert config["dynamic_batching"] == {}
    flat = descriptions.describe_config("m", "onnx", 8, [TensorSpec("x", "INT64", (-1,))], outputs)
    assert (flat["max_batch_size"], flat["input"][0]["dims"], "dynamic_batching" in flat) == (0, [-1], False)
    unbatched = descriptions.describe_config("m", "onnx", 0, ROWS, outputs)
    assert unbatched["input"][0]["dims"] == [-1, 2]
    assert "dynamic_batching" not in unbatched


def test_the_metadata_keeps_it() -> None:
    assert descriptions.describe_model("m", "1", "onnx", ROWS, [])["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]}
    ]


def test_a_model_may_leave_the_rank_open() -> None:
    specs = [TensorSpec("x", "FP32", None)]
    assert oip.decode_request(body(tensor(shape=[1, 1, 2], data=[1, 2])), None, specs).inputs["x"].shape == (1, 1, 2)
    assert oip.decode_request(b"12345678", 0, specs).inputs["x"].shape == (2,)
    assert descriptions.describe_model("m", "1", "", specs, [])["inputs"][0]["shape"] == [-1]
