"""The gateway over real sockets, with an engine that runs calls inline: what HTTP clients see."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

import rtml
from rtml.errors import ConnectionLost
from rtml.serving import App
from tests.integration.gateways import app, double, echo, read, serving

pytestmark = pytest.mark.asyncio


TIMING = 'queue;dur=1.000, batch;desc="1", transfer;dur=0.200, compute;dur=3.000, serialise;dur='


def infer(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **more}


def tensor(name: str, datatype: str, shape: list[int], data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


# --- graph programs ---------------------------------------------------------------------------------------------------


async def test_an_image_goes_to_the_program_and_its_result_comes_back_as_json() -> None:
    async with serving() as server:
        status, body, headers = await server.post("/v1/read?language=de", b"\x89PNG", "image/png")
        assert (status, body) == (200, [{"text": "4 bytes in de", "box": [1, 2]}])
        assert headers["Content-Type"] == "application/json"
        assert headers["Server-Timing"].startswith(TIMING)
        assert headers["x-request-id"]


async def test_json_in_and_arrays_out() -> None:
    async with serving() as server:
        status, body, _ = await server.post("/v1/answer", {"words": ["a", "b"], "limit": 1})
        assert (status, body) == (200, {"words": ["a"], "vector": [[1.5, 2]], "mean": 1.5})


async def test_bytes_out_and_content_of_a_type() -> None:
    async with serving() as server:
        status, body, headers = await server.post("/v1/echo", b"\0\xff")
        assert (status, body, headers["Content-Type"]) == (200, b"\0\xff", "application/octet-stream")
        status, body, headers = await server.post("/v1/picture")
        assert (status, body, headers["Content-Type"]) == (200, b"\x89PNG", "image/png")


async def test_compressed_and_chunked_bodies() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"ab"

    async with serving() as server:
        packed = gzip.compress(b"x" * 100)
        assert (await server.post("/v1/echo", packed, Content_Encoding="gzip"))[1] == b"x" * 100
        assert (await server.post("/v1/echo", chunks(), "application/octet-stream"))[1] == b"ab" * 1000
        status, body, _ = await server.post("/v1/echo", b"this is not gzip", Content_Encoding="gzip")
        assert (status, body["type"]) == (400, "InvalidInput")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/answer", {"words": [1]}, "Expected `str`, got `int` - at `$.words[0]`"),
        ("/v1/answer", b"{", "no JSON"),
        ("/v1/answer", None, "missing required field `words`"),
        ("/v1/echo", {"data": 1}, "at `$.data`"),
        ("/v1/read?limit=3", b"x", "unknown field `limit`"),
        ("/v2/models/double/infer", {"inputs": []}, "input 'x' is missing"),
    ],
)
async def test_bodies_that_do_not_fit_are_told_what_is_wrong(path: str, body: Any, message: str) -> None:
    async with serving() as server:
        content_type = "application/json" if body == b"{" else ""
        status, answered, _ = await server.post(path, body, content_type)
        assert status == 400
        assert message in answered["error"]
        assert answered["type"] == "InvalidInput"


@pytest.mark.parametrize(
    ("how", "status", "kind", "message"),
    [
        ("input", 400, "InvalidInput", "the page is empty"),
        ("user", 500, "ValueError", "wrong page"),
        ("own", 500, "ZeroDivisionError", "division by zero"),
        ("lost", 503, "ConnectionLost", "the engine cannot be reached"),
        ("cancelled", 503, "TaskCancelled", "cancelled by an operator"),
        ("inner", 500, "Unschedulable", "no worker has a gpu"),
        ("object", 500, "TypeError", "a result with a object in it cannot be answered as JSON"),
    ],
)
async def test_errors_of_programs(how: str, status: int, kind: str, message: str) -> None:
    async with serving() as server:
        found, body, headers = await server.post("/v1/fail", {"how": how})
        assert (found, body) == (status, {"error": message, "type": kind})
        assert ("Retry-After" in headers) == (status == 503)
        assert headers["x-request-id"]


# --- deadlines, cancellation ------------------------------------------------------------------------------------------


async def test_the_deadline_travels_with_the_graph_and_ends_in_504() -> None:
    async with serving() as server:
        status, body, _ = await server.post("/v1/wait", x_rtml_deadline_ms="50")
        assert (status, body["type"], body["missing"]) == (504, "DeadlineExceeded", ["wait"])
        assert "deadline" in body["error"]
        (options,) = server.engine.options
        assert options.deadline is not None
        assert 0 < options.deadline <= 0.05
        assert server.engine.cancelled.is_set()
        found = await server.metrics()
        labels = {"app": "demo", "model": "/v1/wait"}
        missed = json.dumps({"app": "demo", "model": "/v1/wait", "outcome": "missed"})
        assert found["rtml_gateway_deadlines_total" + missed] == 1
        assert found["rtml_gateway_requests_in_flight" + json.dumps(labels)] == 0


async def test_an_endpoint_has_a_deadline_of_its_own() -> None:
    async with serving() as server:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await server.post("/v1/wait")
        (options,) = server.engine.options
        assert options.deadline is not None
        assert 29 < options.deadline <= 30
        await server.post("/v1/echo", b"x")
        assert server.engine.options[-1].deadline is None


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", "", "1_0", "\u0661\u0660"])
async def test_deadlines_that_are_none(text: str) -> None:
    async with serving() as server:
        status, body, _ = await server.post("/v1/echo", b"x", x_rtml_deadline_ms=text)
        assert (status, body["type"]) == (400, "InvalidInput")


async def test_a_model_takes_the_protocols_timeout_and_the_tighter_one_counts() -> None:
    async with serving() as server:
        request = infer(tensor("x", "FP32", [1, 2], [1, 2]), parameters={"timeout": 2_000_000})
        assert (await server.post("/v2/models/double/infer", request))[0] == 200
        assert (await server.post("/v2/models/double/infer", request, x_rtml_deadline_ms="900000"))[0] == 200
        assert (await server.post("/v2/models/double/infer", request, x_rtml_deadline_ms="500"))[0] == 200
        seconds = [options.deadline or 0 for options in server.engine.options]
        assert seconds == [pytest.approx(2, abs=0.2), pytest.approx(2, abs=0.2), pytest.approx(0.5, abs=0.2)]


async def test_a_client_that_goes_away_cancels_the_graph() -> None:
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await server.engine.started.wait()
        writer.close()
        await asyncio.wait_for(server.engine.cancelled.wait(), 5)
        gone = json.dumps({"app": "demo", "code": "499", "model": "/v1/wait", "protocol": "http"})
        while (await server.metrics()).get("rtml_gateway_requests_total" + gone) != 1:
            await asyncio.sleep(0.01)
        await writer.wait_closed()
        assert await reader.read() == b""


# --- models -----------------------------------------------------------------------------------------------------------


async def test_json_inference() -> None:
    async with serving() as server:
        status, body, headers = await server.post(
            "/v2/models/double/infer", infer(tensor("x", "FP32", [2, 2], [[1, 2], [3, 4]]), id="42")
        )
        assert status == 200
        assert body == {
            "model_name": "double",
            "model_version": "1",
            "id": "42",
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [2, 4, 6, 8]}],
        }
        assert "Server-Timing" in headers


async def test_binary_inference_of_several_tensors() -> None:
    async with serving() as server:
        head = json.dumps(
            infer(
                {"name": "b", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
                tensor("a", "FP32", [2], [1, 2]),
                parameters={"binary_data_output": True},
            )
        ).encode()
        status, body, headers = await server.get(
            "/v2/models/join/versions/7/infer",
            "POST",
            data=head + struct.pack("<2q", 10, 20),
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
        length = int(headers["Inference-Header-Content-Length"])
        outputs = json.loads(body[:length])["outputs"]
        assert [output["name"] for output in outputs] == ["sum", "text"]
        assert body[length:] == struct.pack("<2f", 11, 22) + b"\1\0\0\0a\1\0\0\0\xff"


async def test_a_raw_request() -> None:
    async with serving() as server:
        status, body, headers = await server.get(
            "/v2/models/double/infer",
            "POST",
            data=struct.pack("<2f", 1, 2),
            headers={"Inference-Header-Content-Length": "0"},
        )
        assert status == 200
        assert body[int(headers["Inference-Header-Content-Length"]) :] == struct.pack("<2f", 2, 4)


async def test_what_models_say_about_themselves() -> None:
    async with serving() as server:
        for base in ("/v2/models/join", "/v2/models/join/versions/7"):
            status, body, _ = await server.get(base)
            assert (status, body["name"], body["versions"]) == (200, "join", ["7"])
            assert body["inputs"][1] == {"name": "b", "datatype": "INT64", "shape": [2]}
            assert (await server.get(f"{base}/ready"))[1] == {"name": "join", "ready": True}
            assert (await server.get(f"{base}/config"))[1]["max_batch_size"] == 0
        assert (await server.get("/v2/models"))[1]["models"][:2] == ["double", "join"]
        assert (await server.get("/v2"))[1]["name"] == "rtml"


# --- everything else --------------------------------------------------------------------------------------------------


async def test_unknown_paths_wrong_verbs_and_large_bodies() -> None:
    async with serving(body_max=1000) as server:
        for path in ("/", "/v1/nothing", "/v2/models/join/nothing", "/v2/models/join/versions/7/infer/more"):
            status, body, _ = await server.get(path)
            assert (status, body["type"]) == (404, "NotFound")
        for path in ("/v2/models/nothing/infer", "/v2/models/join/versions/1", "/v2/models//infer"):
            status, body, _ = await server.get(path)
            assert (status, body["type"]) == (404, "UnknownModel")
        status, body, headers = await server.get("/v1/read")
        assert (status, body["type"], headers["Allow"]) == (405, "MethodNotAllowed", "POST")
        assert (await server.post("/v2"))[0] == 405
        status, body, _ = await server.post("/v1/echo", b"x" * 1001)
        assert (status, body) == (413, {"error": "the body is larger than 1000 bytes", "type": "TooLarge"})
        status, body, _ = await server.post("/v1/echo", gzip.compress(b"x" * 100_000), Content_Encoding="gzip")
        assert status == 413
        assert (await server.post("/v1/echo", b"x" * 1000))[0] == 200


async def test_a_client_that_expects_to_be_asked_for_the_body() -> None:
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
        writer.write(b"abc")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await reader.readexactly(3) == b"abc"
        writer.close()
        await writer.wait_closed()


async def test_request_ids_are_kept_or_made() -> None:
    async with serving() as server:
        assert (await server.post("/v1/echo", b"", x_request_id="mine-1"))[2]["x-request-id"] == "mine-1"
        made = [(await server.post("/v1/echo", b"", x_request_id="x" * 200))[2]["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        assert all(len(name) < 40 for name in made)
        for method, path in (("GET", "/nothing"), ("DELETE", "/v1/echo"), ("GET", "/healthz")):
            headers = (await server.get(path, method, headers={"x-request-id": "mine-2"}))[2]
            assert headers["x-request-id"] == "mine-2"
            assert (await server.get(path, method))[2]["x-request-id"]


async def test_health_follows_the_engine() -> None:
    async with serving() as server:
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert (await server.get(path))[:2] == (200, {"live": True, "ready": True})
            assert (await server.get(path, "HEAD"))[:2] == (200, None)
        server.engine.ready = False
        for path, status in (("/healthz", 200), ("/readyz", 503), ("/v2/health/live", 200), ("/v2/health/ready", 503)):
            assert (await server.get(path))[:2] == (status, {"live": True, "ready": False})
            assert status == 200 or (await server.get(path))[2]["Retry-After"] == "1"
        assert (await server.get("/v2/models/double/ready"))[0] == 503


async def test_metrics_of_gateway_and_dispatcher_on_one_page() -> None:
    async with serving() as server:
        await server.post("/v1/echo", b"x")
        await server.post("/v1/echo", {"data": 1})
        found = await server.metrics()
        labels = {"app": "demo", "model": "/v1/echo"}
        assert (
            found[
                "rtml_gateway_requests_total"
                + json.dumps({**labels, "code": "200", "protocol": "http"}, sort_keys=True)
            ]
            == 1
        )
        assert (
            found[
                "rtml_gateway_requests_total"
                + json.dumps({**labels, "code": "400", "protocol": "http"}, sort_keys=True)
            ]
            == 1
        )
        assert found["rtml_gateway_request_seconds_count" + json.dumps(labels)] == 2
        assert found["rtml_tasks_total{}"] == 3
        assert found["rtml_gateway_dispatcher_up{}"] == 1
        server.engine.metrics = ConnectionLost("gone")
        found = await server.metrics()
        assert found["rtml_gateway_dispatcher_up{}"] == 0
        assert "rtml_tasks_total{}" not in found


async def test_stopping_lets_requests_end_and_takes_no_new_ones() -> None:
    release = asyncio.Event()
    slow = App("slow")

    async def held() -> str:
        await release.wait()
        return "done"

    slow.endpoint("/v1/held")(rtml.task(held))
    async with serving(slow) as server:
        request = asyncio.create_task(server.post("/v1/held"))
        await server.engine.started.wait()
        stopping = asyncio.create_task(server.gateway.stop())
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            except ConnectionResetError:  # it was in the listener's queue
                continue
            except ConnectionRefusedError:
                break
            writer.close()
            await writer.wait_closed()
        assert not server.gateway.ready
        assert not request.done()
        release.set()
        assert (await request)[:2] == (200, "done")
        await stopping


async def test_stopping_cancels_what_does_not_end() -> None:
    async with serving(drain_timeout=0.1) as server:
        request = asyncio.create_task(server.post("/v1/wait"))
        await server.engine.started.wait()
        await server.gateway.stop()
        assert server.engine.cancelled.is_set()
        assert (await request)[0] == 503


async def test_apps_that_collide_or_cannot_be_served_fail_at_start() -> None:
    other = App("other")
    other.endpoint("/v1/read")(read)
    with pytest.raises(ValueError, match="POST /v1/read is served twice"):
        async with serving(app, other):
            pass
    models = App("models")
    models.model("double", double, inputs=[], outputs=[])
    with pytest.raises(ValueError, match="two apps have a model 'double'"):
        async with serving(app, models):
            pass
    unknown = App("unknown")
    unknown.model("m", double)
    with pytest.raises(ValueError, match="give its inputs and outputs"):
        async with serving(unknown):
            pass
    batch = App("batch")
    batch.endpoint("/v1/batch")(rtml.task(batch=8)(echo.function))
    with pytest.raises(TypeError, match="batch function"):
        async with serving(batch):
            pass
