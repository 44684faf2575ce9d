"""Memory and CPU time of a system's whole process tree, from /proc. Standard library only: peers run it too."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

#: Descendants inherit it, so that daemons which left the tree are counted too.
MARK_NAME = "RTML_BENCH_MARK"


def mark() -> str:
    """The mark of this process, by which `tree` finds its descendants.

    /proc shows the environment that a program was *started* with, also for its forks. So a process without a mark sets
    one and starts itself again; call this first.
    """
    if MARK_NAME not in os.environ:
        os.environ[MARK_NAME] = uuid.uuid4().hex
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return os.environ[MARK_NAME]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it ended meanwhile


def marked(value: str) -> list[int]:
    """Live processes that carry the mark `value`, but this one."""
    needle = f"{MARK_NAME}={value}".encode()
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in numbers if pid != os.getpid() and needle in _read(Path(f"/proc/{pid}/environ"))]


def tree(value: str) -> list[int]:
    """This process and all that carry the mark `value`."""
    return [os.getpid(), *marked(value)]


def pss_mib(pids: list[int]) -> float:
    """Proportional set size of these processes together, in MiB: shared pages count once."""
    total_kib = 0
    for pid in pids:
        for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
            if line.startswith(b"Pss:"):
                total_kib += int(line.split()[1])
    return total_kib / 1024


def cpu_seconds(pids: list[int]) -> float:
    """CPU time that all threads of these processes have used so far, in seconds."""
    total_ns = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total_ns += int((_read(task).split() or [b"0"])[0])
    return total_ns / 1e9


def command(pid: int) -> str:
    """The process's command line, shortened for a table."""
    return _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace").strip()[:70]


def cpu_by_process(pids: list[int]) -> dict[int, float]:
    """CPU time of each of these processes, in seconds, with their threads that have ended; in ticks of 10 ms."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for pid in pids:
        fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
        if fields:
            found[pid] = (int(fields[11]) + int(fields[12])) / ticks
    return found
