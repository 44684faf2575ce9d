"""Data endpoints on emulated hosts: one transfer, and one object for all hosts at once."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.integration import hosts as emulated

MIB = 1 << 20
#: Payload of a TCP segment in an Ethernet frame that is full, at an MTU of 1500 bytes and with timestamps.
PAYLOAD = 1448 / 1514


def shared(number: int) -> str:
    """A directory in shared memory for an endpoint of this program."""
    return f"/dev/shm/rtml-endpoint-{os.getpid()}-{number}"


class Host:
    """One endpoint in a process of its own (`benchmarks.endpoint_host`)."""

    def __init__(self, command: list[str], directory: str, address: str, naive: bool = False) -> None:
        more = ["--naive"] if naive else []
        self.process = subprocess.Popen(
            [*command, "-m", "benchmarks.endpoint_host", directory, address, *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, *words: Any) -> None:
        """Tell it to do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """What came of it."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, *words: Any) -> Any:
        """Both."""
        self.say(*words)
        return self.hear()

    def close(self) -> None:
        """Its input ends, and so does it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextlib.contextmanager
def many(network: emulated.Network, count: int, naive: bool = False) -> Iterator[list[Host]]:
    """An endpoint on each host."""
    made: list[Host] = []
    try:
        for number in range(count):
            command = [part for part in network.command(number) if part]
            made.append(Host(command, shared(number), network.address(number), naive))
        yield made
    finally:
        for host in made:
            host.close()


def spread(hosts: list[Host], size: int, rounds: int) -> list[float]:
    """Seconds until the last of all others has what the first one put."""
    home, receivers = hosts[0], hosts[1:]
    seconds = []
    for number in range(rounds + 1):
        ref = home.ask("put", size if number else 1_000_000)  # the first round makes the connections
        start = time.perf_counter()
        for receiver in receivers:
            receiver.say("get", ref)
        answers = [receiver.hear() for receiver in receivers]
        if number:
            seconds.append(time.perf_counter() - start)
        assert len({checksum for _, checksum in answers}) == 1
        for host in hosts:
            host.ask("drop", ref[0])
    return seconds


def on_links(count: int, rate: float, size: int, rounds: int, naive: bool = False) -> list[float]:
    """The same, between hosts with links of `rate` bits a second."""
    with emulated.hosts(count, rate=f"{rate / 1e6:.0f}mbit") as network, many(network, count, naive) as hosts:
        return spread(hosts, size, rounds)


def on_loopback(size: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a transfer between two endpoints, and of as many bytes between two plain sockets, in turn."""
    hosts = [Host([sys.executable], shared(number), "127.0.0.1") for number in range(2)]
    mine, plain = [], []
    try:
        for _ in range(rounds):
            mine += spread(hosts, size, 1)
            plain.append(plain_sockets(size))
    finally:
        for host in hosts:
            host.close()
    return mine, plain


def plain_sockets(size: int) -> float:
    """`sendall` in one thread, `recv_into` one buffer in another."""
    listener = socket.create_server(("127.0.0.1", 0))
    source, target = bytes(size), memoryview(bytearray(size))

    def serve() -> None:
        near, _ = listener.accept()
        with near:
            near.sendall(source)

    thread = threading.Thread(target=serve)
    thread.start()
    with socket.create_connection(listener.getsockname()) as sock:
        start = time.perf_counter()
        at = 0
        while at < size:
            at += sock.recv_into(target[at : at + MIB])
        seconds = time.perf_counter() - start
    thread.join()
    listener.close()
    return seconds
