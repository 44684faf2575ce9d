"""Links and hubs over real sockets: frames, waiting, ends.

Of rtml.link.base, rtml.link.hub, rtml.link.unix, rtml.link.zeromq, rtml.link.routed, rtml.link.addresses.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from rtml.link import Hub, Link, LinkClosed, base, connect
from rtml.link.unix import UnixLink
from rtml.messages import FRAME_MAX
from tests.unit import links as shared
from tests.unit.links import (
    LIMIT,
    SCHEMES,
    Serving,
    address_of,
    collect,
    link_is_unix,
    receive,
    until_closed,
)

address, links, server = shared.address, shared.links, shared.server

# libuv opens a pipe once per process: before the check for leaks takes its snapshot.
uvloop.new_event_loop().close()

# --- frames -----------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 100, 65_533, 65_534, 65_535, 65_536, 65_537, 131_068, 131_069, 200_000, 1_000_000, 9_000_000)


def test_frames_of_all_sizes_come_back_whole(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    with Serving(server):
        link = links(where)
        for size in SIZES:
            for first in (b"\x92", b"\xc1", b"\x00"):
                frame = first + os.urandom(size - 1)
                link.send(frame)
                assert receive(link, 1) == [frame]


def test_the_largest_frame_and_no_more(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    with Serving(server):
        link = links(where)
        frame = bytes(FRAME_MAX)
        link.send(frame)
        assert receive(link, 1) == [frame]
        for wrong in (b"", frame + b"x"):
            with pytest.raises(ValueError, match="a frame has 1 to"):
                link.send(wrong)
            with pytest.raises(ValueError, match="a frame has 1 to"):
                server.send(1, wrong)


def test_thousands_of_small_frames_in_order(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    count = 20_000
    with Serving(server):
        link = links(where)
        for number in range(count):
            link.send(b"%d" % number)
        assert receive(link, count) == [b"%d" % number for number in range(count)]


def test_a_batch_is_bounded(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    link = links(where)
    for number in range(300):
        link.send(b"%d" % number)
    seen = 0
    while seen < 300:
        batch = server.poll(LIMIT)
        assert len(batch) <= base.BATCH_MAX
        seen += len(batch)
    peer = batch[0][0]
    for number in range(300):
        server.send(peer, b"%d" % number)
    seen = 0
    while seen < 300:
        server.poll(0)
        frames = link.recv(0.1)
        assert len(frames) <= base.BATCH_MAX
        seen += len(frames)


def test_peers_are_apart_and_numbers_new(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    first, second = links(where), links(where)
    first.send(b"one")
    ((one, frame),) = collect(server, 1)
    assert frame == b"one"
    second.send(b"two")
    ((two, frame),) = collect(server, 1)
    assert frame == b"two"
    assert one != two
    server.send(two, b"for two")
    assert receive(second, 1) == [b"for two"]
    assert first.recv(0) == []
    first.close()
    assert collect(server, 1) == [(one, None)]
    third = links(where)
    third.send(b"three")
    ((three, _),) = collect(server, 1)
    assert three not in (one, two)
    assert not server.send(one, b"nobody")


def test_one_hub_serves_all_transports(tmp_path: Path, server: Hub, links: Callable[[str], Link]) -> None:
    places = [server.listen(address_of(scheme, tmp_path)) for scheme in SCHEMES]
    with Serving(server):
        for place in places:
            link = links(place)
            link.send(place.encode())
            assert receive(link, 1) == [place.encode()]


def test_credentials(tmp_path: Path, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(f"unix:{tmp_path}/s"))
    link.send(b"x")
    ((peer, _),) = collect(server, 1)
    assert server.credentials(peer) == (os.getpid(), os.geteuid())
    other = links(server.listen(f"ipc://{tmp_path}/z"))
    other.send(b"x")
    ((peer, _),) = collect(server, 1)
    assert server.credentials(peer) is None
    assert server.credentials(10_000) is None


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_timeouts(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    for timeout in (0, 0.03):
        start = time.monotonic()
        assert link.recv(timeout) == []
        assert server.poll(timeout) == []
        assert time.monotonic() - start >= 2 * timeout


def test_wake_ends_a_recv_of_another_thread(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    for _ in range(50):
        threading.Thread(target=link.wake).start()
        assert link.recv(None) == []


def test_recv_ready_takes_what_is_there(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    link = links(where)
    assert link.recv_ready() == []
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    sent = [b"a", b"b" * 200_000, b"\xc1c", *[b"%d" % number for number in range(500)]]
    for burst in (sent[:1], sent[1:2], sent[2:3], sent[3:]):
        for frame in burst:
            assert server.send(peer, frame)
        found: list[bytes] = []
        with select.epoll() as poll:
            poll.register(link.fileno(), select.EPOLLIN)
            while len(found) < len(burst):
                assert poll.poll(LIMIT) or server.poll(0) == []
                found += link.recv_ready()
                server.poll(0)  # it may still have to send the rest of what is long
        assert found == burst
    link.wake()
    assert link.recv_ready() == []
    assert link.recv(0.01) == []
    server.close_peer(peer)
    with pytest.raises(LinkClosed):
        while True:
            with select.epoll() as poll:
                poll.register(link.fileno(), select.EPOLLIN)
                assert poll.poll(LIMIT)
            link.recv_ready()


def test_wake_before_a_recv_is_not_lost(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    link.wake()
    link.wake()
    assert link.recv(None) == []
    assert link.recv(0.01) == []


def test_add_fd_ends_a_poll(address: str, server: Hub) -> None:
    server.listen(address)
    read, write = os.pipe()
    try:
        server.add_fd(read)
        os.write(write, b"x")
        assert server.poll(None) == []
        server.remove_fd(read)
        assert server.poll(0.01) == []
    finally:
        os.close(read)
        os.close(write)


def test_close_ends_a_recv_of_another_thread(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    ended = threading.Event()

    def run() -> None:
        with pytest.raises(LinkClosed):
            while True:
                link.recv(None)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    link.close()
    assert ended.wait(LIMIT)
    thread.join()
    link.close()
    link.wake()
    with pytest.raises(LinkClosed):
        link.send(b"x")
    with pytest.raises(LinkClosed):
        link.fileno()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads: this child does nothing else
def test_a_forked_child_lets_go_of_a_link_that_goes_on(
    tmp_path: Path, server: Hub, links: Callable[[str], Link]
) -> None:
    where = server.listen(f"unix:{tmp_path}/hub.sock")
    with Serving(server):
        link = links(where)
        assert isinstance(link, UnixLink)
        link.fileno()
        child = os.fork()
        if not child:
            link.close_in_child()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        link.send(b"\x92still here")
        assert receive(link, 1) == [b"\x92still here"]


def test_one_thread_sends_while_another_receives(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(address)
    count = 5_000
    with Serving(server):
        link = links(where)
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.extend(receive(link, count)))
        thread.start()
        for number in range(count):
            link.send(b"%d" % number)
        thread.join()
    assert got == [b"%d" % number for number in range(count)]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_descriptor_in_an_event_loop(
    address: str, server: Hub, links: Callable[[str], Link], new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Bursts, then a trickle: the lost wake-up of an edge-triggered descriptor would stop this."""
    where = server.listen(address)
    got: list[bytes] = []
    with Serving(server):
        link = links(where)

        async def run() -> None:
            loop = asyncio.get_running_loop()
            arrived = asyncio.Event()

            def readable() -> None:
                got.extend(link.recv(0))
                arrived.set()

            loop.add_reader(link.fileno(), readable)
            sent = 0
            for burst in (1, 1_000, 1, 1, 3_000, *[1] * 200):
                for _ in range(burst):
                    link.send(b"%d" % sent)
                    sent += 1
                while len(got) < sent:
                    arrived.clear()
                    await asyncio.wait_for(arrived.wait(), LIMIT)
            loop.remove_reader(link.fileno())

        loop = new_loop()
        try:
            loop.run_until_complete(run())
        finally:
            loop.close()
    assert got == [b"%d" % number for number in range(len(got))]


def test_the_descriptor_shows_what_a_send_took_in(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    """Input that a blocked `send` moved out of the socket, and input whose edge a `send` swallowed, stay visible."""
    where = server.listen(address)
    link = links(where)
    fd = link.fileno()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    link.send(b"first")
    ((peer, _),) = collect(server, 1)
    for number in range(20):
        server.send(peer, b"%d" % number)
        time.sleep(0.002)  # lets it arrive before the send, in some of the rounds
        link.send(b"x")
        assert poller.poll(int(LIMIT * 1000))
        assert receive(link, 1) == [b"%d" % number]
        server.poll(0)


def test_a_burst_then_a_trickle_at_the_hub(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    """The hub answers within the same loop that polls: a swallowed edge would leave it waiting for ever."""
    where = server.listen(address)
    peers = [links(where) for _ in range(4)]
    with Serving(server):
        for burst in (500, 1, 1, 500, *[1] * 100):
            for link in peers:
                for number in range(burst):
                    link.send(b"%d" % number)
            for link in peers:
                assert receive(link, burst) == [b"%d" % number for number in range(burst)]


# --- ends -------------------------------------------------------------------------------------------------------------


def test_frames_before_the_end_are_received(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    """On both sides, also when the one that left had unread input (the kernel then reports a reset first)."""
    link = links(server.listen(address))
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    for number in range(5):
        server.send(peer, b"%d" % number)
    time.sleep(0.05)
    for number in range(5):
        link.send(b"last %d" % number)
    link.close()
    expected = [(peer, b"last %d" % number) for number in range(5)]
    assert collect(server, 6) == [*expected, (peer, None)]
    assert server.poll(0.05) == []


def test_a_hub_that_sends_to_a_dead_peer_still_reads_its_last_frames(
    address: str, server: Hub, links: Callable[[str], Link]
) -> None:
    link = links(server.listen(address))
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    link.send(b"result")
    link.close()
    for _ in range(5):
        server.send(peer, b"safe")
    assert collect(server, 2) == [(peer, b"result"), (peer, None)]


def test_a_closed_hub_ends_its_links(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    server.send(peer, b"bye")
    link.send(b"unread")
    server.close()
    # A TCP connection that is closed with unread input drops what is under way.
    assert until_closed(link) in ([[b"bye"]] if link_is_unix(link) else [[b"bye"], []])
    with pytest.raises(LinkClosed):
        for _ in range(10):
            link.send(b"x")
            time.sleep(0.01)


def test_close_peer(address: str, server: Hub, links: Callable[[str], Link]) -> None:
    link = links(server.listen(address))
    link.send(b"hello")
    ((peer, _),) = collect(server, 1)
    server.send(peer, b"refused")
    server.close_peer(peer)
    server.close_peer(peer)
    assert server.poll(0) == [(peer, None)]
    assert until_closed(link) == [b"refused"]
    assert not server.send(peer, b"x")
    assert server.violations == 0
    assert server.poll(0.05) == []


def test_a_link_that_never_spoke_is_not_reported(address: str, server: Hub) -> None:
    connect_and_close = connect(server.listen(address), LIMIT)
    server.poll(0)
    connect_and_close.close()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        assert server.poll(0.05) == []


SERVER = """
import sys
from rtml.link import Hub
hub = Hub()
print(hub.listen(sys.argv[1]), flush=True)
while True:
    for peer, frame in hub.poll(None):
        if frame is not None:
            hub.send(peer, frame)
"""

CLIENT = """
import signal, sys
from rtml.link import connect
link = connect(sys.argv[1])
for number in range(3):
    link.send(b"%d" % number)
signal.pause()
"""


def start(program: str, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True)


class ServerProcess:
    """A hub in a process of its own, which echoes until it is killed."""

    def __init__(self, address: str) -> None:
        self.process = start(SERVER, address)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_killed_hub_is_noticed_and_its_successor_found(address: str) -> None:
    server = ServerProcess(address)
    try:
        link = connect(server.address, LIMIT)
        link.send(b"one")
        assert receive(link, 1) == [b"one"]
        os.kill(server.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert until_closed(link) == []
        assert time.monotonic() - killed < 5
        link.close()
        where = server.address
    finally:
        server.kill()
    with pytest.raises(LinkClosed, match="nobody"):
        connect(where, 0.05)
    found: list[Link] = []
    # A client that comes before the successor waits for it.
    waiting = threading.Thread(target=lambda: found.append(connect(where, LIMIT)))
    waiting.start()
    server = ServerProcess(where)
    try:
        waiting.join()
        found[0].send(b"two")
        assert receive(found[0], 1) == [b"two"]
        found[0].close()
    finally:
        server.kill()
    if where.startswith("unix:"):
        assert Path(where[5:]).exists(), "a killed hub leaves its socket file"
        os.unlink(where[5:])


def test_a_killed_peer_is_noticed(address: str, server: Hub) -> None:
    where = server.listen(address)
    process = start(CLIENT, where)
    (peer, _), *_ = collect(server, 3)
    process.kill()
    killed = time.monotonic()
    assert collect(server, 1) == [(peer, None)]
    assert time.monotonic() - killed < 5
    process.communicate()
