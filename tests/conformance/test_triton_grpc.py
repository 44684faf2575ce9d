"""Triton's gRPC clients on a real engine: all datatypes x compression x batches, one by one and in streams.

What else they can ask is in tests/integration/test_grpc.py.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as aio_client
from tritonclient.grpc import service_pb2

from tests.conformance.conftest import Gateway
from tests.conformance.onnxmodels import ROWS

# Keeps grpc's poller, whose descriptors live as long as somebody uses grpc.
grpc.aio.init_grpc_aio()

FORMS = list(itertools.product((0, 1, 5), (None, "gzip", "deflate")))

#: Datatype -> where its elements stand if they do not travel raw.
TYPED = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
    "RAW": "bytes_contents",
}


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[Any]:
    made = sync_client.InferenceServerClient(f"127.0.0.1:{gateway.grpc_port}")
    yield made
    made.close()


def question(client: Any, datatype: str, rows: int) -> tuple[Any, dict[str, Any]]:
    array = np.repeat(ROWS[datatype][None], rows, axis=0)
    tensor = client.InferInput("x", list(array.shape), "BYTES" if datatype == "RAW" else datatype)
    tensor.set_data_from_numpy(array)
    return array, {"model_name": f"same_{datatype}", "inputs": [tensor], "request_id": "17"}


def check(result: Any, array: Any) -> None:
    found = result.as_numpy("y")
    assert found.shape == array.shape
    assert found.astype(array.dtype).tolist() == array.tolist()
    assert result.get_response().id == "17"


@pytest.mark.parametrize("datatype", ROWS)
def test_every_datatype(client: Any, datatype: str) -> None:
    for rows, compression in FORMS:
        array, arguments = question(sync_client, datatype, rows)
        check(client.infer(**arguments, compression_algorithm=compression, client_timeout=60), array)


@pytest.mark.asyncio
@pytest.mark.parametrize("datatype", ROWS)
async def test_every_datatype_with_asyncio(gateway: Gateway, datatype: str) -> None:
    async with aio_client.InferenceServerClient(f"127.0.0.1:{gateway.grpc_port}") as client:
        for rows, compression in FORMS:
            array, arguments = question(aio_client, datatype, rows)
            check(await client.infer(**arguments, compression_algorithm=compression, client_timeout=60), array)


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents(client: Any, datatype: str) -> None:
    array = np.repeat(ROWS[datatype][None], 3, axis=0)
    request = service_pb2.ModelInferRequest(model_name=f"same_{datatype}", id="17")
    tensor = request.inputs.add(name="x", datatype="BYTES" if datatype == "RAW" else datatype, shape=array.shape)
    getattr(tensor.contents, TYPED[datatype]).extend(array.ravel().tolist())
    check(sync_client.InferResult(client._client_stub.ModelInfer(request, timeout=60)), array)


def test_a_stream_of_every_datatype(client: Any) -> None:
    found: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: found.put((result, error)))
    sent = [question(sync_client, datatype, rows) for datatype in ROWS for rows in (0, 1, 5)]
    for _, arguments in sent:
        client.async_stream_infer(**arguments)
    client.stop_stream()
    for array, _ in sent:
        result, error = found.get_nowait()
        assert error is None
        check(result, array)
