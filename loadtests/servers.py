"""Starting what is measured, and watching its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import processes

ROOT: Final = Path(__file__).resolve().parent.parent
#: Seconds that a gateway may take to start and to stop.
START_TIMEOUT: Final = 60.0
_STOP_TIMEOUT: Final = 15.0


class Process:
    """A server with all the processes that it started.

    Attributes:
        url: Where it serves.
        process: The first of them.
    """

    def __init__(self, process: subprocess.Popen[str], mark: str, url: str) -> None:
        self.process = process
        self.url = url
        self._mark = mark

    def all(self) -> list[int]:
        """Ids of its processes."""
        return processes.marked(self._mark)

    def cpu(self, pids: Sequence[int] | None = None) -> float:
        """Seconds of CPU time so far, of these or of all of its processes."""
        return processes.cpu_seconds(self.all() if pids is None else list(pids))

    def memory(self) -> float:
        """MiB of all its processes together, shared pages once."""
        return processes.pss_mib(self.all())


@contextmanager
def started(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, *, ready: str = "", url: str = ""
) -> Iterator[Process]:
    """A server for as long as the block runs; then all its processes are ended.

    Args:
        command: What to run.
        log: Gets all that it prints.
        environment: Beside this process's own.
        ready: Pattern of a line on stdout whose group 1 is the url. Empty: do not wait; whoever uses it knows when.
        url: Where it serves, where that line does not say.

    Raises:
        RuntimeError: it ended before it was ready; the message has the end of what it printed.
    """
    mark = uuid.uuid4().hex
    log.parent.mkdir(parents=True, exist_ok=True)
    # What executors and gateways leave in the temporary directory goes with this one.
    with tempfile.TemporaryDirectory(prefix="load-") as place, log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": place, **(environment or {}), processes.MARK_NAME: mark},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if ready else output,
            stderr=output if not ready else subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Process(process, mark, _url(process, ready, log) if ready else url)
        finally:
            _stop(process, mark)


def _url(process: subprocess.Popen[str], ready: str, log: Path) -> str:
    found: list[str] = []
    seen = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        with log.open("a") as output:
            for line in process.stdout:
                output.write(line)
                output.flush()
                if not found and (match := re.match(ready, line)):
                    found.append(match[1])
                    seen.set()
        seen.set()

    threading.Thread(target=read, daemon=True).start()
    seen.wait(START_TIMEOUT)
    if not found:
        raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-2000:]}")
    return found[0]


def _stop(process: subprocess.Popen[str], mark: str) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end = time.monotonic() + 3.0
    while (left := processes.marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@contextmanager
def gateway(app: str, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Process]:
    """`rtml serve APP` on a free port, with two workers.

    Raises:
        RuntimeError: it does not start.
    """
    command = [sys.executable, "-m", "rtml", "serve", app, "--port", "0", "--workers", "2", *options]
    found = {"PYTHONPATH": str(ROOT), **(environment or {})}
    log = ROOT / "out/load/gateway.log"
    with started(command, log, found, ready=r"serving on (http://\S+)") as process:
        yield process


def gateway_pids(server: Process) -> list[int]:
    """Of a gateway's processes those that speak HTTP: neither executors nor the dispatcher."""
    return [server.process.pid]
