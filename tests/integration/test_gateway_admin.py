"""The protocol's paths beside inference: repository, traces, the log, generate."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest

import rtml
from rtml.errors import InvalidInput
from rtml.serving import App, oip
from rtml.serving.app import TensorSpec
from rtml.serving.conditions import Conditions
from rtml.serving.features import Features
from rtml.serving.http import HttpError
from rtml.serving.inference import Inference
from tests.integration.gateways import serving

pytestmark = pytest.mark.asyncio


class FakeRepository:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        self.asked.append(("load", name, dict(parameters)))
        if name == "broken":
            raise HttpError(400, "broken: no model.onnx", "InvalidInput")

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        self.asked.append(("unload", name, unload_dependents))


# --- the repository ---------------------------------------------------------------------------------------------------


async def test_the_index_needs_no_body() -> None:
    async with serving() as server:
        for body in (b"", b"{}", json.dumps({"ready": True}).encode()):
            status, rows, _ = await server.post("/v2/repository/index", body)
            assert status == 200
            assert {"name": "double", "version": "1", "state": "READY", "reason": ""} in rows
        for body in (b"[]", b"{", b'{"ready": 1}', b"[" * 100_000):
            assert (await server.post("/v2/repository/index", body))[0] == 400
        assert (await server.get("/v2/repository/index"))[0] == 405


async def test_models_are_loaded_and_unloaded_by_the_repository() -> None:
    async with serving() as server:
        repository = FakeRepository()
        server.gateway.registry.repository = repository
        assert "model_repository" in (await server.get("/v2"))[1]["extensions"]
        assert (await server.post("/v2/repository/models/m/load", b""))[0] == 200
        config = {"parameters": {"config": "{}"}}
        assert (await server.post("/v2/repository/models/m%20m/load", config))[0] == 200
        dependents = {"parameters": {"unload_dependents": True}}
        assert (await server.post("/v2/repository/models/m/unload", dependents))[0] == 200
        assert repository.asked == [("load", "m", {}), ("load", "m m", {"config": "{}"}), ("unload", "m", True)]
        status, body, _ = await server.post("/v2/repository/models/broken/load", b"")
        assert (status, body["error"]) == (400, "broken: no model.onnx")
        status, body, _ = await server.post("/v2/repository/models/m/load", {"parameters": {"file:1/model.onnx": "aa"}})
        assert (status, body["type"]) == (501, "NotEnabled")
        assert "--allow-model-upload" in body["error"]
        for path, wrong in (("m/load", {"parameters": []}), ("m/unload", {"parameters": {"unload_dependents": 1}})):
            assert (await server.post(f"/v2/repository/models/{path}", wrong))[0] == 400
        assert len(repository.asked) == 4
        for path in ("m/reload", "load", "/load"):
            assert (await server.post(f"/v2/repository/models/{path}", b""))[0] == 404


async def test_without_a_repository_nothing_is_loaded() -> None:
    async with serving() as server:
        assert "model_repository" not in (await server.get("/v2"))[1]["extensions"]
        for verb in ("load", "unload"):
            status, body, _ = await server.post(f"/v2/repository/models/double/{verb}", b"")
            assert (status, body["type"]) == (501, "NotEnabled")
            assert "--model-repository" in body["error"]


async def test_files_may_come_where_that_is_allowed() -> None:
    async with serving(conditions=Conditions(features=Features(model_upload=True))) as server:
        repository = server.gateway.registry.repository = FakeRepository()
        files = {"file:1/model.onnx": "aa"}
        assert (await server.post("/v2/repository/models/m/load", {"parameters": files}))[0] == 200
        assert repository.asked == [("load", "m", files)]


async def test_cuda_memory_is_never_registered() -> None:
    async with serving() as server:
        assert (await server.get("/v2/cudasharedmemory/status"))[:2] == (200, [])
        assert (await server.post("/v2/cudasharedmemory/unregister", b""))[0] == 200
        status, body, _ = await server.post("/v2/cudasharedmemory/region/r/register", {"raw_handle": {"b64": "aa"}})
        assert status == 501
        assert "CUDA shared memory cannot be registered here" in body["error"]
        for path in ("/v2/cudasharedmemory/register", "/v2/cudasharedmemory/region/r/", "/v2/systemsharedmemory/x"):
            assert (await server.post(path, b""))[0] == 404


# --- traces and the log -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("/v2/trace/setting", "--allow-trace"),
        ("/v2/models/double/trace/setting", "--allow-trace"),
        ("/v2/logging", "--allow-logging"),
    ],
)
async def test_settings_of_the_server_are_the_operators(path: str, option: str) -> None:
    async with serving() as server:
        for method in ("GET", "POST"):
            status, body, _ = await server.get(path, method)
            assert (status, body["type"]) == (501, "NotEnabled")
            assert option in body["error"]


async def test_requests_are_traced_where_that_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    features = Features(trace=True, trace_file=str(file))
    async with serving(conditions=Conditions(features=features)) as server:
        assert "trace" in (await server.get("/v2"))[1]["extensions"]
        wanted = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"}
        status, body, _ = await server.post("/v2/models/double/trace/setting", wanted)
        assert (status, body["trace_level"], body["trace_rate"]) == (200, ["TIMESTAMPS"], "1")
        assert (await server.get("/v2/trace/setting"))[1]["trace_level"] == ["OFF"]
        status, body, _ = await server.post("/v2/trace/setting", {"trace_file": "/etc/passwd"})
        assert status == 400
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
        assert (await server.post("/v2/models/double/infer", {"inputs": [tensor], "id": "mine"}))[0] == 200
    (trace,) = json.loads(file.read_bytes())
    assert (trace["model_name"], trace["request_id"], len(trace["timestamps"])) == ("double", "mine", 7)


async def test_the_log_is_changed_where_that_is_allowed() -> None:
    async with serving(conditions=Conditions(features=Features(logging=True))) as server:
        assert "logging" in (await server.get("/v2"))[1]["extensions"]
        status, body, _ = await server.post("/v2/logging", {"log_info": False, "log_verbose_level": 1})
        assert (status, body["log_info"], body["log_verbose_level"]) == (200, False, 1)
        assert (await server.get("/v2/logging"))[1] == body
        assert (await server.post("/v2/logging", {"log_file": "/tmp/x"}))[0] == 400


# --- generate ---------------------------------------------------------------------------------------------------------

story = App("story")
TEXT = [TensorSpec("prompt", "BYTES", (1,))]


@rtml.task
def tell(prompt: Any) -> Any:
    if prompt[0] == b"fail":
        raise InvalidInput("no story")
    return prompt + b"!"


story.model("tell", tell, inputs=TEXT, outputs=[TensorSpec("story", "BYTES", (1,))])


@story.endpoint("/v1/shout")
@rtml.task
async def shout(text_input: str, times: int = 1) -> str:
    return text_input.upper() * times


async def test_generate_is_inference_with_plain_fields() -> None:
    async with serving(story) as server:
        status, body, headers = await server.post("/v2/models/tell/generate", {"text_input": "Once", "id": "7"})
        assert (status, body) == (200, {"model_name": "tell", "model_version": "1", "id": "7", "text_output": "Once!"})
        assert "Server-Timing" in headers
        asked = {"text_input": "a", "parameters": {"times": 3}}
        assert (await server.post("/v2/models/shout/versions/1/generate", asked))[1]["text_output"] == "AAA"
        status, body, _ = await server.post("/v2/models/tell/generate", {"text": "Once"})
        assert (status, body["type"]) == (400, "InvalidInput")
        status, body, _ = await server.post("/v2/models/tell/generate", {"text_input": "fail"})
        assert (status, body["error"]) == (400, "no story")


async def test_a_stream_of_generated_answers_is_events() -> None:
    async with serving(story) as server:
        status, body, headers = await server.post("/v2/models/tell/generate_stream", {"text_input": "Once"})
        assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        event, rest = body.split(b"\n\n")
        assert event.startswith(b"data: ")
        assert rest == b""
        assert json.loads(event[6:])["text_output"] == "Once!"
        assert headers["x-request-id"]
        status, body, _ = await server.post("/v2/models/tell/generate_stream", {"text_input": "fail"})
        assert (status, body["error"]) == (400, "no story")
        # Statistics know of streams.
        (found,) = (await server.get("/v2/models/tell/stats"))[1]["model_stats"]
        assert found["response_stats"]["0"]["success"]["count"] == 1


async def test_an_error_amid_a_stream_is_its_last_event(monkeypatch: Any) -> None:
    async def stream(self: Inference, model: Any, request: Any, progress: Any) -> AsyncGenerator[oip.Reply, None]:
        yield await self.run(model, request, progress)
        raise InvalidInput("no more")

    monkeypatch.setattr(Inference, "stream", stream)
    async with serving(story) as server:
        status, body, _ = await server.post("/v2/models/tell/generate_stream", {"text_input": "Once"})
        first, last, rest = body.split(b"\n\n")
        assert (status, rest) == (200, b"")
        assert json.loads(first[6:])["text_output"] == "Once!"
        assert json.loads(last[6:]) == {"error": "no more", "type": "InvalidInput"}
