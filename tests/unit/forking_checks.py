"""Checks that fork, for `test_workers_parts`: each in a fresh interpreter, since only that has a single thread."""

from __future__ import annotations

import os
import select
import sys
import tempfile
import time
from pathlib import Path

from rtml.workers import janitor
from rtml.workers.page import COUNT, FIRST, LEFT, PID, STATE, RunningPage
from rtml.workers.processes import fork, reason_of


def the_page_is_shared_with_forked_processes() -> None:
    page = RunningPage()
    slot = page.slot(7)

    def run() -> int:
        slot[FIRST] = 1 << 62
        slot[FIRST + 1] = 5
        slot[COUNT] = 2
        slot[STATE] = LEFT
        return 3

    pid = fork(run, "test", lambda: None)
    slot[PID] = pid
    _, status = os.waitpid(pid, 0)
    assert reason_of(status) == "exit code 3"
    assert page.running(7) == [1 << 62, 5]
    assert page.left(7)
    assert page.pids() == [pid]
    page.clear(7)
    assert page.running(7) == []
    assert not page.left(7)
    assert page.pids() == []


def reasons_name_signals() -> None:
    pid = fork(lambda: os.kill(os.getpid(), 11) or 0, "test", lambda: None)  # type: ignore[func-returns-value]
    assert reason_of(os.waitpid(pid, 0)[1]) == "signal SIGSEGV"


def a_child_that_raises_ends() -> None:
    def run() -> int:
        raise ValueError("in the child")

    pid = fork(run, "test", lambda: None)
    assert reason_of(os.waitpid(pid, 0)[1]) == "exit code 1"


def the_janitor_cleans_up() -> None:
    page = RunningPage()
    directory = Path(tempfile.mkdtemp()) / "rtml-x"
    directory.mkdir()
    victim = fork(lambda: time.sleep(60) or 0, "victim", lambda: None)  # type: ignore[func-returns-value]
    page.slot(1)[PID] = victim
    supervisor = fork(lambda: sys.stdin is None or 0, "owner", lambda: None)
    pidfd = os.pidfd_open(supervisor)
    janitor.run_janitor(pidfd, page, [str(directory)])
    os.close(pidfd)
    assert reason_of(os.waitpid(victim, 0)[1]) == "signal SIGKILL"
    assert not directory.exists()
    os.waitpid(supervisor, 0)
    directory.parent.rmdir()


def a_zombie_is_dead() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert janitor.process_identity(pid) == ""
    os.waitpid(pid, 0)
    assert janitor.process_identity(os.getpid()).startswith(f"{os.getpid()} ")


def poll_sees_the_end_of_a_process() -> None:
    """What supervisor and janitor rely on: a pidfd is readable from the death on."""
    pid = fork(lambda: 0, "short", lambda: None)
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(10_000)
    os.close(pidfd)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
