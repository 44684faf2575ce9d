"""The protocol before a real engine: steps that were really taken, statistics of several processes, shared memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_serve import APP, Server, running
from tests.unit.tiny_onnx import doubler

#: A program that calls a model and a plain function.
APPLICATION = """
import numpy as np
import rtml
from rtml.serving import App

app = App("steps")
double = rtml.model("double.onnx")
app.model("double", double)

@rtml.task
def halve(x: float) -> float:
    return x / 2

@app.endpoint("/v1/mix")
@rtml.task
async def mix(x: list[float], times: int = 1) -> list[float]:
    await rtml.gather(*[halve.submit(1.0) for _ in range(times)])
    return (await double.submit(np.array([x], "f4")))[0].tolist()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("steps")
    (folder / "double.onnx").write_bytes(doubler())
    (folder / "steps_app.py").write_text(APPLICATION)
    before = Path.cwd()
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(before), path)))
    os.chdir(folder)
    try:
        with running("serve", "steps_app:app", "--processes", "2", "--allow-shared-memory") as found:
            yield found
    finally:
        os.chdir(before)
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def row_of(server: Server, name: str) -> dict[str, Any]:
    status, body, _ = server.request("GET", f"/v2/models/{name}/stats")
    assert status == 200
    (row,) = body["model_stats"]
    return dict(row)


def test_the_steps_of_a_program_and_their_statistics_whoever_answers(server: Server) -> None:
    x = {"name": "x", "datatype": "FP64", "shape": [3], "data": [1, 2, 3]}
    times = {"name": "times", "datatype": "INT64", "shape": [1], "data": [2]}
    for _ in range(6):  # on a new connection each, so by both processes in turn
        status, body, _ = server.post("/v2/models/mix/infer", {"inputs": [x, times]})
        assert (status, body["outputs"][0]["data"]) == (200, [2, 4, 6])
    assert server.post("/v1/mix", {"x": [1, 1, 1]})[1] == [2, 2, 2]
    direct = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1] * 6}
    assert server.post("/v2/models/double/infer", {"inputs": [direct]})[0] == 200
    config = server.request("GET", "/v2/models/mix/config")[1]
    assert config["platform"] == "ensemble"
    assert {step["model_name"] for step in config["ensemble_scheduling"]["step"]} == {"double", "halve"}
    for _ in range(4):
        whole, double, halve = (row_of(server, name) for name in ("mix", "double", "halve"))
        assert whole["inference_stats"]["success"]["count"] == 7
        assert double["inference_stats"]["success"]["count"] == 8
        assert halve["inference_count"] == 6 * 2 + 1
        assert whole["inference_stats"]["success"]["ns"] > double["inference_stats"]["compute_infer"]["ns"] > 0
    names = {row["name"] for row in server.request("GET", "/v2/models/stats")[1]["model_stats"]}
    assert names == {"mix", "double", "halve"}


def test_a_region_that_was_registered_is_there_in_every_process(server: Server) -> None:
    path = Path("/dev/shm") / f"rtml-test-{os.getpid()}"
    path.write_bytes(np.array([[1, 2, 3]], "f4").tobytes())
    try:
        where = {"key": f"/{path.name}", "offset": 0, "byte_size": 12}
        assert server.post("/v2/systemsharedmemory/region/r/register", where)[0] == 200
        place = {"shared_memory_region": "r", "shared_memory_byte_size": 12}
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": place}
        for _ in range(8):
            status, body, _ = server.post("/v2/models/double/infer", {"inputs": [tensor]})
            assert (status, body["outputs"][0]["data"]) == (200, [2, 4, 6])
        status, body, _ = server.post("/v2/systemsharedmemory/region/r/register", where)
        assert (status, "registered already" in body["error"]) == (400, True)
        assert server.post("/v2/systemsharedmemory/unregister")[0] == 200
        for _ in range(8):
            assert server.request("GET", "/v2/systemsharedmemory/status")[1] == []
            assert server.post("/v2/models/double/infer", {"inputs": [tensor]})[0] == 400
    finally:
        path.unlink()


def test_large_tensors_through_a_real_engine(server: Server) -> None:
    array = np.random.default_rng(0).standard_normal((200_000, 3)).astype("f4")
    size = {"binary_data_size": array.nbytes}
    tensor = {"name": "x", "datatype": "FP32", "shape": list(array.shape), "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    for _ in range(3):
        status, body, headers = server.request("POST", "/v2/models/double/infer", head + array.tobytes(), **length)
        assert status == 200
        data = body[int(headers["Inference-Header-Content-Length"]) :]
        assert np.array_equal(np.frombuffer(data, "f4").reshape(array.shape), array * 2)


def test_what_is_off_says_how_to_switch_it_on() -> None:
    with running("serve", APP) as server:
        status, body, _ = server.request("GET", "/v2/logging")
        assert (status, "--allow-logging" in body["error"]) == (501, True)
        status, body, _ = server.request("GET", "/v2")
        assert "logging" not in body["extensions"]
