"""What both kinds of executors share at their start: settings, identity, captured output, the nested client."""

from __future__ import annotations

import gc
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Final

from rtml.client import context
from rtml.client.client import Client
from rtml.client.core import ClientCore
from rtml.messages import SESSION_MAX, Hello
from rtml.store import Store
from rtml.workers.core import WorkerCore
from rtml.workers.logs import CapturedStream, LogBuffer

if TYPE_CHECKING:
    from rtml.client.driver import Driver

#: Seconds between two looks for a dispatcher that is not there. The supervisor starts it again, or ends us.
RECONNECT_S: Final = 1.0

#: Seconds without anything to do after which shared memory is tidied up.
TIDY_AFTER: Final = 1.0

#: Seconds until printed text is sent while its task goes on.
LOGS_DELAY: Final = 0.1


@dataclass(frozen=True)
class ExecutorSettings:
    """What a supervisor tells a process that it forked."""

    worker: int
    address: str
    shm_dir: str
    #: This process's slot in the running page.
    page: memoryview
    #: Send what tasks print to their submitter; otherwise it is dropped.
    logs: bool = True
    #: Lowers the priority once the process is ready, so that a busy machine does not delay its start (D13).
    nice: int = 0
    #: The node's gpus that it sees.
    devices: list[int] = field(default_factory=list)


class Child:
    """Whether this process is (still) the executor, and not something that user code forked from it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.forked = False

    def watch(self) -> None:
        """From now on notice forks."""
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.forked = True
        # What it prints would wait in its own copy of our buffer for ever.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def new_session() -> int:
    """Random bits that name this process's submissions and objects."""
    return int.from_bytes(os.urandom(4), "big") % SESSION_MAX + 1


def make_client(core: WorkerCore, driver: Driver, shm_dir: str) -> Client:
    """The client through which tasks submit tasks, installed as the process's own."""
    # No window: what it held back would keep the parent, which waits for all of its tasks, waiting.
    client = Client(ClientCore(core.session, window=sys.maxsize), driver, Store(shm_dir, core.session), show_logs=False)
    context.install(client.open(), inside=True)
    return client


def hello(core: WorkerCore) -> Hello:
    """The `Hello` of this executor."""
    return core.hello(python=platform.python_version(), name=f"executor-{core.worker}")


def capture_output(soon: Callable[[], None]) -> tuple[LogBuffer, CapturedStream, CapturedStream]:
    """Replaces `sys.stdout` and `sys.stderr`; nothing reads from the terminal."""
    buffer = LogBuffer(soon)
    out, err = CapturedStream("out", buffer, 1), CapturedStream("err", buffer, 2)
    sys.stdout, sys.stderr = out, err
    _no_input()
    return buffer, out, err


def discard_output() -> None:
    """Tasks print to nowhere. The process's own error output stays: a crash of ours must be seen."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    _no_input()


def _no_input() -> None:
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for the life of the process


def settle_process() -> None:
    """What a fresh fork needs before it runs user code."""
    # Threads of an executor wait for the interpreter rarely, but then for something that is urgent.
    sys.setswitchinterval(0.0005)
    # Headers are containers, so the default of 700 allocations means a collection every few hundred tasks.
    gc.set_threshold(10_000, 20, 50)
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()  # forked executors would all draw the same numbers
    # An explicit SIGINT is no way to end an executor; what user code starts gets the default again through exec.
    signal.signal(signal.SIGINT, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler rather than SIG_IGN, which subprocesses of user code would inherit."""
