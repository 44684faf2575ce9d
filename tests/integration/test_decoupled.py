"""Models with any number of answers to a request: generators, over HTTP's `generate_stream` and gRPC's streams."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as aio_client
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

import rtml
from rtml.errors import InvalidInput
from rtml.serving import App
from rtml.serving.app import TensorSpec
from tests.integration.gateways import Server, serving

pytestmark = pytest.mark.asyncio

# grpc's poller has descriptors that live as long as somebody uses grpc: open them before the check of leaks looks.
grpc.aio.init_grpc_aio()

app = App("tokens")


@app.endpoint("/v1/say")
@rtml.task
def say(text_input: str, times: int = 2, fail: bool = False) -> Iterator[str]:
    for number in range(times):
        yield f"{text_input}{number}"
    if fail:
        raise InvalidInput("no more words")


@app.endpoint("/v1/places")
@rtml.task
async def places(count: int) -> AsyncIterator[dict[str, int]]:
    for number in range(count):
        yield {"place": number}


@app.endpoint("/v1/untyped")
@rtml.task
def untyped(text: str):  # type: ignore[no-untyped-def]
    yield {"text": text}


gates: dict[int, asyncio.Event] = {}


@rtml.task
async def count(x: Any) -> Any:
    """As many answers as the number says; those of 100 wait for those of others."""
    for number in range(int(x[0])):
        if int(x[0]) == 100 and number == 1:
            await gates[100].wait()
        yield x * 0 + number


app.model("count", count, inputs=[TensorSpec("x", "INT32", (1,))], outputs=[TensorSpec("y", "INT32", (1,))])


def events(body: bytes) -> list[Any]:
    *found, rest = body.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data: ") for event in found)
    return [json.loads(event[6:]) for event in found]


# --- HTTP -------------------------------------------------------------------------------------------------------------


async def test_a_generator_is_described_as_decoupled() -> None:
    async with serving(app) as server:
        for name in ("say", "places", "untyped", "count"):
            policy = (await server.get(f"/v2/models/{name}/config"))[1]["model_transaction_policy"]
            assert policy == {"decoupled": True}
        say = (await server.get("/v2/models/say"))[1]
        assert say["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": [1]}
        assert say["outputs"] == [{"name": "output", "datatype": "BYTES", "shape": [1]}]


async def test_each_item_is_an_answer_of_generate_stream() -> None:
    async with serving(app) as server:
        status, body, headers = await server.post("/v2/models/say/generate_stream", {"text_input": "a", "id": "7"})
        assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        head = {"model_name": "say", "model_version": "1", "id": "7"}
        assert events(body) == [{**head, "text_output": "a0"}, {**head, "text_output": "a1"}]
        _, body, _ = await server.post("/v2/models/places/versions/1/generate_stream", {"count": 1})
        assert events(body)[0]["text_output"] == '{"place":0}'
        _, body, _ = await server.post("/v2/models/untyped/generate_stream", {"text": "b"})
        assert events(body)[0]["text_output"] == '{"text":"b"}'
        _, body, _ = await server.post("/v2/models/count/generate_stream", {"x": 3})
        assert [event["y"] for event in events(body)] == [0, 1, 2]
        status, body, _ = await server.post("/v2/models/count/generate_stream", {"x": 0})
        assert (status, body) == (200, b"")
        (found,) = (await server.get("/v2/models/count/stats"))[1]["model_stats"]
        assert found["inference_stats"]["success"]["count"] == found["inference_stats"]["queue"]["count"] == 2
        assert [found["response_stats"][place]["success"]["count"] for place in "012"] == [1, 1, 1]


async def test_what_goes_wrong_first_has_a_status_and_later_is_an_event() -> None:
    async with serving(app) as server:
        path = "/v2/models/say/generate_stream"
        status, body, _ = await server.post(path, {"text_input": "a", "times": 1, "fail": True})
        first, last = events(body)
        assert (status, first["text_output"]) == (200, "a0")
        assert last == {"error": "no more words", "type": "InvalidInput"}
        status, body, _ = await server.post(path, {"text_input": "a", "times": 0, "fail": True})
        assert (status, body) == (400, {"error": "no more words", "type": "InvalidInput"})
        status, body, _ = await server.post(path, {"times": 1})
        assert (status, body["type"]) == (400, "InvalidInput")
        status, body, _ = await server.post(path, {"text_input": "a", "timeout": "soon"})
        assert (status, body["type"]) == (400, "InvalidInput")
        status, body, _ = await server.post(path, {"text_input": "a", "sequence_id": 3})
        assert (status, body["type"]) == (501, "NotSupported")


async def test_parameters_of_a_stream_are_those_of_inference() -> None:
    async with serving(app) as server:
        await server.post("/v2/models/say/generate_stream", {"text_input": "a", "timeout": 30_000_000, "priority": 1})
        (options,) = server.engine.options
        assert options.deadline == pytest.approx(30, abs=1)
        assert options.priority == 1


async def test_whoever_wants_one_answer_is_told_how_to_have_all() -> None:
    async with serving(app) as server:
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}
        status, body, _ = await server.post("/v2/models/say/infer", {"inputs": [tensor]})
        assert (status, body["type"]) == (400, "Decoupled")
        assert "/v2/models/say/generate_stream" in body["error"]
        assert not server.engine.options  # nothing was run for it
        path = "/v2/models/say/generate"
        status, body, _ = await server.post(path, {"text_input": "a", "times": 1})
        assert (status, body["text_output"]) == (200, "a0")
        for times in (0, 2):
            status, body, _ = await server.post(path, {"text_input": "a", "times": times})
            assert (status, body["type"]) == (400, "Decoupled")
            assert "generate_stream" in body["error"]


async def test_a_client_that_goes_away_ends_the_generator() -> None:
    gates[100] = asyncio.Event()
    async with serving(app) as server:
        url = f"http://127.0.0.1:{server.port}/v2/models/count/generate_stream"
        async with server.session.post(url, json={"x": 100}) as response:
            assert b"data: " in await response.content.readline()
        await asyncio.wait_for(server.engine.cancelled.wait(), 10)


# --- gRPC -------------------------------------------------------------------------------------------------------------


def tensor(value: int, client: Any = aio_client) -> Any:
    made = client.InferInput("x", [1], "INT32")
    made.set_data_from_numpy(np.array([value], "i4"))
    return made


def final(response: Any) -> bool:
    return bool(response.parameters["triton_final_response"].bool_param)


async def ask(server: Server, *values: int, empty_final: bool) -> list[tuple[str, int | None, bool]]:
    """(id, number or None, whether it says to be the last) of each answer."""

    async def requests() -> AsyncIterator[Any]:
        for value in values:
            request = service_pb2.ModelInferRequest(model_name="count", id=str(value))
            request.inputs.add(name="x", datatype="INT32", shape=[1]).contents.int_contents.append(value)
            if empty_final:  # which the asyncio client cannot ask for
                request.parameters["triton_enable_empty_final_response"].bool_param = True
            yield request

    found = []
    async with aio_client.InferenceServerClient(f"127.0.0.1:{server.gateway.grpc_port}") as client:
        async for answer in client._client_stub.ModelStreamInfer(requests()):
            assert answer.error_message == ""
            response = answer.infer_response
            raw = response.raw_output_contents
            found.append((response.id, int(np.frombuffer(raw[0], "i4")[0]) if raw else None, final(response)))
            if response.id == "2":
                gates[100].set()
    return found


async def test_a_request_has_several_answers_and_an_end_if_it_asks_for_one() -> None:
    async with serving(app, grpc_port=0) as server:
        gates[100] = asyncio.Event()
        assert await ask(server, 2, empty_final=False) == [("2", 0, False), ("2", 1, False)]
        assert await ask(server, 2, empty_final=True) == [("2", 0, False), ("2", 1, False), ("2", None, True)]
        assert await ask(server, 0, empty_final=True) == [("0", None, True)]
        assert await ask(server, 0, empty_final=False) == []


async def test_a_long_answer_does_not_hold_up_those_of_later_requests() -> None:
    async with serving(app, grpc_port=0) as server:
        gates[100] = asyncio.Event()
        found = await asyncio.wait_for(ask(server, 100, 2, empty_final=True), 20)
        assert [number for name, number, _ in found if name == "100"] == [*range(100), None]
        assert [number for name, number, _ in found if name == "2"] == [0, 1, None]


async def test_an_error_amid_the_answers_is_the_requests_last() -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        text = aio_client.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"a"], object))
        times = aio_client.InferInput("times", [1], "INT64")
        times.set_data_from_numpy(np.array([1], "i8"))
        fails = aio_client.InferInput("fail", [1], "BOOL")
        fails.set_data_from_numpy(np.array([True]))
        yield {"model_name": "say", "inputs": [text, times, fails]}
        yield {"model_name": "count", "inputs": [tensor(1)]}

    found: list[Any] = []
    async with serving(app, grpc_port=0) as server:
        async with aio_client.InferenceServerClient(f"127.0.0.1:{server.gateway.grpc_port}") as client:
            async for result, error in client.stream_infer(requests()):
                array = None if error else result.as_numpy("output")
                found.append(error.message() if error else "y" if array is None else array[0])
        assert sorted(found, key=str) == [b"a0", "no more words", "y"]
        assert found.index(b"a0") < found.index("no more words")


async def test_one_answer_over_grpc_is_refused() -> None:
    async with serving(app, grpc_port=0) as server:
        async with aio_client.InferenceServerClient(f"127.0.0.1:{server.gateway.grpc_port}") as client:
            assert (await client.get_model_config("count")).config.model_transaction_policy.decoupled
            with pytest.raises(InferenceServerException, match="ModelStreamInfer"):
                await client.infer("count", [tensor(1)])
        assert not server.engine.options


async def test_the_synchronous_client() -> None:
    def ask(url: str) -> list[tuple[int | None, bool]]:
        results: queue.Queue[Any] = queue.Queue()
        with sync_client.InferenceServerClient(url) as client:
            client.start_stream(lambda result, error: results.put((result, error)))
            client.async_stream_infer("count", [tensor(3, sync_client)], enable_empty_final_response=True)
            found: list[tuple[int | None, bool]] = []
            while not (found and found[-1][1]):
                result, error = results.get(timeout=20)
                assert error is None
                array = result.as_numpy("y")
                found.append((None if array is None else int(array[0]), final(result.get_response())))
            client.stop_stream()
        return found

    async with serving(app, grpc_port=0) as server:
        expected: list[tuple[int | None, bool]] = [(0, False), (1, False), (2, False), (None, True)]
        assert await asyncio.to_thread(ask, f"127.0.0.1:{server.gateway.grpc_port}") == expected
