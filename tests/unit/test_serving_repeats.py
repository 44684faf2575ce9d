"""Requests whose JSON came before: they are read, and answered, as `oip` does it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.metrics import GatewayMetrics
from rtml.serving import oip
from rtml.serving.app import App, TensorSpec
from rtml.serving.registry import ModelVersion, of_app
from rtml.serving.repeats import Form, Forms
from tests.integration.gateways import InlineEngine

INPUTS = [
    TensorSpec("a", "FP32", (-1, 2)),
    TensorSpec("b", "INT64", (2,)),
    TensorSpec("c", "BOOL", (1,), optional=True),
]
OUTPUTS = [TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "INT64", (2,))]


@rtml.task
def nothing() -> None:
    pass


@pytest.fixture
def model() -> ModelVersion:
    app = App("demo")
    app.model("m", nothing, inputs=INPUTS, outputs=OUTPUTS, version="3")
    return of_app(InlineEngine(), GatewayMetrics().target("demo", "m"), "demo", app.models["m"])


def tensor(name: str, datatype: str, shape: list[int], size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}, **more}


def head(rows: int = 1, **more: Any) -> bytes:
    inputs = [tensor("b", "INT64", [2], 16), tensor("a", "FP32", [rows, 2], 8 * rows)]
    return json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}, **more}).encode()


def data(rows: int = 1, first: int = 1) -> bytes:
    a = np.arange(first, first + 2 * rows, dtype=np.float32)
    return np.array([first, 7], np.int64).tobytes() + a.tobytes()


def learned(model: ModelVersion, text: bytes, elements: bytes) -> Form | None:
    forms = Forms()
    for _ in range(2):
        forms.learn(text + elements, len(text), model, oip.decode_request(text + elements, len(text), model.inputs))
    return forms.find(text + elements, len(text), model)


def same(found: oip.Request, expected: oip.Request) -> None:
    assert list(found.inputs) == list(expected.inputs)
    for name, array in expected.inputs.items():
        assert found.inputs[name].dtype == array.dtype
        assert found.inputs[name].shape == array.shape
        assert found.inputs[name].tolist() == array.tolist()
    assert (found.id, found.parameters, found.outputs, found.binary) == (
        expected.id, expected.parameters, expected.outputs, expected.binary,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
def test_what_repeats_is_read_as_it_was_the_first_time(model: ModelVersion, rows: int) -> None:
    text = head(rows)
    form = learned(model, text, data(rows))
    assert form is not None
    for first in (1, 50):
        body = text + data(rows, first)
        same(form.request(body), oip.decode_request(body, len(text), model.inputs))


def test_answers_are_the_same_bytes(model: ModelVersion) -> None:
    text = head()
    form = learned(model, text, data())
    assert form is not None
    request = form.request(text + data())
    for rows in (1, 2, 1, 0):
        outputs: dict[str, Any] = {
            "z": np.array([rows, 5]),
            "y": np.full((2, rows), 0.5, np.float32).T,
            "more": np.zeros(1),
        }
        reply = oip.Reply("m", "3", outputs, model.outputs)
        made, parts = oip.encode_reply(reply, request)
        assert form.answer(reply) == (made + b"".join(map(bytes, parts)), str(len(made)))


def test_unusual_answers_are_left_to_others(model: ModelVersion) -> None:
    form = learned(model, head(), data())
    assert form is not None
    good: dict[str, Any] = {"y": np.zeros((1, 2), np.float32), "z": np.zeros(2, np.int64)}
    assert form.answer(oip.Reply("m", "3", good, model.outputs)) is not None
    assert form.answer(oip.Reply("m", "3", good, model.outputs, {"deadline_outcome": "met"})) is None
    assert form.answer(oip.Reply("m", "2", good, model.outputs)) is None
    assert form.answer(oip.Reply("m", "3", {"y": good["y"]}, model.outputs)) is None
    assert form.answer(oip.Reply("m", "3", {**good, "z": np.zeros(2, np.int32)}, model.outputs)) is None
    json_form = learned(model, head(parameters={}), data())
    assert json_form is not None
    assert json_form.answer(oip.Reply("m", "3", good, model.outputs)) is None


def test_it_is_learned_when_it_comes_again_and_known_by_all_of_it(model: ModelVersion) -> None:
    forms, text = Forms(), head()
    body = text + data()
    request = oip.decode_request(body, len(text), model.inputs)
    forms.learn(body, len(text), model, request)
    assert forms.find(body, len(text), model) is None
    forms.learn(body, len(text), model, request)
    assert forms.find(body, len(text), model) is not None
    assert forms.find(body + b"x", len(text), model) is None
    assert forms.find(body[:-1], len(text), model) is None
    assert forms.find(body, len(text) - 1, model) is None
    assert forms.find(memoryview(body), len(text), model) is None
    other = App("demo")
    other.model("m", nothing, inputs=INPUTS, outputs=OUTPUTS, version="3")
    newer = of_app(InlineEngine(), model.target, "demo", other.models["m"])
    assert forms.find(body, len(text), newer) is None


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        (head(id="5"), data()),
        (head(parameters={"timeout": 5}), data()),
        (head(3000, unheard_of="x" * 3000), data(3000)),
        (head(0), data(0)),
        (
            json.dumps({"inputs": [tensor("b", "INT64", [2], 16), {"name": "a", "datatype": "FP32", "shape": [1, 2],
                                                                   "data": [1, 2]}]}).encode(),
            bytes(16),
        ),
        (
            json.dumps({"inputs": [tensor("b", "INT64", [2], 16), tensor("a", "FP32", [1, 2], 8),
                                   tensor("c", "BOOL", [1], 1)]}).encode(),
            bytes(24) + b"\x02",
        ),
    ],
)  # fmt: skip
def test_what_says_more_is_read_each_time(model: ModelVersion, text: bytes, elements: bytes) -> None:
    assert learned(model, text, elements) is None
    forms = Forms()
    for number in range(1000):
        text = head(unheard_of=number)
        request = oip.decode_request(text + data(), len(text), model.inputs)
        for _ in range(2):
            forms.learn(text + data(), len(text), model, request)
    assert len(forms) <= 64
