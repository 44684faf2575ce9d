"""The generate extension: plain JSON fields as tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rtml.errors import InvalidInput
from rtml.serving import generate, oip
from rtml.serving.app import TensorSpec

TEXT = TensorSpec("prompt", "BYTES", (-1, 1))
SPECS = (TEXT, TensorSpec("temperature", "FP32", (1,), True), TensorSpec("ids", "INT64", None, True))


def decode(value: Any) -> oip.Request:
    return generate.decode(json.dumps(value).encode(), SPECS)


def test_fields_become_tensors_and_the_rest_parameters() -> None:
    request = decode({"text_input": "Once", "temperature": 0.5, "ids": [[1, 2], [3, 4]], "id": "7", "max_tokens": 9})
    assert request.inputs["prompt"].tolist() == [[b"Once"]]
    assert request.inputs["temperature"].tolist() == [0.5]
    assert request.inputs["ids"].tolist() == [[1, 2], [3, 4]]
    assert (request.id, request.parameters) == ("7", {"max_tokens": 9})


def test_fields_may_stand_in_parameters_or_have_the_inputs_own_name() -> None:
    request = decode({"prompt": ["a"], "parameters": {"temperature": 1, "priority": 1}, "id": 3})
    assert request.inputs["prompt"].tolist() == [[b"a"]]
    assert request.inputs["temperature"].tolist() == [1.0]
    assert (request.id, request.parameters) == ("3", {"priority": 1})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a generate request is a JSON object"),
        ({}, "input 'prompt' is missing"),
        ({"text_input": 1}, "tensor 'prompt': Expected `str`"),
        ({"text_input": ["a", "b"]}, r"input 'prompt' has shape \[1, 2\]; the model takes \[-1, 1\]"),
        ({"text_input": "a", "ids": [[1], [2, 3]]}, "input 'ids': lists of different lengths are no tensor"),
        ({"text_input": "a", "ids": [[1], 2]}, "tensor 'ids'"),
        ({"text_input": "a", "temperature": {"a": 1}}, "tensor 'temperature'"),
        ({"text_input": "a", "id": True}, "id must be text"),
        ({"text_input": "a", "parameters": [1]}, "parameters must be an object"),
        ({"text_input": "a", "timeout": -1}, "parameter timeout must be"),
    ],
)
def test_requests_that_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        decode(value)


def test_nesting_without_end_is_refused() -> None:
    body = b'{"text_input": ' + b"[" * 200 + b"1" + b"]" * 200 + b"}"
    with pytest.raises(InvalidInput, match="nested too deeply"):
        generate.decode(body, SPECS)
    with pytest.raises(InvalidInput, match="a generate request is a JSON object"):
        generate.decode(b'{"text_input": ' + b"[" * 100_000, SPECS)


def test_outputs_are_plain_fields() -> None:
    specs = (TensorSpec("text", "BYTES", (1,)), TensorSpec("scores", "FP32", (-1,)))
    outputs = {"text": np.array([b"upon"], object), "scores": np.array([1, 2], "f4")}
    reply = oip.Reply("story", "1", outputs, specs)
    found = json.loads(generate.encode(reply, oip.Request("7", {}, {})))
    assert found == {
        "model_name": "story",
        "model_version": "1",
        "id": "7",
        "text_output": "upon",
        "scores": [1.0, 2.0],
    }
