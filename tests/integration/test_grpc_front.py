"""What is around gRPC requests: tokens, limits, traces, the access log, TLS; the same settings as HTTP's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as aio_client
import trustme
from tritonclient.grpc import service_pb2

from rtml.metrics import GatewayMetrics
from rtml.serving import tokens
from rtml.serving.conditions import Conditions, open_conditions
from rtml.settings import HttpSettings
from tests.integration.gateways import serving
from tests.integration.test_grpc import Served, app, failure, tensor

pytestmark = pytest.mark.asyncio

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

# Keeps grpc's poller, whose descriptors live as long as somebody uses grpc.
grpc.aio.init_grpc_aio()


@asynccontextmanager
async def fronted(**settings: Any) -> AsyncIterator[tuple[Served, Conditions]]:
    metrics = GatewayMetrics()
    conditions = open_conditions(HttpSettings(linger=0, **settings), metrics)
    try:
        async with serving(app, grpc_port=0, metrics=metrics, conditions=conditions) as server:
            client = aio_client.InferenceServerClient(f"127.0.0.1:{server.gateway.grpc_port}")
            try:
                yield Served(server, client), conditions
            finally:
                await client.close()
    finally:
        conditions.close()


def request_for(model: str, *values: float) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[len(values)]).contents.fp32_contents.extend(values)
    return request


async def test_tokens_and_quotas(tmp_path: Path) -> None:
    token, line = tokens.make("acme")
    file = tmp_path / "tokens"
    file.write_text(f"{line} models=total rate=1 burst=2")
    async with fronted(tokens=str(file), open_metrics=True) as (served, _):
        mine = {"authorization": f"Bearer {token}"}
        assert await served.client.is_server_ready()
        assert (await failure(served.infer("total", [1])))[0] == "UNAUTHENTICATED"
        assert (await failure(served.infer("total", [1], headers={"authorization": "Bearer x"})))[
            0
        ] == "UNAUTHENTICATED"
        assert (await failure(served.infer("nap", [0], headers=mine)))[0] == "PERMISSION_DENIED"
        assert (await failure(served.client.get_model_config("nap", headers=mine)))[0] == "PERMISSION_DENIED"
        assert (await failure(served.client.load_model("total", headers=mine)))[0] == "PERMISSION_DENIED"
        for _ in range(2):
            await served.infer("total", [1], headers=mine)
        with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED") as caught:
            await served.client._client_stub.ModelInfer(request_for("total", 1), metadata=tuple(mine.items()))
        trailing = dict(caught.value.trailing_metadata())
        assert (trailing["retry-after"], trailing["rtml-error-type"]) == ("1", "QuotaExceeded")
        assert await served.counted("rtml_gateway_tenant_requests_total", tenant="acme", outcome="over_quota") == 1


async def test_tokens_of_streams(tmp_path: Path) -> None:
    token, line = tokens.make("acme")
    file = tmp_path / "tokens"
    file.write_text(f"{line} models=total")
    async with fronted(tokens=str(file)) as (served, _):

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for model in ("total", "nap", "total"):
                yield {"model_name": model, "inputs": [tensor([0])]}

        mine = {"authorization": f"Bearer {token}"}
        found = [error async for _, error in served.client.stream_infer(requests(), headers=mine)]
        assert [error is None for error in found] == [True, False, True]
        assert "not good for /v2/models/nap/infer" in str(found[1])
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await anext(aiter(served.client.stream_infer(requests())))


async def test_limits() -> None:
    async with fronted(concurrency_max=2, queues={"wait": 1}) as (served, _):
        running = asyncio.create_task(served.infer("wait", [1]))
        await served.server.engine.started.wait()
        code, text = await failure(served.infer("wait", [1]))
        assert (code, "the most that may be" in text) == ("UNAVAILABLE", True)
        nap = asyncio.create_task(served.infer("nap", [0.5]))
        while len(served.server.engine.options) < 2:
            await asyncio.sleep(0.01)
        code, text = await failure(served.infer("total", [1]))
        assert (code, "most requests running: 2" in text) == ("UNAVAILABLE", True)
        assert (await served.server.get("/v2"))[0] == 503
        assert await served.client.is_server_ready()
        await nap
        await served.infer("total", [1])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_traces_and_the_access_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with fronted(access_log=str(log)) as (served, _):
        call = served.client._client_stub.ModelInfer(
            request_for("total", 1, 2), metadata=(("traceparent", f"00-{ID}-{SPAN}-01"), ("x-request-id", "mine"))
        )
        await call
        trailing = dict(await call.trailing_metadata())
        assert trailing["traceparent"].split("-")[1] == ID
        assert trailing["x-request-id"] == "mine"
        assert "compute;dur=" in trailing["server-timing"]
        await failure(served.infer("nobody", [1]))
        await failure(served.infer("wait", [1], timeout=20_000))
        async with asyncio.timeout(5):
            while not log.exists() or len(log.read_text().splitlines()) < 3:
                await asyncio.sleep(0.05)
        first, second, third = (json.loads(line) for line in log.read_text().splitlines())
        assert (first["path"], first["status"]) == ("/inference.GRPCInferenceService/ModelInfer", 200)
        assert (first["trace_id"], first["request_id"], first["model"], first["version"]) == (ID, "mine", "total", "3")
        assert first["remote"] == "127.0.0.1"
        assert second["status"] == 404
        assert (third["status"], third["deadline"], third["deadline_outcome"]) == (504, 0.02, "missed")


# --- TLS --------------------------------------------------------------------------------------------------------------


def write_certificate(authority: trustme.CA, directory: Path) -> dict[str, str]:
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    return {"tls_cert": str(directory / "cert.pem"), "tls_key": str(directory / "key.pem")}


async def live(served: Served, authority: trustme.CA, client: trustme.LeafCert | None = None) -> bool:
    own = () if client is None else (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), *own)
    async with grpc.aio.secure_channel(served.url, credentials) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        try:
            return bool(await ask(b"", timeout=10) == b"\x08\x01")
        except grpc.aio.AioRpcError as refused:
            return refused.code() is not grpc.StatusCode.UNAVAILABLE


async def test_tls_and_a_new_certificate_without_a_restart(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    async with fronted(**write_certificate(first, tmp_path)) as (served, conditions):
        assert await live(served, first)
        assert not await live(served, second)
        write_certificate(second, tmp_path)
        conditions.reload()
        assert await live(served, second)
        assert not await live(served, first)


async def test_clients_must_show_a_certificate_of_the_authority(tmp_path: Path) -> None:
    servers, clients, strangers = trustme.CA(), trustme.CA(), trustme.CA()
    clients.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    settings = write_certificate(servers, tmp_path) | {"tls_client_ca": str(tmp_path / "ca.pem")}
    async with fronted(**settings) as (served, _):
        assert await live(served, servers, clients.issue_cert("client@example"))
        assert not await live(served, servers, strangers.issue_cert("client@example"))
        assert not await live(served, servers)
