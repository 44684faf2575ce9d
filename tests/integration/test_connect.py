"""What `connect` and `rtml up` can set, seen from outside, with real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

import rtml
from rtml.errors import ConnectionLost, LimitExceeded
from rtml.link import AddressError
from tests.integration import programs
from tests.integration.engine import children_of_this, kill


@rtml.task
def length(data: bytes) -> int:
    return len(data)


@rtml.task
def zeros(size: int) -> bytes:
    return bytes(size)


def test_limits_reach_the_dispatcher_and_its_successor() -> None:
    with rtml.connect(workers=1, limits={"dependencies_max": 3}) as client:
        parts = [programs.square.submit(n) for n in range(4)]
        assert rtml.submit(sum, parts[:3]).result(20) == 5
        kill(json.loads(client.query("status"))["pid"])
        held = [programs.slow.submit(0.2, n) for n in range(4)]
        with pytest.raises(LimitExceeded, match="dependencies_max"):
            rtml.submit(sum, held).result(20)


def test_resources_and_blocked_executors_can_be_set() -> None:
    with rtml.connect(workers=1, cpu=3, resources={"licence": 1}, blocked_max=2) as client:
        assert programs.square.options(resources={"licence": 1}).submit(3).result(20) == 9
        (node,) = json.loads(client.query("status"))["nodes"]
        assert node["cpu"] == 3
        with pytest.raises(rtml.errors.Unschedulable):
            programs.square.options(resources={"licence": 2}).submit(3).result(20)


def test_timings_are_there_for_those_who_ask() -> None:
    with rtml.connect(workers=1, timings=True) as client:
        future = programs.slow.submit(0.05, 1)
        future.result(20)
        timing = future.timing
        assert timing is not None
        assert timing.run >= 0.05
        assert timing.attempts == 1
        (supervisor,) = children_of_this()
        assert supervisor
        address = client.driver._connector.address  # type: ignore[attr-defined]
        with rtml.connect(address) as other:
            quiet = other.submit(pow, 2, 3)
            assert (quiet.result(20), quiet.timing) == (8, None)
        assert programs.square.submit(2)._client is client


@pytest.mark.parametrize("link", ["unix", "zmq"])
def test_futures_fail_at_once_when_the_supervisor_is_killed(link: Literal["unix", "zmq"]) -> None:
    client = rtml.connect(workers=1, link=link)
    (supervisor,) = children_of_this()
    futures = [programs.slow.submit(30, n) for n in range(3)]
    begin = time.monotonic()
    kill(supervisor)
    for future in futures:
        with pytest.raises(ConnectionLost, match=r"the engine's processes are gone: the supervisor ended with code -9"):
            future.result(25)
    assert time.monotonic() - begin < 15  # not the 30 s of `reconnect_timeout`
    client.shutdown()


def test_large_values_travel_over_tcp_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with rtml.connect(workers=1, listen=address), rtml.connect(address) as distant:
        assert distant.submit(length, bytes(60_000)).result(20) == 60_000
        assert distant.submit(length, bytes(70_000)).result(20) == 70_000
        assert distant.submit(length, distant.put(bytes(70_000))).result(20) == 70_000
        large = distant.submit(zeros, 70_000)
        assert len(large.result(20)) == 70_000
        assert distant.submit(length, large).result(20) == 70_000


def test_what_a_client_had_is_free_as_soon_as_it_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with rtml.connect(workers=1, listen=address):
        for number in range(3):
            with rtml.connect(address):
                kept = Kept.options(name="only one", cpu=1).create(number)
                assert kept.value.submit().result(20) == number  # 30 s long it was that of the client before


def test_large_values_are_refused_where_no_node_takes_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with subprocess.Popen([sys.executable, "-m", "rtml", "dispatcher", "--listen", address]) as dispatcher:
        try:
            with rtml.connect(address) as distant:
                with pytest.raises(LimitExceeded, match=f"cannot travel through {address}.*rtml worker --data"):
                    distant.submit(length, bytes(70_000))
                with pytest.raises(LimitExceeded, match=f"cannot travel through {address}"):
                    distant.put(bytes(70_000))
        finally:
            dispatcher.terminate()


class KeptClass:
    def __init__(self, number: int) -> None:
        self.number = number

    def value(self) -> int:
        return self.number


Kept = rtml.actor(KeptClass)


def command(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rtml", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | more,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "tcp://0.0.0.0:17433"], "tcp://0.0.0.0:17433 can be reached from other machines"),
        (["--listen", "nonsense"], "'nonsense' is no address"),
        (["--listen", "tcp://127.0.0.1:99999"], "tcp://127.0.0.1:99999: "),
        (["--host", "203.0.113.7", "--port", "0"], "cannot listen on 203.0.113.7, port 0: "),
        (["--limit", "depth=3"], "there is no limit 'depth'; there are graph_tasks_max"),
        (["--limit", "depth_max=many"], "--limit (RTML_LIMITS): Expected `float`"),
    ],
)
def test_addresses_and_limits_that_cannot_be_used_end_in_one_line(arguments: list[str], message: str) -> None:
    done = command("up", "--workers", "1", *arguments)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rtml up: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "tcp://0.0.0.0:17433"], "rtml dispatcher: tcp://0.0.0.0:17433 can be reached"),
        (["--listen", "ipc:///nowhere/s", "--uplink", "tcp://10.0.0.1:99999"], "no port from 1 to 65535"),
        (["--listen", "ipc:///nowhere/s", "--uplink", "tcp://10.0.0.1"], "has no port: tcp://host:port is expected"),
    ],
)
def test_a_dispatcher_alone_ends_in_one_line_too(arguments: list[str], message: str) -> None:
    done = command("dispatcher", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr


def test_dispatcher_and_node_say_where_they_are(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    program = [sys.executable, "-m", "rtml"]
    offer = ["--cpu", "2", "--workers", "3", "--name", "n7", "--label", "zone=a"]
    node = subprocess.Popen(
        [*program, "worker", "--dispatcher", address, *offer], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = [
        f"node n7 of the dispatcher at {address}: 2 cpus, 3 executors and 1 for async functions",
        f"no connection to the dispatcher above: nobody answers at {address}; trying on",
        f"connected to the dispatcher at {address}",
    ]
    with node:
        try:
            assert node.stdout is not None
            assert node.stderr is not None
            while lines[0] not in node.stdout.readline():
                assert node.poll() is None
            while lines[1] not in node.stderr.readline():
                assert node.poll() is None
            listen = ["--listen", address, "--listen", f"ipc://{tmp_path}/s"]
            with subprocess.Popen([*program, "dispatcher", *listen], stdout=subprocess.PIPE, text=True) as dispatcher:
                try:
                    assert dispatcher.stdout is not None
                    said = dispatcher.stdout.readline()
                    assert said.startswith(f"rtml dispatcher: listening at {address}, ipc://{tmp_path}/s; policy edf; ")
                    while lines[2] not in node.stderr.readline():
                        assert node.poll() is None
                finally:
                    dispatcher.terminate()
        finally:
            node.terminate()
            node.communicate(timeout=60)


def test_who_connects_to_nobody_is_told_early_what_it_waits_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtml.client.embedded.START_TIMEOUT", 3.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionLost, match=rf"{address}, for 3\.1 s; is a dispatcher listening there without keys"):
        rtml.connect(address)
    (told,) = [record.getMessage() for record in caplog.records if record.name == "rtml.client"]
    assert told.startswith(f"nobody answers at {address}; trying for ")
    monkeypatch.setattr("rtml.client.embedded.START_TIMEOUT", 0.5)
    with pytest.raises(ConnectionLost, match=r"for 0.5 s; the name 'nowhere.invalid' is unknown here"):
        rtml.connect("tcp://nowhere.invalid:7411")
    with pytest.raises(ConnectionLost, match=r"nobody listens at unix:/nowhere/s .*rtml status"):
        rtml.connect("unix:/nowhere/s")
    with pytest.raises(AddressError, match="no port from 1 to 65535"):
        rtml.connect("tcp://10.0.0.1:0")


def test_ports_in_use_end_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments in (["--port", port], ["--listen", f"tcp://127.0.0.1:{port}"]):
            done = command("up", "--workers", "1", *arguments)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert "in use" in done.stderr


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    with rtml.connect(workers=1) as client:
        address = client.driver._connector.address  # type: ignore[attr-defined]
        reading, writing = os.pipe()
        os.close(reading)
        asking = [sys.executable, "-m", "rtml", "status", "--address", address]
        try:
            done = subprocess.run(asking, check=False, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")
