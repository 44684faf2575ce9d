"""kill -9 of every kind of process in the middle of a run, on both links: every submission is accounted for."""

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
from rtml import errors
from tests.integration import programs
from tests.integration.engine import children_of_this, eventually, kill, processes

LINKS = pytest.mark.parametrize("link", ["unix", "zmq"])


@LINKS
def test_executors_killed_under_load_lose_nothing(link: Literal["unix", "zmq"]) -> None:
    with rtml.connect(workers=2, link=link):
        (supervisor,) = children_of_this()
        futures = [programs.square.options(retries=50).submit(n) for n in range(20_000)]
        for _ in range(5):
            rtml.wait(futures, num_returns=1)
            assert eventually(lambda: len(_executors(supervisor)) >= 1)
            kill(_executors(supervisor)[0])
            time.sleep(0.02)
        assert rtml.get(futures, timeout=60) == [n * n for n in range(20_000)]


@LINKS
def test_dispatcher_killed_under_load_loses_nothing(link: Literal["unix", "zmq"], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with rtml.connect(workers=2, link=link):
        (supervisor,) = children_of_this()
        futures = [programs.record.submit(str(log), n) for n in range(3_000)]
        nested = [programs.total_blocking.submit(50) for _ in range(20)]
        graphs = [programs.total_async.submit(50) for _ in range(20)]
        for _ in range(3):
            futures[len(futures) // 4].result(60)
            time.sleep(0.05)
            old = processes(supervisor)["dispatcher"]
            for pid in old:
                kill(pid)
            assert eventually(lambda old=old: bool(set(processes(supervisor)["dispatcher"]) - set(old)))  # type: ignore[misc]
        assert rtml.get(futures, timeout=120) == list(range(3_000))
        expected = sum(n * n for n in range(50))
        assert rtml.get(nested + graphs, timeout=120) == [expected] * 40
    runs = [int(line) for line in log.read_text().split()]
    assert set(runs) == set(range(3_000))


@LINKS
def test_supervisor_killed_fails_every_future_and_leaves_nothing(link: Literal["unix", "zmq"]) -> None:
    client = rtml.connect(workers=2, link=link, reconnect_timeout=1.0)
    (supervisor,) = children_of_this()
    tree = [pid for pids in processes(supervisor).values() for pid in pids]
    futures = [programs.slow.submit(0.01, n) for n in range(500)]
    futures[0].result(20)
    kill(supervisor)
    ended = [future.exception(60) for future in futures]
    assert all(error is None or isinstance(error, errors.ConnectionLost) for error in ended)
    assert any(isinstance(error, errors.ConnectionLost) for error in ended)
    client.shutdown()
    assert eventually(lambda: not any(_alive(pid) for pid in tree))


@LINKS
def test_driver_killed_leaves_nothing(link: Literal["unix", "zmq"]) -> None:
    program = (
        "import os, sys, time, rtml\n"
        "from tests.integration import programs\n"
        f"client = rtml.connect(workers=2, link={link!r})\n"
        "futures = [programs.slow.submit(0.01, n) for n in range(10_000)]\n"
        "futures[10].result(30)\n"
        "print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n"
        "time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    supervisor = int(driver.stdout.readline().split()[0])
    tree = [pid for pids in processes(supervisor).values() for pid in pids]
    assert len(tree) >= 4
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    assert eventually(lambda: not any(_alive(pid) for pid in tree))


def test_interrupted_driver_exits_cleanly() -> None:
    program = (
        "import time, rtml\n"
        "from tests.integration import programs\n"
        "client = rtml.connect(workers=2)\n"
        "futures = [programs.slow.submit(0.01, n) for n in range(10_000)]\n"
        "print(futures[10].result(30), flush=True)\n"
        "rtml.get(futures)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    driver.stdout.readline()
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=30)
    assert driver.returncode in (1, 130, -signal.SIGINT)
    assert stderr.count("Traceback") == 1
    assert "KeyboardInterrupt" in stderr


def _executors(supervisor: int) -> list[int]:
    return [pid for pid in processes(supervisor)["executor"] if os.getpriority(os.PRIO_PROCESS, pid) == 19]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
