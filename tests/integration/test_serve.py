"""`rtml serve` and the other commands as processes: HTTP in front, a real engine behind, signals in between."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

APP = "tests.integration.served_app:app"


class Server:
    """A running `rtml serve`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "rtml", *arguments, "--port", "0"]
        command += ["--workers", "2"] if arguments[0] != "gateway" else []  # that one brings no engine
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self.address = ""
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("engine: "):
                self.address = line.split()[1]
            if found := re.fullmatch(r"serving on https?://127\.0\.0\.1:(\d+)\n", line):
                self.port = int(found[1])
                return
        self.stop()
        raise AssertionError("\n".join(self.lines))

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body)
            if not isinstance(body, bytes):
                headers["Content-Type"] = "application/json"
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            content: Any = response.read()
            if response.headers.get_content_type() == "application/json":
                content = json.loads(content)
            return response.status, content, response.headers
        finally:
            connection.close()

    def post(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        return self.request("POST", path, body, **headers)

    def metric(self, pattern: str) -> float:
        text = self.request("GET", "/metrics")[1].decode()
        return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.M))

    def command(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "rtml", *arguments, "--address", self.address]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def status(self) -> Any:
        return json.loads(self.command("status", "--json"))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.rest()
        return self.process.returncode

    def rest(self) -> list[str]:
        """All lines, when the process has ended."""
        if self.process.stdout is not None and not self.process.stdout.closed:
            rest, _ = self.process.communicate(timeout=60)
            self.lines += rest.splitlines()
        return self.lines


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module", params=["unix", "zmq"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with running("serve", APP, "--link", request.param) as found:
        yield found


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def test_it_says_its_settings_and_what_it_serves(server: Server) -> None:
    text = "\n".join(server.lines)
    assert re.search(r"^rtml serve: host=127\.0\.0\.1 port=0 .*workers=2", text, re.M)
    assert f"POST http://127.0.0.1:{server.port}/v1/sum" in text
    assert f"POST http://127.0.0.1:{server.port}/v2/models/scale/infer" in text


def test_a_graph_program_with_typed_input(server: Server) -> None:
    status, body, headers = server.post("/v1/sum", {"numbers": [1, 2, 3]})
    assert (status, body["total"], body["squares"]) == (200, 14, [1, 4, 9])
    assert body["pids"]
    assert server.process.pid not in body["pids"]
    assert re.search(r"compute;dur=[\d.]+, serialise;dur=[\d.]+, total;dur=", headers["Server-Timing"])
    status, body, _ = server.post("/v1/sum", {"numbers": ["x"]})
    assert (status, body["type"]) == (400, "InvalidInput")


@pytest.mark.parametrize("size", [0, 10, 100_000, 5_000_000])
def test_bodies_of_every_size_go_through(server: Server, size: int) -> None:
    data = os.urandom(size)
    status, body, _ = server.post("/v1/reverse", data, Content_Type="application/octet-stream")
    assert (status, body) == (200, data[::-1])


@pytest.mark.parametrize("rows", [3, 100_000])
def test_models_with_several_tensors(server: Server, rows: int) -> None:
    tensors = [
        {"name": name, "datatype": "FP32", "shape": [rows], "data": [value] * rows}
        for name, value in (("a", 2), ("b", 3))
    ]
    status, body, _ = server.post("/v2/models/scale/infer", {"inputs": tensors, "id": "1"})
    assert status == 200
    assert {output["name"]: set(output["data"]) for output in body["outputs"]} == {"product": {6.0}, "sum": {5.0}}


@pytest.mark.parametrize("rows", [2, 20_000])
def test_models_that_return_text(server: Server, rows: int) -> None:
    tensor = {"name": "numbers", "datatype": "INT64", "shape": [rows], "data": list(range(rows))}
    status, body, _ = server.post("/v2/models/spell/infer", {"inputs": [tensor]})
    assert status == 200
    assert {output["name"]: output["data"] for output in body["outputs"]} == {
        "words": [f"word {number}" for number in range(rows)],
        "numbers": list(range(rows)),
    }


def test_errors_say_what_and_not_where(server: Server) -> None:
    assert server.post("/v1/fail", {"how": "raise"})[:2] == (500, {"error": "no such page", "type": "LookupError"})
    status, body, _ = server.post("/v1/fail", {"how": "object"})
    assert (status, body["type"]) == (500, "TypeError")
    status, body, _ = server.post("/v1/fail", {"how": "exit"})
    assert (status, body["type"]) == (500, "WorkerDied")
    assert "Traceback" not in json.dumps(body)


def test_the_gateway_never_unpickles(server: Server) -> None:
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    status, body, _ = server.post("/v2/models/evil/infer", request)
    assert (status, body["type"]) == (500, "SerializationError")
    assert "the result is no plain data: it contains a Unpicklable" in body["error"]
    assert server.process.poll() is None


def test_it_may_open_as_many_files_as_the_system_allows(server: Server) -> None:
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    found = re.search(r"^Max open files +(\d+) +(\d+)", limits, re.M)
    assert found is not None
    assert int(found[1]) == min(int(found[2]), 1 << 20)


def test_the_deadline_reaches_the_graph(server: Server) -> None:
    begin = time.monotonic()
    status, body, _ = server.post("/v1/nap", {"seconds": 20}, x_rtml_deadline_ms="150")
    assert (status, body["type"], body["missing"]) == (504, "DeadlineExceeded", ["nap"])
    assert server.post("/v1/nap", {"seconds": 1}, x_rtml_deadline_ms="0.001")[1]["missing"] == ["nap"]
    assert 0.15 <= time.monotonic() - begin < 5
    assert server.post("/v1/nap", {"seconds": 0.01}, x_rtml_deadline_ms="10000")[:2] == (200, 0.01)
    wait_for(lambda: live_tasks(server) == 0)


def test_a_client_that_goes_away_ends_its_graph(server: Server) -> None:
    body = b'{"seconds": 60}'
    head = f"POST /v1/nap HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: live_tasks(server) == 1)
    wait_for(lambda: live_tasks(server) == 0)


def live_tasks(server: Server) -> int:
    tasks = server.status()["tasks"]
    return sum(count for state, count in tasks.items() if state != "done")


def test_metrics_show_requests_and_tasks(server: Server) -> None:
    before = server.metric(r'rtml_tasks_total\{function="square",outcome="ok"\}')
    server.post("/v1/sum", {"numbers": [1, 2, 3, 4]})
    wait_for(lambda: server.metric(r'rtml_tasks_total\{function="square",outcome="ok"\}') == before + 4)
    assert server.metric(r'rtml_gateway_requests_total\{app="served",code="200",model="/v1/sum",protocol="http"\}') >= 1
    assert server.metric(r'rtml_task_run_seconds_count\{function="square"\}') == before + 4
    assert server.metric("rtml_gateway_dispatcher_up") == 1


def test_status_and_trace_for_people(server: Server) -> None:
    assert "2 executor" in server.command("status")
    server.post("/v1/sum", {"numbers": [1, 2, 3]})
    trace = server.command("trace")
    assert "sum_squares" in trace
    assert trace.count("\n  square") == 3


def test_health(server: Server) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert server.request("GET", path)[:2] == (200, {"live": True, "ready": True})


def test_executors_that_are_killed_cost_no_request() -> None:
    with running("serve", APP) as server, ThreadPoolExecutor(8) as pool:
        executors = server.post("/v1/sum", {"numbers": list(range(64))})[1]["pids"]
        answers = [pool.submit(server.post, "/v1/hold", {"tasks": 4, "number": 3}) for _ in range(40)]
        for pid in executors:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert [answer.result()[:2] for answer in answers] == [(200, 36)] * 40


def test_a_dispatcher_that_is_killed_costs_no_request() -> None:
    with running("serve", APP) as server, ThreadPoolExecutor(8) as pool:
        assert server.post("/v1/sum", {"numbers": [1]})[0] == 200
        answers = [pool.submit(server.post, "/v1/hold", {"tasks": 4, "number": 3}) for _ in range(40)]
        os.kill(server.status()["pid"], signal.SIGKILL)
        assert [answer.result()[:2] for answer in answers] == [(200, 36)] * 40


def test_a_gateway_that_is_killed_takes_its_engine_along() -> None:
    with running("serve", APP) as server:
        pids = [*server.post("/v1/sum", {"numbers": list(range(64))})[1]["pids"], server.status()["pid"]]
        server.process.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        session_dir = Path(server.address.removeprefix("unix:")).parent
        wait_for(lambda: not session_dir.exists())


def test_a_gateway_whose_engine_is_killed_ends_with_an_error() -> None:
    with running("serve", APP) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/nap", {"seconds": 60})
        wait_for(lambda: live_tasks(server) == 1)
        status = Path(f"/proc/{server.status()['pid']}/status").read_text()
        os.kill(int(re.findall(r"^PPid:\t(\d+)", status, re.M)[0]), signal.SIGKILL)
        assert server.process.wait(20) == 1
        assert answer.result()[0] == 503
        assert any(line.startswith("the engine has ended") for line in server.rest())


def test_stopping_answers_what_it_has_accepted() -> None:
    with running("serve", APP) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, "/v1/nap", {"seconds": 3.0}) for _ in range(4)]
        wait_for(lambda: live_tasks(server) == 4)
        assert server.stop() == 0
        assert [answer.result()[:2] for answer in answers] == [(200, 3.0)] * 4
        assert any(line.startswith("stopping") for line in server.lines)


def test_a_second_signal_does_not_wait() -> None:
    with running("serve", APP) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/nap", {"seconds": 60})
        wait_for(lambda: live_tasks(server) == 1)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: not accepts(server.port))
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 130
        try:
            assert answer.result()[0] == 503
        except (http.client.HTTPException, OSError):
            return  # or no answer at all


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionError:
        return False
    return True


def test_a_gateway_on_an_engine_that_runs_elsewhere() -> None:
    with running("up") as engine:
        assert engine.request("GET", "/readyz")[0] == 200
        assert engine.post("/v1/sum", {"numbers": [1]})[0] == 404
        command = [sys.executable, "-m", "rtml", "gateway", APP, "--port", "0", "--address", engine.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
            assert gateway.stdout is not None
            port = next(int(line.rpartition(":")[2]) for line in gateway.stdout if line.startswith("serving on"))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/v1/reverse", b"abc", {"Content-Type": "text/plain"})
            assert connection.getresponse().read() == b"cba"
            connection.close()
            gateway.kill()
        assert engine.request("GET", "/readyz")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve"], 2, "MODULE:APP"),
        (["serve", "no_such_module:app"], 2, "there is no module 'no_such_module'"),
        (["serve", "tests.integration.served_app:nothing"], 2, "there is no 'nothing' in"),
        (["serve", APP, "--port", "x"], 2, "--port (RTML_PORT): Expected `int`"),
        (["status", "--address", "unix:/nowhere/dispatcher.sock"], 1, "nowhere"),
        (["nothing"], 2, "invalid choice"),
    ],
)
def test_wrong_commands_are_told_in_one_line(arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-m", "rtml", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_measures_something() -> None:
    command = [sys.executable, "-m", "rtml", "bench", "--seconds", "0.2", "--workers", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    figures = dict(re.findall(r"^(\w+) +([\d,.]+)$", printed, re.M))
    assert set(figures) == {"first_result_ms", "round_trip_p50_us", "round_trip_p99_us", "tasks_per_s"}


def test_raw_tensors_over_a_plain_socket(server: Server) -> None:
    """Header names in lower case, one segment: what C++ clients send."""
    head = json.dumps(
        {
            "inputs": [
                {"name": name, "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}} for name in "ab"
            ],
            "outputs": [{"name": "sum", "parameters": {"binary_data": True}}],
        }
    ).encode()
    body = head + struct.pack("<2f", 1, 2)
    request = (
        f"POST /v2/models/scale/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"inference-header-content-length: {len(head)}\r\nconnection: close\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(struct.pack("<f", 3))


def test_a_request_is_found_by_its_trace(server: Server) -> None:
    trace = os.urandom(16).hex()
    given = {"traceparent": f"00-{trace}-{'1' * 16}-01"}
    status, _, headers = server.post("/v1/sum", {"numbers": [1, 2, 3]}, **given)
    assert (status, headers["traceparent"].split("-")[1]) == (200, trace)
    found: Any = {"tasks": []}

    def whole() -> bool:
        found.update(json.loads(server.command("trace", trace, "--json")))
        return len(found["tasks"]) == 4

    wait_for(whole)
    assert found["trace"] == trace
    assert server.command("trace", trace).startswith(f"graph {found['graph']}: 4 tasks")
