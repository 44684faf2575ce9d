"""`rtml serve --processes N`: one port, one `/metrics`, deaths and drains under load, with real processes."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from rtml.serving import tokens
from tests.integration.test_serve import APP, Server, running, wait_for
from tests.unit import tiny_onnx

DATA = b"0123456789"
OK = r'rtml_gateway_requests_total\{app="served",code="200",model="/v1/reverse",protocol="http"\}'


def processes_of(server: Server) -> list[int]:
    """The gateway's processes."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server.process.pid and b"rtml.serving.child" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


class Client(threading.Thread):
    """Sends one request after the other on kept connections, until told to stop or nobody listens any more."""

    def __init__(self, port: int, going: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._going = going
        self.answered: Counter[str] = Counter()
        #: Of requests that were sent and had no answer: the process (by the prefix of its request ids) and the error.
        self.lost: list[tuple[str, str]] = []
        self.statuses: Counter[int] = Counter()
        self.refused = False

    def run(self) -> None:
        connection, process = None, ""
        while self._going.is_set():
            if connection is None:
                connection, process = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20), ""
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    self.refused = True
                    return
                except ConnectionResetError as error:
                    # The process whose socket it reached was killed before it accepted.
                    self.lost.append(("", repr(error)))
                    connection = None
                    continue
            try:
                connection.request("POST", "/v1/reverse", DATA, {"Content-Type": "application/octet-stream"})
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.lost.append((process, repr(error)))
                connection.close()
                connection = None
                continue
            self.statuses[response.status] += 1
            assert response.status != 200 or body == DATA[::-1]
            process = response.headers["x-request-id"].partition("-")[0]
            self.answered[process] += 1
            if response.will_close:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()


@contextlib.contextmanager
def load(server: Server, clients: int) -> Iterator[list[Client]]:
    going = threading.Event()
    going.set()
    threads = [Client(server.port, going) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        going.clear()
        for thread in threads:
            thread.join(30)


def ask_once(server: Server) -> str:
    """The process that answers on a new connection."""
    status, _, headers = server.post("/v1/reverse", DATA, Content_Type="application/octet-stream")
    assert status == 200
    return str(headers["x-request-id"]).partition("-")[0]


def answered(clients: list[Client]) -> Counter[str]:
    return sum((client.answered for client in clients), Counter())


@pytest.mark.slow
def test_a_process_that_is_killed_takes_only_its_own_requests_with_it_and_its_counts_stay() -> None:
    with running("serve", APP, "--processes", "2") as server:
        first = processes_of(server)
        assert len(first) == 2
        with load(server, 8) as clients:
            wait_for(lambda: len(answered(clients)) == 2 and min(answered(clients).values()) > 50)
            before = server.metric(OK)
            os.kill(first[0], signal.SIGKILL)
            wait_for(lambda: len(set(processes_of(server)) - {first[0]}) == 2)
            wait_for(lambda: server.request("GET", "/readyz")[1]["processes"] == {"serving": 2, "wanted": 2})
            new = {ask_once(server) for _ in range(24)} - answered(clients).keys()
            assert len(new) == 1
        assert server.metric(OK) >= before
        everything = answered(clients) + Counter({"once": 24})
        lost = [loss for client in clients for loss in client.lost]
        killed = {process for process, _ in lost if process}
        # Whoever lost a request had a connection to that process, or was just getting one.
        assert len(killed) <= 1
        assert all(client.statuses.keys() == {200} for client in clients)
        counted = server.metric(OK)
        assert sum(everything.values()) <= counted <= sum(everything.values()) + len(lost)
        assert server.metric(r'rtml_gateway_process_deaths_total\{reason="SIGKILL"\}') == 1
        assert server.metric(r'rtml_gateway_processes\{state="serving"\}') == 2
        labels = r'\{app="served",model="/v1/reverse"\}'
        assert server.metric("rtml_gateway_request_seconds_count" + labels) == counted
        assert "ended (SIGKILL); another starts in 0.1 s" in "\n".join(stopped(server))
        assert server.process.returncode == 0


def stopped(server: Server) -> list[str]:
    server.stop()
    return server.lines


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_no_request_is_lost_when_a_gateway_is_told_to_stop(processes: str) -> None:
    with running("serve", APP, "--processes", processes) as server, load(server, 8) as clients:
        wait_for(lambda: sum(answered(clients).values()) > 200)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: all(client.refused for client in clients))
        assert server.rest()[-1].startswith("stopping")  # a second signal could find it at its very end
        assert server.process.returncode == 0
        assert [loss for client in clients for loss in client.lost] == []
        assert sum((client.statuses for client in clients), Counter()).keys() == {200}


def test_requests_that_run_end_and_a_second_signal_does_not_wait() -> None:
    with running("serve", APP, "--processes", "2") as server:
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/nap", {"seconds": 1.5})[0]))
        thread.start()
        wait_for(lambda: server.metric(r'rtml_gateway_requests_in_flight\{app="served",model="/v1/nap"\}') == 1)
        server.process.send_signal(signal.SIGTERM)
        thread.join(20)
        assert answers == [200]
        assert stopped(server)
        assert server.process.returncode == 0
    with running("serve", APP, "--processes", "2") as server:
        hanging = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        hanging.request("POST", "/v1/nap", '{"seconds": 60}', {"Content-Type": "application/json"})
        wait_for(lambda: server.metric(r'rtml_gateway_requests_in_flight\{app="served",model="/v1/nap"\}') == 1)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        server.rest()
        assert time.monotonic() - begin < 15
        hanging.close()


def test_a_gateway_whose_engine_ends_ends_at_once_though_requests_run() -> None:
    with running("serve", APP, "--processes", "2") as server:
        hanging = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        hanging.request("POST", "/v1/nap", '{"seconds": 60}', {"Content-Type": "application/json"})
        wait_for(lambda: server.metric(r'rtml_gateway_requests_in_flight\{app="served",model="/v1/nap"\}') == 1)
        (engine,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and is_engine_of(entry, server.process.pid)
        ]
        begin = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        text = "\n".join(server.rest())
        assert time.monotonic() - begin < 20
        assert server.process.returncode == 1
        assert "the engine has ended by itself" in text
        hanging.close()


def is_engine_of(entry: Path, parent: int) -> bool:
    with contextlib.suppress(OSError):
        return (
            b"rtml.workers.supervisor" in (entry / "cmdline").read_bytes()
            and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        )
    return False


def test_processes_of_a_gateway_for_an_engine_elsewhere_and_grpc_beside() -> None:
    grpcclient = pytest.importorskip("tritonclient.grpc")
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    with (
        running("up", "--preimport", "tests.integration.served_app") as engine,
        running("gateway", APP, "--processes", "2", "--address", engine.address, "--grpc-port", str(port)) as server,
    ):
        assert len({ask_once(server) for _ in range(24)}) == 2
        for _ in range(6):
            client = grpcclient.InferenceServerClient(f"127.0.0.1:{port}")
            assert client.is_model_ready("scale")
            client.close()
        server.stop()
        assert server.process.returncode == 0
        assert engine.status()["nodes"]


def test_processes_end_when_their_supervisor_is_killed() -> None:
    with running("serve", APP, "--processes", "2") as server:
        children = processes_of(server)
        server.process.kill()
        server.rest()
        wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_quotas_hold_for_all_processes_together_and_files_are_read_again(tmp_path: Path) -> None:
    token, line = tokens.make("acme")
    file, log = tmp_path / "tokens", tmp_path / "log"
    file.write_text(f"{line} rate=0.01 burst=5")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    options = ["--tokens", str(file), "--access-log", str(log), "--open-metrics"]
    options += ["--tls-cert", str(tmp_path / "pem"), "--tls-key", str(tmp_path / "pem")]

    def ask(port: int, bearer: str) -> int:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        try:
            connection.request("POST", "/v1/reverse", DATA, {"Authorization": f"Bearer {bearer}"})
            return connection.getresponse().status
        finally:
            connection.close()

    with running("serve", APP, "--processes", "2", *options) as server:
        statuses = Counter(ask(server.port, token) for _ in range(16))
        assert statuses == {200: 5, 429: 11}
        other, line = tokens.make("beta")
        file.write_text(line)
        log.rename(tmp_path / "log.1")
        server.process.send_signal(signal.SIGHUP)
        for wanted, bearer in ((200, other), (401, token)):
            # In both processes, whichever of them answers.
            wait_for(lambda: Counter(ask(server.port, bearer) for _ in range(8)) == {wanted: 8})  # noqa: B023
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 16)
    tenants = Counter(line.count('"tenant":"acme"') for line in (tmp_path / "log.1").read_text().splitlines())
    assert tenants[1] == 5


@pytest.mark.slow
def test_models_are_loaded_in_all_processes_also_in_those_that_start_later(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name in ("one", "two"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.onnx").write_bytes(tiny_onnx.adder(1))
    options = ["--model-repository", str(tmp_path), "--model-control", "explicit"]
    with running("serve", APP, "--processes", "2", *options) as server:

        def statuses(model: str) -> set[int]:
            return {server.request("GET", f"/v2/models/{model}/ready")[0] for _ in range(12)}

        assert statuses("one") == {404}
        assert server.post("/v2/repository/models/one/load", {})[0] == 200
        assert server.post("/v2/repository/models/two/load", {})[0] == 200
        assert server.post("/v2/repository/models/three/load", {})[0] == 404
        assert statuses("one") == statuses("two") == {200}
        assert server.post("/v2/repository/models/two/unload", {})[0] == 200
        assert 200 not in statuses("two")
        for process in processes_of(server):
            os.kill(process, signal.SIGKILL)
            wait_for(lambda: process not in processes_of(server) and len(processes_of(server)) == 2)  # noqa: B023
            wait_for(lambda: both_serve(server))
        assert statuses("one") == {200}
        assert 200 not in statuses("two")


def both_serve(server: Server) -> bool:
    with contextlib.suppress(ConnectionError):
        return bool(server.request("GET", "/readyz")[1]["processes"] == {"serving": 2, "wanted": 2})
    return False


def failing(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "rtml", "serve", APP, "--processes", "2", "--workers", "1", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout + ended.stderr


def test_what_cannot_be_started_ends_with_a_line() -> None:
    code, text = failing("--port", "0", "--tokens", "/nonexistent")
    assert code == 1
    assert "cannot read the token file '/nonexistent'" in text
    assert "Traceback" not in text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = failing("--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "cannot listen on 127.0.0.1" in text


def test_two_gateways_do_not_share_a_port_by_mistake() -> None:
    with running("serve", APP, "--processes", "2") as server:
        code, text = failing("--port", str(server.port))
        assert code == 2
        assert "Address already in use" in text


def known_deaths(server: Server) -> float:
    with contextlib.suppress(ConnectionError):  # the kernel may have given this connection to the one that was killed
        return server.metric(r'rtml_gateway_process_deaths_total\{reason="SIGKILL"\}')
    return -1


def test_a_process_that_dies_again_and_again_is_started_with_pauses() -> None:
    with running("serve", APP, "--processes", "2") as server:
        for deaths in range(1, 4):
            wait_for(lambda: len(processes_of(server)) == 2)
            os.kill(max(processes_of(server)), signal.SIGKILL)
            wait_for(lambda: known_deaths(server) == deaths)  # noqa: B023
        wait_for(lambda: len(processes_of(server)) == 2)
        pauses = [line.rpartition("in ")[2] for line in stopped(server) if "another starts" in line]
        assert len(pauses) == 3
