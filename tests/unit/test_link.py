"""Links and hubs over real sockets: rtml.link.base, rtml.link.unix, rtml.link.zeromq, rtml.link.hub."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
import zmq

from rtml.link import AddressError, Hub, Link, LinkClosed, base, connect, hub, unix, zeromq
from rtml.messages import FRAME_MAX

#: Seconds after which a test that waits has failed.
LIMIT = 20.0

# libuv opens a pipe once per process: before the check for leaks takes its snapshot.
uvloop.new_event_loop().close()

SCHEMES = ("unix", "tcp", "ipc")


def address_of(scheme: str, directory: Path) -> str:
    return {"unix": f"unix:{directory}/s", "tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{directory}/z"}[scheme]


@pytest.fixture(params=SCHEMES)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return address_of(request.param, tmp_path)


@pytest.fixture
def server() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def links() -> Iterator[Callable[[str], Link]]:
    """Makes links that are closed at the end."""
    made: list[Link] = []

    def make(address: str) -> Link:
        made.append(connect(address, LIMIT))
        return made[-1]

    yield make
    for link in made:
        link.close()


def link_is_unix(link: Link) -> bool:
    return isinstance(link, unix.UnixLink)


def collect(server: Hub, count: int, limit: float = LIMIT) -> list[tuple[int, bytes | None]]:
    """What the hub reports, until there are `count` of it."""
    found: list[tuple[int, bytes | None]] = []
    end = time.monotonic() + limit
    while len(found) < count:
        left = end - time.monotonic()
        assert left > 0, f"only {len(found)} of {count}: {found[:5]}"
        found += server.poll(left)
    return found


def receive(link: Link, count: int, limit: float = LIMIT) -> list[bytes]:
    frames: list[bytes] = []
    end = time.monotonic() + limit
    while len(frames) < count:
        left = end - time.monotonic()
        assert left > 0, f"only {len(frames)} of {count}"
        frames += link.recv(left)
    return frames


def until_closed(link: Link, limit: float = LIMIT) -> list[bytes]:
    """Everything received until `LinkClosed`."""
    frames: list[bytes] = []
    end = time.monotonic() + limit
    with pytest.raises(LinkClosed):
        while time.monotonic() < end:
            frames += link.recv(0.2)
    return frames


class Serving:
    """A hub polled by a thread: echoes what it gets."""

    def __init__(self, server: Hub) -> None:
        self.server = server
        self.gone: list[int] = []
        self._read, self._write = os.pipe()
        server.add_fd(self._read)
        self._stop = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        os.write(self._write, b"x")
        self._thread.join()
        self.server.remove_fd(self._read)
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        while not self._stop:
            for peer, frame in self.server.poll(None):
                if frame is None:
                    self.gone.append(peer)
                else:
                    self.server.send(peer, frame)


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
    assert time.monotonic() - killed < 2
    process.communicate()


# --- peers that do not read -------------------------------------------------------------------------------------------


def test_a_peer_that_does_not_read_is_cut_off(
    address: str, server: Hub, links: Callable[[str], Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 4 * 1024 * 1024
    for module in (unix, zeromq):
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
                assert bad.poll(int(LIMIT * 1000))
                assert bad.recv() == b"hello"
                bad.send_multipart(parts)
                answer = b""  # a keepalive
                while not answer:
                    assert bad.poll(int(LIMIT * 1000))
                    answer = bad.recv()
                assert answer == base.BYE_PACKET
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


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["", "/tmp/x", "udp://127.0.0.1:1", "unix", "tcp:127.0.0.1:1"])
def test_malformed_addresses(server: Hub, wrong: str) -> None:
    with pytest.raises(AddressError):
        server.listen(wrong)
    with pytest.raises(AddressError):
        connect(wrong, 0)


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1", "tcp://127.0.0.1:x", "ipc:///no/such/directory/z"])
def test_addresses_that_cannot_be_bound(server: Hub, wrong: str) -> None:
    with pytest.raises(AddressError):
        server.listen(wrong)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "192.0.2.1", "example.invalid", "eth0", "10.1.2.3"])
def test_the_network_is_refused_without_keys(server: Hub, host: str) -> None:
    with pytest.raises(AddressError, match="CURVE"):
        server.listen(f"tcp://{host}:0")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "[::1]"])
def test_loopback_needs_no_keys(server: Hub, host: str) -> None:
    if host == "[::1]" and not Path("/proc/net/if_inet6").read_text():
        pytest.skip("this machine has no IPv6")
    where = server.listen(f"tcp://{host}:0")
    assert not where.endswith(":0")


def test_an_address_in_use(address: str, server: Hub) -> None:
    where = server.listen(address)
    if where.startswith("ipc:"):
        pytest.skip("ZeroMQ takes over the file of a live ipc listener")
    second = Hub()
    try:
        with pytest.raises(AddressError):
            second.listen(where)
    finally:
        second.close()
    assert where.startswith("tcp:") or Path(where[len("unix:") :]).exists()


def test_unix_files(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    where = f"unix:{directory}/s"
    previous = os.umask(0)
    try:
        server = Hub()
        server.listen(where)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o600
    server.close()
    server.close()
    assert not (directory / "s").exists()


def test_a_stale_socket_file_is_replaced_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    server, successor = Hub(), Hub()
    server.listen(f"unix:{path}")
    path.unlink()
    successor.listen(f"unix:{path}")
    server.close()
    assert path.exists(), "the file of a successor was removed"
    successor.close()
    path.write_text("precious")
    with pytest.raises(AddressError, match="not a socket"):
        listen_once(f"unix:{path}")
    assert path.read_text() == "precious"


def listen_once(address: str) -> None:
    server = Hub()
    try:
        server.listen(address)
    finally:
        server.close()


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(AddressError, match="written by other users"):
        listen_once(f"unix:{tmp_path}/s")


def test_a_long_path(tmp_path: Path, server: Hub, links: Callable[[str], Link]) -> None:
    where = server.listen(f"unix:{tmp_path}/{'d' * 120}/{'s' * 60}")
    link = links(where)
    link.send(b"x")
    ((_, frame),) = collect(server, 1)
    assert frame == b"x"


def test_too_many_connections(
    tmp_path: Path, server: Hub, links: Callable[[str], Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PEERS_MAX", 2)
    monkeypatch.setattr(zeromq, "PEERS_MAX", 2)
    for scheme in ("unix", "tcp"):
        where = server.listen(address_of(scheme, tmp_path))
        with Serving(server):
            kept = [links(where), links(where)]
            for link in kept:
                link.send(b"hello")
                assert receive(link, 1) == [b"hello"]
            late = links(where)
            late.send(b"hello") if scheme == "tcp" else None
            assert until_closed(late) == []
            for link in kept:
                link.send(b"again")
                assert receive(link, 1) == [b"again"]
                link.close()
            deadline = time.monotonic() + LIMIT
            while server._peers and time.monotonic() < deadline:
                time.sleep(0.01)
    assert server.violations == 2


# --- CURVE ------------------------------------------------------------------------------------------------------------


def test_curve_keys(server: Hub) -> None:
    (hub_public, hub_secret), (mine, my_secret), (theirs, their_secret) = (
        tuple(key.decode() for key in zmq.curve_keypair()) for _ in range(3)
    )
    where = server.listen("tcp://0.0.0.0:0", zeromq.CurveKeys(hub_public, hub_secret, allowed=frozenset([mine])))
    where = where.replace("0.0.0.0", "127.0.0.1")
    with Serving(server):
        link = connect(where, LIMIT, zeromq.CurveKeys(mine, my_secret, server=hub_public))
        link.send(b"secret")
        assert receive(link, 1) == [b"secret"]
        with pytest.raises(LinkClosed, match="refuses our key"):
            connect(where, LIMIT, zeromq.CurveKeys(theirs, their_secret, server=hub_public))
        for keys in (zeromq.CurveKeys(mine, my_secret, server=theirs), None):
            with pytest.raises(LinkClosed):
                connect(where, 0.5, keys)
        link.send(b"still")
        assert receive(link, 1) == [b"still"]
        link.close()
    assert my_secret not in repr(zeromq.CurveKeys(mine, my_secret))


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
    #: The main program holds frames that it has not put into `got`.
    holds = False
    with Serving(server):
        link = links(where)

        def handler() -> None:
            frame = b"h%d" % len(handler_frames)
            handler_frames.append(frame)
            link.send(frame)
            if not holds:
                got.extend(link.recv(0))

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


# --- processes and descriptors ----------------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_left(address: str) -> None:
    def once() -> None:
        server = Hub()
        where = server.listen(address)
        link, other = connect(where, LIMIT), connect(where, LIMIT)
        link.fileno()
        link.send(b"x")
        other.send(b"y")
        collect(server, 2)
        link.close()
        server.close()
        other.close()

    once()
    gc.collect()
    before = open_descriptors()
    for _ in range(5):
        once()
        with pytest.raises(LinkClosed):
            connect(address.replace(":0", ":1"), 0.01)
        with pytest.raises(AddressError):
            listen_once("tcp://0.0.0.0:0")
    assert open_descriptors() == before


def test_a_forked_child_does_not_keep_a_link_open(tmp_path: Path, server: Hub, links: Callable[[str], Link]) -> None:
    """A task may fork: the child's copies of the descriptors must not delay the end that either side sees."""
    link, other = (links(server.listen(f"unix:{tmp_path}/{name}")) for name in "ab")
    link.send(b"x")
    ((peer, _),) = collect(server, 1)
    other.send(b"x")
    ((second, _),) = collect(server, 1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        link.close()
        assert collect(server, 1) == [(peer, None)]
        server.close_peer(second)
        assert until_closed(other) == []
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_connections_beyond_the_descriptor_limit_are_turned_away(tmp_path: Path) -> None:
    """Without spinning, and those that are there go on."""
    program = f"""
import resource, socket, time
from rtml.link import Hub
hub = Hub()
hub.listen("unix:{tmp_path}/s")
def raw():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect("{tmp_path}/s")
    return sock
first = raw()
first.send(b"one")
while not hub.poll(1): pass
more = [raw() for _ in range(5)]
import os
used = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
before = time.process_time()
for _ in range(20): hub.poll(0.01)
assert time.process_time() - before < 0.1, "spins"
first.send(b"two")
while not (found := hub.poll(1)): pass
assert found == [(1, b"two")], found
for sock in more:
    sock.settimeout(5)
closed = 0
for sock in more:
    sock.setblocking(False)
    try:
        closed += sock.recv(1) == b""
    except BlockingIOError:
        pass
assert closed, "none was turned away"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_zmq_is_loaded_only_when_needed() -> None:
    program = "import sys, rtml.link; assert not {'zmq', 'asyncio', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
