"""The gateway and clients that send well-formed HTTP with bad intentions, or at a bad moment."""

from __future__ import annotations

import asyncio
import gzip
import logging
import zlib
from typing import Any

import numpy as np
import pytest

import rtml
from rtml import codec
from rtml.client.future import Future
from rtml.errors import SerializationError
from rtml.serving import App
from rtml.serving.app import TensorSpec
from rtml.serving.results import Content
from tests.integration.gateways import app, serving

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(
    ("encoding", "body", "status", "said"),
    [
        ("gzip", gzip.compress(b"x" * 1000)[:20], 400, "ends too early"),
        ("gzip", gzip.compress(b"x") + b"more", 400, "no gzip"),
        ("deflate", zlib.compress(b"x") + b"more", 400, "follow"),
        ("br", b"x", 415, "gzip, deflate"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"x")), 415, "not 'gzip, gzip'"),
        ("gzip", gzip.compress(bytes(20_000_000)), 413, "larger than 1048576 bytes"),
        ("gzip", gzip.compress(bytes(2_000_000)), 413, "larger than 1048576 bytes"),
    ],
    ids=["cut", "junk", "zlib junk", "unknown", "twice", "large bomb", "bomb"],
)
async def test_compressed_bodies_are_whole_or_refused(encoding: str, body: bytes, status: int, said: str) -> None:
    async with serving(body_max=1 << 20) as server:
        found, answer, _ = await server.post("/v1/echo", body, Content_Encoding=encoding)
        assert (found, said in answer["error"]) == (status, True), answer
        packed = gzip.compress(bytes(1 << 20))
        assert (await server.post("/v1/echo", packed, Content_Encoding="gzip"))[1] == bytes(1 << 20)


async def test_errors_of_clients_leave_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(body_max=10) as server:
        with caplog.at_level(logging.INFO, "rtml.serving"):
            assert (await server.post("/v1/echo", b"x" * 11))[0] == 413
            assert (await server.post("/v1/echo", b"x", Content_Encoding="zip"))[0] == 415
            assert (await server.post("/v1/echo", b"x", Content_Encoding="gzip"))[0] == 400
    assert not caplog.records


async def test_json_that_is_nested_too_deeply_is_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = App("deep")

    async def take(x: Any) -> str:
        return "taken"

    deep.endpoint("/v1/take")(rtml.task(take))
    async with serving(deep) as server:

        def submit(prepared: Any, args: Any, kwargs: Any, options: Any) -> Any:
            codec.encode_call(args, kwargs, None, Future)
            raise AssertionError("it is not too deep")

        monkeypatch.setattr(server.engine, "submit", submit)
        status, answer, _ = await server.post("/v1/take", b'{"x":' + b"[" * 800 + b"]" * 800 + b"}", "application/json")
        assert (status, answer["type"]) == (400, "InvalidInput")
        assert "nested too deeply" in answer["error"]


@pytest.mark.parametrize(
    ("parameters", "output", "data", "said"),
    [
        ({"timeout": 10**400}, {}, [1, 2], "parameter timeout must be a whole number"),
        ({"priority": 2**64}, {}, [1, 2], "parameter priority must be a whole number"),
        ({}, {"binary_data": "false"}, [1, 2], "binary_data must be true or false, not 'false'"),
        ({}, {}, [[1], [2]], "not nested as its shape [1, 2]"),
    ],
)
async def test_inference_requests_that_lie(parameters: Any, output: Any, data: Any, said: str) -> None:
    async with serving() as server:
        inputs = [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": data}]
        body = {"inputs": inputs, "parameters": parameters, "outputs": [{"name": "y", "parameters": output}]}
        status, answer, _ = await server.post("/v2/models/double/infer", body)
        assert (status, said in answer["error"]) == (400, True), answer


async def test_models_that_return_what_they_did_not_declare() -> None:
    lying = App("lying")
    kinds: dict[str, Any] = {"text": np.array(["no"]), "complex": np.array([1j]), "float": np.array([1.5])}

    async def pick(x: Any) -> Any:
        return kinds[x[0].decode()]

    inputs, outputs = [TensorSpec("x", "BYTES", (1,))], [TensorSpec("y", "INT32", (1,))]
    lying.model("pick", rtml.task(pick), inputs=inputs, outputs=outputs)
    async with serving(lying) as server:
        for kind in kinds:
            body = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": [kind]}]}
            status, answer, _ = await server.post("/v2/models/pick/infer", body)
            assert status == 500
            assert answer["error"].startswith("output 'y' is declared as INT32, but the model returned ")


async def test_a_media_type_may_have_parameters() -> None:
    pages = App("pages")

    async def page() -> Content:
        return Content("é".encode(), "text/html; charset=utf-8")

    pages.endpoint("/v1/page")(rtml.task(page))
    async with serving(pages) as server:
        status, body, headers = await server.post("/v1/page")
        assert (status, body, headers["Content-Type"]) == (200, "é".encode(), "text/html; charset=utf-8")


async def test_clients_are_told_that_their_connection_ends_when_the_gateway_stops() -> None:
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
        await asyncio.sleep(0.05)
        release.set()
        status, _, headers = await request
        assert (status, headers["Connection"]) == (200, "close")
        await stopping


async def test_requests_that_outlast_the_drain_are_told_and_it_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtml.serving.gateway._GOODBYE", 60.0)  # what it must not wait for
    async with serving(app, drain_timeout=0.3) as server:
        requests = [asyncio.create_task(server.post("/v1/wait")) for _ in range(3)]
        await server.engine.started.wait()
        async with asyncio.timeout(20):
            await server.gateway.stop()
        for status, answer, headers in await asyncio.gather(*requests):
            assert (status, answer["type"]) == (503, "Stopping")
            assert headers["Retry-After"] == "1"
        assert server.engine.cancelled.is_set()


async def test_arguments_that_are_no_data_stay_the_programs_errors() -> None:
    """`SerializationError` of a result is not the client's fault."""
    odd = App("odd")

    async def odd_result() -> Any:
        raise SerializationError("the result is no plain data")

    odd.endpoint("/v1/odd")(rtml.task(odd_result))
    async with serving(odd) as server:
        status, answer, _ = await server.post("/v1/odd")
        assert (status, answer["type"]) == (500, "SerializationError")


async def test_small_requests_do_not_make_large_answers() -> None:
    async with serving() as server:
        tensor = {"name": "x", "shape": [100_001, 2], "datatype": "FP32", "data": [0] * 200_002}
        twice = {"inputs": [tensor], "outputs": [{"name": "y"}, {"name": "y", "parameters": {"binary_data": True}}]}
        status, answer, _ = await server.post("/v2/models/double/infer", twice)
        assert (status, answer["error"]) == (400, "output 'y' is asked for twice")
        named = {"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"classification": 1}}]}
        status, answer, _ = await server.post("/v2/models/double/infer", named)
        assert (status, "at most 100000 classes" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"inputs": [], "parameters": {"a": ' + b"[" * 50_000, {}, 400),
        (b'{"inputs": ' + b'[{"name": "x", "shape": [1, 2], "datatype": "FP32"},' * 10_000, {}, 400),
        (b'{"inputs": [{"name": "x", "shape": [' + b"1," * 100_000 + b'1], "datatype": "FP32", "data": []}]}', {}, 400),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "9" * 15}, 400),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "-1"}, 400),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "14", "Accept-Encoding": "gzip;q=x," * 500}, 400),
        (b"", {"Inference-Header-Content-Length": "0"}, 200),
    ],
    ids=["deep", "unfinished", "rank", "long head", "negative head", "encodings", "nothing"],
)
async def test_bodies_of_the_protocol_that_are_not_meant_well(body: bytes, headers: Any, status: int) -> None:
    async with serving() as server:
        found, answer, _ = await server.get("/v2/models/double/infer", "POST", data=body, headers=headers)
        assert found == status, answer


async def test_a_body_in_very_many_chunks() -> None:
    async with serving(body_max=1 << 20) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            writer.write(b"1\r\nx\r\n" * 1000)
            await writer.drain()
            # The others are answered meanwhile.
            assert (await server.post("/v1/echo", b"y"))[1] == b"y"
        writer.write(b"0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(100_000) == b"x" * 100_000
        writer.close()
        await writer.wait_closed()


async def test_a_large_body_that_ends_early_leaves_nothing_behind() -> None:
    async with serving(read_timeout=0.3) as server:
        for length in (300_000, 60_000_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
            writer.write(head + b"x" * 1000)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 408")
            writer.close()
            await writer.wait_closed()
        assert (await server.post("/v1/echo", b"x" * 400_000))[1] == b"x" * 400_000
