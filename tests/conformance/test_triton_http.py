"""Triton's HTTP clients, on gevent and on asyncio: all datatypes x JSON and binary x compression x batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import gevent
import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from tests.conformance.conftest import Gateway
from tests.conformance.onnxmodels import ROWS

#: The client itself refuses to write these as JSON.
BINARY_ONLY = ("FP16", "BF16", "RAW")

FORMS = [
    (binary_in, binary_out, packed, unpacked)
    for binary_in, binary_out in itertools.product((True, False), repeat=2)
    for packed, unpacked in itertools.product((None, "gzip", "deflate"), repeat=2)
]


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[Any]:
    made = sync_client.InferenceServerClient(f"127.0.0.1:{gateway.port}", network_timeout=60, connection_timeout=60)
    yield made
    made.close()
    # gevent's hub keeps its descriptors as long as it lives.
    gevent.get_hub().destroy(destroy_loop=True)


def question(client: Any, datatype: str, rows: int, form: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The array, and the arguments of `infer` that send it."""
    binary_in, binary_out, packed, unpacked = form
    array = np.repeat(ROWS[datatype][None], rows, axis=0)
    tensor = client.InferInput("x", list(array.shape), "BYTES" if datatype == "RAW" else datatype)
    tensor.set_data_from_numpy(array, binary_data=binary_in)
    return array, {
        "model_name": f"same_{datatype}",
        "inputs": [tensor],
        "outputs": [client.InferRequestedOutput("y", binary_data=binary_out)],
        "request_compression_algorithm": packed,
        "response_compression_algorithm": unpacked,
        "request_id": "17",
    }


def forms(datatype: str) -> list[tuple[Any, ...]]:
    return [form for form in FORMS if datatype not in BINARY_ONLY or (form[0] and form[1])]


def check(result: Any, array: Any, form: tuple[Any, ...]) -> None:
    found = result.as_numpy("y")
    if form[1] is False and array.dtype == object:
        # The client leaves the texts of JSON as they are.
        found = np.array([text.encode() for text in found.flat], object).reshape(found.shape)
    assert found.shape == array.shape, form
    assert found.astype(array.dtype).tolist() == array.tolist(), form
    assert result.get_response()["id"] == "17", form


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("datatype", ROWS)
def test_every_datatype(client: Any, datatype: str, rows: int) -> None:
    for form in forms(datatype):
        array, arguments = question(sync_client, datatype, rows, form)
        check(client.infer(**arguments), array, form)


@pytest.mark.asyncio
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("datatype", ROWS)
async def test_every_datatype_with_asyncio(gateway: Gateway, datatype: str, rows: int) -> None:
    async with aio_client.InferenceServerClient(f"127.0.0.1:{gateway.port}", conn_timeout=60) as client:
        for form in forms(datatype):
            array, arguments = question(aio_client, datatype, rows, form)
            check(await client.infer(**arguments), array, form)


def test_requests_that_share_a_run(client: Any) -> None:
    questions = [question(sync_client, "INT64", rows, FORMS[0]) for rows in (0, 1, 5, 2) * 25]
    calls = [client.async_infer(**arguments) for _, arguments in questions]
    for (array, _), call in zip(questions, calls, strict=True):
        check(call.get_result(), array, FORMS[0])


def test_what_the_client_can_ask(client: Any, gateway: Gateway) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "rtml"
    assert sorted(client.get_model_metadata("double")["versions"]) == ["1", "2"]
    assert client.get_model_config("double", "1")["max_batch_size"] == 8
    assert {"name": "double", "version": "2", "state": "READY", "reason": ""} in client.get_model_repository_index()
    assert client.get_inference_statistics("double")["model_stats"][0]["name"] == "double"
    client.update_trace_settings("double", {"trace_rate": "7"})
    assert client.get_trace_settings("double")["trace_rate"] == "7"
    with pytest.raises(InferenceServerException, match="--allow-logging"):
        client.update_log_settings({"log_info": True})
    with pytest.raises(InferenceServerException, match="explicit"):
        client.load_model("double")


@pytest.mark.parametrize(("version", "factor"), [("1", 1), ("2", 2), ("", 2)])
def test_versions(client: Any, version: str, factor: int) -> None:
    array = np.arange(8, dtype="f4").reshape(2, 4)
    tensor = sync_client.InferInput("x", [2, 4], "FP32")
    tensor.set_data_from_numpy(array)
    result = client.infer("double", [tensor], model_version=version)
    assert (result.as_numpy("y") == factor * array).all()
    assert result.get_response()["model_version"] == (version or "2")


def test_errors_have_a_text_that_the_client_shows(client: Any) -> None:
    tensor = sync_client.InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3), "f4"))
    with pytest.raises(InferenceServerException, match=r"input 'x' has shape \[1, 3\]; the model takes \[-1, 4\]"):
        client.infer("double", [tensor])
    with pytest.raises(InferenceServerException, match="nobody"):
        client.infer("nobody", [tensor])


def test_classification_and_the_deadline(client: Any) -> None:
    tensor = sync_client.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 4, 3, 2]], "f4"))
    wanted = [sync_client.InferRequestedOutput("y", class_count=2)]
    assert client.infer("double", [tensor], outputs=wanted).as_numpy("y").tolist() == [[b"8.000000:1", b"6.000000:2"]]
    with pytest.raises(InferenceServerException, match=r"deadline|take"):
        client.infer("double", [tensor], timeout=1)
