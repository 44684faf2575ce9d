"""Models over the Open Inference Protocol, beside inference itself: what is said of them, and what is counted."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from rtml.errors import ConnectionLost
from rtml.serving import App
from tests.integration.gateways import Server, echo, read, serving

pytestmark = pytest.mark.asyncio


def request(rows: int = 1, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": [1, 2] * rows}], **more}


async def statistics(server: Server, path: str) -> list[Any]:
    status, body, _ = await server.get(path)
    assert status == 200
    return list(body["model_stats"])


async def test_the_requests_of_each_model_are_counted() -> None:
    async with serving() as server:
        for _ in range(3):
            assert (await server.post("/v2/models/double/infer", request()))[0] == 200
        assert (await server.post("/v2/models/double/versions/1/infer", request()))[0] == 200
        assert (await server.post("/v2/models/double/infer", request(parameters={"sequence_id": 3})))[0] == 501
        (found,) = await statistics(server, "/v2/models/double/versions/1/stats")
        assert (found["name"], found["version"], found["inference_count"]) == ("double", "1", 4)
        assert found["inference_stats"]["queue"] == {"count": 4, "ns": 4_000_000}
        assert found["inference_stats"]["compute_infer"] == {"count": 4, "ns": 12_000_000}
        assert found["inference_stats"]["fail"]["count"] == 1
        assert found["last_inference"] > 1_600_000_000_000
        assert await statistics(server, "/v2/models/double/stats") == [found]
        everything = {entry["name"]: entry for entry in await statistics(server, "/v2/models/stats")}
        assert everything["double"] == found
        assert everything["join"]["inference_count"] == 0


async def test_requests_that_repeat_their_json_are_answered_each_for_its_own_data() -> None:
    size = {"binary_data_size": 8}
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    async with serving() as server:
        seen = []
        for number in range(5):
            data = struct.pack("<2f", number, 0.5)
            status, body, headers = await server.post("/v2/models/double/infer", head + data, **length)
            end = int(headers["Inference-Header-Content-Length"])
            assert (status, struct.unpack("<2f", body[end:])) == (200, (2 * number, 1.0))
            assert headers["Content-Type"] == "application/octet-stream"
            seen.append(json.loads(body[:end]))
        output = {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": size}
        assert seen == [{"model_name": "double", "model_version": "1", "outputs": [output]}] * 5
        for wrong in (head + b"1234567", head + b"123456789"):
            assert (await server.post("/v2/models/double/infer", wrong, **length))[0] == 400
        (found,) = await statistics(server, "/v2/models/double/stats")
        assert found["inference_count"] == 5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sequence_id": -1}, "parameter sequence_id must be text or a whole number"),
        ({"sequence_id": 1.5}, "parameter sequence_id must be text or a whole number"),
        ({"sequence_id": True}, "parameter sequence_id must be text or a whole number"),
        ({"sequence_id": 1, "sequence_start": 1}, "parameter sequence_start must be true or false"),
        ({"sequence_end": "no"}, "parameter sequence_end must be true or false"),
        ({"timeout": 2**64}, "parameter timeout must be a whole number from 0 to 2**64 - 1"),
        ({"priority": [1]}, "parameter priority must be a whole number"),
    ],
)
async def test_reserved_parameters_are_looked_at(parameters: Any, message: str) -> None:
    async with serving() as server:
        status, body, _ = await server.post("/v2/models/double/infer", request(parameters=parameters))
        assert status == 400
        assert message in body["error"]


async def test_parameters_that_mean_nothing_here_are_ignored() -> None:
    odd = {"headers": {"a": ["b"]}, "triton_enable_empty_final_response": True, "mine": None, "sequence_id": 0}
    async with serving() as server:
        assert (await server.post("/v2/models/double/infer", request(parameters=odd)))[0] == 200


@pytest.mark.parametrize(("priority", "engine"), [(0, None), (1, 1), (2, 0), (3, -1), (2**64 - 1, -(2**31))])
async def test_the_most_urgent_priority_is_1(priority: int, engine: int | None) -> None:
    async with serving() as server:
        answer = await server.post("/v2/models/double/infer", request(parameters={"priority": priority}))
        assert answer[0] == 200
        assert server.engine.options[-1].priority == engine


async def test_sequences_are_refused_by_models_that_keep_no_state() -> None:
    async with serving() as server:
        parameters = {"sequence_id": "call-7", "sequence_start": True}
        status, body, _ = await server.post("/v2/models/double/infer", request(parameters=parameters))
        assert (status, body["type"]) == (501, "NotSupported")
        assert "keeps no state" in body["error"]
        assert not server.engine.options


# --- graph programs ---------------------------------------------------------------------------------------------------


async def test_a_program_is_a_model_whose_tensors_its_type_hints_say() -> None:
    async with serving() as server:
        assert "answer" in (await server.get("/v2/models"))[1]["models"]
        status, body, _ = await server.get("/v2/models/answer")
        assert (status, body["platform"], body["versions"]) == (200, "ensemble", ["1"])
        assert body["inputs"] == [
            {"name": "words", "datatype": "BYTES", "shape": [-1]},
            {"name": "limit", "datatype": "INT64", "shape": [1]},
        ]
        words = {"name": "words", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}
        limit = {"name": "limit", "datatype": "INT64", "shape": [1], "data": [1]}
        status, body, _ = await server.post("/v2/models/answer/infer", {"inputs": [words, limit], "id": "7"})
        assert (status, body["id"], body["model_name"]) == (200, "7", "answer")
        (output,) = body["outputs"]
        assert (output["name"], output["datatype"]) == ("output", "BYTES")
        assert json.loads(output["data"][0]) == {"words": ["a"], "vector": [[1.5, 2]], "mean": 1.5}
        # `limit` has a default.
        status, body, _ = await server.post("/v2/models/answer/infer", {"inputs": [words]})
        assert json.loads(body["outputs"][0]["data"][0])["words"] == ["a", "b"]
        status, body, _ = await server.post("/v2/models/answer/infer", {"inputs": [limit]})
        assert (status, body["type"]) == (400, "InvalidInput")
        assert "input 'words' is missing" in body["error"]


async def test_both_doors_of_a_program_count_in_its_statistics() -> None:
    async with serving() as server:
        assert (await server.post("/v1/echo", b"x"))[0] == 200
        data = {"name": "data", "datatype": "BYTES", "shape": [1], "data": ["x"]}
        assert (await server.post("/v2/models/echo/infer", {"inputs": [data]}))[0] == 200
        (found,) = await statistics(server, "/v2/models/echo/stats")
        assert (found["inference_count"], found["inference_stats"]["success"]["count"]) == (2, 2)


LEARNED = {
    "steps": {"answer": {"double": 3, "crop": 1}},
    "called": {
        name: {
            "ok": 4,
            "failed": 1,
            "seconds": 0.4,
            "failed_seconds": 0.1,
            "queued": 0.1,
            "transfer": 0.02,
            "run": 0.2,
            "batches": {"2": [4, 0.02, 0.2]},
        }
        for name in ("double", "crop")
    },
}


async def test_an_ensemble_has_the_steps_that_its_graphs_took() -> None:
    async with serving() as server:
        assert (await server.get("/v2/models/answer/config"))[1]["ensemble_scheduling"] == {"step": []}
        server.engine.calls = json.dumps(LEARNED)
        config = (await server.get("/v2/models/answer/config"))[1]
        assert [step["model_name"] for step in config["ensemble_scheduling"]["step"]] == ["double", "crop"]
        assert config["platform"] == "ensemble"
        assert (await server.get("/v2/models/double/config"))[1].get("ensemble_scheduling") is None


async def test_steps_have_statistics_and_those_that_are_no_models_too() -> None:
    async with serving() as server:
        assert (await server.get("/v2/models/crop/config"))[0] == 404
        server.engine.calls = json.dumps(LEARNED)
        assert (await server.post("/v2/models/double/infer", request()))[0] == 200
        (found,) = await statistics(server, "/v2/models/double/stats")
        # Four calls by tasks in two runs, and one by a client.
        assert (found["inference_count"], found["execution_count"]) == (5, 3)
        assert found["inference_stats"]["queue"] == {"count": 5, "ns": 101_000_000}
        assert found["inference_stats"]["fail"]["count"] == 1
        for path in ("/v2/models/crop/stats", "/v2/models/crop/versions/1/stats"):
            (found,) = await statistics(server, path)
            assert (found["name"], found["inference_count"], found["execution_count"]) == ("crop", 4, 2)
            (batch,) = found["batch_stats"]
            assert batch["batch_size"] == 2
            assert batch["compute_infer"] == {"count": 2, "ns": 100_000_000}
        everything = await statistics(server, "/v2/models/stats")
        assert [row["inference_count"] for row in everything if row["name"] == "crop"] == [4]
        config = (await server.get("/v2/models/crop/config"))[1]
        assert (config["name"], config["platform"]) == ("crop", "python")
        assert (await server.get("/v2/models/crop"))[0] == 200
        assert (await server.post("/v2/models/crop/infer", request()))[0] == 404
        assert (await server.get("/v2/models/crop/versions/2/config"))[0] == 404
        assert (await server.get("/v2/models/nothing/stats"))[0] == 404


async def test_statistics_are_there_while_the_dispatcher_is_not() -> None:
    async with serving() as server:
        server.engine.calls = ConnectionLost("gone")
        (found,) = await statistics(server, "/v2/models/double/stats")
        assert found["inference_count"] == 0
        server.engine.calls = "no JSON"
        assert len(await statistics(server, "/v2/models/stats")) > 2


async def test_names_of_programs() -> None:
    app = App("names")
    app.endpoint("/v1/double")(read)
    app.endpoint("/v2x/double")(echo)
    app.endpoint("/v3/~x")(echo)
    app.endpoint("/v4/echo", model="mine")(echo)
    async with serving(app) as server:
        assert (await server.get("/v2/models"))[1]["models"] == ["double", "v2x.double", "_x", "mine"]
    app.endpoint("/v5/echo", model="mine")(echo)
    with pytest.raises(ValueError, match=r"endpoint '/v5/echo' needs a name of its own"):
        async with serving(app):
            pass


async def test_the_server_says_what_is_on() -> None:
    async with serving() as server:
        status, body, _ = await server.get("/v2")
        assert (status, body["name"]) == (200, "rtml")
        assert body["extensions"] == [
            "classification",
            "sequence",
            "binary_tensor_data",
            "parameters",
            "model_configuration",
            "schedule_policy",
            "statistics",
            "generate",
        ]
