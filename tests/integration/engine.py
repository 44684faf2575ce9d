"""What the integration tests share: an embedded engine per module and link, and its processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def processes(supervisor: int) -> dict[str, list[int]]:
    """The pids of an embedded tree by kind: supervisor, dispatcher, executor, janitor."""
    found: dict[str, list[int]] = {"supervisor": [supervisor], "dispatcher": [], "executor": [], "other": []}
    for pid in _children(supervisor):
        command = _command(pid)
        if "rtml.dispatcher" in command:
            found["dispatcher"].append(pid)
        elif "janitor" in _name(pid) or "janitor" in command:
            found["other"].append(pid)
        else:
            found["executor"].append(pid)
    return found


def children_of_this() -> list[int]:
    """Direct children of the test process that are supervisors."""
    return [pid for pid in _children(os.getpid()) if "rtml.workers.supervisor" in _command(pid)]


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (task / "children").read_text()
        except OSError:
            continue  # that thread has ended
        yield from map(int, text.split())


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def eventually(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether `what` becomes true within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.01)
    return what()
