"""Forking: what a child must do before it is a process of its own, and what its end says."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
#: Of a process's name, what the kernel keeps.
_NAME_BYTES: Final = 15


@dataclass
class Child:
    """One executor process."""

    worker: int
    role: str
    pid: int
    pidfd: int
    #: Its slot in the running page.
    slot: int
    #: Why we killed it; "" while we did not.
    killed: str = ""

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


def fork(body: Callable[[], int], name: str, close: Callable[[], None]) -> int:
    """Forks a process that dies with this one and runs `body` to its exit code. Returns its pid.

    Args:
        body: never returns into the parent's code.
        name: shown by `ps` and `top`.
        close: closes, in the child, what belongs to the parent.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies only the forking thread"
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    _end_process(lambda: _in_child(parent, body, name, close))


def _in_child(parent: int, body: Callable[[], int], name: str, close: Callable[[], None]) -> int:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # A group of its own: what user code forks ends with it.
    os.setpgid(0, 0)
    die_with_parent(True)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_NAME_BYTES], 0, 0, 0)
    if os.getppid() != parent:
        return 1  # it died before we asked to be told
    close()
    return body()


def die_with_parent(yes: bool) -> None:
    """Whether the kernel ends this process with SIGKILL when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL) if yes else 0, 0, 0, 0)


def _end_process(body: Callable[[], int]) -> NoReturn:
    """Runs a forked process's body and ends it, without ever returning into the parent's code."""
    code = 1
    try:
        code = body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - the end of a process: say why, and do not run the parent's handlers
        sys.stderr = sys.__stderr__
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def prefer_for_oom() -> None:
    """When memory runs out the kernel should end the process that runs user code, not the dispatcher."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")


def killed(status: int) -> bool:
    """Whether a wait status says SIGKILL: somebody else ended the process, which says nothing about its health."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def reason_of(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"signal {signal.Signals(number).name}"
        except ValueError:
            return f"signal {number}"
    return f"exit code {os.WEXITSTATUS(status)}"


def show_devices(devices: Sequence[int]) -> None:
    """Let this process see no gpus but these, counted among those that its node sees."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = [visible[device] if device < len(visible) else str(device) for device in devices]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
