"""Keys of tcp links: files, the command that makes them, and who gets in with which, over real addresses."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import rtml
from rtml.errors import ConnectionLost
from rtml.link import AddressError
from rtml.link.keys import NODE, hub_keys, make_keys, peer_keys
from rtml.serving.engine import ClientEngine
from tests.integration.engine import eventually

FILES = ["data.secret"]
FILES += [f"{name}.{half}" for name in ("client", "dispatcher", "node") for half in ("public", "secret")]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(str(tmp_path / "keys"))
    return tmp_path / "keys"


def command(*arguments: str | Path, prefix: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    given = [*prefix, sys.executable, "-m", "rtml", *map(str, arguments)]
    return subprocess.run(given, check=False, capture_output=True, text=True, timeout=60, env=os.environ | more)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_command_makes_keys_once_and_for_their_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    done = command("keys", "make", directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == sorted(str(directory / name) for name in FILES)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in FILES} == {0o600}
    assert len({(directory / name).read_text() for name in FILES}) == len(FILES)
    before = {name: (directory / name).read_text() for name in FILES}
    again = command("keys", "make", directory)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "is there already" in again.stderr
    assert before == {name: (directory / name).read_text() for name in FILES}


def test_a_directory_with_some_keys_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "node.secret").write_text("precious")
    with pytest.raises(AddressError, match=r"node\.secret is there already"):
        make_keys(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["node.secret"]


def test_each_side_reads_only_what_it_needs(keys: Path, tmp_path: Path) -> None:
    for name, files in {
        "hub": ["dispatcher.secret", "client.public", "node.public"],
        "node": ["node.secret", "dispatcher.public"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy2(keys / file, tmp_path / name)
    hub, node = hub_keys(str(tmp_path / "hub")), peer_keys(str(tmp_path / "node"), NODE)
    assert node.server == hub.public == (keys / "dispatcher.public").read_text().strip()
    assert hub.allowed == {(keys / f"{name}.public").read_text().strip() for name in ("client", "node")}
    assert node.public in hub.allowed
    assert node.secret not in repr(node)


def test_keys_that_cannot_be_used_say_what_is_wrong(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(AddressError, match=r"dispatcher\.secret: No such file .* `rtml keys make DIR`"):
        hub_keys(str(tmp_path))
    (keys / "client.secret").chmod(0o644)
    with pytest.raises(AddressError, match=r"can be read by every user: chmod 600 .*client\.secret"):
        peer_keys(str(keys))
    (keys / "client.secret").chmod(0o440)  # as in a Kubernetes Secret with fsGroup
    peer_keys(str(keys))
    (keys / "client.public").write_text("short")
    with pytest.raises(AddressError, match=r"client\.public is no key"):
        hub_keys(str(keys))
    for name in ("client", "node"):
        (keys / f"{name}.public").unlink()
    with pytest.raises(AddressError, match="nobody could connect"):
        hub_keys(str(keys))


def test_commands_end_in_one_line_if_there_are_no_keys(tmp_path: Path) -> None:
    for arguments in (
        ("dispatcher", "--listen", "tcp://0.0.0.0:0", "--keys", tmp_path),
        ("up", "--listen", "tcp://0.0.0.0:0", "--keys", tmp_path),
        ("status", "--address", "tcp://127.0.0.1:1", "--keys", tmp_path),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"rtml {arguments[0]}: {tmp_path}" in done.stderr


# --- who gets in ------------------------------------------------------------------------------------------------------


def test_only_those_with_a_key_get_in(keys: Path, tmp_path: Path) -> None:
    address = free_address()
    make_keys(str(tmp_path / "strange"))
    shutil.copy2(keys / "dispatcher.public", tmp_path / "strange")
    with rtml.connect(workers=1, listen=address, keys=keys):
        with rtml.connect(address, keys=str(keys)) as client:
            assert client.submit(pow, 2, 10).result(20) == 1024
        assert command("status", "--address", address, "--keys", keys).returncode == 0
        assert command("status", "--address", address, RTML_KEYS=str(keys)).returncode == 0
        for strange in ("", str(tmp_path / "strange")):
            refused = command("status", "--address", address, RTML_KEYS=strange)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert "refuses our key" in refused.stderr


def test_a_peer_is_added_by_its_public_key(keys: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_keys(str(other))
    shutil.copy2(other / "client.public", keys / "alice.public")
    shutil.copy2(keys / "dispatcher.public", other)
    address = free_address()
    with rtml.connect(workers=1, listen=address, keys=keys), rtml.connect(address, keys=other) as alice:
        assert alice.submit(pow, 2, 3).result(20) == 8


def test_a_clients_key_is_none_of_a_node(keys: Path, tmp_path: Path) -> None:
    address = free_address()
    wrong = tmp_path / "wrong"
    shutil.copytree(keys, wrong)
    shutil.copy2(keys / "client.secret", wrong / "node.secret")
    own = tmp_path / "own"
    make_keys(str(own))
    shutil.copy2(own / "node.public", keys / "node-7.public")
    for file in ("dispatcher.public", "client.secret", "data.secret"):
        shutil.copy2(keys / file, own)
    log = tmp_path / "log"
    node = ("worker", "--dispatcher", address, "--cpu", "1", "--name", "n", "--keys")
    started: list[subprocess.Popen[bytes]] = []
    with log.open("w") as said:

        def start(*arguments: str) -> None:
            full = [sys.executable, "-m", "rtml", *map(str, arguments)]
            started.append(subprocess.Popen(full, stdin=subprocess.DEVNULL, stderr=said))

        try:
            start("dispatcher", "--listen", address, "--keys", str(keys))
            start(*node, str(wrong))
            text = "the key that was shown is a client's, which may not join as dispatcher"
            assert eventually(lambda: text in log.read_text(), 60)
            with rtml.connect(address, keys=keys) as client:  # as a client it is welcome
                assert not any(one["cpu"] for one in json.loads(client.query("status"))["dispatchers"])
                start(*node, str(own))
                assert client.submit(pow, 2, 10).result(60) == 1024
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(60)


@pytest.fixture
def namespace() -> Iterator[tuple[str, str]]:
    """(name, address) of a network namespace: a host of its own, as far as links can tell."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    name, number = f"rtml{uuid.uuid4().hex[:6]}", os.getpid() % 250 + 1
    near, far = f"10.213.{number}.1", f"10.213.{number}.2"
    steps = (
        f"netns add {name}",
        f"link add {name} type veth peer name eth0 netns {name}",
        f"address add {near}/24 dev {name}",
        f"link set {name} up",
        f"-n {name} address add {far}/24 dev eth0",
        f"-n {name} link set lo up",
        f"-n {name} link set eth0 up",
    )
    try:
        for step in steps:
            subprocess.run(["ip", *step.split()], check=True)
        yield name, far
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def test_an_engine_on_another_host(keys: Path, namespace: tuple[str, str]) -> None:
    name, host = namespace
    address, prefix = f"tcp://{host}:7411", ("ip", "netns", "exec", name)
    open_to_all = command("dispatcher", "--listen", address, prefix=prefix)
    assert (open_to_all.returncode, "give CURVE keys (rtml keys make)" in open_to_all.stderr) == (2, True)
    up = [*prefix, sys.executable, "-m", "rtml", "up", "--workers", "1", "--port", "0", "--listen", address]
    with subprocess.Popen([*up, "--keys", str(keys)], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        try:
            while not engine.stdout.readline().startswith("serving on "):
                assert engine.poll() is None
            with rtml.connect(address, keys=keys) as client:
                assert client.submit(pow, 2, 10).result(20) == 1024
            without = command("status", "--address", address)
            assert (without.returncode, "it may want keys" in without.stderr) == (1, True), without.stderr
        finally:
            engine.send_signal(signal.SIGTERM)
            engine.stdout.read()


# --- a gateway without a dispatcher -----------------------------------------------------------------------------------


def test_a_gateway_learns_that_its_dispatcher_does_not_come_back(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/d/s"
    arguments = [sys.executable, "-m", "rtml", "dispatcher", "--listen", address]

    async def lose(dispatcher: subprocess.Popen[bytes]) -> None:
        engine = ClientEngine.open(address, reconnect_timeout=0.3)
        lost = asyncio.Event()
        engine.on_end(lost.set)
        try:
            dispatcher.kill()
            await asyncio.wait_for(lost.wait(), 20)
            assert not engine.ready
            with pytest.raises(ConnectionLost):
                await engine.query("status")
        finally:
            engine.close()

    with subprocess.Popen(arguments) as dispatcher:
        try:
            asyncio.run(lose(dispatcher))
        finally:
            dispatcher.kill()
