"""What happens before and after a route, over real sockets: traces, limits, tokens, the access log, TLS."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from rtml.metrics import GatewayMetrics
from rtml.serving import tokens
from rtml.serving.conditions import Conditions, open_conditions
from rtml.settings import HttpSettings
from tests.integration.gateways import Server, serving

pytestmark = pytest.mark.asyncio

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@asynccontextmanager
async def fronted(**settings: Any) -> AsyncIterator[tuple[Server, Conditions]]:
    metrics = GatewayMetrics()
    conditions = open_conditions(HttpSettings(linger=0, **settings), metrics)
    try:
        async with serving(metrics=metrics, conditions=conditions) as server:
            yield server, conditions
    finally:
        conditions.close()


# --- traces -----------------------------------------------------------------------------------------------------------


async def test_a_trace_is_echoed_with_a_span_of_the_gateways_and_the_state_as_it_came() -> None:
    async with serving() as server:
        given = {"traceparent": f"00-{ID}-{SPAN}-01", "tracestate": "vendor=1"}
        for path, status in (("/v1/echo", 200), ("/v1/nothing", 404), ("/v1/answer", 400)):
            found, _, headers = await server.get(path, "POST", headers=given, data=b"x")
            assert found == status
            version, trace, span, flags = headers["traceparent"].split("-")
            assert (version, trace, flags, headers["tracestate"]) == ("00", ID, "01", "vendor=1")
            assert span != SPAN
        _, _, headers = await server.post("/v1/echo", b"x", traceparent="00-nonsense")
        assert headers["traceparent"].split("-")[1] != ID
        assert "tracestate" not in headers
        _, _, headers = await server.post("/v1/echo", b"x")
        assert "traceparent" not in headers


# --- the access log ---------------------------------------------------------------------------------------------------


async def lines_of(path: Path, enough: Callable[[list[Any]], bool]) -> list[Any]:
    async with asyncio.timeout(10):
        while True:
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            if enough(lines):
                return lines
            await asyncio.sleep(0.02)


async def test_each_request_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with fronted(access_log=str(path)) as (server, _):
        given = {"traceparent": f"00-{ID}-{SPAN}-01", "x-request-id": "mine", "x-rtml-deadline-ms": "5000"}
        await server.get("/v1/echo", "POST", headers=given, data=b"four")
        _, _, headers = await server.post("/v1/nothing", b"x")
        await server.post("/v1/wait", x_rtml_deadline_ms="20")
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        server.engine.started.clear()
        writer.write(b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await server.engine.started.wait()
        writer.close()
        first, second, third, fourth = await lines_of(path, lambda lines: len(lines) == 4)
        await writer.wait_closed()
    assert first["time"].endswith("Z")
    assert 0 < first["duration"] < 5
    expected = {
        "method": "POST", "path": "/v1/echo", "status": 200, "bytes_in": 4, "bytes_out": 4, "request_id": "mine",
        "trace_id": ID, "queue": 0.001, "compute": 0.003, "deadline": 5.0, "deadline_outcome": "met",
        "remote": "127.0.0.1",
    }  # fmt: skip
    assert {name: first[name] for name in expected} == expected
    assert (second["status"], second["path"], second["request_id"]) == (404, "/v1/nothing", headers["x-request-id"])
    assert second["trace_id"] == headers["traceparent"].split("-")[1]
    assert (third["status"], third["deadline_outcome"]) == (504, "missed")
    assert (fourth["status"], fourth["bytes_out"]) == (499, 0)


async def test_the_log_follows_a_rotation(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    async with fronted(access_log=str(path)) as (server, conditions):
        await server.post("/v1/echo", b"1")
        await lines_of(path, lambda lines: len(lines) == 1)
        path.rename(old)
        await server.post("/v1/echo", b"2")
        await lines_of(old, lambda lines: len(lines) == 2)
        conditions.reload()
        await server.post("/v1/echo", b"3")
        await lines_of(path, lambda lines: len(lines) == 1)
        await server.post("/v1/echo", b"4")
    assert len(path.read_text().splitlines()) == 2
    assert len(old.read_text().splitlines()) == 2


async def test_a_log_that_cannot_be_written_fast_enough_loses_lines_and_no_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtml.serving.accesslog._PENDING_MAX", 20_000)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with fronted(access_log=str(pipe)) as (server, _):
            for _ in range(500):
                assert (await server.post("/v1/echo", b"x"))[0] == 200
            lost = (await server.metrics())['rtml_gateway_access_log_lines_lost_total{"reason": "slow"}']
            assert 0 < lost < 500
            os.set_blocking(reader, True)
            await asyncio.to_thread(os.read, reader, 1 << 20)
    finally:
        os.close(reader)


async def test_a_log_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot open the access log .*: No such file"):
        open_conditions(HttpSettings(access_log=str(tmp_path / "none" / "log")), GatewayMetrics())


# --- limits -----------------------------------------------------------------------------------------------------------


async def waiting(server: Server, path: str = "/v1/wait") -> asyncio.Task[Any]:
    server.engine.started.clear()
    task = asyncio.create_task(server.post(path))
    await server.engine.started.wait()
    return task


async def stopped(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_requests_beyond_the_most_are_refused_and_health_is_not() -> None:
    async with fronted(concurrency_max=1) as (server, _):
        task = await waiting(server)
        status, body, headers = await server.post("/v1/echo", b"x")
        assert (status, body["type"], headers["Retry-After"]) == (503, "Busy", "1")
        assert headers["x-request-id"]
        assert (await server.get("/readyz"))[0] == 200
        assert (await server.metrics())['rtml_gateway_refused_total{"reason": "Busy"}'] == 1
        await stopped(task)
        await server.engine.cancelled.wait()
        async with asyncio.timeout(5):
            while (await server.post("/v1/echo", b"x"))[0] != 200:
                await asyncio.sleep(0.01)


async def test_a_model_or_endpoint_has_a_limit_of_its_own() -> None:
    async with fronted(queue_max=7, queues={"/v1/wait": 1}) as (server, _):
        task = await waiting(server)
        status, body, headers = await server.post("/v1/wait")
        assert (status, body["type"], headers["Retry-After"]) == (503, "QueueFull", "1")
        assert (await server.post("/v1/echo", b"x"))[0] == 200
        found = await server.metrics()
        assert (
            found['rtml_gateway_requests_total{"app": "demo", "code": "503", "model": "/v1/wait", "protocol": "http"}']
            == 1
        )
        assert found['rtml_gateway_requests_in_flight{"app": "demo", "model": "/v1/wait"}'] == 1
        await stopped(task)


async def test_connections_beyond_the_most_get_an_answer_and_end() -> None:
    async with fronted(connections_max=2) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await server.get("/healthz"))[0] == 200
        over, over_writer = await asyncio.open_connection("127.0.0.1", server.port)
        answer = await over.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"TooManyConnections" in answer
        assert b"Retry-After: 1\r\n" in answer
        found = await server.metrics()
        assert found["rtml_gateway_connections{}"] == 2
        assert found['rtml_gateway_refused_total{"reason": "TooManyConnections"}'] == 1
        for one in (writer, over_writer):
            one.close()
            await one.wait_closed()
        assert await reader.read() == b""


async def test_lines_of_the_head_have_a_length() -> None:
    async with fronted(header_max=300) as (server, _):
        assert (await server.get("/healthz", headers={"long": "x" * 250}))[0] == 200
        assert (await server.get("/healthz", headers={"long": "x" * 400}))[0] == 431


# --- tokens -----------------------------------------------------------------------------------------------------------


async def test_tokens_over_http(tmp_path: Path) -> None:
    token, line = tokens.make("acme")
    file, log = tmp_path / "tokens", tmp_path / "log"
    file.write_text(f"{line} models=double rate=1 burst=2")
    async with fronted(tokens=str(file), access_log=str(log)) as (server, _):
        status, body, headers = await server.post("/v1/echo", b"x" * 100_000)
        assert (status, body["type"], headers["WWW-Authenticate"]) == (401, "Unauthorized", 'Bearer realm="rtml"')
        mine = {"Authorization": f"Bearer {token}"}
        assert (await server.post("/v1/echo", b"x", **mine))[0] == 403
        request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
        answers = [await server.post("/v2/models/double/infer", request, **mine) for _ in range(3)]
        assert [answer[0] for answer in answers] == [200, 200, 429]
        assert answers[2][2]["Retry-After"] == "1"
        assert (await server.get("/healthz"))[0] == 200
        assert (await server.get("/metrics"))[0] == 401
        lines = await lines_of(log, lambda lines: len(lines) >= 6)
    assert [line.get("tenant") for line in lines[:4]] == [None, None, "acme", "acme"]


# --- TLS --------------------------------------------------------------------------------------------------------------


def write_certificate(authority: trustme.CA, directory: Path) -> dict[str, str]:
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    return {"tls_cert": str(directory / "cert.pem"), "tls_key": str(directory / "key.pem")}


def trusting(*authorities: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for authority in authorities:
        authority.configure_trust(context)
    return context


async def get(port: int, context: ssl.SSLContext) -> tuple[int, bytes]:
    connector = aiohttp.TCPConnector(force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"https://127.0.0.1:{port}/healthz", ssl=context) as response,
    ):
        return response.status, await response.read()


async def test_https_and_a_new_certificate_without_a_restart(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    async with fronted(**write_certificate(first, tmp_path)) as (server, conditions):
        assert await get(server.port, trusting(first)) == (200, b'{"live":true,"ready":true}')
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await get(server.port, trusting(second))
        write_certificate(second, tmp_path)
        conditions.reload()
        assert (await get(server.port, trusting(second)))[0] == 200
        (tmp_path / "cert.pem").write_text("nonsense")
        conditions.reload()
        assert (await get(server.port, trusting(second)))[0] == 200
        old = trusting(second)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
        assert (await get(server.port, old))[0] == 200
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(server.port, old)


async def test_clients_must_show_a_certificate_of_the_authority(tmp_path: Path) -> None:
    servers, clients, strangers = trustme.CA(), trustme.CA(), trustme.CA()
    clients.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    settings = write_certificate(servers, tmp_path) | {"tls_client_ca": str(tmp_path / "ca.pem")}
    async with fronted(**settings) as (server, conditions):
        own, strange = trusting(servers), trusting(servers)
        clients.issue_cert("client@example").configure_cert(own)
        strangers.issue_cert("client@example").configure_cert(strange)
        assert (await get(server.port, own))[0] == 200
        for context in (strange, trusting(servers)):
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                await get(server.port, context)
        # An authority that is taken away is trusted no more.
        strangers.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        conditions.reload()
        assert (await get(server.port, strange))[0] == 200
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await get(server.port, own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "cert.pem"}, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": "cert.pem"}, "--tls-client-ca needs both"),
        ({"tls_cert": "none.pem", "tls_key": "key.pem"}, r"cannot read none\.pem: No such file"),
        ({"tls_cert": "key.pem", "tls_key": "key.pem"}, "no certificate and key of each other"),
    ],
)
async def test_certificates_that_cannot_be_used(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_certificate(trustme.CA(), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_conditions(HttpSettings(**settings), GatewayMetrics())
