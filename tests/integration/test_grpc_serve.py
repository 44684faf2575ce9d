"""`rtml serve --grpc-port` as a process: uvloop, a real engine, signals."""

from __future__ import annotations

import queue
import signal
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.integration.test_serve import Server, wait_for

APP = "tests.integration.served_app:app"

# Keeps grpc's poller, whose descriptors live as long as somebody uses grpc.
grpc.aio.init_grpc_aio()


class Served:
    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = Server("serve", APP, "--grpc-port", str(self.port))
        self.client = triton.InferenceServerClient(f"127.0.0.1:{self.port}")

    def infer(self, model: str, **arrays: Any) -> Any:
        return self.client.infer(model, inputs(**arrays), client_timeout=30)


def inputs(**arrays: Any) -> list[Any]:
    made = []
    for name, array in arrays.items():
        datatype = {"f": "FP32", "i": "INT64", "O": "BYTES"}[array.dtype.kind]
        made.append(triton.InferInput(name, list(array.shape), datatype))
        made[-1].set_data_from_numpy(array)
    return made


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.client.close()
    made.server.stop()


def test_inference_by_a_real_engine(served: Served) -> None:
    assert f"gRPC: 127.0.0.1:{served.port}" in served.server.lines
    a = np.arange(100_000, dtype="f4")
    found = served.infer("scale", a=a, b=a)
    assert (found.as_numpy("product") == a * a).all()
    assert (found.as_numpy("sum") == a + a).all()
    assert served.infer("spell", numbers=np.array([1, 2])).as_numpy("words").tolist() == [b"word 1", b"word 2"]
    with pytest.raises(InferenceServerException, match="INTERNAL"):
        served.infer("evil", x=np.zeros(1, "f4"))
    assert served.client.is_server_ready()


def test_graph_programs_are_models(served: Served) -> None:
    assert served.client.get_model_metadata("sum").platform == "ensemble"
    found = served.infer("sum", numbers=np.array([1, 2, 3]))
    assert found.as_numpy("total").tolist() == [14]
    step = served.client.get_model_config("sum").config.ensemble_scheduling.step[0].model_name
    assert "square" in step
    assert served.client.get_model_config(step).config.name == step


def test_a_stream_of_requests(served: Served) -> None:
    found: queue.Queue[Any] = queue.Queue()
    served.client.start_stream(lambda result, error: found.put((result, error)))
    for number in range(200):
        served.client.async_stream_infer("spell", inputs(numbers=np.array([number])), request_id=str(number))
    served.client.stop_stream()
    answers = [found.get_nowait() for _ in range(200)]
    assert [result.as_numpy("words")[0] for result, _ in answers] == [b"word %d" % number for number in range(200)]


def test_a_stop_lets_running_calls_end(served: Served) -> None:
    found: queue.Queue[Any] = queue.Queue()
    # The client cancels a call that nobody holds.
    call = served.client.async_infer("nap", nap(3.0), lambda result, error: found.put((result, error)))
    wait_for(lambda: served.server.metric(r'rtml_gateway_requests_in_flight\{app="served",model="/v1/nap"\}') == 1)
    served.server.process.send_signal(signal.SIGTERM)
    result, error = found.get(timeout=20)
    assert error is None, call
    assert result.as_numpy("output").tolist() == [3.0]
    assert served.server.process.wait(20) == 0


def nap(seconds: float) -> list[Any]:
    made = triton.InferInput("seconds", [1], "FP64")
    made.set_data_from_numpy(np.array([seconds]))
    return [made]
