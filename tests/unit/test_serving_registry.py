"""The registry: which version a request means, and what the index says."""

from __future__ import annotations

import pytest

import rtml
from rtml.metrics import GatewayMetrics
from rtml.serving.app import App, TensorSpec
from rtml.serving.http import HttpError
from rtml.serving.registry import ModelVersion, Registry, of_app
from tests.integration.gateways import InlineEngine


@rtml.task
def double(x: object) -> object:
    return x


def version(number: str, name: str = "m") -> ModelVersion:
    app = App("demo")
    spec = TensorSpec("x", "FP32", (-1, 4))
    app.model(name, double, inputs=[spec], outputs=[spec], version=number, deadline=2.0)
    return of_app(InlineEngine(), GatewayMetrics().target("demo", name), "demo", app.models[name])


def test_the_highest_number_is_what_a_request_without_a_version_means() -> None:
    registry = Registry()
    for number in ("9", "10", "beta", "2"):
        registry.add(version(number))
    assert registry.find("m").version == "10"
    assert registry.find("m", "beta").version == "beta"
    assert registry.versions("m") == ["beta", "2", "9", "10"]
    registry.remove("m", "10")
    assert registry.find("m").version == "9"


def test_what_is_not_there_is_said_with_what_is() -> None:
    registry = Registry()
    registry.add(version("1"))
    with pytest.raises(HttpError, match="model 'm' has no version '3', only 1") as missing:
        registry.find("m", "3")
    assert missing.value.status == 404
    with pytest.raises(HttpError, match="there is no model 'n'") as unknown:
        registry.find("n")
    assert unknown.value.status == 404


def test_what_is_not_ready_is_said_with_its_reason() -> None:
    registry = Registry()
    registry.mark("m", "2", "UNAVAILABLE", "it is no ONNX model")
    for number in (None, "2"):
        with pytest.raises(HttpError, match="is UNAVAILABLE: it is no ONNX model") as error:
            registry.find("m", number)
        assert error.value.status == 503
    registry.mark("m", "3", "LOADING")
    with pytest.raises(HttpError, match="model 'm' is LOADING: try again"):
        registry.find("m")


def test_a_broken_newer_file_leaves_what_is_served_ready() -> None:
    registry = Registry()
    registry.add(version("1"))
    registry.mark("m", "1", "UNAVAILABLE", "the file has changed, and is broken now")
    registry.mark("m", "2", "UNAVAILABLE", "empty")
    assert registry.find("m").version == "1"
    assert registry.index() == [
        {"name": "m", "version": "1", "state": "READY", "reason": "the file has changed, and is broken now"},
        {"name": "m", "version": "2", "state": "UNAVAILABLE", "reason": "empty"},
    ]
    assert [row["version"] for row in registry.index(ready=True)] == ["1"]


def test_a_model_without_any_version_is_in_the_index_too() -> None:
    registry = Registry()
    registry.mark("m", "", "UNAVAILABLE", "no version directory")
    assert registry.index() == [{"name": "m", "state": "UNAVAILABLE", "reason": "no version directory"}]
    registry.add(version("1", "a"))
    assert [row["name"] for row in registry.index()] == ["a", "m"]
    assert registry.names() == ["a"]


def test_every_change_is_a_new_generation_and_leaves_snapshots_alone() -> None:
    registry = Registry()
    registry.add(version("1"))
    before, snapshot = registry.generation, registry.snapshot()
    registry.add(version("2"))
    assert registry.generation > before
    assert snapshot["m"].version == "1"
    assert registry.snapshot()["m"].version == "2"
    registry.remove("m", "2")
    registry.remove("m", "1")
    assert registry.names() == []
    assert registry.index() == []
