"""How the Open Inference Protocol describes a model: its metadata, and its configuration as Triton has it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rtml.serving.app import TensorSpec


def describe_model(
    name: str, version: str, platform: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    """The answer to `GET /v2/models/{name}`."""
    return {
        "name": name,
        "versions": [version],
        "platform": platform,
        "inputs": [_described(spec) for spec in inputs],
        "outputs": [_described(spec) for spec in outputs],
    }


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": _shape(spec)}


def _shape(spec: TensorSpec) -> list[int]:
    return [-1] if spec.shape is None else list(spec.shape)


def describe_config(
    name: str,
    platform: str,
    batch_max: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    decoupled: bool = False,
) -> dict[str, Any]:
    """The answer to `GET /v2/models/{name}/config`: Triton's ModelConfig, as far as load generators read it.

    Args:
        name: The model.
        platform: As in the metadata.
        batch_max: Most rows of one call; above 0 the first dimension of every tensor is the batch, which the
            configuration leaves out. If that is all that an input has, none is said to be one: every tensor has dims in
            Triton's configurations, and perf_analyzer stops at one without.
        inputs: The model's inputs, batch dimension included.
        outputs: The same of its outputs.
        decoupled: A request has any number of answers.
    """
    if any(len(_shape(spec)) < 2 for spec in inputs):
        batch_max = 0

    def dims(spec: TensorSpec) -> list[int]:
        return _shape(spec)[1:] if batch_max else _shape(spec)

    def data_type(spec: TensorSpec) -> str:
        return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"

    config: dict[str, Any] = {
        "name": name,
        "platform": platform,
        "backend": "rtml",
        "max_batch_size": batch_max,
        "input": [
            {"name": spec.name, "data_type": data_type(spec), "dims": dims(spec)}
            | ({"optional": True} if spec.optional else {})
            for spec in inputs
        ],
        "output": [{"name": spec.name, "data_type": data_type(spec), "dims": dims(spec)} for spec in outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "model_transaction_policy": {"decoupled": decoupled},
    }
    if batch_max:
        config["dynamic_batching"] = {}
    return config
