"""Stateful models of a model repository: Triton's configuration, versions that change, unloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_repository import Repository, serving
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")

CONFIG = """
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: %d
  oldest { max_candidate_sequences: 16 }
  state [ { input_name: "s" output_name: "t" data_type: TYPE_FP32 dims: [ 1 ]
            initial_state { name: "first" data_type: TYPE_FP32 dims: [ 1 ] data_file: "first" } } ]
}
"""


class Sums:
    def __init__(self, served: Repository) -> None:
        self.served = served

    async def __call__(self, x: float, number: Any, **parameters: bool) -> tuple[Any, Any]:
        parameters = {"sequence_id": number, **{f"sequence_{name}": value for name, value in parameters.items()}}
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [x]}
        status, answer = await self.served.post("/v2/models/sum/infer", {"inputs": [tensor], "parameters": parameters})
        if status != 200:
            return status, answer["error"]
        return answer["model_version"], answer["outputs"][0]["data"][0]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    path = tmp_path / "models"
    (path / "sum" / "initial_state").mkdir(parents=True)
    np.array([100], "<f4").tofile(path / "sum" / "initial_state" / "first")
    found = Repository(path)
    found.config("sum", CONFIG % 20_000_000)
    found.put("sum", "1", tiny_onnx.accumulator())
    return found


@pytest.mark.asyncio
async def test_a_sequence_ends_with_the_version_that_it_began_with(repository: Repository) -> None:
    async with serving(repository.path, control="poll") as served:
        step = Sums(served)
        assert await step(1, 7, start=True) == ("1", 101)
        config = (await served.get("/v2/models/sum/config"))[1]
        batching = config["sequence_batching"]
        assert batching["max_sequence_idle_microseconds"] == 20_000_000
        assert batching["oldest"]["max_candidate_sequences"] == 16
        assert batching["state"] == [{"input_name": "s", "output_name": "t", "data_type": "TYPE_FP32", "dims": [1]}]
        assert config["max_batch_size"] == 8
        assert "dynamic_batching" not in config
        repository.put("sum", "2", tiny_onnx.accumulator("Sub"))
        await served.until_version("sum", "2")
        assert await step(1, 8, start=True) == ("2", 99)
        assert await step(1, 7) == ("1", 102)
        assert await step(1, 8) == ("2", 98)
        assert await step(1, 7, end=True) == ("1", 103)
        assert await step(1, 7, start=True) == ("2", 99)
        # Nobody needs the first version any more: its holder ends.
        await served.until(lambda: not served.gateway.registry.repository._drains)  # type: ignore[union-attr]
        assert await step(1, 8) == ("2", 97)


@pytest.mark.asyncio
async def test_what_is_unloaded_ends_its_sequences_and_begins_none(repository: Repository) -> None:
    async with serving(repository.path, control="explicit", load_models=("sum",)) as served:
        step = Sums(served)
        assert await step(1, "a", start=True) == ("1", 101)
        assert (await served.post("/v2/repository/models/sum/unload", {}))[0] == 200
        assert await step(2, "a") == ("1", 103)
        status, reason = await step(1, "b", start=True)
        assert (status, "is being unloaded" in reason) == (503, True)
        assert await step(1, "a", end=True) == ("1", 104)
        await served.until(lambda: not served.gateway.registry.repository._drains)  # type: ignore[union-attr]
        status, reason = await step(1, "a")
        assert status == 503
        assert "unloaded" in reason
        assert (await served.post("/v2/repository/models/sum/load", {}))[0] == 200
        assert await step(1, "a", start=True) == ("1", 101)


@pytest.mark.asyncio
async def test_idle_sequences_do_not_hold_up_an_unloading(repository: Repository) -> None:
    repository.config("sum", CONFIG % 300_000)
    async with serving(repository.path, control="explicit", load_models=("sum",)) as served:
        assert await Sums(served)(1, 1, start=True) == ("1", 101)
        assert (await served.post("/v2/repository/models/sum/unload", {}))[0] == 200
        await served.until(lambda: not served.gateway.registry.repository._drains)  # type: ignore[union-attr]
        assert served.index()["sum 1"] == "UNAVAILABLE"


@pytest.mark.asyncio
async def test_what_contradicts_the_file_is_not_served(repository: Repository) -> None:
    repository.config("sum", (CONFIG % 1).replace('"t"', '"u"'))
    async with serving(repository.path) as served:
        assert "the file has no output 'u'; it has y, t" in served.reason("sum", "1")
