"""A gateway whose loop is behind: who comes too late is refused before anything is done for it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import rtml
from rtml.serving import App
from rtml.serving.accesslog import AccessLog
from rtml.serving.conditions import Conditions
from rtml.serving.front import Checks
from tests.integration.gateways import Server, serving

# libuv keeps a pipe for the whole process.
uvloop = pytest.importorskip("uvloop")
uvloop.new_event_loop().close()

#: Seconds for which the loop is held up, and of a budget that does not last so long.
HELD, SHORT = 0.4, 0.05

begun = threading.Event()
app = App("behind")


@app.endpoint("/v1/hold")
@rtml.task
async def hold(seconds: float) -> float:
    """Works for so long in the gateway's loop, as the engine of these tests does."""
    begun.set()
    time.sleep(seconds)
    return seconds


class Client:
    """A connection with blocking calls, for threads."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 15)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, seconds: float, *headers: str) -> None:
        body = json.dumps({"seconds": seconds})
        lines = ("POST /v1/hold HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers)
        self._socket.sendall("\r\n".join((*lines, "", body)).encode())

    def answer(self) -> tuple[int, dict[str, str], Any]:
        status = int(self._file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self._file.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, headers, json.loads(self._file.read(int(headers["content-length"])))

    def asks(self, seconds: float, *headers: str) -> tuple[int, dict[str, str], Any]:
        self.send(seconds, *headers)
        return self.answer()


def budget(seconds: float) -> str:
    return f"x-rtml-deadline-ms: {seconds * 1e3:.3f}"


def on_uvloop(scenario: Coroutine[Any, Any, None]) -> None:
    """Only its loop knows when it looked for what has come."""
    uvloop.run(scenario)


def held_up(port: int, *clients: tuple[Client, str]) -> list[tuple[int, dict[str, str], Any]]:
    """What clients are answered that send, each with a header, while the loop is held up."""
    with Client(port) as holder:
        assert holder.asks(0.0)[0] == 200
        begun.clear()
        holder.send(HELD)
        assert begun.wait(15)
        for client, header in clients:
            client.send(0.0, header)
        assert holder.answer()[0] == 200
        return [client.answer() for client, _ in clients]


def test_who_waited_too_long_in_the_socket_is_refused() -> None:
    async def scenario() -> None:
        async with serving(app) as server:
            await asyncio.to_thread(play, server)

    def play(server: Server) -> None:
        with Client(server.port) as short, Client(server.port) as long, Client(server.port) as patient:
            asked = (short, budget(SHORT)), (long, budget(30.0)), (patient, "x-other: 1")
            refused, late, any_time = held_up(server.port, *asked)
            status, headers, body = refused
            assert (status, headers["retry-after"], body["type"]) == (503, "1", "Overloaded")
            assert body["budget"] == pytest.approx(SHORT)
            assert body["predicted"] > HELD - 0.002
            assert body["retry_after"] == pytest.approx(body["predicted"] - SHORT, abs=1e-5)
            assert headers["x-request-id"]
            assert late[0] == any_time[0] == 200
            # The time in the socket is theirs, too.
            for _, told, _ in (late, any_time):
                assert float(told["server-timing"].rpartition("total;dur=")[2]) > HELD * 1e3 - 2.0
            # The connection is as it was, and so is the gateway.
            assert short.asks(0.0, budget(30.0))[0] == 200
            assert short.asks(0.0, budget(29.5))[0] == 200
            assert short.asks(0.0, budget(10.0))[0] == 200
        assert server.gateway.metrics.refused.labels("Overloaded").value == 1

    on_uvloop(scenario())


def test_the_engine_gets_what_is_left() -> None:
    async def scenario() -> None:
        async with serving(app) as server:
            await asyncio.to_thread(play, server)

    def play(server: Server) -> None:
        with Client(server.port) as client:
            (answer,) = held_up(server.port, (client, budget(10.0)))
            assert answer[0] == 200
        left = server.engine.options[-1].deadline
        assert left is not None
        assert 5.0 < left < 10.0 - HELD + 0.002

    on_uvloop(scenario())


def test_a_number_that_is_none_is_still_said_to_be_none() -> None:
    async def scenario() -> None:
        async with serving(app) as server:
            await asyncio.to_thread(play, server)

    def play(server: Server) -> None:
        with Client(server.port) as client:
            for header in (budget(10.0), budget(11.0)):
                assert client.asks(0.0, header)[0] == 200
            for text in ("0", "-1", "nan", "1_0", ""):
                status, _, body = client.asks(0.0, f"x-rtml-deadline-ms: {text}")
                assert (status, body["type"]) == (400, "InvalidInput")
            ((status, _, body),) = held_up(server.port, (client, "x-rtml-deadline-ms: 0"))
            assert (status, body["type"]) == (400, "InvalidInput")
            assert client.asks(0.0, budget(10.0))[0] == 200

    on_uvloop(scenario())


def test_what_is_refused_is_logged(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(app, conditions=Conditions(checks=Checks(log=log))) as server:
            await asyncio.to_thread(play, server)

    def play(server: Server) -> None:
        with Client(server.port) as client:
            assert client.asks(0.0, budget(10.0))[0] == 200
            ((status, headers, _),) = held_up(server.port, (client, budget(SHORT)))
            assert status == 503
            ids.append(headers["x-request-id"])

    metrics = rtml.metrics.GatewayMetrics()
    lost = metrics.log_lines_lost
    log = AccessLog(str(tmp_path / "log"), lost.labels("slow"), lost.labels("failed"))
    ids: list[str] = []
    log.open()
    try:
        on_uvloop(scenario())
    finally:
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (refused,) = [line for line in lines if line["status"] == 503]
    assert refused["request_id"] == ids[0]
    assert (refused["method"], refused["path"]) == ("POST", "/v1/hold")
    assert refused["duration"] > HELD - 0.002


def test_a_loop_that_waited_for_an_answer_is_not_behind() -> None:
    async def scenario() -> None:
        async with serving() as server:
            await asyncio.to_thread(play, server)

    def play(server: Server) -> None:
        wait = b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nx-rtml-deadline-ms: 300\r\nContent-Length: 0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), 15) as connection, connection.makefile("rb") as file:
            for _ in range(2):
                connection.sendall(wait)
                head = b"".join(iter(file.readline, b"\r\n")).lower()
                assert b" 504 " in head
                file.read(int(head.partition(b"content-length: ")[2].split()[0]))
                # It came when the loop had nothing to do: it has the whole of its budget.
                assert server.engine.options[-1].deadline == pytest.approx(0.3, abs=0.2)
        assert server.gateway.metrics.refused.labels("Overloaded").value == 0

    on_uvloop(scenario())
