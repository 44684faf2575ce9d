"""What `connect` checks before it starts anything, which client is current, and what a distant client may send."""

from __future__ import annotations

import select
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import rtml
from rtml.client import context
from rtml.client.connecting import Connector, Peer
from rtml.client.embedded import check_addresses, limit_arguments
from rtml.errors import ConnectionLost, LimitExceeded
from rtml.graph.tables import Limits
from rtml.link import AddressError, KeyRefused, Link, LinkClosed
from rtml.messages import ObjectRef
from rtml.transfer.remote import RemoteStore
from tests.fake_dispatcher import connected


def test_limits_become_arguments_of_the_dispatcher() -> None:
    given = {"depth_max": 5, "inputs_max": 2.0, "recovery": 1, "session_grace": 0}
    assert limit_arguments(given) == ["--depth-max=5", "--inputs-max=2", "--recovery=1.0", "--session-grace=0.0"]
    assert len(limit_arguments(Limits()._asdict())) == len(Limits._fields)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"depth": 5}, "there is no limit 'depth'; there are graph_tasks_max, depth_max"),
        ({"depth_max": 0}, "depth_max must be a whole number and at least 1, not 0"),
        ({"depth_max": 1.5}, "depth_max must be a whole number"),
        ({"recovery": -1}, "recovery must be a number and not negative"),
        ({"recovery": "1"}, "recovery must be a number"),
        ({"recovery": float("nan")}, "recovery must be a number"),
        ({"depth_max": True}, "depth_max must be a number"),
    ],
)
def test_limits_that_are_none(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rtml.connect(limits=limits)


def test_addresses_are_tried_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="can be reached from other machines"):
        rtml.connect(listen="tcp://0.0.0.0:7411")
    with pytest.raises(AddressError, match="is no address"):
        rtml.connect(listen=["nonsense"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(AddressError, match="in use"):
        rtml.connect(listen=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    (tmp_path / "file").write_text("")
    with pytest.raises(AddressError, match="not a socket"):
        rtml.connect(listen=f"unix:{tmp_path}/file")
    check_addresses(["tcp://127.0.0.1:0", f"unix:{tmp_path}/a", f"ipc://{tmp_path}/b"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_there_are_no_tokens() -> None:
    with pytest.raises(TypeError, match="no setting 'token'"):
        rtml.connect(token="secret")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_workers": 2}, TypeError, "no setting 'max_workers'; there are .*, workers"),
        ({"link": "tcp"}, ValueError, "link is 'unix' or 'zmq', not 'tcp'"),
        ({"address": 5}, TypeError, "address is text like .*, not 5"),
        ({"preimport": 5}, TypeError, "expected text, or a list of texts, not 5"),
        ({"listen": [5]}, TypeError, "expected text, or a list of texts, not \\[5\\]"),
    ],
)
def test_wrong_settings_start_nothing(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rtml.connect(**settings)


def test_the_client_before_is_current_again() -> None:
    with connected() as (_, outer):
        assert context.current_client() is outer
        with connected() as (_, inner):
            assert context.current_client() is inner
            inner.shutdown()
            assert context.current_client() is outer
        with connected() as (_, inner):
            outer.shutdown()
            assert context.current_client() is inner
        assert context.current_client() is not outer
    assert context.current_client() is None


def test_nobody_reconnects_to_processes_that_are_gone() -> None:
    gone: list[str] = []
    connector = Connector("unix:/nonexistent/socket", obstacle=lambda: gone[0] if gone else "")
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) == 2:
            gone.append("the supervisor ended with code -9")
        return True

    expected = pytest.raises(ConnectionLost, match="the engine's processes are gone: the supervisor ended with code -9")
    with connected() as (_, client), expected:
        connector.again(client, Peer(), pause)
    assert len(pauses) == 2


def test_a_key_that_is_refused_is_said_even_if_the_last_attempt_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([KeyRefused("there refuses our key")])

    def connect(*_: Any) -> Link:
        raise next(tries, LinkClosed("nobody answers there"))

    monkeypatch.setattr("rtml.client.connecting.links.connect", connect)
    connector = Connector("tcp://127.0.0.1:1", connect_timeout=0.01)
    with pytest.raises(LinkClosed, match=r"refuses our key, for 0\.01 s; the dispatcher's directory of keys must have"):
        connector.first(None, None)  # type: ignore[arg-type]  # it does not come to them


def test_a_store_of_a_distant_engine_refuses() -> None:
    store = RemoteStore(7, "tcp://127.0.0.1:7411")
    with pytest.raises(LimitExceeded, match=r"of 100000 bytes cannot travel through tcp://.*:7411: .*above 64 KiB"):
        store.put([bytes(60_000), bytes(40_000)])
    with pytest.raises(LimitExceeded, match=r"a result of 5 bytes .*unix: address"):
        store.get(ObjectRef(1, 5, "segment", ""))
    store.free(1)
    store.sweep()
    store.close()


@pytest.mark.parametrize("scheme", ["unix", "ipc"])
def test_a_link_may_be_closed_while_another_thread_asks_for_its_descriptor(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtml import link as links
    from tests.fake_dispatcher import running

    with running(scheme) as (fake, _):
        link = links.connect(fake.address)
        closing = threading.Thread(target=link.close)
        real = select.epoll

        def epoll() -> select.epoll:
            closing.start()
            closing.join(0.2)  # as far as it gets
            return real()

        monkeypatch.setattr("rtml.link.base.select.epoll", epoll)
        assert link.fileno() > 0
        closing.join(10)
        assert not closing.is_alive()
        with pytest.raises(links.LinkClosed, match="the link is closed"):
            link.fileno()


@pytest.mark.parametrize("scheme", ["unix", "ipc"])
def test_a_links_descriptor_is_made_once_whoever_asks_first(scheme: str) -> None:
    from rtml import link as links
    from tests.fake_dispatcher import running

    with running(scheme) as (fake, _):
        for _ in range(20):
            link = links.connect(fake.address)
            found: list[int] = []
            together = threading.Barrier(4)

            def ask(link: links.Link = link, found: list[int] = found, together: threading.Barrier = together) -> None:
                together.wait()
                found.append(link.fileno())

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            link.close()
            assert len(set(found)) == 1
