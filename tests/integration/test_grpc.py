"""The gateway's gRPC side, asked by Triton's client: synchronous, asyncio and streams."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as aio_client
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

import rtml
from rtml.errors import ConnectionLost, InvalidInput, Overloaded
from rtml.link import AddressError
from rtml.serving import App
from rtml.serving.app import TensorSpec
from rtml.serving.conditions import Conditions
from rtml.serving.features import Features
from rtml.serving.grpc_messages import message
from tests.integration.gateways import Server, serving

pytestmark = pytest.mark.asyncio

app = App("grpc")

DATATYPES = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], "u1"),
    "UINT16": np.array([[0, 65535]], "u2"),
    "UINT32": np.array([[0, 2**32 - 1]], "u4"),
    "UINT64": np.array([[0, 2**64 - 1]], "u8"),
    "INT8": np.array([[-128, 127]], "i1"),
    "INT16": np.array([[-32768, 127]], "i2"),
    "INT32": np.array([[-(2**31), 127]], "i4"),
    "INT64": np.array([[-(2**63), 127]], "i8"),
    "FP16": np.array([[-1.5, 65504]], "f2"),
    "FP32": np.array([[-1.5, np.inf]], "f4"),
    "FP64": np.array([[-1.5, 1e300]], "f8"),
    "BYTES": np.array([[b"", b"a\0\xff"]], object),
    "BF16": np.array([[-1.5, 3.0]], ml_dtypes.bfloat16),
}


@rtml.task
def same(x: Any) -> Any:
    return x


@rtml.task
def total(x: Any) -> Any:
    return x.sum(keepdims=True)


@rtml.task
async def wait(x: Any) -> Any:
    await asyncio.Event().wait()


@rtml.task
async def nap(x: Any) -> Any:
    await asyncio.sleep(float(x[0]))
    return x


@rtml.task
def fail(x: Any) -> Any:
    kind = x[0].decode()
    if kind == "input":
        raise InvalidInput("the page is empty")
    if kind == "overloaded":
        raise Overloaded("too late", predicted=0.5, retry_after=2.5)
    if kind == "lost":
        raise ConnectionLost("nobody at unix:/secret")
    raise ZeroDivisionError("division by zero")


for _datatype in DATATYPES:
    _spec = [TensorSpec("x", _datatype, (-1, 2))]
    app.model(f"same_{_datatype}", same, inputs=_spec, outputs=[TensorSpec("y", _datatype, (-1, 2))])
_VECTOR = [TensorSpec("x", "FP32", (-1,))]
for _name, _function in {"total": total, "wait": wait, "nap": nap}.items():
    app.model(_name, _function, inputs=_VECTOR, outputs=[TensorSpec("y", "FP32", (-1,))], version="3")
app.model("fail", fail, inputs=[TensorSpec("x", "BYTES", (1,))], outputs=[TensorSpec("y", "BYTES", (1,))])


# grpc's poller has descriptors that live as long as somebody uses grpc: open them before the check of leaks looks.
grpc.aio.init_grpc_aio()


class Served:
    def __init__(self, server: Server, client: Any) -> None:
        self.server = server
        self.client = client
        self.url = f"127.0.0.1:{server.gateway.grpc_port}"

    async def infer(self, model: str, array: Any, datatype: str = "FP32", **more: Any) -> Any:
        return await self.client.infer(model, [tensor(array, datatype)], **more)

    async def counted(self, name: str, **labels: str) -> float:
        found = await self.server.metrics()
        where = sorted(labels.items())
        return sum(
            value
            for key, value in found.items()
            if key.partition("{")[0] == name and all(f'"{label}": "{text}"' in key for label, text in where)
        )


@asynccontextmanager
async def serving_grpc(*apps: App, **settings: Any) -> AsyncIterator[Served]:
    async with serving(*(apps or (app,)), grpc_port=0, **settings) as server:
        client = aio_client.InferenceServerClient(f"127.0.0.1:{server.gateway.grpc_port}")
        try:
            yield Served(server, client)
        finally:
            await client.close()


def tensor(array: Any, datatype: str = "FP32", client: Any = aio_client) -> Any:
    made = client.InferInput("x", list(np.shape(array)), datatype)
    made.set_data_from_numpy(np.asarray(array, None if datatype != "FP32" else "f4"))
    return made


async def failure(awaited: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        await awaited
    return str(caught.value.status()).removeprefix("StatusCode."), str(caught.value.message())


# --- what there is ----------------------------------------------------------------------------------------------------


async def test_the_server_describes_itself() -> None:
    async with serving_grpc() as served:
        client = served.client
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("total")
        assert await client.is_model_ready("total", "3")
        about = await client.get_server_metadata()
        assert about.name == "rtml"
        assert "classification" in about.extensions
        metadata = await client.get_model_metadata("total")
        assert (metadata.name, list(metadata.versions), metadata.platform) == ("total", ["3"], "python")
        assert (metadata.inputs[0].name, metadata.inputs[0].datatype, list(metadata.inputs[0].shape)) == (
            "x",
            "FP32",
            [-1],
        )
        config = (await client.get_model_config("total")).config
        assert (config.name, config.max_batch_size, config.input[0].data_type) == ("total", 0, 11)
        index = await client.get_model_repository_index()
        assert {model.name: (model.version, model.state) for model in index.models}["total"] == ("3", "READY")
        await served.infer("total", [1, 2])
        (found,) = (await client.get_inference_statistics("total")).model_stats
        assert (found.name, found.version, found.inference_count) == ("total", "3", 1)
        assert found.inference_stats.success.count == 1
        assert len((await client.get_inference_statistics()).model_stats) == len(app.models)


async def test_a_gateway_that_is_not_ready_says_so() -> None:
    async with serving_grpc() as served:
        served.server.engine.ready = False
        assert await served.client.is_server_live()
        assert not await served.client.is_server_ready()
        assert not await served.client.is_model_ready("total")


async def test_unknown_models_are_not_found() -> None:
    async with serving_grpc() as served:
        for awaited in (
            served.infer("nobody", [1]),
            served.infer("total", [1], model_version="9"),
            served.client.get_model_metadata("nobody"),
            served.client.get_model_config("nobody"),
            served.client.get_inference_statistics("nobody"),
            served.client.get_trace_settings("nobody"),
        ):
            assert (await failure(awaited))[0] == "NOT_FOUND"


async def test_what_is_not_allowed_says_so() -> None:
    async with serving_grpc() as served:
        client = served.client
        assert not (await client.get_cuda_shared_memory_status()).regions
        for awaited in (
            client.register_system_shared_memory("a", "/b", 1),
            client.get_system_shared_memory_status(),
            client.register_cuda_shared_memory("a", b"AAAA", 0, 1),
            client.get_trace_settings(),
            client.update_log_settings({"log_info": True}),
            client.load_model("total"),
            client.unload_model("total"),
        ):
            code, message = await failure(awaited)
            assert code == "UNIMPLEMENTED"
            assert "--" in message or "cannot be registered" in message


async def test_shared_memory_traces_and_the_log_where_they_are_allowed(tmp_path: Path) -> None:
    features = Features(shared_memory=True, trace=True, trace_file=str(tmp_path / "trace"), logging=True)
    values = np.arange(5, dtype="f4")
    async with serving_grpc(conditions=Conditions(features=features)) as served:
        client = served.client
        # Not by the client's own helper: it starts a process that watches over the memory.
        regions = {name: Path(f"/dev/shm/test-{os.getpid()}-{name}") for name in ("in", "out")}
        try:
            for name, region in regions.items():
                region.write_bytes(values.tobytes().ljust(64))
                await client.register_system_shared_memory(name, f"/test-{os.getpid()}-{name}", 64)
            status = (await client.get_system_shared_memory_status()).regions
            assert (status["in"].key, status["in"].byte_size) == (f"/test-{os.getpid()}-in", 64)
            sent = aio_client.InferInput("x", [5], "FP32")
            sent.set_shared_memory("in", 20)
            wanted = aio_client.InferRequestedOutput("y")
            wanted.set_shared_memory("out", 4, offset=8)
            result = await client.infer("total", [sent], outputs=[wanted])
            assert not result.get_response().raw_output_contents[0]
            assert np.frombuffer(regions["out"].read_bytes()[8:12], "f4") == [10]
            sent.set_shared_memory("in", 100)
            assert (await failure(client.infer("total", [sent])))[0] == "INVALID_ARGUMENT"
            await client.unregister_system_shared_memory("in")
            assert set((await client.get_system_shared_memory_status()).regions) == {"out"}
        finally:
            for region in regions.values():
                region.unlink()
        settings = await client.update_trace_settings("total", {"trace_level": ["TIMESTAMPS"], "trace_rate": "7"})
        assert list(settings.settings["trace_level"].value) == ["TIMESTAMPS"]
        assert list((await client.get_trace_settings("total")).settings["trace_rate"].value) == ["7"]
        log = await client.update_log_settings({"log_verbose_level": 1, "log_warning": False})
        assert log.settings["log_verbose_level"].uint32_param == 1
        assert not (await client.get_log_settings()).settings["log_warning"].bool_param


async def test_health_and_reflection() -> None:
    async with serving_grpc() as served:
        request, response = (message(f"grpc.health.v1.HealthCheck{name}") for name in ("Request", "Response"))
        async with grpc.aio.insecure_channel(served.url) as channel:
            forms = request.SerializeToString, response.FromString
            check = channel.unary_unary("/grpc.health.v1.Health/Check", *forms)
            assert (await check(request())).status == response.SERVING
            assert (await check(request(service="inference.GRPCInferenceService"))).status == response.SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await check(request(service="nobody"))
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch", *forms)(request())
            assert (await watch.read()).status == response.SERVING
            served.server.engine.ready = False
            assert (await watch.read()).status == response.NOT_SERVING
            served.server.engine.ready = True
            assert (await watch.read()).status == response.SERVING
            watch.cancel()

        def reflect() -> Any:
            with grpc.insecure_channel(served.url) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                found = database.FindFileContainingSymbol("inference.ModelInferRequest")
                return set(database.get_services()), [made.name for made in found.service]

        services, inside = await asyncio.to_thread(reflect)
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services
        assert inside == ["GRPCInferenceService"]


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("rows", [0, 1, 3])
async def test_every_datatype(datatype: str, rows: int) -> None:
    array = np.repeat(DATATYPES[datatype], rows, axis=0)
    async with serving_grpc() as served:
        result = await served.infer(f"same_{datatype}", array, datatype, request_id="17")
        found = result.as_numpy("y")
        assert found.dtype == array.dtype or datatype == "BF16"
        assert found.astype(array.dtype).tolist() == array.tolist()
        response = result.get_response()
        assert (response.id, response.model_name, response.outputs[0].datatype) == ("17", f"same_{datatype}", datatype)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
async def test_compressed_requests(compression: str) -> None:
    async with serving_grpc() as served:
        array = np.zeros((5000, 2), "f4")
        result = await served.infer("same_FP32", array, compression_algorithm=compression)
        assert (result.as_numpy("y") == array).all()


async def test_typed_contents_of_clients_that_send_them() -> None:
    async with serving_grpc() as served:
        request = service_pb2.ModelInferRequest(model_name="total")
        request.inputs.add(name="x", datatype="FP32", shape=[3]).contents.fp32_contents.extend([1, 2, 3])
        found = await served.client._client_stub.ModelInfer(request)
        assert np.frombuffer(found.raw_output_contents[0], "f4").tolist() == [6]


async def test_large_tensors_and_the_limit_of_a_message() -> None:
    async with serving_grpc(body_max=9_000_000) as served:
        array = np.arange(2_000_000, dtype="f4")
        assert (await served.infer("total", array)).as_numpy("y")[0] == array.sum()
        code, message = await failure(served.infer("total", np.zeros(2_400_000)))
        assert code == "RESOURCE_EXHAUSTED"
        assert "9000000" in message


async def test_a_message_that_explodes_when_it_is_unpacked() -> None:
    async with serving_grpc(body_max=1_000_000) as served:
        code, _ = await failure(served.infer("total", np.zeros(20_000_000), compression_algorithm="gzip"))
        assert code == "RESOURCE_EXHAUSTED"


async def test_classification_and_chosen_outputs() -> None:
    async with serving_grpc() as served:
        wanted = [aio_client.InferRequestedOutput("y", class_count=2)]
        result = await served.infer("same_FP32", [[0.25, 0.75]], outputs=wanted)
        assert result.as_numpy("y").tolist() == [[b"0.750000:1", b"0.250000:0"]]
        unknown = [aio_client.InferRequestedOutput("z")]
        code, text = await failure(served.infer("same_FP32", [[0.25, 0.75]], outputs=unknown))
        assert (code, "'z' is unknown" in text) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(
    ("model", "array", "datatype", "code", "text"),
    [
        ("same_FP32", [[1, 2, 3]], "FP32", "INVALID_ARGUMENT", "takes [-1, 2]"),
        ("same_FP32", np.array([[1, 2]]), "INT64", "INVALID_ARGUMENT", "takes FP32"),
        ("fail", np.array([b"input"], object), "BYTES", "INVALID_ARGUMENT", "the page is empty"),
        ("fail", np.array([b"own"], object), "BYTES", "INTERNAL", "division by zero"),
    ],
)
async def test_errors(model: str, array: Any, datatype: str, code: str, text: str) -> None:
    async with serving_grpc() as served:
        found, said = await failure(served.infer(model, array, datatype))
        assert found == code
        assert text in said
        assert "Traceback" not in said
        assert await served.counted("rtml_gateway_requests_in_flight", model=model) == 0


async def test_clients_are_told_when_to_come_back() -> None:
    async with serving_grpc() as served:
        request = service_pb2.ModelInferRequest(model_name="fail")
        request.inputs.add(name="x", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"lost")
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE") as caught:
            await served.client._client_stub.ModelInfer(request, metadata=(("x-request-id", "mine"),))
        assert caught.value.details() == "the engine cannot be reached"
        trailing = dict(caught.value.trailing_metadata())
        assert (trailing["retry-after"], trailing["grpc-retry-pushback-ms"]) == ("1", "1000")
        assert (trailing["x-request-id"], trailing["rtml-error-type"]) == ("mine", "ConnectionLost")


async def test_refused_requests_say_what_was_predicted() -> None:
    async with serving_grpc() as served:
        request = service_pb2.ModelInferRequest(model_name="fail")
        request.inputs.add(name="x", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"overloaded")
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE") as caught:
            await served.client._client_stub.ModelInfer(request)
        trailing = dict(caught.value.trailing_metadata())
        assert trailing["retry-after"] == "3"
        assert "0.5" in trailing["rtml-error-details"]


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\xff" * 100_000, b""])
async def test_what_is_no_request(data: bytes) -> None:
    async with serving_grpc() as served, grpc.aio.insecure_channel(served.url) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data)
        expected = grpc.StatusCode.INVALID_ARGUMENT if data else grpc.StatusCode.NOT_FOUND
        assert caught.value.code() == expected


async def test_the_synchronous_client() -> None:
    def ask(url: str) -> Any:
        with sync_client.InferenceServerClient(url) as client:
            results: queue.Queue[Any] = queue.Queue()
            client.async_infer(
                "total", [tensor([1, 2], client=sync_client)], lambda result, error: results.put((result, error))
            )
            result, error = results.get(timeout=20)
            assert error is None
            assert client.get_model_config("total", as_json=True)["config"]["name"] == "total"
            return client.infer("total", [tensor([1, 2, 3], client=sync_client)]).as_numpy("y"), result.as_numpy("y")

    async with serving_grpc() as served:
        assert await asyncio.to_thread(ask, served.url) == ([6], [3])


# --- deadlines, cancellation, metrics ---------------------------------------------------------------------------------


async def test_the_calls_deadline_is_the_graphs_budget() -> None:
    async with serving_grpc() as served:
        code, _ = await failure(served.infer("wait", [1], client_timeout=0.2))
        assert code == "DEADLINE_EXCEEDED"
        await asyncio.wait_for(served.server.engine.cancelled.wait(), 5)
        (options,) = served.server.engine.options
        assert options.deadline is not None
        assert 0.05 < options.deadline <= 0.205  # clients round it up to what the header can say
        while await served.counted("rtml_gateway_deadlines_total", model="wait", outcome="missed") != 1:
            await asyncio.sleep(0.01)
        assert await served.counted("rtml_gateway_requests_in_flight", model="wait") == 0


async def test_the_parameter_timeout_and_the_header_are_budgets_too() -> None:
    async with serving_grpc() as served:
        code, text = await failure(served.infer("wait", [1], timeout=50_000))
        assert (code, "deadline" in text) == ("DEADLINE_EXCEEDED", True)
        code, _ = await failure(served.infer("wait", [1], headers={"x-rtml-deadline-ms": "50"}))
        assert code == "DEADLINE_EXCEEDED"
        code, _ = await failure(served.infer("wait", [1], headers={"x-rtml-deadline-ms": "soon"}))
        assert code == "INVALID_ARGUMENT"
        await served.infer(
            "total", [1], client_timeout=30, timeout=90_000_000, headers={"x-rtml-deadline-ms": "900000"}
        )
        assert [options.deadline for options in served.server.engine.options] == [
            pytest.approx(0.05, abs=0.02),
            pytest.approx(0.05, abs=0.02),
            pytest.approx(30, abs=1),
        ]


async def test_a_client_that_goes_away_cancels_the_graph() -> None:
    async with serving_grpc() as served:
        asking = asyncio.create_task(served.infer("wait", [1]))
        await served.server.engine.started.wait()
        asking.cancel()
        await asyncio.wait_for(served.server.engine.cancelled.wait(), 5)
        while await served.counted("rtml_gateway_requests_total", model="wait", code="499") != 1:
            await asyncio.sleep(0.01)


async def test_requests_are_counted_as_those_of_http_are() -> None:
    async with serving_grpc() as served:
        await served.infer("total", [1])
        assert await served.counted("rtml_gateway_requests_total", model="total", code="200") == 1
        assert await served.counted("rtml_gateway_request_seconds_count", model="total") == 1


# --- streams ----------------------------------------------------------------------------------------------------------


def asking(*requests: tuple[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async def generate() -> AsyncIterator[dict[str, Any]]:
        for number, (model, array) in enumerate(requests):
            yield {"model_name": model, "inputs": [tensor(array)], "request_id": str(number)}

    return generate()


async def test_a_stream_answers_in_order_and_goes_on_after_errors() -> None:
    async with serving_grpc() as served:
        naps = [("nap", [0.2]), ("total", [1, 2]), ("nobody", [1]), ("same_FP32", [[1, 2, 3]]), ("nap", [0.05])]
        found: list[Any] = []
        async for result, error in served.client.stream_infer(asking(*naps)):
            found.append(str(error.message()) if error else float(result.as_numpy("y")[0]))
            if result:
                assert result.get_response().parameters["triton_final_response"].bool_param
        assert found[0] == pytest.approx(0.2)
        assert found[1] == 3
        assert "no model 'nobody'" in found[2]
        assert "takes [-1, 2]" in found[3]
        assert found[4] == pytest.approx(0.05)
        # One after the other they would be submitted later.
        assert len(served.server.engine.options) == 3


async def test_requests_of_a_stream_run_at_once_but_not_too_many() -> None:
    async with serving_grpc() as served:
        results = served.client.stream_infer(asking(*[("wait", [1])] * 500))
        first = asyncio.create_task(anext(aiter(results)))
        before = -1
        while len(served.server.engine.options) != before or not before:
            before = len(served.server.engine.options)
            await asyncio.sleep(0.2)
        assert 2 <= before <= 66
        results.cancel()
        with pytest.raises((asyncio.CancelledError, InferenceServerException)):
            await first
        while await served.counted("rtml_gateway_requests_in_flight", model="wait"):
            await asyncio.sleep(0.01)


async def test_the_synchronous_clients_stream() -> None:
    def ask(url: str) -> list[Any]:
        results: queue.Queue[Any] = queue.Queue()
        with sync_client.InferenceServerClient(url) as client:
            client.start_stream(lambda result, error: results.put((result, error)))
            for number in range(100):
                client.async_stream_infer("total", [tensor([number], client=sync_client)], request_id=str(number))
            client.stop_stream()
        found = [results.get_nowait() for _ in range(100)]
        return [(result.get_response().id, float(result.as_numpy("y")[0])) for result, _ in found]

    async with serving_grpc() as served:
        assert await asyncio.to_thread(ask, served.url) == [(str(number), number) for number in range(100)]


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_running_calls_end_and_closes_idle_streams() -> None:
    async with serving_grpc(drain_timeout=20) as served:
        running = asyncio.create_task(served.infer("nap", [0.5]))
        while len(served.server.engine.options) < 1:
            await asyncio.sleep(0.01)
        idle = asyncio.Event()

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "nap", "inputs": [tensor([0.3])]}
            await idle.wait()

        stream = aiter(served.client.stream_infer(requests()))
        first = asyncio.create_task(anext(stream))
        while len(served.server.engine.options) < 2:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(served.server.gateway.stop())
        result, error = await first
        assert (error, result.as_numpy("y").tolist()) == (None, [pytest.approx(0.3)])
        with pytest.raises(grpc.aio.AioRpcError, match="the gateway stops"):
            await anext(stream)
        assert (await running).as_numpy("y").tolist() == [0.5]
        await asyncio.wait_for(stopping, 5)
        idle.set()


async def test_what_does_not_end_in_time_is_told_so() -> None:
    async with serving_grpc(drain_timeout=0.2) as served:
        running = asyncio.create_task(failure(served.infer("wait", [1])))
        await served.server.engine.started.wait()
        await asyncio.wait_for(served.server.gateway.stop(), 5)
        code, text = await running
        assert code == "UNAVAILABLE"
        assert "stops" in text


async def test_a_port_that_is_taken() -> None:
    async with serving_grpc() as served:
        with pytest.raises(AddressError, match="gRPC"):
            async with serving(app, grpc_port=served.server.gateway.grpc_port):
                pass


async def test_a_gateway_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rtml.serving.grpc_server", None)
    async with serving(app):
        pass
    with pytest.raises(ValueError, match=r"--grpc-port needs gRPC: pip install 'rtml\[grpc\]'"):
        async with serving(app, grpc_port=0):
            pass


async def test_nobody_imports_grpc_before_it_is_asked_for() -> None:
    code = "import sys, rtml.__main__, rtml.serving.running; sys.exit('grpc' in sys.modules or 'google' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
