"""Where hubs listen (rtml.link.files), who may connect, and what is left behind."""

from __future__ import annotations

import gc
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from rtml.link import AddressError, Hub, Link, LinkClosed, connect, hub, zeromq
from rtml.link.keys import CurveKeys
from rtml.link.zeromq import new_pair
from tests.unit import links as shared
from tests.unit.links import (
    LIMIT,
    Serving,
    address_of,
    collect,
    listen_once,
    receive,
    until_closed,
)

address, links, server = shared.address, shared.links, shared.server

# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["", "/tmp/x", "udp://127.0.0.1:1", "unix", "tcp:127.0.0.1:1"])
def test_malformed_addresses(server: Hub, wrong: str) -> None:
    with pytest.raises(AddressError):
        server.listen(wrong)
    with pytest.raises(AddressError):
        connect(wrong, 0)


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1", "tcp://127.0.0.1:x", "ipc:///proc/no/z", "unix:/proc/no/s"])
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
    second = Hub()
    try:
        with pytest.raises(AddressError):
            second.listen(where)
    finally:
        second.close()
    if not where.startswith("tcp:"):
        assert Path(where.partition(":")[2].removeprefix("//")).exists(), "the file of a live listener was removed"


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
    where = server.listen("tcp://0.0.0.0:0", CurveKeys(hub_public, hub_secret, allowed=frozenset([mine])))
    where = where.replace("0.0.0.0", "127.0.0.1")
    with Serving(server):
        link = connect(where, LIMIT, CurveKeys(mine, my_secret, server=hub_public))
        link.send(b"secret")
        assert receive(link, 1) == [b"secret"]
        with pytest.raises(LinkClosed, match="refuses our key"):
            connect(where, LIMIT, CurveKeys(theirs, their_secret, server=hub_public))
        for keys in (CurveKeys(mine, my_secret, server=theirs), None):
            with pytest.raises(LinkClosed):
                connect(where, 0.5, keys)
        link.send(b"still")
        assert receive(link, 1) == [b"still"]
        link.close()
    assert my_secret not in repr(CurveKeys(mine, my_secret))


def test_a_key_says_who_may_only_submit(server: Hub) -> None:
    hub_public, hub_secret = new_pair()
    pairs = {name: new_pair() for name in ("client", "node")}
    allowed = frozenset(public for public, _ in pairs.values())
    where = server.listen(
        "tcp://127.0.0.1:0", CurveKeys(hub_public, hub_secret, allowed=allowed, nodes=frozenset([pairs["node"][0]]))
    )
    with Serving(server):
        for number, (name, (public, secret)) in enumerate(pairs.items(), 1):
            link = connect(where, LIMIT, CurveKeys(public, secret, server=hub_public))
            link.send(b"who am I")
            assert receive(link, 1) == [b"who am I"]
            guests = [server.is_guest(peer) for peer in server._peers]
            assert guests.count(name == "client") == 1, number
            link.close()
    assert not server.is_guest(10**6)


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
