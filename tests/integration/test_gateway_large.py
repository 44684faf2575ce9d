"""Large JSON: read and written beside the gateway, which goes on answering others."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.serving import App, generate, oip
from rtml.serving.app import TensorSpec
from rtml.serving.aside import READ_ASIDE, Aside
from tests.integration.gateways import Server, serving

pytestmark = pytest.mark.asyncio

app = App("large")


@rtml.task
def same(x: Any) -> Any:
    return x


@rtml.task
def many(n: Any) -> Any:
    return np.arange(int(n[0]), dtype="f4")


for name, datatype in {"same": "FP32", "texts": "BYTES", "longs": "INT64"}.items():
    app.model(name, same, inputs=[TensorSpec("x", datatype, (-1,))], outputs=[TensorSpec("y", datatype, (-1,))])
app.model("many", many, inputs=[TensorSpec("n", "INT64", (1,))], outputs=[TensorSpec("y", "FP32", (-1,))])


@app.endpoint("/v1/count")
@rtml.task
def count(numbers: list[float], scale: float = 1.0) -> float:
    return len(numbers) * scale


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the bodies that are read in the gateway itself."""
    sizes: list[int] = []
    for module, function in ((oip, "decode_request"), (generate, "decode")):
        plain = getattr(module, function)

        def counted(body: Any, *arguments: Any, plain: Any = plain) -> Any:
            sizes.append(len(body))
            return plain(body, *arguments)

        monkeypatch.setattr(module, function, counted)
    return sizes


def body(data: list[Any], datatype: str = "FP32", **more: Any) -> bytes:
    tensor = {"name": "x", "datatype": datatype, "shape": [len(data)], "data": data}
    return json.dumps({"inputs": [tensor], "id": "7", **more}).encode()


async def infer(server: Server, model: str, data: bytes, verb: str = "infer", **headers: str) -> tuple[int, Any]:
    path = f"/v2/models/{model}/{verb}"
    status, found, _ = await server.post(path, io.BytesIO(data), "application/json", **headers)
    return status, found


async def test_large_requests_and_replies_are_as_small_ones(here: list[int]) -> None:
    numbers = [number / 8 for number in range(100_000)]
    async with serving(app) as server:
        status, found = await infer(server, "same", body(numbers))
        assert (status, found["id"], found["outputs"][0]["shape"]) == (200, "7", [100_000])
        assert found["outputs"][0]["data"] == numbers
        status, found = await infer(server, "longs", body(list(range(2**62, 2**62 + 50_000)), "INT64"))
        assert found["outputs"][0]["data"][-1] == 2**62 + 49_999
        texts = [f"text {number}" for number in range(50_000)]
        status, found = await infer(server, "texts", body(texts, "BYTES"))
        assert found["outputs"][0]["data"] == texts
        status, found = await infer(server, "same", json.dumps({"x": numbers, "id": 8}).encode(), "generate")
        assert (status, found["id"], found["y"]) == (200, "8", numbers)
        status, found = await infer(server, "same", json.dumps({"x": numbers}).encode(), "generate_stream")
        assert json.loads(found.removeprefix(b"data: "))["y"] == numbers
        assert here == []
        status, found = await infer(server, "many", body([100_000], "INT64").replace(b'"x"', b'"n"'))
        assert found["outputs"][0]["data"][-1] == 99_999


async def test_replies_that_are_asked_for_as_binary_or_by_class() -> None:
    numbers = [number / 8 for number in range(100_000)]
    async with serving(app) as server:
        _, found = await infer(server, "same", body(numbers, parameters={"binary_data_output": True}))
        head = json.loads(found[: len(found) - 400_000])
        assert head["outputs"][0]["parameters"] == {"binary_data_size": 400_000}
        assert np.frombuffer(found[-400_000:], "f4").tolist() == numbers
        wanted = [{"name": "y", "parameters": {"classification": 1}}]
        _status, found = await infer(server, "same", body(numbers, outputs=wanted))
        assert found["outputs"][0]["data"] == ["12499.875000:99999"]


async def test_what_is_wrong_with_a_large_request_is_said_as_of_a_small_one() -> None:
    numbers = [0.5] * 100_000
    async with serving(app) as server:
        for wrong, message in (
            (body(numbers)[:-1], "the request is not an inference request"),
            (body(numbers).replace(b'"FP32"', b'"FP99"'), "FP99"),
            (body([*numbers, "a"]), "Expected `float`, got `str`"),
            (body(numbers, outputs=[{"name": "z"}]), "output 'z' is unknown"),
            (body(numbers, parameters={"timeout": "soon"}), "parameter timeout"),
        ):
            status, found = await infer(server, "same", wrong)
            assert (status, found["type"]) == (400, "InvalidInput"), found
            assert message in found["error"]
        shared = body(numbers).replace(b'"inputs": [', b'"inputs": [{"name": "s", "datatype": "FP32", "shape": [1],'
                                       b'"parameters": {"shared_memory_region": "r"}},')  # fmt: skip
        assert (await infer(server, "same", shared))[0] == 400


async def test_a_process_that_dies_is_replaced(here: list[int]) -> None:
    numbers = [0.5] * 100_000
    async with serving(app) as server:
        assert (await infer(server, "same", body(numbers)))[0] == 200
        process = server.gateway._aside._process
        assert process is not None
        process.kill()
        process.wait()
        assert (await infer(server, "same", body(numbers)))[0] == 200
        assert len(here) == 1
        assert (await infer(server, "same", body(numbers)))[0] == 200
        assert len(here) == 1
        replaced = server.gateway._aside._process
        assert replaced is not None
        pid = replaced.pid
    assert not Path(f"/proc/{pid}").exists()


async def test_others_are_answered_while_a_large_request_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = asyncio.Event(), asyncio.Event()
    read = Aside.read

    async def slow(self: Aside, *arguments: Any) -> Any:
        reading.set()
        await go_on.wait()
        return await read(self, *arguments)

    monkeypatch.setattr(Aside, "read", slow)
    async with serving(app) as server:
        large = asyncio.create_task(infer(server, "same", body([0.5] * 100_000)))
        await reading.wait()
        assert (await infer(server, "same", body([0.5])))[1]["outputs"][0]["data"] == [0.5]
        go_on.set()
        assert (await large)[0] == 200


async def test_a_large_body_of_an_endpoint_is_read_where_the_program_runs() -> None:
    numbers = [0.5] * READ_ASIDE
    async with serving(app) as server:
        sent = json.dumps({"numbers": numbers, "scale": 2}).encode()
        status, found, _ = await server.post("/v1/count", io.BytesIO(sent), "application/json")
        assert (status, found) == (200, 2.0 * READ_ASIDE)
        assert server.engine.largest >= READ_ASIDE
        sent = sent.replace(b"scale", b"scala")
        status, found, _ = await server.post("/v1/count", io.BytesIO(sent), "application/json")
        assert (status, found["type"]) == (400, "InvalidInput")
        assert "scala" in found["error"]


async def test_a_request_that_waits_to_be_read_for_longer_than_it_has_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Aside, *arguments: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(Aside, "read", never)
    async with serving(app) as server:
        for verb, sent in (("infer", body([0.5] * 100_000)), ("generate", json.dumps({"x": [0.5] * 100_000}).encode())):
            status, found = await infer(server, "same", sent, verb, x_rtml_deadline_ms="100")
            assert (status, found["type"], found["missing"]) == (504, "DeadlineExceeded", ["same"])
