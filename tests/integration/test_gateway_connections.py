"""The gateway and clients that send no HTTP, or send it slowly."""

from __future__ import annotations

import asyncio
import json

import pytest

from rtml.link import AddressError
from rtml.serving.gateway import Gateway
from tests.integration.gateways import InlineEngine, app, serving

pytestmark = pytest.mark.asyncio


async def exchange(port: int, *parts: bytes) -> bytes:
    """All that a plain connection gets after sending each of the parts; the server ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 15)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    "request_head",
    [
        b"\x16\x03\x01 this is TLS\r\n\r\n",
        b"GET / HTTP/9.9x\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nlong: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
    ids=["tls", "version", "length", "header", "long"],
)
async def test_what_is_no_http_gets_json_and_the_connection_ends(request_head: bytes) -> None:
    async with serving() as server:
        head, _, body = (await exchange(server.port, request_head)).partition(b"\r\n\r\n")
        status = b"431" if len(request_head) > 10_000 else b"400"
        assert head.startswith((b"HTTP/1.0 " + status, b"HTTP/1.1 " + status))
        assert b"application/json" in head
        assert b"x-request-id: " in head.lower()
        answer = json.loads(body)
        assert answer["type"] == "BadRequest"
        assert answer["error"].startswith("this is no valid HTTP request: ")
        assert len(answer["error"]) < 200


async def test_clients_that_send_slowly_are_not_waited_for() -> None:
    async with serving(read_timeout=0.2) as server:
        head = await exchange(server.port, b"POST /v1/echo HTTP/1.1\r\nHo")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(head.partition(b"\r\n\r\n")[2])["type"] == "RequestTimeout"
        assert await exchange(server.port) == b""  # nothing said, nothing answered
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nab")
        body = await reader.readuntil(b"}")
        assert body.startswith(b"HTTP/1.1 408 ")
        assert b'"type":"RequestTimeout"' in body
        writer.close()
        await writer.wait_closed()


async def test_idle_connections_and_long_programs_may_take_longer_than_the_head() -> None:
    async with serving(read_timeout=0.1) as server:
        # Shorter than the pauses below, so that a limit which ran on would show.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        echo = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na"
        for parts in ([echo], [echo[:10], echo[10:]]):
            for part in parts:
                writer.write(part)
                await writer.drain()
            assert (await reader.readuntil(b"\r\n\r\na")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.3)
        assert not reader.at_eof()
        writer.write(b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nx-rtml-deadline-ms: 400\r\nContent-Length: 0\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 504 ")
        writer.close()
        await writer.wait_closed()


async def test_a_port_that_is_taken_says_so() -> None:
    async with serving() as server:
        gateway = Gateway(InlineEngine(), [app])
        with pytest.raises(AddressError, match=rf"cannot listen on 127\.0\.0\.1, port {server.port}: .*in use"):
            await gateway.start("127.0.0.1", server.port)
        await gateway.stop()
