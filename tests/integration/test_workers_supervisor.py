"""The supervisor's process tree: how it starts, and that nothing is left whichever way it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

import rtml
from rtml.workers import janitor
from tests.integration.engine import children_of_this, eventually, kill, processes


def idle(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def tree_of(supervisor: int) -> list[int]:
    return [pid for pids in processes(supervisor).values() for pid in pids]


def directories(supervisor: int) -> list[Path]:
    arguments = Path(f"/proc/{supervisor}/cmdline").read_text().split("\0")
    return [Path(arguments[arguments.index(name) + 1]) for name in ("--session-dir", "--shm-dir")]


def _all_gone(pids: list[int]) -> bool:
    return eventually(lambda: gone(pids))


def start_supervisor(session: Path, shared: Path, driver: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "rtml.workers.supervisor", "--workers", "1", "--async-executors", "0"]
    command += ["--session-dir", str(session), "--shm-dir", str(shared), "--driver-pid", str(driver)]
    package = str(Path(rtml.__file__).parents[1])
    return subprocess.Popen(command, env=dict(os.environ, PYTHONPATH=package), stderr=subprocess.PIPE)


def gone(pids: list[int]) -> bool:
    return not any(janitor.process_identity(pid) for pid in pids)


def test_an_orderly_end_leaves_nothing_and_is_quick() -> None:
    client = rtml.connect(workers=2)
    assert client.submit(idle, 0).result(20) == "slept"
    (supervisor,) = children_of_this()
    tree, places = tree_of(supervisor), directories(supervisor)
    assert all(place.is_dir() for place in places)
    start = time.monotonic()
    client.shutdown()
    assert time.monotonic() - start < 5.0
    assert gone(tree)
    assert not any(place.exists() for place in places)


def miss_the_next_sigterm() -> None:
    own = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, own) and None)


def test_an_executor_that_did_not_notice_the_signal_is_told_again() -> None:
    """As it happens to one that the signal finds between its last look for signals and its wait for messages."""
    client = rtml.connect(workers=1, drain=60.0)
    client.submit(miss_the_next_sigterm).result(20)
    start = time.monotonic()
    client.shutdown()
    assert time.monotonic() - start < 9.0


@pytest.mark.parametrize("victims", ["supervisor", "supervisor and janitor", "janitor"])
def test_killed_parts_leave_nothing(victims: str) -> None:
    client = rtml.connect(workers=2, reconnect_timeout=0.5)
    (supervisor,) = children_of_this()
    assert client.submit(idle, 0).result(20) == "slept"
    running = client.submit(idle, 60)
    tree, places = tree_of(supervisor), directories(supervisor)
    janitors = [pid for pid in tree if Path(f"/proc/{pid}/comm").read_text().strip() == "rtml-janitor"]
    assert len(janitors) == 1
    for pid in [supervisor] * ("supervisor" in victims) + janitors * ("janitor" in victims):
        kill(pid)
    if victims == "janitor":
        # Another one takes its place.
        assert eventually(lambda: len(set(tree_of(supervisor)) - set(tree)) == 1)
        assert client.submit(idle, 0).result(20) == "slept"
        running.cancel()
        client.shutdown()
        assert gone(tree)
    else:
        assert _all_gone(tree)
        if victims == "supervisor":
            assert eventually(lambda: not any(place.exists() for place in places))
        client.shutdown()
    assert not any(place.exists() for place in places)


def count_and_run(path: str, seconds: float) -> str:
    with open(path, "a") as file:
        file.write("run\n")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return "ran"


@pytest.mark.parametrize("link", ["unix", "zmq"])
def test_a_running_task_outlives_the_dispatcher(tmp_path: Path, link: Literal["unix", "zmq"]) -> None:
    """Its executor says what it holds in the middle of the task, so that nobody runs it again."""
    path = tmp_path / "runs"
    with rtml.connect(workers=2, link=link) as client:
        (supervisor,) = children_of_this()
        future = client.submit(count_and_run, str(path), 2.0)
        assert eventually(path.exists)
        for pid in processes(supervisor)["dispatcher"]:
            kill(pid)
        assert client.submit(idle, 0).result(20) == "slept"
        assert future.result(20) == "ran"
    assert path.read_text() == "run\n"


def test_the_next_start_sweeps_what_a_killed_tree_left(tmp_path: Path) -> None:
    """The directories of a tree that was killed as a whole, the driver included."""
    stale = tmp_path / "rtml-stale"
    stale.mkdir()
    (stale / janitor.OWNER_FILE).write_text("999999 1")
    alive = tmp_path / "rtml-alive"
    janitor.own(str(alive))
    fresh = tmp_path / "rtml-fresh"
    fresh.mkdir()
    session = tmp_path / "rtml-session"
    shared = Path("/dev/shm") / f"rtml-test-{os.getpid()}"
    supervisor = start_supervisor(session, shared, os.getpid())
    assert eventually(lambda: not stale.exists())
    assert alive.exists()
    assert fresh.exists()
    assert eventually((session / "dispatcher.sock").exists)
    supervisor.send_signal(signal.SIGINT)
    supervisor.communicate(timeout=10)
    assert supervisor.returncode == 0
    assert not session.exists()
    assert not shared.exists()


def test_running_tasks_get_time_to_end_but_not_for_ever() -> None:
    client = rtml.connect(workers=1, drain=0.3)
    client.submit(idle, 0).result(20)
    client.submit(idle, 60)
    (supervisor,) = children_of_this()
    tree = tree_of(supervisor)
    assert eventually(lambda: 'assigned":1' in client.query("status"))
    start = time.monotonic()
    client.shutdown(wait=False, cancel_futures=True)
    assert time.monotonic() - start < 5.0
    assert gone(tree)


def test_executors_end_with_a_driver_that_is_gone_already(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    supervisor = start_supervisor(tmp_path / "rtml-s", tmp_path / "rtml-m", ended.pid)
    _, stderr = supervisor.communicate(timeout=20)
    assert supervisor.returncode != 0
    assert b"driver" in stderr
    assert not (tmp_path / "rtml-s").exists()


def test_preimports_that_fail_are_reported_and_harmless(capfd: pytest.CaptureFixture[str]) -> None:
    with rtml.connect(workers=1, preimport=["json", "no_such_module"]) as client:
        assert client.submit(idle, 0).result(20) == "slept"
    assert "cannot pre-import no_such_module" in capfd.readouterr().err


def test_a_supervisor_without_room_for_its_files_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    supervisor = start_supervisor(tmp_path / "rtml-s", tmp_path / "file" / "rtml-m", os.getpid())
    _, stderr = supervisor.communicate(timeout=20)
    assert supervisor.returncode == 1
    assert stderr.startswith(b"rtml supervisor: cannot start: ")
    assert stderr.count(b"\n") == 1
    assert not (tmp_path / "rtml-s").exists()


def test_executors_that_were_told_to_end_are_no_deaths(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        # At once: some executors are still at their start, and know no SIGTERM yet.
        rtml.connect(workers=2).shutdown()
    assert "died" not in capfd.readouterr().err
