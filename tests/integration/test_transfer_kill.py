"""Data endpoints in processes of their own, ended by SIGKILL while they pass an object on."""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.workloads import objects_links
from rtml.exchange import Give, Given
from rtml.messages import ObjectRef
from rtml.segment import HEADER_OFFSET
from tests.unit.test_transfer import MIB, SECRET, Gate, Host, close_all, content, eventually, getting, there

SIZE = 16 * MIB


class Away(objects_links.Host):
    """An endpoint in another process, and a reader of it."""

    def __init__(self, directory: Path, number: int) -> None:
        super().__init__([sys.executable], str(directory / f"away{number}"), "127.0.0.1")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Callable[[], Away]]:
    made: list[Away] = []

    def make() -> Away:
        made.append(Away(tmp_path, len(made)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    made: list[Host] = []

    def make(name: str) -> Host:
        made.append(Host(tmp_path, name, secret=SECRET))
        return made[-1]

    yield make
    close_all(made)


def test_a_killed_link_of_the_chain_is_left_out(hosts: Callable[[str], Host], away: Callable[[], Away]) -> None:
    home, last = hosts("home"), hosts("last")
    middle = away()
    ref = home.store(1).put([content(SIZE)])
    gate = Gate(home.endpoint, SIZE // 2)
    middle.say("get", [ref.id, ref.size, ref.segment, ref.node])
    eventually(lambda: len(home.endpoint.holders.known(ref.id)) == 1)
    thread, found = getting(last, ref)
    eventually(lambda: there(last, ref) == HEADER_OFFSET + SIZE // 2)  # all by way of the one in the middle
    middle.process.kill()
    gate.open.set()
    thread.join()
    assert found == [content(SIZE)]
    counts = last.endpoint.counts
    assert counts.bytes_in == ref.size - HEADER_OFFSET  # nothing came twice
    assert (counts.resumed, counts.pulled, counts.failed) == (1, 1, 0)


def test_the_home_is_killed_and_complete_copies_go_on(hosts: Callable[[str], Host], away: Callable[[], Away]) -> None:
    home, (first, second) = away(), (hosts("first"), hosts("second"))
    home.say("put", SIZE)
    ref = ObjectRef(*home.hear())
    home.say("get", [ref.id, ref.size, ref.segment, ref.node])
    _, expected = home.hear()
    getting(first, ref)[0].join()
    # The second reads from the first and the home; both stop for a moment, and one for ever.
    gate = Gate(first.endpoint, SIZE // 64)
    thread, found = getting(second, ref)
    eventually(lambda: second.endpoint.counts.bytes_in > 0)
    home.process.kill()
    gate.open.set()
    thread.join()
    assert zlib.crc32(found[0]) == expected
    assert second.endpoint.counts.bytes_in == ref.size - HEADER_OFFSET


def test_many_receivers_and_two_of_them_killed(hosts: Callable[[str], Host], away: Callable[[], Away]) -> None:
    home = hosts("home")
    receivers = [away() for _ in range(5)]
    ref = home.store(1).put([content(SIZE)])
    expected = zlib.crc32(content(SIZE))
    gate = Gate(home.endpoint, SIZE // 2)
    for receiver in receivers:
        receiver.say("get", [ref.id, ref.size, ref.segment, ref.node])
    eventually(lambda: len(home.endpoint.holders.known(ref.id)) == 5, 60)
    victims = receivers[1], receivers[3]
    for victim in victims:
        victim.process.kill()
    gate.open.set()
    for receiver in receivers:
        if receiver not in victims:
            assert receiver.hear()[1] == expected


def test_a_node_that_takes_over_objects_is_killed(hosts: Callable[[str], Host], away: Callable[[], Away]) -> None:
    home, last, victim = hosts("home"), hosts("last"), away()
    owner = home.store(1)
    refs = [owner.put([content(SIZE, seed)]) for seed in range(4)]
    victim.say("address")
    takers = [victim.hear(), last.address]
    gate = Gate(home.endpoint, MIB)
    given: list[Given] = []
    thread = threading.Thread(target=lambda: given.append(home.endpoint.giver.give(Give(refs, takers, 60))))
    thread.start()
    eventually(lambda: home.endpoint.counts.bytes_out >= 2 * MIB)  # both have begun
    victim.process.kill()
    gate.open.set()
    thread.join()
    assert sorted(given[0].moved) == sorted((ref.id, last.address) for ref in refs)
    assert given[0].left == 0
    for seed, ref in enumerate(refs):
        there = ObjectRef(ref.id, ref.size, ref.segment, last.address)
        assert bytes(last.store(20 + seed).get(there)[0]) == content(SIZE, seed)
