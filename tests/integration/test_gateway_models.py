"""Models over the Open Inference Protocol, beside inference itself: what is said of them, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.gateways import Server, serving

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
