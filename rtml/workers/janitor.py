"""Leaves nothing behind: directories that name their owner, and a small process that outlives the supervisor.

The janitor is forked before anything big is imported and sleeps on the supervisor's pidfd. When the supervisor ends
without having ended it first (kill -9), the janitor ends the processes named in the running page with their process
groups and removes the directories. After a kill of the whole tree at once, the next start's `sweep` finds directories
whose owner is dead.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from typing import Final

from rtml.workers.page import RunningPage

OWNER_FILE: Final = ".owner"
PREFIX: Final = "rtml-"
#: An empty directory may be one that a driver has just made; after this many seconds it is not.
_OWNERLESS_S: Final = 60.0


def process_identity(pid: int) -> str:
    """The pid with its start time, so that a recycled pid is told apart; "" if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return ""
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return ""
    return f"{pid} {fields[19].decode()}"


def own(directory: str) -> None:
    """Makes the directory if need be and writes this process into it as its owner."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with open(os.path.join(directory, OWNER_FILE), "w", encoding="ascii") as file:
        file.write(process_identity(os.getpid()))


def remove(directory: str) -> None:
    """Removes the directory and all in it; what is gone already is no error."""
    shutil.rmtree(directory, ignore_errors=True)


def sweep(parent: str) -> list[str]:
    """Removes this user's `rtml-*` directories in `parent` whose owner is dead. Returns their paths.

    The name alone says nothing: what has no owner file and is not empty is somebody else's.
    """
    ours = []
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        ours = [each.path for each in entries if each.name.startswith(PREFIX) and each.is_dir(follow_symlinks=False)]
    return [directory for directory in ours if _removed(directory)]


def _removed(directory: str) -> bool:
    """Whether a directory was nobody's any more, and is gone."""
    with contextlib.suppress(OSError):
        status = os.stat(directory)
        if status.st_uid != os.getuid():
            return False
        if _has_dead_owner(directory):
            remove(directory)
            return True
        # Wall time, because that is what file times are in.
        if time.clock_gettime(time.CLOCK_REALTIME) - status.st_mtime > _OWNERLESS_S:
            os.rmdir(directory)  # if it is empty
            return True
    return False


def _has_dead_owner(directory: str) -> bool:
    try:
        with open(os.path.join(directory, OWNER_FILE), encoding="ascii") as file:
            owner = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return False
    if not owner:
        return False
    pid = owner.split()[0]
    return not pid.isdigit() or process_identity(int(pid)) != owner


def kill_group(pid: int) -> None:
    """Ends a process and whatever it forked into its process group."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def run_janitor(supervisor: int, page: RunningPage, directories: list[str]) -> None:
    """Body of the janitor process: waits for the supervisor's end, then cleans up.

    Args:
        supervisor: a pidfd of the supervisor.
        page: names the processes to end.
        directories: what to remove.
    """
    for parent in {os.path.dirname(directory) for directory in directories}:
        sweep(parent)
    waiting = select.poll()
    waiting.register(supervisor, select.POLLIN)
    waiting.poll()
    for pid in page.pids():
        kill_group(pid)
    for directory in directories:
        remove(directory)
