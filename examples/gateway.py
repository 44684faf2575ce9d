"""Starts `rtml serve` for the demo as a process of its own, and asks it over HTTP as any client would."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

_READY_SECONDS = 60.0
_STOP_SECONDS = 15.0
#: prctl(2): the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


class NotServing(Exception):
    """The gateway did not come up, or answered with an error."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Gateway:
    """A gateway process. Use as a context manager: it is stopped at the end, and with this process if that is killed.

    Args:
        apps: What to serve, "module:app" each.
        log: Where its output goes.
        arguments: Further arguments of `rtml serve`.
    """

    def __init__(self, apps: Sequence[str], log: Path, arguments: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "rtml", "serve", *apps, "--port", str(self.port), *arguments]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        #: Holds the socket on which the engine's dispatcher answers `rtml trace`.
        self._folder = ""

    def __enter__(self) -> Gateway:
        library = ctypes.CDLL(None)
        self._folder = tempfile.mkdtemp(prefix="rtml-demo-")

        def end_with_parent() -> None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C reaches this program, which then stops the gateway in order.
            self._process = subprocess.Popen(
                [*self._command, "--listen", self._dispatcher],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509  # this program has one thread
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _dispatcher(self) -> str:
        return f"unix:{self._folder}/dispatcher.sock"

    async def ready(self, session: aiohttp.ClientSession) -> float:
        """Wait until it serves; returns after how many seconds.

        Raises:
            NotServing: it ended, or was not ready in time; with the end of its output.
        """
        begin = time.perf_counter()
        while (passed := time.perf_counter() - begin) < _READY_SECONDS:
            if self._process is None or self._process.poll() is not None:
                raise NotServing(f"`{' '.join(self._command[1:])}` ended:\n{self._tail()}")
            try:
                async with session.get(f"{self.url}/v2/health/ready") as answer:
                    if answer.status == 200:
                        return passed
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)
        raise NotServing(f"not ready after {_READY_SECONDS:.0f} s:\n{self._tail()}")

    async def trace(self) -> dict[str, Any]:
        """The tasks of the graph that ended last: what `rtml trace` knows.

        Raises:
            NotServing: the engine does not answer.
        """
        command = [sys.executable, "-m", "rtml", "trace", "--json", "--address", self._dispatcher]
        asking = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        answer, complaint = await asking.communicate()
        if asking.returncode:
            raise NotServing(f"`rtml trace`: {complaint.decode(errors='replace')}")
        found: dict[str, Any] = msgspec.json.decode(answer)
        return found

    async def batches(self, session: aiohttp.ClientSession) -> dict[str, dict[float, float]]:
        """From `/metrics`: function -> largest batch -> calls that ran in one of at most this size, since the start."""
        async with session.get(f"{self.url}/metrics") as answer:
            text = await answer.text()
        found: dict[str, dict[float, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "rtml_task_batch_calls_bucket":
                    buckets = found.setdefault(sample.labels["function"], {})
                    buckets[float(sample.labels["le"])] = sample.value
        return found

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])


async def ask(session: aiohttp.ClientSession, url: str, png: bytes) -> tuple[dict[str, Any], float]:
    """Post a picture; the answer, and how many seconds it took.

    Raises:
        NotServing: the gateway answered with an error.
    """
    begin = time.perf_counter()
    async with session.post(url, data=png, headers={"content-type": "image/png"}) as response:
        body = await response.json()
        if response.status != 200:
            raise NotServing(f"{response.status} from {url}: {body}")
        return body, time.perf_counter() - begin
