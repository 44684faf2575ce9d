"""Links and hubs under stress: peers that do not read, garbage, signals."""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from rtml.link import Hub, Link, LinkClosed, base, connect, routed, unix
from rtml.messages import FRAME_MAX
from tests.unit import links as shared
from tests.unit.links import (
    LIMIT,
    Serving,
    collect,
    receive,
    until_closed,
)

address, links, server = shared.address, shared.links, shared.server

# --- peers that do not read -------------------------------------------------------------------------------------------


def test_a_peer_that_does_not_read_is_cut_off(
    address: str, server: Hub, links: Callable[[str], Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 4 * 1024 * 1024
    for module in (unix, routed):
        monkeypatch.setattr(module, "OUTBOX_MAX", limit)
    where = server.listen(address)
    link, other = links(where), links(where)
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    other.send(b"hello")
    ((bystander, _),) = collect(server, 1)
    frame = bytes(100_000)
    sent = 0
    while server.send(peer, frame):
        sent += 1
        assert sent * len(frame) < 20 * limit, "no limit"
    assert sent * len(frame) >= limit
    assert server.violations == 1
    assert "does not read" in server.last_violation
    assert server.poll(1) == [(peer, None)]
    assert not server.send(peer, b"x")
    assert server.send(bystander, b"still here")
    assert receive(other, 1) == [b"still here"]
    # What it finds when it wakes up: a part of the frames, whole ones, then the end.
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            server.poll(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert set(until_closed(link)) <= {frame}
    finally:
        stopped.set()
        thread.join()


def test_a_queued_outbox_is_sent_when_the_peer_reads(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    frames = [b"%d" % number + bytes(10_000) for number in range(3_000)]
    assert all(server.send(peer, frame) for frame in frames)
    got: list[bytes] = []
    end = time.monotonic() + LIMIT
    while len(got) < len(frames) and time.monotonic() < end:
        server.poll(0)
        got += link.recv(0)
    assert got == frames
    assert server.violations == 0


def test_two_sides_that_both_send_do_not_deadlock(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    """The hub echoes at once, nobody calls `recv`: a blocked `send` takes the echoes in."""
    where = server.listen(address)
    frame = bytes(50_000)
    with Serving(server):
        link = links(where)
        for _ in range(1_000):
            link.send(frame)
        assert receive(link, 1_000) == [frame] * 1_000


def test_send_ends_when_the_peer_dies_while_it_blocks(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    link.send(b"hello")
    ((_, _),) = collect(server, 1)
    ended = threading.Event()

    def run() -> None:
        with pytest.raises(LinkClosed):
            for _ in range(100_000):
                link.send(bytes(50_000))
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert not ended.wait(0.3)
    server.close()
    assert ended.wait(LIMIT)
    thread.join()


# --- garbage ----------------------------------------------------------------------------------------------------------


def raw_unix(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(LIMIT)
    sock.connect(address[len("unix:") :])
    return sock


BAD_PACKETS = {
    "too long": [bytes(base.PACKET_MAX + 1)],
    "far too long": [bytes(200_000)],
    "escape alone": [b"\xc1"],
    "unknown kind": [b"\xc1\x07abc"],
    "bye": [b"\xc1\x02"],
    "empty frame": [b"\xc1\x00"],
    "plain between pieces": [b"\xc1\x01abc", b"plain"],
    "endless frame": [b"\xc1\x01" + bytes(base.PACKET_MAX - 2)] * (FRAME_MAX // base.PACKET_MAX + 2),
}


@pytest.mark.parametrize("packets", BAD_PACKETS.values(), ids=BAD_PACKETS.keys())
def test_a_hub_survives_garbage(tmp_path: Path, server: Hub, packets: list[bytes]) -> None:
    where = server.listen(f"unix:{tmp_path}/s")
    with Serving(server) as serving, raw_unix(where) as bad, raw_unix(where) as good:
        bad.send(b"hello")
        assert bad.recv(100) == b"hello"
        try:
            for packet in packets:
                bad.send(packet)
        except ConnectionError:
            assert packets is BAD_PACKETS["endless frame"]
        try:
            assert bad.recv(100) == b""
        except ConnectionResetError:
            assert packets is BAD_PACKETS["endless frame"]
        good.send(b"hello")
        assert good.recv(100) == b"hello"
    assert serving.gone[0] == 1
    assert server.violations == 1


@pytest.mark.parametrize("packets", BAD_PACKETS.values(), ids=BAD_PACKETS.keys())
def test_a_link_survives_garbage(tmp_path: Path, packets: list[bytes]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        link = connect(f"unix:{tmp_path}/s", LIMIT)
        bad, _ = listener.accept()

        def speak() -> None:
            try:
                for packet in [b"good", *packets]:
                    bad.send(packet)
            except ConnectionError:
                assert packets is BAD_PACKETS["endless frame"]

        thread = threading.Thread(target=speak)
        thread.start()
        assert until_closed(link) == [b"good"]
        # And an event loop hears of it, although the socket itself may have nothing more to read.
        with select.epoll() as epoll:
            epoll.register(link.fileno(), select.EPOLLIN)
            assert epoll.poll(0)
        link.close()
        thread.join()
        bad.close()


def no_keepalive(bad: zmq.Socket[bytes]) -> bytes:
    """The next packet that says something."""
    packet = b""
    while not packet:
        assert bad.poll(int(LIMIT * 1000))
        packet = bad.recv()
    return packet


def test_a_router_survives_garbage(server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen("tcp://127.0.0.1:0")
    host, _, port = where[len("tcp://") :].rpartition(":")
    with Serving(server) as serving, zmq.Context() as context:
        messages = [[b"a", b"b"], [b"", b""], [b"\xc1"], [b"\xc1\x02"], [b"\xc1\x00"], [b""] * 300]
        for parts in messages:
            with context.socket(zmq.DEALER) as bad:
                bad.linger = 0
                bad.connect(where)
                bad.send(b"hello")
                assert no_keepalive(bad) == b"hello"
                bad.send_multipart(parts)
                assert no_keepalive(bad) == base.BYE_PACKET
                # Ignored from now on.
                bad.send(b"more")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.send(b"GET / HTTP/1.1\r\n\r\n" * 20)
        with context.socket(zmq.DEALER) as large:
            large.linger = 0
            large.connect(where)
            large.send(bytes(FRAME_MAX + 100))
            large.send(b"after")
        link = links(where)
        link.send(b"hello")
        assert receive(link, 1) == [b"hello"]
    assert server.violations == len(messages), server.last_violation
    assert len(serving.gone) == len(messages)


def test_a_peer_that_errs_and_vanishes_is_reported_once(server: Hub) -> None:
    """The hub learns by a failed send that the peer is gone, before it has read what the peer did."""
    where = server.listen("tcp://127.0.0.1:0")
    with zmq.Context() as context, context.socket(zmq.DEALER) as bad:
        bad.connect(where)
        bad.send(b"hello")
        ((peer, _),) = collect(server, 1)
        bad.send_multipart([b"a", b"b"])
    limit = time.monotonic() + LIMIT
    while server.send(peer, b"x"):
        assert time.monotonic() < limit
    assert collect(server, 1) == [(peer, None)]
    assert server.poll(0.3) == []
    assert server.violations == 1


# --- signals ----------------------------------------------------------------------------------------------------------


class Alarm:
    """Calls `handler` by SIGALRM every so many seconds."""

    def __init__(self, every: float, handler: Callable[[], object]) -> None:
        self.every = every
        self.handler = handler

    def __enter__(self) -> None:
        self.running = False
        self.previous = signal.signal(signal.SIGALRM, lambda *_: self.alarm())
        signal.setitimer(signal.ITIMER_REAL, self.every, self.every)

    def alarm(self) -> None:
        if not self.running:  # handlers of fast signals would nest
            self.running = True
            self.handler()
            self.running = False

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.previous)


def test_signals_do_not_disturb_a_blocked_recv(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    with Alarm(0.005, lambda: None):
        start = time.monotonic()
        assert link.recv(0.1) == []
        assert time.monotonic() - start >= 0.1


def test_a_recv_in_a_handler_ends_the_interrupted_one(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    """The interrupted `recv` delivers, the one in the handler never does: so nothing overtakes."""
    link = links(server.listen(address))
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    seen: list[list[bytes]] = []

    def handler() -> None:
        server.send(peer, b"answer")
        seen.append(link.recv(0))
        signal.setitimer(signal.ITIMER_REAL, 0)

    with Alarm(0.02, handler):
        got = link.recv(None)
        got += receive(link, 1 - len(got))
    assert seen == [[]]
    assert got == [b"answer"]


def test_send_and_recv_in_handlers_lose_and_reorder_nothing(
    address: str, server: Hub, links: Callable[[str], Link]
) -> None:
    """A storm of signals whose handler sends and receives, over a program that does the same with all sizes."""
    where = server.listen(address)
    main_frames: list[bytes] = []
    handler_frames: list[bytes] = []
    got: list[bytes] = []
    #: Somebody holds frames that are not in `got` yet.
    holds = False
    with Serving(server):
        link = links(where)

        def handler() -> None:
            nonlocal holds
            frame = b"h%d" % len(handler_frames)
            handler_frames.append(frame)
            link.send(frame)
            # A handler may itself be interrupted by the next signal while it holds frames.
            if not holds:
                holds = True
                got.extend(link.recv(0))
                holds = False

        with Alarm(0.0007, handler):
            for number in range(4_000):
                frame = b"m%d" % number + bytes(200_000 if number % 50 == 0 else 10)
                main_frames.append(frame)
                link.send(frame)
                if number % 10 == 0:
                    holds = True
                    got.extend(link.recv(0))
                    holds = False
        got.extend(receive(link, len(main_frames) + len(handler_frames) - len(got)))
    assert len(handler_frames) > 5
    assert [frame for frame in got if frame[:1] == b"h"] == handler_frames
    assert [frame for frame in got if frame[:1] == b"m"] == main_frames
