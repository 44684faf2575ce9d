"""Requests that arrive in one piece, whose answers the gateway writes itself, beside those that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.integration.gateways import serving

pytestmark = pytest.mark.asyncio

#: Bytes that may wait behind a request that is being answered, and more.
_AHEAD = 400_000


def echo(body: bytes, *headers: bytes) -> bytes:
    """A request whose answer is its body."""
    lines = (b"POST /v1/echo HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers)
    return b"\r\n".join((*lines, b"", body))


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15)).decode()
    status, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert len(headers) == len(lines), f"a header comes twice: {lines}"
    return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def test_the_same_head_brings_each_body() -> None:
    async with serving() as server, connected(server.port) as (reader, writer):
        ids = set()
        for body in (b"one", b"two", b"six", b"longer than the others", b"ten"):
            writer.write(echo(body))
            status, headers, found = await answer(reader)
            assert (status, found) == (200, body)
            assert headers.keys() >= {"content-type", "date", "server", "server-timing", "x-request-id"}
            assert "connection" not in headers
            ids.add(headers["x-request-id"])
        assert len(ids) == 5


async def test_a_head_is_one_only_if_all_of_it_is_the_same() -> None:
    async with serving() as server, connected(server.port) as (reader, writer):
        for number in (*range(40), 1, 39):
            writer.write(echo(b"%d" % (number % 7), b"x-request-id: call-%d" % number))
            _, headers, found = await answer(reader)
            assert (headers["x-request-id"], found) == (f"call-{number}", b"%d" % (number % 7))


@pytest.mark.parametrize("pieces", [1, 2, 3, 10, 100_000])
async def test_requests_in_a_row_are_answered_in_their_order(pieces: int) -> None:
    bodies = [b"%d" % number for number in range(20)]
    sent = echo(b"first") + b"".join([echo(body) for body in bodies])
    size = len(sent) // pieces + 1
    async with serving() as server, connected(server.port) as (reader, writer):
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await asyncio.sleep(0)
        for body in (b"first", *bodies):
            assert (await answer(reader))[::2] == (200, body)


async def test_what_comes_before_an_answer_waits_for_it() -> None:
    """A whole request, and while it is answered others, whole and in parts, and more than is taken in ahead."""
    large = [bytes([65 + number]) * 100_000 for number in range(6)]
    assert sum(map(len, large)) > _AHEAD
    wait = b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nx-rtml-deadline-ms: 300\r\nContent-Length: 0\r\n\r\n"
    async with serving() as server, connected(server.port) as (reader, writer):
        writer.write(wait)
        await asyncio.wait_for(server.engine.started.wait(), 15)
        sent = b"".join([echo(body) for body in (b"small", *large)])
        for start in range(0, len(sent), 70_001):
            writer.write(sent[start : start + 70_001])
            await asyncio.sleep(0)
        assert (await answer(reader))[0] == 504
        for body in (b"small", *large):
            assert (await answer(reader))[::2] == (200, body)


async def test_a_client_that_goes_cancels_its_call() -> None:
    async with serving() as server:
        async with connected(server.port) as (_, writer):
            writer.write(b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            await asyncio.wait_for(server.engine.started.wait(), 15)
        await asyncio.wait_for(server.engine.cancelled.wait(), 15)


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
async def test_a_connection_ends_when_the_client_wants_it_to(version: bytes) -> None:
    last = echo(b"last", b"Connection: close").replace(b"HTTP/1.1", version)
    async with serving() as server, connected(server.port) as (reader, writer):
        writer.write(echo(b"kept"))
        assert (await answer(reader))[2] == b"kept"
        writer.write(last)
        assert (await answer(reader))[2] == b"last"
        assert await asyncio.wait_for(reader.read(), 15) == b""


async def test_other_answers_are_as_ever() -> None:
    """To HEAD, to what is wrong, to clients that wait for a go-ahead, and those that are large."""
    async with serving() as server, connected(server.port) as (reader, writer):
        writer.write(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15)
        assert head.startswith(b"HTTP/1.1 200 ")
        writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        status, _, body = await answer(reader)
        assert (status, json.loads(body)["type"]) == (404, "NotFound")
        go = echo(b"go", b"Expect: 100-continue")
        writer.write(go[:-2])
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(go[-2:])
        assert (await answer(reader))[2] == b"go"
        large = b"x" * 200_000
        writer.write(echo(large))
        assert (await answer(reader))[2] == large


async def test_a_gateway_that_stops_says_goodbye_on_whole_requests() -> None:
    async with serving() as server, connected(server.port) as (reader, writer):
        writer.write(echo(b"before"))
        assert "connection" not in (await answer(reader))[1]
        server.engine.started.clear()
        writer.write(b"POST /v1/wait HTTP/1.1\r\nHost: x\r\nx-rtml-deadline-ms: 300\r\nContent-Length: 0\r\n\r\n")
        await asyncio.wait_for(server.engine.started.wait(), 15)
        stopping = asyncio.create_task(server.gateway.stop())
        status, headers, _ = await answer(reader)
        assert (status, headers["connection"]) == (504, "close")
        assert await asyncio.wait_for(reader.read(), 15) == b""
        await stopping
