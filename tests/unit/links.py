"""What the tests of links share: fixtures, waiting with a limit, a serving thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rtml.link import Hub, Link, LinkClosed, connect, unix

#: Seconds after which a test that waits has failed.
LIMIT = 20.0

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


def listen_once(address: str) -> None:
    server = Hub()
    try:
        server.listen(address)
    finally:
        server.close()
