"""KServe's clients, REST and gRPC, against the gateway."""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool

from tests.conformance.conftest import Gateway
from tests.conformance.onnxmodels import ROWS

pytestmark = pytest.mark.asyncio

# Keeps grpc's poller, whose descriptors live as long as somebody uses grpc.
grpc.aio.init_grpc_aio()

#: Those that the client's arrays can hold, and whether binary; it refuses FP16 as JSON, which has no typed contents.
DATATYPES = [
    (datatype, binary)
    for datatype in ROWS
    for binary in (True, False)
    if datatype not in ("BF16", "RAW") and (binary or datatype != "FP16")
]


class KServe:
    """The client's modules. Importing the package would import its server, too, which needs far more than is here."""

    def __init__(self) -> None:
        spec = find_spec("kserve")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = types.ModuleType("kserve")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["kserve"] = package
        # Its messages have the names of those of Triton's client: one process has room for one of them, but in a pool
        # of its own.
        pool = descriptor_pool.DescriptorPool()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(descriptor_pool, "Default", lambda: pool)
            import kserve.inference_client as client
            import kserve.protocol.infer_type as types_

        self.open_rest: Any = lambda: client.InferenceRESTClient(client.RESTConfig(protocol="v2", timeout=60))
        self.open_grpc: Any = client.InferenceGRPCClient
        self.types = types_

    def request(self, datatype: str, rows: int, *, binary_in: bool, binary_out: bool = True) -> tuple[Any, Any]:
        array = np.repeat(ROWS[datatype][None], rows, axis=0)
        tensor = self.types.InferInput("x", list(array.shape), datatype)
        tensor.set_data_from_numpy(array, binary_data=binary_in)
        outputs = [self.types.RequestedOutput("y", {"binary_data": binary_out})]
        return array, self.types.InferRequest(f"same_{datatype}", [tensor], request_id="17", request_outputs=outputs)


@pytest.fixture(scope="module")
def kserve() -> Iterator[KServe]:
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "kserve"}
    yield KServe()
    for name in [name for name in sys.modules if name.partition(".")[0] == "kserve"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest_asyncio.fixture
async def rest(kserve: KServe) -> AsyncIterator[Any]:
    """The client belongs to an event loop."""
    async with kserve.open_rest() as client:
        yield client


@pytest.fixture
def url(gateway: Gateway) -> str:
    return f"http://127.0.0.1:{gateway.port}"


def check(result: Any, array: Any) -> None:
    (output,) = result.outputs
    assert list(output.shape) == list(array.shape)
    found = output.as_numpy()
    if found.dtype == object:
        found = np.array([text.encode() if isinstance(text, str) else text for text in found.flat], object)
    assert found.reshape(array.shape).tolist() == array.tolist()
    assert result.id == "17"


async def test_health(rest: Any, url: str) -> None:
    assert await rest.is_server_live(url) is True
    assert await rest.is_server_ready(url) is True
    assert await rest.is_model_ready(url, "double") is True
    assert await rest.is_model_ready(url, "nobody") is False


@pytest.mark.parametrize("binary_out", [True, False], ids=["to binary", "to json"])
@pytest.mark.parametrize(("datatype", "binary_in"), DATATYPES)
async def test_rest(kserve: KServe, rest: Any, url: str, datatype: str, binary_in: bool, binary_out: bool) -> None:
    for rows in (0, 1, 5):
        array, request = kserve.request(datatype, rows, binary_in=binary_in, binary_out=binary_out)
        check(await rest.infer(url, request, model_name=f"same_{datatype}"), array)


async def test_a_plain_dictionary(rest: Any, url: str) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [[1, 2, 3, 4]]}
    result = await rest.infer(url, {"inputs": [tensor]}, model_name="double")
    assert result.model_name == "double"
    assert result.outputs[0].data == [2, 4, 6, 8]


async def test_errors_show_their_text(rest: Any, url: str) -> None:
    with pytest.raises(httpx.HTTPStatusError, match=r"takes \[-1, 4\].*'400 Bad Request'"):
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
        await rest.infer(url, {"inputs": [tensor]}, model_name="double")
    with pytest.raises(httpx.HTTPStatusError, match="'404 Not Found'"):
        await rest.infer(url, {"inputs": []}, model_name="nobody")


# Not the last one: the client logs the error, and pytest keeps the log with its frames until the next test.
async def test_a_request_that_is_refused_by_grpc(kserve: KServe, gateway: Gateway) -> None:
    async with kserve.open_grpc(f"127.0.0.1:{gateway.grpc_port}", retries=0) as client:
        _, request = kserve.request("FP32", 1, binary_in=True)
        request.model_name = "nobody"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("datatype", "binary"), DATATYPES)
async def test_grpc(kserve: KServe, gateway: Gateway, datatype: str, binary: bool) -> None:
    async with kserve.open_grpc(f"127.0.0.1:{gateway.grpc_port}") as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(f"same_{datatype}")
        for rows in (1, 5):
            array, request = kserve.request(datatype, rows, binary_in=binary)
            check(await client.infer(request), array)
