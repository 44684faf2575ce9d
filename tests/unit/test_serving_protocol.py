"""Connections of the gateway, fed by hand: however the bytes are cut, each request has its one answer, in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from rtml.metrics import Cell
from rtml.serving import http
from rtml.serving.protocol import Connection, Crowd, Server

pytestmark = pytest.mark.asyncio


class Request(NamedTuple):
    """One request, and what its answer must be."""

    data: bytes
    answer: bytes
    #: The server must say that it wants the body.
    asked: bool = False


def request(path: str, body: bytes = b"", *lines: str, chunks: int = 0) -> Request:
    head = [f"{'POST' if body else 'GET'} {path} HTTP/1.1", "Host: x", *lines]
    sent = body
    if chunks:
        head.append("Transfer-Encoding: chunked")
        parts = [body[start : start + chunks] for start in range(0, len(body), chunks)]
        sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])
    elif body:
        head.append(f"Content-Length: {len(body)}")
    asked = any(line.startswith("Expect") for line in lines)
    return Request("\r\n".join([*head, "", ""]).encode() + sent, path.encode() + b" " + body, asked)


class Wire(asyncio.Transport):
    """What the connection takes for a socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = self.paused = False
        self._loop = loop
        self.protocol: Connection

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self.protocol.connection_lost, None)


class Client:
    """Sends, and reads answers. The server needs `turns` turns of its loop for each."""

    def __init__(self, turns: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self.turns = turns
        self.running = 0
        make = lambda message, payload, protocol, writer, task: web.BaseRequest(  # noqa: E731
            message, payload, protocol, writer, task, loop
        )
        settings = {"request_factory": make, "handler_cancellation": True, "access_log": None}
        self.server = Server(self.answer, http.RequestIds(), 60, Crowd(Cell(), Cell()), lambda *_: None, **settings)
        self.wire = Wire(loop)
        self.wire.protocol = Connection(self.server, loop=loop, **self.server._kwargs)
        self.wire.protocol.connection_made(self.wire)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.running += 1
        try:
            body = await http.read_body(request, 60)
            await turn(self.turns)
            response = web.Response(body=request.path.encode() + b" " + bytes(body))
            if request.headers.get("Connection") == "close":
                response.force_close()
            return response
        finally:
            self.running -= 1

    async def send(self, data: bytes) -> None:
        while self.wire.paused:
            await asyncio.sleep(0)
        if not self.wire.closed:
            self.wire.protocol.data_received(data)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)

    async def check(self, requests: Sequence[Request]) -> None:
        """These were answered, and nothing else was."""
        expected = [request.answer for request in requests]
        await self.until(lambda: self.wire.written.count(b"HTTP/1.1 200 ") >= len(expected))
        await turn(5)
        found, asked = answers(bytes(self.wire.written))
        assert found == expected
        assert asked <= sum(request.asked for request in requests)
        assert self.running == 0

    async def end(self) -> None:
        if not self.wire.closed:
            self.wire.closed = True
            self.wire.protocol.connection_lost(None)
        await self.until(lambda: self.running == 0)
        await turn(5)
        assert len(asyncio.all_tasks()) == 1


async def turn(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def answers(data: bytes) -> tuple[list[bytes], int]:
    """The bodies of the answers, all of which must be right, and how often a body was asked for."""
    found, asked = [], 0
    while b"\r\n\r\n" in data:
        head, _, rest = data.partition(b"\r\n\r\n")
        if head == b"HTTP/1.1 100 Continue":
            asked, data = asked + 1, rest
            continue
        assert head.startswith(b"HTTP/1.1 200 "), head
        (length,) = (int(line.split()[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        if len(rest) < length:
            break
        found.append(rest[:length])
        data = rest[length:]
    return found, asked


Program = Callable[[Client], Awaitable[None]]


async def played(program: Program, turns: int = 0) -> None:
    client = Client(turns)
    try:
        await program(client)
    finally:
        await client.end()


KINDS = {
    "whole": [request("/a", b"first"), request("/b"), request("/c", b"third")],
    "chunked": [request("/a", b"first body", chunks=4), request("/b", b"second", chunks=100), request("/c")],
    "expecting": [request("/a", b"first", "Expect: 100-continue"), request("/b", b"second")],
}


@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
async def test_two_pieces_cut_anywhere(kind: str, turns: int) -> None:
    requests = KINDS[kind]
    data = b"".join(request.data for request in requests)
    for cut in range(len(data) + 1):
        for between in (0, 1, 20):

            async def program(client: Client, cut: int = cut, between: int = between) -> None:
                await client.send(data[:cut])
                await turn(between)
                await client.send(data[cut:])
                await client.check(requests)

            await played(program, turns)


@pytest.mark.parametrize("kind", KINDS)
async def test_byte_by_byte(kind: str) -> None:
    requests = KINDS[kind] * 2

    async def program(client: Client) -> None:
        for byte in b"".join(request.data for request in requests):
            await client.send(bytes((byte,)))
            await turn(1)
        await client.check(requests)

    await played(program)


async def test_the_rest_of_a_head_is_not_taken_for_a_known_one() -> None:
    """Two requests that end alike, each begun behind another one that is answered meanwhile."""
    first, one, two = request("/first"), request("/one", b"body"), request("/two", b"body")
    for cut in range(1, len(one.data)):

        async def program(client: Client, cut: int = cut) -> None:
            await turn(5)
            for second in (one, two, one):
                await client.send(first.data + second.data[:cut])
                await turn(10)
                await client.send(second.data[cut:])
                await turn(10)
            await client.check([first, one, first, two, first, one])

        await played(program)


async def test_a_known_head_inside_another_one_is_no_request() -> None:
    known = request("/known")
    outer = b"GET /outer HTTP/1.1\r\nX: "

    async def program(client: Client) -> None:
        await turn(5)
        await client.send(known.data)
        await client.check([known])
        await client.send(known.data + outer)
        await client.check([known, known])
        await client.send(known.data)
        await client.check([known, known, Request(b"", b"/outer ")])

    await played(program)


async def test_random_conversations() -> None:
    for seed in range(300):
        dice = random.Random(seed)
        requests = [
            request(
                dice.choice(["/a", "/b"]),
                dice.choice([b"", b"body", b"BODY", bytes(5_000)]),
                *dice.sample(["X: 1", "Expect: 100-continue", "Y: " + "y" * 2_100], dice.randint(0, 1)),
                chunks=dice.choice([0, 0, 0, 3_000]),
            )
            for _ in range(dice.randint(1, 12))
        ]
        data = b"".join(request.data for request in requests)
        ends = [sum(len(request.data) for request in requests[:count]) for count in range(len(requests))]
        cuts = {dice.randrange(len(data)) for _ in range(dice.randint(0, 12))} | {
            end for end in ends if dice.random() < 0.5
        }

        async def program(client: Client) -> None:
            start = 0
            for end in [*sorted(cuts), len(data)]:  # noqa: B023
                await client.send(data[start:end])  # noqa: B023
                start = end
                await turn(dice.choice([0, 1, 2, 20]))  # noqa: B023
            await client.check(requests)  # noqa: B023

        await played(program, dice.choice([0, 1, 5]))


async def test_many_requests_at_once() -> None:
    for requests in ([request("/a", b"x")] * 500, [request("/big", bytes(200_000)), request("/b")] * 4):

        async def program(client: Client, requests: list[Request] = requests) -> None:
            data = b"".join(request.data for request in requests)
            for start in range(0, len(data), 100_000):
                await client.send(data[start : start + 100_000])
            await client.check(requests)

        await played(program, 1)


async def test_what_comes_behind_the_last_request_is_not_answered() -> None:
    last, more = request("/a", b"x", "Connection: close"), request("/b")

    async def program(client: Client) -> None:
        await client.send(last.data)
        await client.send(more.data)
        await client.check([last])
        await client.until(lambda: client.wire.closed)

    await played(program, 3)


@pytest.mark.parametrize("kind", KINDS)
async def test_clients_that_go_in_the_middle(kind: str) -> None:
    """Nothing is left behind (`end` looks), and what was answered before was answered in order."""
    requests = KINDS[kind]
    data = b"".join(request.data for request in requests)
    for cut in range(len(data)):

        async def program(client: Client, cut: int = cut) -> None:
            await client.send(data[:cut])
            await turn(cut % 7)
            found, _ = answers(bytes(client.wire.written))
            assert found == [request.answer for request in requests][: len(found)]

        await played(program, 2)
