"""A real gateway and those who mean it no good: every request gets its answer, memory stays bounded.

What single parts say to single lies is in tests/integration/test_hostile_http.py and tests/unit; this is about the
process, over HTTP and gRPC.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.conformance import onnxmodels
from tests.conformance.conftest import Gateway

pytestmark = pytest.mark.slow

BODY_MAX = 8 << 20
#: Seconds that a request may take to come.
READ_TIMEOUT = 5
#: What the gateway may need beyond what it needed before: some bodies of the largest size, in several forms.
MEMORY_MAX = 16 * BODY_MAX

# Keeps grpc's poller, whose descriptors live as long as somebody uses grpc.
grpc.aio.init_grpc_aio()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "models").mkdir()
    onnxmodels.write(directory / "models")
    found = Gateway(directory, "--body-max", str(BODY_MAX), "--read-timeout", str(READ_TIMEOUT))
    yield found
    found.stop()
    assert "Traceback" not in "\n".join(found.lines), "nothing that a client sends is an error of the gateway"


@pytest.fixture(autouse=True)
def bounded(gateway: Gateway) -> Iterator[None]:
    """Nothing takes much memory, even for a moment, nor the gateway down."""
    check_alive(gateway)
    before = gateway.resident
    Path(f"/proc/{gateway.process.pid}/clear_refs").write_text("5")  # the peak begins anew
    yield
    check_alive(gateway)
    assert gateway.peak - before < MEMORY_MAX


def check_alive(gateway: Gateway) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    status, answer, _ = gateway.post("/v2/models/double/infer", {"inputs": [tensor]})
    assert (status, answer["outputs"][0]["data"]) == (200, [2, 4, 6, 8])


# --- HTTP -------------------------------------------------------------------------------------------------------------


def tensor(**changes: Any) -> bytes:
    plain = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    return json.dumps({"inputs": [{**plain, **changes}]}).encode()


def binary(size: Any, data: bytes = bytes(16), **changes: Any) -> tuple[bytes, dict[str, str]]:
    made: Any = {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": size}, **changes}
    head = json.dumps({"inputs": [made]}).encode()
    return head + data, {"Inference_Header_Content_Length": str(len(head))}


BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "header beyond the body": (tensor(), {"Inference_Header_Content_Length": str(10**9)}),
    "header of many digits": (tensor(), {"Inference_Header_Content_Length": "9" * 400}),
    "negative header": (tensor(), {"Inference_Header_Content_Length": "-1"}),
    "header in other digits": (tensor(), {"Inference_Header_Content_Length": "1_0"}),
    "negative dimension": (tensor(shape=[-1, -4]), {}),
    "huge dimensions": (tensor(shape=[2**62, 4]), {}),
    "dimensions whose product is 0 modulo 2**64": (tensor(shape=[2**32, 2**32]), {}),
    "dimensions beyond integers": (tensor(shape=[2**80, 4]), {}),
    "empty but huge": (tensor(shape=[0, 2**63 - 1], data=[]), {}),
    "many dimensions": (tensor(shape=[1] * 100_000), {}),
    "dimension that is no number": (tensor(shape=[1.5, "4"]), {}),
    "negative size": binary(-16),
    "size beyond the body": binary(2**63),
    "size beyond integers": binary(2**70),
    "size that is no number": binary("16"),
    "size that is true": binary(True),
    "bytes behind the tensors": binary(16, bytes(17)),
    "both forms": (tensor(parameters={"binary_data_size": 16}), {}),
    "lengths in BYTES that lie": binary(8, b"\xff\xff\xff\xffabcd", datatype="BYTES", shape=[1, 1]),
    "many empty BYTES": binary(4, b"\0\0\0\0", datatype="BYTES", shape=[2**40, 2]),
    "a name twice": (tensor().replace(b"]}]}", b"]}, " + tensor()[12:]), {}),
    "unknown datatype": (tensor(datatype="FP1"), {}),
    "a hundred thousand inputs": (b'{"inputs": [' + b",".join([tensor()[12:-2]] * 100_000) + b"]}", {}),
    "four million numbers": (tensor(data=[]).replace(b"[]", b"[" + b"0," * 4_000_000 + b"0]"), {}),
    "lists a million deep": (b'{"inputs": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", {}),
    "data a million deep": (tensor().replace(b"[1, 2, 3, 4]", b"[" * 1_000_000 + b"]" * 1_000_000), {}),
    "parameters a million deep": (b'{"parameters": ' + b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"}", {}),
    "numbers that explode": (tensor().replace(b"[1, 2, 3, 4]", b"[1e999999999, 1, 1, 1" + b"0" * 100_000 + b"]"), {}),
    "no JSON": (b"\xff\xfe{\0}\0", {}),
    "text that is no UTF-8": (tensor().replace(b"{", b'{"id": "\xff", ', 1), {}),
    "BYTES that are no UTF-8": (tensor(datatype="BYTES", shape=[1, 1], data=["?"]).replace(b"?", b"\xff"), {}),
    "nothing": (b"", {}),
    "null": (b"null", {}),
    "a list": (b"[]", {}),
    "cut off": (tensor()[:-5], {}),
    "a gzip bomb": (gzip.compress(bytes(1 << 30), 9), {"Content_Encoding": "gzip"}),
    "a deflate bomb": (zlib.compress(bytes(1 << 28), 9), {"Content_Encoding": "deflate"}),
    "bombs of many members": (gzip.compress(bytes(1 << 20)) * 500, {"Content_Encoding": "gzip"}),
    "a million empty members": (gzip.compress(b"") * 100_000, {"Content_Encoding": "gzip"}),
    "no gzip": (b"\x1f\x8b" + bytes(1000), {"Content_Encoding": "gzip"}),
    "gzip, cut": (gzip.compress(tensor())[:-9], {"Content_Encoding": "gzip"}),
    "gzip that is damaged": (gzip.compress(tensor())[:-6] + bytes(6), {"Content_Encoding": "gzip"}),
    "gzip in gzip": (gzip.compress(gzip.compress(tensor())), {"Content_Encoding": "gzip, gzip"}),
}


@pytest.mark.parametrize("which", BODIES)
def test_bodies(gateway: Gateway, which: str) -> None:
    body, headers = BODIES[which]
    model = "same_BYTES" if "BYTES" in which else "double"
    status, answer, _ = gateway.post(f"/v2/models/{model}/infer", body, **headers)
    assert status in (400, 413, 415), answer
    assert answer["error"]
    assert len(json.dumps(answer)) < 3000, "an error does not repeat what was sent"


@pytest.mark.parametrize("milliseconds", ["1e17", "1.7976931348623157e+308"])
def test_deadlines_beyond_all_times(gateway: Gateway, milliseconds: str) -> None:
    for path, body in (
        ("/v1/chain", b'{"x": [1, 2, 3, 4]}'),
        ("/v2/models/double/infer", tensor(parameters={"a": 1})),
        ("/v2/models/double/infer", tensor()[:-1] + b', "parameters": {"timeout": %d}}' % (2**64 - 1)),
    ):
        headers = {"x_rtml_deadline_ms": milliseconds, "Content_Type": "application/json"}
        assert gateway.post(path, body, **headers)[0] == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(gateway: Gateway) -> None:
    with connected(gateway.port) as connection:
        connection.sendall(b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert answered(connection) == 413


def test_a_million_tiny_chunks(gateway: Gateway) -> None:
    head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = tensor(data=[0] * 4).ljust(1_000_000)
    with connected(gateway.port) as connection:
        connection.sendall(head)
        connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body))
        connection.sendall(b"0\r\n\r\n")
        assert answered(connection) in (200, 408)  # in time or not, on a slow machine


def test_chunks_without_an_end(gateway: Gateway) -> None:
    with connected(gateway.port) as connection:
        connection.sendall(b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        with contextlib.suppress(ConnectionError):  # it does not listen to the end
            for _ in range(200):
                connection.sendall(chunk)
        with contextlib.suppress(ConnectionError):
            assert answered(connection) in (413, None)


@pytest.mark.parametrize(
    "head",
    [
        b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 100_000 + b"\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"Content-Length: -5\r\n\r\n",
        b"Content-Length: 1e3\r\n\r\n",
        b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"".join(b"X-%d: a\r\n" % number for number in range(20_000)) + b"\r\n",
        b"\0: \0\r\n\r\n",
    ],
    ids=[
        "huge chunk",
        "negative chunk",
        "extension",
        "two lengths",
        "lengths",
        "negative",
        "float",
        "line",
        "lines",
        "NUL",
    ],
)
def test_heads(gateway: Gateway, head: bytes) -> None:
    with connected(gateway.port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\n" + head)
        assert answered(connection) in (400, 408, 413, 431)


def test_many_who_send_a_byte_now_and_then(gateway: Gateway) -> None:
    """Slow loris: the others are served meanwhile, and the slow ones sent away."""
    head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(gateway.port)) for _ in range(200)]
        for number, connection in enumerate(slow):
            connection.sendall(head[: 10 + number])  # the later ones have sent their head, and some of the body
        limit = time.monotonic() + 60
        left = list(slow)
        while left:
            assert time.monotonic() < limit, f"{len(left)} still may send"
            check_alive(gateway)
            left = [connection for connection in left if dripped(connection)]


def test_clients_that_ask_and_do_not_read(gateway: Gateway) -> None:
    """What they do not fetch is not heaped up: they are not read from before."""
    array = np.zeros((BODY_MAX // 16 - 100, 4), "f4")
    body, headers = binary(array.nbytes, array.tobytes(), shape=list(array.shape))
    length = headers["Inference_Header_Content_Length"].encode()
    request = (
        b"POST /v2/models/same_FP32/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %b\r\n"
        b"Content-Length: %d\r\n\r\n" % (length, len(body))
    ) + body
    with connected(gateway.port) as connection:
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(50):
                connection.sendall(request)


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        yield connection


def answered(connection: socket.socket) -> int | None:
    """The status of the answer; None: the connection was closed without one."""
    data = b""
    while b"\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return None
        data += part
    return int(data.split()[1])


def dripped(connection: socket.socket) -> bool:
    """Whether one more byte could be sent: nothing has been answered, nothing closed."""
    connection.setblocking(False)
    try:
        connection.recv(65536)
    except BlockingIOError:
        with contextlib.suppress(OSError):
            connection.send(b"x")
            return True
    except ConnectionError:
        pass
    return False


# --- gRPC -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def channel(gateway: Gateway) -> Iterator[Any]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{gateway.grpc_port}", options) as made:
        yield made


def call(channel: Any, data: bytes, compression: Any = None) -> str:
    """The code of `ModelInfer` for these bytes."""
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    ended = infer.future(data, timeout=60, compression=compression)
    assert "Traceback" not in ended.details()
    return str(ended.code().name)


def message(raw: tuple[bytes, ...] = (bytes(16),), **changes: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name=changes.pop("model", "double"))
    request.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [1, 4], **changes})
    request.raw_input_contents.extend(raw)
    return request


def twice(second: str = "x") -> Any:
    request = message((bytes(16), bytes(16)))
    request.inputs.add(name=second, datatype="FP32", shape=[1, 4])
    return request


def typed(numbers: int, raw: tuple[bytes, ...] = ()) -> Any:
    request = message(raw)
    request.inputs[0].contents.fp32_contents.extend([1.0] * numbers)
    return request


MESSAGES = {
    "no contents": message(()),
    "too many contents": message((bytes(16), bytes(16))),
    "a million contents": message((b"",) * 1_000_000),
    "short contents": message((bytes(15),)),
    "long contents": message((bytes(17),)),
    "raw and typed": typed(4, (bytes(16),)),
    "few typed": typed(3),
    "many typed": typed(1_000_000),
    "the wrong type": message((), contents=service_pb2.InferTensorContents(int64_contents=[1, 2, 3, 4])),
    "two types": message((), contents=service_pb2.InferTensorContents(fp32_contents=[1] * 4, int_contents=[1] * 4)),
    "negative dimension": message(shape=[-1, -4]),
    "huge dimensions": message(shape=[2**62, 4]),
    "dimensions whose product is 0 modulo 2**64": message(shape=[2**32, 2**32]),
    "empty but huge": message((b"",), shape=[0, 2**63 - 1]),
    "many dimensions": message(shape=[1] * 100_000),
    "a name twice": twice(),
    "an unknown name": twice("z"),
    "unknown datatype": message(datatype="FP1"),
    "lengths in BYTES that lie": message(
        (b"\xff\xff\xff\xffabcd",), model="same_BYTES", datatype="BYTES", shape=[1, 1]
    ),
    "nothing": service_pb2.ModelInferRequest(model_name="double"),
}


@pytest.mark.parametrize("which", MESSAGES)
def test_messages(channel: Any, which: str) -> None:
    assert call(channel, MESSAGES[which].SerializeToString()) == "INVALID_ARGUMENT"


def test_messages_that_are_too_large(channel: Any) -> None:
    data = message((bytes(10 * BODY_MAX),)).SerializeToString()
    assert call(channel, data) == "RESOURCE_EXHAUSTED"
    assert call(channel, data, grpc.Compression.Gzip) == "RESOURCE_EXHAUSTED"
    assert call(channel, data, grpc.Compression.Deflate) == "RESOURCE_EXHAUSTED"


def test_messages_that_are_damaged(channel: Any) -> None:
    dice = random.Random(7)
    good = message().SerializeToString()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        assert call(channel, bytes(data[: dice.randint(0, len(data))])) in ("OK", "INVALID_ARGUMENT", "NOT_FOUND")


def test_a_stream_of_damaged_messages(channel: Any) -> None:
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    sent = [b"\xff" * 10, message().SerializeToString(), message((b"",) * 1000).SerializeToString()] * 100
    answers = [service_pb2.ModelStreamInferResponse.FromString(data) for data in stream(iter(sent), timeout=60)]
    assert [bool(answer.error_message) for answer in answers] == [True, False, True] * 100


@pytest.mark.parametrize("preface", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)])
def test_connections_full_of_garbage(gateway: Gateway, channel: Any, preface: bytes) -> None:
    dice = random.Random(11)
    for _ in range(50):
        with connected(gateway.grpc_port) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(preface + dice.randbytes(dice.randint(1, 100_000)))
    assert call(channel, message().SerializeToString()) == "OK"


def test_many_half_frames(gateway: Gateway, channel: Any) -> None:
    """Frames that announce 16 MiB and never come."""
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(connected(gateway.grpc_port))
            frames = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
            with contextlib.suppress(ConnectionError):
                connection.sendall(frames + b"\xff\xff\xff\x01\x04\0\0\0\x01")
        assert call(channel, message().SerializeToString()) == "OK"
