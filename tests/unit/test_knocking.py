"""Whether a node has ended is asked of the kernel where its data endpoint was: real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from rtml.graph.tables import Knock
from rtml.link import Hub
from rtml.link.knocking import Knocker, is_refused
from tests.unit.links import LIMIT


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def knocker(hub: Hub) -> Iterator[Knocker]:
    made = Knocker(hub)
    yield made
    made.close()
    for thread in threading.enumerate():
        if thread.name == "rtml-knock":
            thread.join(LIMIT)


def listening() -> tuple[socket.socket, str]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, f"127.0.0.1:{sock.getsockname()[1]}"


def knock(knocker: Knocker, worker: int, address: str, *, lost: bool) -> None:
    knocker.knock(Knock(worker, address, lost))
    for thread in threading.enumerate():
        if thread.name == "rtml-knock":
            thread.join(LIMIT)


def test_who_listens_is_there_and_who_refuses_is_not() -> None:
    sock, address = listening()
    assert is_refused(address) is False
    sock.close()
    assert is_refused(address) is True
    assert is_refused("no such host:1") is None
    assert is_refused("127.0.0.1:none") is None


def test_a_node_that_is_no_more_is_known_at_once(hub: Hub, knocker: Knocker) -> None:
    sock, address = listening()
    knock(knocker, 7, address, lost=False)
    sock.close()
    knock(knocker, 7, address, lost=True)
    assert hub.poll(LIMIT) == []  # it wakes up
    assert knocker.take() == 7
    assert not knocker.refused


def test_nothing_is_known_of_who_still_listens_or_never_did(knocker: Knocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtml.link.knocking._PAUSES", (0.01,) * 4)
    sock, address = listening()
    never, unreachable = listening()
    never.close()
    knock(knocker, 7, address, lost=False)
    knock(knocker, 7, address, lost=True)
    knock(knocker, 8, unreachable, lost=False)
    knock(knocker, 8, unreachable, lost=True)
    assert not knocker.refused
    sock.close()
