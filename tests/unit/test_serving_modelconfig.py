"""A model's configuration: what is read, what is refused and why, and what it comes to with the file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rtml.onnxfile import ModelInfo, TensorInfo
from rtml.serving.app import TensorSpec
from rtml.serving.modelconfig import ConfigError, ModelConfig, plan, read

X, Y = TensorInfo("x", "float32", (-1, 3)), TensorInfo("y", "int64", (-1,))
OPEN = ModelInfo((X,), (Y,), {})
FIXED = ModelInfo((TensorInfo("x", "float32", (1, 3)),), (TensorInfo("y", "int64", (1,)),), {})


#: What converters make of a classifier.
MAPS = ModelInfo((X,), (Y, TensorInfo("maps", "", None, "a sequence")), {})


def of(**fields: Any) -> ModelConfig:
    return read(json.dumps(fields), "json")[0]


def test_without_a_configuration_the_file_decides() -> None:
    found = plan("m", None, OPEN)
    assert found.inputs == (TensorSpec("x", "FP32", (-1, 3)),)
    assert found.batch_max == 32
    assert found.arguments == {"name": "m", "batch": 32, "batch_delay": 0.0, "check_rows": True}
    assert plan("m", None, OPEN, joins=False).arguments == {"name": "m"}
    assert "check_rows" not in plan("m", of(max_batch_size=4, dynamic_batching={}), OPEN).arguments
    assert found.config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
    assert found.config["dynamic_batching"] == {}
    fixed = plan("m", None, FIXED)
    assert (fixed.batch_max, fixed.arguments) == (0, {"name": "m"})
    assert fixed.config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 3]}]


def test_pbtxt_and_json_say_the_same() -> None:
    text = """
        name: "m" max_batch_size: 8
        input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
        dynamic_batching { preferred_batch_size: [ 4, 6 ] max_queue_delay_microseconds: 250
                           default_queue_policy { default_timeout_microseconds: 40000 } }
        instance_group [ { kind: KIND_GPU count: 1 } ]
        version_policy { latest { num_versions: 2 } }
    """
    fields = {
        "name": "m",
        "max_batch_size": 8,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}],
        "dynamic_batching": {
            "preferred_batch_size": [4, 6],
            "max_queue_delay_microseconds": 250,
            "default_queue_policy": {"default_timeout_microseconds": 40000},
        },
        "instance_group": [{"kind": "KIND_GPU", "count": 1}],
        "version_policy": {"latest": {"num_versions": 2}},
    }
    found = read(text, "pbtxt")[0]
    assert found == of(**fields)
    made = plan("m", found, OPEN)
    assert made.arguments == {"name": "m", "gpu": 1.0, "batch": 6, "batch_delay": 0.00025}
    assert (made.batch_max, made.deadline) == (8, 0.04)


def test_a_configuration_without_batching_has_none() -> None:
    assert "batch" not in plan("m", of(max_batch_size=8), OPEN).arguments
    assert plan("m", of(), OPEN).batch_max == 0


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ({}, ["10"]),
        ({"latest": {"num_versions": 2}}, ["9", "10"]),
        ({"all": {}}, ["1", "9", "10"]),
        ({"specific": {"versions": [1, 9, 77]}}, ["1", "9"]),
    ],
)
def test_version_policy(policy: dict[str, Any], chosen: list[str]) -> None:
    assert of(version_policy=policy).chosen(["10", "1", "9"]) == chosen


def test_unknown_fields_are_named_and_nothing_more() -> None:
    config, unused = read('{"name": "m", "optimization": {}, "input": [{"name": "x", "colour": 1}], "odd": 2}', "json")
    assert config.input[0].name == "x"
    assert sorted(unused) == ["input[0].colour", "odd"]
    policy = {"max_queue_size": 5, "allow_timeout_override": True}
    batching = {"preserve_ordering": True, "default_queue_policy": policy}
    _, unused = read(json.dumps({"dynamic_batching": batching, "instance_group": [{"gpus": [0]}]}), "json")
    assert sorted(unused) == [
        "dynamic_batching.default_queue_policy.max_queue_size",
        "dynamic_batching.preserve_ordering",
        "instance_group[0].gpus",
    ]
    config, unused = read("max_batch_size: 4 odd_field: 3 dynamic_batching { strange: true }", "pbtxt")
    assert config.max_batch_size == 4
    assert any("odd_field" in field for field in unused)


@pytest.mark.parametrize(
    ("text", "form", "reason"),
    [
        ("[1]", "json", "a configuration is a JSON object"),
        ("{", "json", "this is no JSON"),
        ('{"max_batch_size": "many"}', "json", "Expected `int"),
        ('{"max_batch_size": -1}', "json", "max_batch_size is 0 or more"),
        ('{"backend": "tensorflow"}', "json", "only onnxruntime is served here"),
        ('{"platform": "pytorch_libtorch"}', "json", "only onnxruntime is served here"),
        ('{"ensemble_scheduling": {"step": [1]}}', "json", "a graph program"),
        ('{"default_model_filename": "../m"}', "json", "a file's name, not a path"),
        ('{"version_policy": {"latest": {"num_versions": 0}}}', "json", "1 or more"),
        ('{"instance_group": [{"kind": "KIND_TPU"}]}', "json", "Invalid enum value 'KIND_TPU'"),
        ("max_batch_size: many", "pbtxt", "line:column 1:17"),
        ("input [ { name: 'x' data_type: TYPE_FP99 } ]", "pbtxt", "TYPE_FP99"),
        ("name: \x00", "pbtxt", "line:column"),
    ],
)
def test_what_is_wrong_is_said(text: str, form: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(text, form)


@pytest.mark.parametrize(
    ("fields", "info", "reason"),
    [
        ({"name": "other"}, OPEN, "of model 'other', its directory is 'm'"),
        ({"max_batch_size": 4}, FIXED, "input 'x' of the file has no open first dimension"),
        ({"input": [{"name": "z"}]}, OPEN, "no input 'z'; it has x"),
        ({"output": [{"name": "z"}]}, OPEN, "no output 'z'; it has y"),
        ({"input": [{"name": "x", "data_type": "TYPE_INT8"}]}, OPEN, "'x' is FP32 in the file, not INT8"),
        ({"input": [{"name": "x", "dims": [4]}], "max_batch_size": 4}, OPEN, r"dims \[3\] in the file, not \[4\]"),
        ({"input": [{"name": "x", "dims": [-1, 3, 1]}]}, OPEN, r"dims \[-1, 3\] in the file"),
        ({"input": [{"name": "x", "dims": [-5, 3]}]}, OPEN, "positive or -1"),
        ({"parameters": {"deadline_ms": {"string_value": "soon"}}}, OPEN, "deadline_ms is a positive number"),
        ({"model_warmup": [{"inputs": {"z": {"dims": [1]}}}]}, OPEN, "no input 'z'"),
        ({}, ModelInfo((TensorInfo("x", "", None),), (Y,), {}), "no tensor of a datatype that can be served"),
        ({"input": [{"name": "x"}]}, ModelInfo((X, Y), (Y,), {}), "also has the inputs y"),
        ({}, MAPS, "'maps' is a sequence, no tensor .* may leave it out: its output lists the others"),
        ({"output": [{"name": "maps"}]}, MAPS, "'maps' is a sequence, no tensor of a datatype"),
    ],
)
def test_what_contradicts_the_file_is_refused(fields: dict[str, Any], info: ModelInfo, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan("m", of(**fields), info)


def test_what_is_asked_for_reaches_the_model() -> None:
    config = of(
        max_batch_size=4,
        output=[{"name": "y", "label_filename": "names.txt"}],
        parameters={"deadline_ms": {"string_value": "50"}, "threads": {"string_value": "2"}},
        model_warmup=[{"batch_size": 4, "inputs": {"x": {"dims": [3]}}}, {"inputs": {"x": {"dims": [3]}}}],
        instance_group=[{"kind": "KIND_CPU"}],
        dynamic_batching={"priority_levels": 3, "default_priority_level": 3},
    )
    found = plan("m", config, OPEN)
    assert found.deadline == 0.05
    assert found.label_files == {"y": "names.txt"}
    assert found.arguments == {
        "name": "m",
        "providers": ["CPUExecutionProvider"],
        "batch": 4,
        "batch_delay": 0.0,
        "priority": -1,
        "outputs": ["y"],
        "threads": 2,
        "warmup": [{"x": [4, 3]}, {"x": [1, 3]}],
    }
    assert found.config["output"][0]["label_filename"] == "names.txt"
    json.dumps(found.config)


def test_versions_that_the_policy_names_may_be_missing() -> None:
    given = of(version_policy={"specific": {"versions": [1, 3]}})
    assert (given.chosen(["1", "2"]), given.missing(["1", "2"])) == (["1"], [3])
    assert of().missing(["1"]) == []


def test_an_output_that_is_no_tensor_can_be_left_out() -> None:
    found = plan("m", of(output=[{"name": "y"}]), MAPS)
    assert [spec.name for spec in found.outputs] == found.arguments["outputs"] == ["y"]


def test_what_is_described_is_a_configuration_of_tritons() -> None:
    """gRPC answers with it."""
    json_format = pytest.importorskip("google.protobuf.json_format")
    from rtml.serving.grpc_messages import message

    inputs = {"x": {"data_type": "TYPE_FP32", "dims": [3], "zero_data": True}}
    given = of(
        max_batch_size=4,
        dynamic_batching={"preferred_batch_size": [2]},
        instance_group=[{"count": 2, "kind": "KIND_CPU"}],
        parameters={"threads": {"string_value": "1"}},
        model_warmup=[{"name": "zeros", "batch_size": 4, "inputs": inputs}],
    )
    parsed = json_format.ParseDict(plan("m", given, OPEN).config, message("inference.ModelConfig")())
    assert parsed.model_warmup[0].inputs["x"].zero_data
