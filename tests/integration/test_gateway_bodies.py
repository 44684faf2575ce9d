"""Bodies on their way: large tensors, compressed answers, tensors in shared memory."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtml.serving.conditions import Conditions
from rtml.serving.features import Features
from rtml.serving.oip import HEADER_LENGTH
from tests.integration.gateways import Server, serving

pytestmark = pytest.mark.asyncio

ROWS = 100_000


def binary_request(array: Any, **more: Any) -> tuple[bytes, dict[str, str]]:
    data = array.tobytes()
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": list(array.shape),
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **more}).encode()
    return head + data, {HEADER_LENGTH: str(len(head))}


def binary_reply(body: bytes, headers: Any) -> tuple[Any, bytes]:
    length = int(headers[HEADER_LENGTH])
    return json.loads(body[:length]), body[length:]


async def infer(server: Server, array: Any, **headers: str) -> tuple[Any, bytes, Any]:
    body, own = binary_request(array)
    url = f"http://127.0.0.1:{server.port}/v2/models/double/infer"
    async with server.session.post(url, data=body, headers={**own, **headers}) as response:
        assert response.status == 200
        head, data = binary_reply(await response.read(), response.headers)
        return head, data, response.headers


async def test_a_large_tensor_goes_in_and_out() -> None:
    array = np.random.default_rng(0).standard_normal((ROWS, 2)).astype("f4")
    async with serving() as server:
        head, data, headers = await infer(server, array)
        assert "Content-Encoding" not in headers  # random numbers do not shrink, so nobody tries
        assert head["outputs"][0]["shape"] == [ROWS, 2]
        assert np.array_equal(np.frombuffer(data, "f4").reshape(ROWS, 2), array * 2)
        # The connection goes on.
        for rows in (1, 0, ROWS):
            head, data, _ = await infer(server, array[:rows])
            assert len(data) == 8 * rows


@pytest.mark.parametrize("rows", [500, ROWS])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_answers_are_compressed_when_the_client_wants_it(rows: int, encoding: str) -> None:
    array = np.zeros((rows, 2), "f4")
    body, own = binary_request(array)
    async with serving() as server:
        address = f"http://127.0.0.1:{server.port}/v2/models/double/infer"
        headers = {**own, "Accept-Encoding": encoding, "Content-Encoding": encoding}
        packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
        async with server.session.post(address, data=packed, headers=headers) as response:
            assert response.headers["Content-Encoding"] == encoding
            assert response.headers["Vary"] == "Accept-Encoding"
            # aiohttp's client unpacks; the header counts plain JSON.
            _, data = binary_reply(await response.read(), response.headers)
            assert np.array_equal(np.frombuffer(data, "f4"), array.ravel())
            assert int(response.headers["Content-Length"]) < len(data)
        async with server.session.post(address, data=body, headers={**own, "Accept-Encoding": "identity"}) as response:
            assert "Content-Encoding" not in response.headers
            assert binary_reply(await response.read(), response.headers)[1] == array.tobytes()


# --- shared memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path("/dev/shm") / f"rtml-test-{os.getpid()}"
    path.write_bytes(np.array([[1, 2], [3, 4]], "f4").tobytes() + bytes(16))
    yield path
    path.unlink()


def shared(offset: int = 0, size: int = 16, region: str = "r") -> dict[str, Any]:
    found: dict[str, Any] = {"shared_memory_region": region, "shared_memory_byte_size": size}
    return {**found, "shared_memory_offset": offset} if offset else found


def shared_request(place: Any, output: Any = None) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "parameters": place}]}
    return {**found, "outputs": [{"name": "y", "parameters": output}]} if output else found


ALLOWED = Conditions(features=Features(shared_memory=True))


async def test_tensors_in_shared_memory(segment: Path) -> None:
    base = "/v2/systemsharedmemory"
    async with serving(conditions=ALLOWED) as server:
        assert "system_shared_memory" in (await server.get("/v2"))[1]["extensions"]
        register = {"key": f"/{segment.name}", "offset": 0, "byte_size": 32}
        assert (await server.post(f"{base}/region/r/register", register))[0] == 200
        assert (await server.post(f"{base}/region/r/register", register))[0] == 400
        expected = [{"name": "r", "key": f"/{segment.name}", "offset": 0, "byte_size": 32}]
        assert (await server.get(f"{base}/status"))[1] == expected
        assert (await server.get(f"{base}/region/r/status"))[1] == expected
        status, body, _ = await server.post("/v2/models/double/infer", shared_request(shared(), shared(16)))
        assert status == 200
        assert body["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2, 2]}]
        assert np.frombuffer(segment.read_bytes(), "f4").tolist() == [1, 2, 3, 4, 2, 4, 6, 8]
        status, body, _ = await server.post("/v2/models/double/infer", shared_request(shared(16)))
        assert body["outputs"][0]["data"] == [4, 8, 12, 16]
        assert (await server.post(f"{base}/region/r/unregister"))[0] == 200
        assert (await server.get(f"{base}/region/r/status"))[0] == 404
        assert (await server.post(f"{base}/unregister"))[0] == 200
        assert (await server.get(f"{base}/status"))[1] == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (shared_request(shared(17)), "reach beyond the 32 bytes"),
        (shared_request(shared(0, 15)), "tensor 'x' brings 15 bytes"),
        (shared_request(shared(0, 16, "s")), "there is no shared memory region 's'"),
        (shared_request(shared(), shared(16, 8)), "an output of 16 bytes does not fit into the 8 bytes"),
        (shared_request({"shared_memory_region": 1}), "must be the name of a region"),
        (shared_request({"shared_memory_region": "r"}), "shared_memory_byte_size must be a number"),
        (shared_request({**shared(), "shared_memory_offset": -1}), "shared_memory_offset must be a number"),
        (shared_request({**shared(), "binary_data_size": 16}), "is in shared memory and in the body, too"),
        (
            {"inputs": [{"name": "z", "datatype": "FP32", "shape": [2, 2], "parameters": shared()}]},
            "input 'z' is unknown",
        ),
    ],
)
async def test_tensors_that_are_not_where_they_say(segment: Path, request_: Any, message: str) -> None:
    async with serving(conditions=ALLOWED) as server:
        register = {"key": segment.name, "byte_size": 32}
        assert (await server.post("/v2/systemsharedmemory/region/r/register", register))[0] == 200
        status, body, _ = await server.post("/v2/models/double/infer", request_)
        assert (status, body["type"]) == (400, "InvalidInput")
        assert message in body["error"]


async def test_shared_memory_is_off_unless_it_is_allowed(segment: Path) -> None:
    async with serving() as server:
        for method, path in (
            ("GET", "/v2/systemsharedmemory/status"),
            ("POST", "/v2/systemsharedmemory/region/r/register"),
            ("POST", "/v2/systemsharedmemory/unregister"),
        ):
            status, body, _ = await server.get(path, method)
            assert (status, body["type"]) == (501, "NotEnabled")
            assert "--allow-shared-memory" in body["error"]
        for request_ in (shared_request(shared()), shared_request(shared(), shared())):
            status, body, _ = await server.post("/v2/models/double/infer", request_)
            assert (status, body["type"]) == (501, "NotEnabled")
