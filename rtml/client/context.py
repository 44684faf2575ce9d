"""Which client, and which running task, `rtml.submit` and its like mean here.

One process has at most one current client: a driver program's default one, or the one that an executor installs for the
code it runs. This is the one deliberate piece of process-wide state of rtml.

The running task is found in a context variable first (async executors run many tasks in one thread), then in the
process-wide slot that a sync executor fills (so that threads which user code starts inside a task belong to it too).
"""

from __future__ import annotations

import os
import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.messages import Function


class TaskInfo(msgspec.Struct, frozen=True):
    """The running task, as the code inside it sees it."""

    id: int
    attempt: int
    name: str
    #: Names of the ancestor tasks, root first, this task last.
    chain: list[str]
    #: Absolute end of the graph's budget on `time.monotonic`, in seconds; None without a deadline.
    deadline: float | None
    #: The root submission's id: also the trace id of everything below it.
    graph: int
    #: What the graph's submitter gave it to look up: a gateway's versions of models, see `rtml.served`.
    context: Function | None = None


class _Process:
    """What is current in this process. Read without a lock: each slot is replaced as a whole."""

    __slots__ = ("client", "forks", "inside", "installed", "locks", "missed", "task")

    def __init__(self) -> None:
        self.client: Client | None = None
        #: Those that were installed and not yet removed, newest last.
        self.installed: list[Client] = []
        #: sync executors: what runs now in this process
        self.task: TaskInfo | None = None
        #: Names of steps that running tasks went on without, by task id.
        self.missed: dict[int, list[str]] = {}
        #: This process is an executor: `connect()` means the client that is installed.
        self.inside = False
        #: Forks between the first process and this one. A client made at another count belongs to a parent. (It needs
        #: no system call, as `os.getpid` does.)
        self.forks = 0

        #: Of clients: the thread that held one when this process was forked is not here to let go of it.
        self.locks: weakref.WeakSet[Any] = weakref.WeakSet()

    def forked(self) -> None:
        self.forks += 1
        for lock in list(self.locks):
            lock._at_fork_reinit()


#: For this module, and for executors, which write `task` around each call.
process: Final = _Process()
os.register_at_fork(after_in_child=process.forked)
_task: Final[ContextVar[TaskInfo | None]] = ContextVar("rtml_task", default=None)


def current_client() -> Client | None:
    """The client that module-level functions use, or None before the first one."""
    return process.client


def install(client: Client | None, *, inside: bool = False) -> None:
    """Make `client` the current one.

    Args:
        client: current until it is removed, or another one is installed; None uninstalls all.
        inside: this process is an executor.
    """
    process.installed = [] if client is None else [*process.installed, client]
    process.client = client
    process.inside = inside


def remove(client: Client) -> None:
    """`client` has ended: the one that was current before it is so again."""
    left = [one for one in process.installed if one is not client]
    if len(left) < len(process.installed):
        process.installed = left
        process.client = left[-1] if left else None


def free_in_children(lock: threading.Lock) -> None:
    """Forked children find this lock free, whoever holds it here."""
    process.locks.add(lock)


def is_executor() -> bool:
    """Whether this process runs tasks."""
    return process.inside


def current_task() -> TaskInfo | None:
    """The task that the calling code runs in, or None in a driver program."""
    return _task.get() or process.task


def enter_context_task(task: TaskInfo | None) -> None:
    """Async executors, inside the asyncio task (or its own context) that runs `task`."""
    _task.set(task)


def note_missing(names: list[str]) -> None:
    """The running task goes on without these steps."""
    task = current_task()
    if names and task is not None:
        process.missed.setdefault(task.id, []).extend(names)


def take_missing(task: int) -> list[str] | None:
    """The steps that a task which ends now went on without."""
    return process.missed.pop(task, None) if process.missed else None
