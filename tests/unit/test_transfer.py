"""Data endpoints in this process: what is served, to whom, and what happens when something fails on the way."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rtml.announcer import Announcer
from rtml.errors import LimitExceeded, ObjectLost, ProtocolError
from rtml.exchange import Chunk, Give, Given, Open, Opened, Place, Read, call, expect, receive, send
from rtml.messages import ObjectRef
from rtml.segment import HEADER_OFFSET
from rtml.store import Store
from rtml.transfer import pulling, uploads
from rtml.transfer.endpoint import CONNECTIONS_MAX, Endpoint, EndpointSettings, listen_inside, listen_outside
from rtml.transfer.holders import HOME
from rtml.transfer.remote import RemoteStore

MIB = 1024 * 1024
SECRET = b"s" * 40


class Host:
    """A node without dispatcher and executors: shared memory and a data endpoint, in threads."""

    def __init__(self, directory: Path, name: str, memory: int = 0, secret: bytes = SECRET) -> None:
        self.directory = str(directory / name)
        Store.make(self.directory)
        (directory / f"{name}-disk").mkdir(exist_ok=True)
        outside = listen_outside("127.0.0.1", 0)
        path = str(directory / f"{name}.sock")
        self.address = f"127.0.0.1:{outside.getsockname()[1]}"
        Place(self.address, path, memory, str(directory / f"{name}-disk")).write(self.directory)
        settings = EndpointSettings(self.directory, self.address, secret, 1000, 2000)
        self.endpoint = Endpoint(settings, outside, listen_inside(path))
        self._stores: list[Store] = []
        threading.Thread(target=self.endpoint.run, daemon=True).start()

    def store(self, session: int) -> Store:
        self._stores.append(Store(self.directory, session))
        return self._stores[-1]

    def files(self) -> list[str]:
        return sorted(path.name for path in Path(self.directory).glob("*-*"))

    def close(self) -> None:
        """When nobody talks any more."""
        self.endpoint.caller.close()
        for store in self._stores:
            store.close()
        # Both of its listeners wait for a caller.
        eventually(lambda: self.endpoint._connections._value == CONNECTIONS_MAX - 2)
        self.endpoint.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(name: str, **more: Any) -> Host:
        made.append(Host(tmp_path, name, **more))
        return made[-1]

    yield make
    close_all(made)


def close_all(made: list[Host]) -> None:
    """All at once, since they talk to each other."""
    for host in made:
        host.endpoint.caller.close()
    for host in made:
        host.close()


@contextmanager
def remote(session: int, host: Host) -> Iterator[RemoteStore]:
    client = RemoteStore(session, "tcp://somewhere", SECRET)
    client.endpoints([host.address])
    try:
        yield client
    finally:
        client.close()


def eventually(true: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def evicted(endpoint: Endpoint, ref: ObjectRef) -> bool:
    endpoint.copies._evict(0)
    return ref.id not in endpoint.copies._copies


def content(size: int, seed: int = 1) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[seed : seed + size]


@contextmanager
def relay(target: str, most: int) -> Iterator[str]:
    """A port that leads to `target`, and ends its first connection after `most` bytes from there."""
    listener = socket.create_server(("127.0.0.1", 0))
    made: list[socket.socket] = [listener]
    threads: list[threading.Thread] = []

    def serve(limit: int | None) -> None:
        near, _ = listener.accept()
        host, port = target.split(":")
        far = socket.create_connection((host, int(port)))
        made.extend((near, far))

        def copy(source: socket.socket, sink: socket.socket, left: int | None) -> None:
            try:
                while left is None or left > 0:
                    data = source.recv(65536 if left is None else min(65536, left))
                    if not data:
                        break
                    sink.sendall(data)
                    left = None if left is None else left - len(data)
            except OSError:
                pass
            for sock in (source, sink):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        for arguments in ((near, far, None), (far, near, limit)):
            threads.append(threading.Thread(target=copy, args=arguments, daemon=True))
            threads[-1].start()

    def run() -> None:
        limit: int | None = most
        try:
            while True:
                serve(limit)
                limit = None
        except OSError:
            pass

    threads.append(threading.Thread(target=run, daemon=True))
    threads[-1].start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for sock in made:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for sock in made:
            sock.close()


# --- between nodes ----------------------------------------------------------------------------------------------------


def test_an_object_comes_once_for_all_processes_and_is_not_copied_by_readers(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    owner = here.store(1)
    ref = owner.put([b"head", content(3 * MIB)])
    assert ref.node == here.address
    first, second = there.store(11), there.store(12)
    head, body = first.get(ref)
    assert (bytes(head), bytes(body)) == (b"head", content(3 * MIB))
    assert body.readonly
    again = second.get(ref)
    assert bytes(again[1]) == content(3 * MIB)
    assert first.asker.moved == ref.size
    assert second.asker.moved == 0
    assert len(there.files()) == 1


def test_many_threads_ask_at_once(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    owner, reader = here.store(1), there.store(11)
    refs = [owner.put([content(MIB, seed)]) for seed in range(6)]
    results: dict[tuple[int, int], bool] = {}

    def read(thread: int) -> None:
        for seed in range(6):
            (body,) = reader.get(refs[seed])
            results[thread, seed] = bytes(body) == content(MIB, seed)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    assert all(results.values())
    assert reader.asker.moved == sum(ref.size for ref in refs)


def test_what_is_gone_is_said_to_be_gone(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    owner = here.store(1)
    ref = owner.put([content(MIB)])
    owner.free(ref.id)
    other = owner.put([content(MIB)])  # in the same segment
    assert other.segment == ref.segment
    with pytest.raises(ObjectLost, match="recycled"):
        there.store(11).get(ref)
    with pytest.raises(ObjectLost, match="no such object"):
        there.store(11).get(ObjectRef(1, MIB, "../../etc/passwd", here.address))
    with pytest.raises(ObjectLost, match="no segment"):
        there.store(11).get(ObjectRef(1, MIB, "00000001-99", here.address))


def test_a_transfer_goes_on_where_it_stopped(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    ref = here.store(1).put([content(5 * MIB)])
    with relay(here.address, 2 * MIB) as address:
        (body,) = there.store(11).get(ObjectRef(ref.id, ref.size, ref.segment, address))
    assert bytes(body) == content(5 * MIB)


def test_a_source_that_is_read_is_pinned(hosts: Callable[..., Host]) -> None:
    here = hosts("here")
    owner = here.store(1)
    ref = owner.put([content(MIB)])
    sock = call(here.address, SECRET)
    send(sock, Open(ref))
    assert expect(sock, Opened) == Opened("", [HOME])
    owner.free(ref.id)
    other = owner.put([content(MIB, 7)])
    assert other.segment != ref.segment
    send(sock, Read(HEADER_OFFSET, ref.size))
    assert expect(sock, Chunk).count == ref.size - HEADER_OFFSET
    sock.close()
    eventually(lambda: not owner.sweep() and not owner._pinned)  # type: ignore[func-returns-value]


def test_copies_are_sources_and_a_lost_one_is_replaced(hosts: Callable[..., Host]) -> None:
    here, first, second, third = (hosts(name) for name in ("here", "first", "second", "third"))
    ref = here.store(1).put([content(2 * MIB)])
    first.store(1).get(ref)
    (body,) = second.store(1).get(ref)
    assert bytes(body) == content(2 * MIB)
    # The second had it from the first: its holder is known, and the first has served it.
    eventually(lambda: here.endpoint.holders.known(ref.id) == {first.address: True, second.address: True})
    assert first.endpoint.counts.bytes_out == ref.size - HEADER_OFFSET
    del body
    for host in (first, second):
        eventually(lambda: evicted(host.endpoint, ref))  # noqa: B023 - called at once
    (body,) = third.store(1).get(ref)
    assert bytes(body) == content(2 * MIB)


class Gate:
    """Has an endpoint send no more than the first `most` bytes of what it is asked for, until it is opened."""

    def __init__(self, endpoint: Endpoint, most: int) -> None:
        self._serve = endpoint._serve
        self.most = most
        self.open = threading.Event()
        endpoint._serve = self  # type: ignore[method-assign]

    def __call__(self, sock: socket.socket, opened: Any, asked: Read) -> None:
        middle = min(asked.end, HEADER_OFFSET + self.most)
        if asked.offset < middle and not self.open.is_set():
            self._serve(sock, opened, Read(asked.offset, middle))
            asked = Read(middle, asked.end)
        self.open.wait(60)
        self._serve(sock, opened, asked)


def getting(host: Host, ref: ObjectRef) -> tuple[threading.Thread, list[bytes]]:
    """The object, on its way there."""
    found: list[bytes] = []
    reader = host.store(50)
    thread = threading.Thread(target=lambda: found.append(bytes(reader.get(ref)[0])))
    thread.start()
    return thread, found


def there(host: Host, ref: ObjectRef) -> int:
    """Up to where it has arrived."""
    copy = host.endpoint.copies._copies.get(ref.id)
    return 0 if copy is None or copy.incoming is None else copy.incoming.upto(HEADER_OFFSET)


def test_what_has_arrived_is_passed_on_and_the_home_sends_it_once(hosts: Callable[..., Host]) -> None:
    here, first, second = (hosts(name) for name in ("here", "first", "second"))
    ref = here.store(1).put([content(4 * MIB)])
    gate = Gate(here.endpoint, 2 * MIB)
    one, to_first = getting(first, ref)
    eventually(lambda: there(first, ref) == HEADER_OFFSET + 2 * MIB)
    two, to_second = getting(second, ref)
    eventually(lambda: there(second, ref) == HEADER_OFFSET + 2 * MIB)
    gate.open.set()
    one.join()
    two.join()
    assert to_first == to_second == [content(4 * MIB)]
    assert here.endpoint.counts.bytes_out == first.endpoint.counts.bytes_out == ref.size - HEADER_OFFSET


def test_large_objects_are_read_from_several_holders_at_once(hosts: Callable[..., Host]) -> None:
    here, first, second = (hosts(name) for name in ("here", "first", "second"))
    ref = here.store(1).put([content(20 * MIB)])
    first.store(1).get(ref)
    eventually(lambda: here.endpoint.holders.known(ref.id) == {first.address: True})
    sent = here.endpoint.counts.bytes_out
    gates = [Gate(host.endpoint, 0) for host in (here, first)]  # neither can take all before the other begins
    thread, found = getting(second, ref)
    eventually(lambda: sum(here.endpoint.holders._objects[ref.id].load.values()) == 2)
    for gate in gates:
        gate.open.set()
    thread.join()
    assert found == [content(20 * MIB)]
    from_home, from_first = here.endpoint.counts.bytes_out - sent, first.endpoint.counts.bytes_out
    assert from_home + from_first == ref.size - HEADER_OFFSET
    assert min(from_home, from_first) >= MIB


def test_a_source_that_gives_nothing_is_given_up(hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "STUCK", 0.2)
    monkeypatch.setattr("rtml.transfer.endpoint.STILL_HERE", 0.05)
    here, first, second = (hosts(name) for name in ("here", "first", "second"))
    ref = here.store(1).put([content(2 * MIB)])
    gate = Gate(here.endpoint, MIB)
    one, to_first = getting(first, ref)
    eventually(lambda: there(first, ref) == HEADER_OFFSET + MIB)
    # The home is slow for the first, which therefore has nothing for the second, and fast for the second.
    here.endpoint._serve = gate._serve  # type: ignore[method-assign]
    two, to_second = getting(second, ref)
    two.join()
    assert to_second == [content(2 * MIB)]
    assert second.endpoint.counts.resumed == 1
    gate.open.set()
    one.join()
    assert to_first == to_second


def test_copies_that_nobody_reads_are_forgotten_in_time(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there", memory=16 * MIB)
    owner, reader = here.store(1), there.store(11)
    kept = reader.get(owner.put([content(MIB, 3)]))
    for seed in range(20):
        ref = owner.put([content(2 * MIB, seed)])
        assert bytes(reader.get(ref)[0]) == content(2 * MIB, seed)
        owner.free(ref.id)
    assert there.endpoint.copies.held <= 8 * MIB + 2 * MIB
    assert bytes(kept[0]) == content(MIB, 3)


def test_prefetched_objects_are_here_when_they_are_asked_for(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    ref = here.store(1).put([content(MIB)])
    there.endpoint.copies.prefetch([ref])
    eventually(lambda: there.endpoint.copies._copies[ref.id].complete)
    reader = there.store(11)
    assert bytes(reader.get(ref)[0]) == content(MIB)


def test_who_has_another_secret_gets_nothing(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there", secret=b"other")
    ref = here.store(1).put([content(MIB)])
    with pytest.raises(ProtocolError, match="another secret"):
        call(here.address, b"wrong")
    with pytest.raises(ObjectLost, match="another secret"):
        there.store(11).get(ref)
    with socket.create_connection(("127.0.0.1", int(here.address.rpartition(":")[2]))) as sock:
        receive(sock)
        send(sock, Open(ref))  # without a proof
        sock.settimeout(10)
        assert sock.recv(1) == b""


def test_garbage_ends_its_connection_only(hosts: Callable[..., Host]) -> None:
    here = hosts("here")
    port = int(here.address.rpartition(":")[2])
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\x05\x00\x00\x00hello"):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(garbage)
            sock.settimeout(10)
            try:
                while sock.recv(4096):
                    pass
            except ConnectionResetError:
                pass
    ref = here.store(1).put([b"x"])
    assert bytes(hosts("there").store(11).get(ref)[0]) == b"x"


# --- remote clients ---------------------------------------------------------------------------------------------------


def test_a_remote_client_puts_frees_and_goes(hosts: Callable[..., Host]) -> None:
    here, there = hosts("here"), hosts("there")
    client = RemoteStore(77, "tcp://somewhere", SECRET)
    client.endpoints([here.address])
    refs = [client.put([b"head", content(MIB, seed)]) for seed in range(3)]
    assert {ref.node for ref in refs} == {here.address}
    assert bytes(there.store(1).get(refs[1])[1]) == content(MIB, 1)
    assert bytes(client.get(refs[2])[1]) == content(MIB, 2)
    client.free(refs[0].id)
    eventually(lambda: len(here.endpoint.uploads._clients[77].objects) == 2)
    client.close()
    eventually(lambda: not here.endpoint.uploads._clients)
    assert not here.endpoint.uploads.store.objects


def test_a_client_that_vanishes_leaves_nothing(hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "GRACE", 0.05)
    here = hosts("here")
    client = RemoteStore(78, "tcp://somewhere", SECRET)
    client.endpoints([here.address])
    client.put([content(MIB)])
    client._closed = True
    client._ring()
    assert client._thread is not None
    client._thread.join()
    os.close(client._bell)
    client._hang_up(here.address)
    eventually(lambda: not here.endpoint.uploads.store.objects)


def test_a_client_whose_connection_breaks_keeps_its_objects(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "GRACE", 1.0)
    here = hosts("here")
    client = RemoteStore(79, "tcp://somewhere", SECRET)
    client.endpoints([here.address])
    ref = client.put([content(MIB)])
    sock = client._socks[here.address]
    sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: client._socks.get(here.address) not in (None, sock))
    time.sleep(1.2)
    assert bytes(client.get(ref)[0]) == content(MIB)
    client.close()


def test_what_has_no_room_is_refused_clearly(hosts: Callable[..., Host]) -> None:
    here = hosts("here", memory=8 * MIB)
    client = RemoteStore(80, "tcp://somewhere", SECRET)
    client.endpoints([here.address])
    with pytest.raises(LimitExceeded, match=r"finds no place.*object_memory"):
        client.put([content(32 * MIB)])
    assert bytes(client.get(client.put([content(MIB)]))[0]) == content(MIB)
    client.close()


def test_the_next_life_of_an_endpoint_keeps_what_clients_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "GRACE", 0.3)
    store = Store(str(tmp_path), 5)
    kept, lost = store.put([content(MIB)]), store.put([content(MIB)])
    store._presence.leave()
    next_life = uploads.Uploads(Store(str(tmp_path), 6), [5])
    with socket.socket() as sock:
        next_life.joined(77, [(kept.id, kept.segment)], sock)
    eventually(lambda: not (tmp_path / lost.segment).exists())
    assert (tmp_path / kept.segment).exists()
    next_life.drop(77, [(kept.id, kept.segment)])
    assert not (tmp_path / kept.segment).exists()


# --- a node that leaves -----------------------------------------------------------------------------------------------


def test_what_is_needed_goes_to_those_who_have_room_and_clients_follow(hosts: Callable[..., Host]) -> None:
    here, small, large, last = hosts("here"), hosts("small", memory=4 * MIB), hosts("large"), hosts("last")
    owner = here.store(1)
    ref = owner.put([content(8 * MIB)])
    with remote(77, here) as client:
        put = client.put([content(8 * MIB, 5)])
        freed = client.put([content(MIB, 6)])
        takers = [small.address, large.address, "127.0.0.1:1", here.address]
        for path in Path(small.directory).parent.glob("small-disk"):
            path.rmdir()  # nor has it room there
        given = here.endpoint.giver.give(Give([ref], takers, 30))
        assert sorted(given.moved) == sorted((one.id, large.address) for one in (ref, put, freed))
        assert given.left == 0
        assert here.endpoint.giver.give(Give([], takers, 30)) == Given([])
        # The client is told, goes there, and is the owner there, too.
        eventually(lambda: large.endpoint.uploads._clients.get(77) and large.endpoint.uploads._clients[77].connections)
        assert bytes(client.get(put)[0]) == content(8 * MIB, 5)
        client.free(freed.id)
        eventually(lambda: len(large.endpoint.uploads._clients[77].objects) == 1)
        assert not evicted(large.endpoint, put)
        assert evicted(large.endpoint, freed)
        # Who left takes nothing; who took gives in its turn, and references by the old name are good where it lies.
        assert large.endpoint.giver.give(Give([], [here.address], 5)).left == 2
        large.endpoint.giver.give(Give([], [last.address], 30))
        at_last = ObjectRef(ref.id, ref.size, ref.segment, last.address)
        assert bytes(last.store(11).get(at_last)[0]) == content(8 * MIB)
        asker = Announcer(Place.of(last.directory).socket)
        asker.let_go([ref.id])
        eventually(lambda: evicted(last.endpoint, ref))
        asker.close()
        with pytest.raises(ObjectLost):
            last.store(12).get(at_last)
        eventually(lambda: last.endpoint.uploads._clients.get(77) and last.endpoint.uploads._clients[77].connections)
    eventually(lambda: not last.endpoint.uploads._clients)
    eventually(lambda: evicted(last.endpoint, put))


def test_nobody_waits_twice_for_an_endpoint_that_is_gone(
    hosts: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "PATIENCE", 1.0)
    there = hosts("there")
    reader = there.store(11)
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = f"127.0.0.1:{free.getsockname()[1]}"
    took = []
    for number in range(2):
        start = time.monotonic()
        with pytest.raises(ObjectLost, match="Refused"):
            reader.get(ObjectRef(number, MIB, f"00000001-{number}", gone))
        took.append(time.monotonic() - start)
    assert took[0] >= 1.0
    assert took[1] < 1.0
