"""Processes that measure when they are told to: systems take turns, and each is started only once.

    with Process("single", "benchmarks.workloads.hotos_single", python) as system:
        answer = system.ask(mean=97.0, rounds=10)

The other end is `serve(run)`: one JSON object a line in, one out. Standard library only, as peers run it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import processes

ROOT = Path(__file__).resolve().parents[2]


class SystemFailed(Exception):
    """A measured system ended instead of answering."""


class Process:
    """A measured system in a process of its own, and what it answers.

    Args:
        name: for people.
        module: which calls `serve`.
        arguments: for it.
        python: what runs it.
        enter: a command that runs it elsewhere, `ip netns exec ...`.
        pause: stop its processes (SIGSTOP) while it is not asked: a JVM works on by itself, it compiles and collects.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *arguments: str,
        python: str = sys.executable,
        enter: tuple[str, ...] = (),
        pause: bool = False,
    ) -> None:
        self.name = name
        self._pause = pause
        self._command = [*enter, python, "-m", module, *arguments]
        self._mark = uuid.uuid4().hex
        self._errors: Any = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Process:
        self._errors = tempfile.TemporaryFile("w+")
        # One thread for each process's arithmetic: two cores are to be shared by processes here.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), processes.MARK_NAME: self._mark}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()  # its sign to end
        except BrokenPipeError:
            pass
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in processes.marked(self._mark) if self._pause else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def answer(self) -> dict[str, Any]:
        """The next object that it prints.

        Raises:
            SystemFailed: it ended; the message has its last lines of standard error.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = "".join(self._errors.readlines()[-30:])
            raise SystemFailed(f"{self.name} ended with status {self._process.wait()}:\n{last}")
        self._signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **question: Any) -> dict[str, Any]:
        """What it answers to this; as `cpu_s` the CPU time that all of its processes took for it."""
        assert self._process is not None
        self._signal(signal.SIGCONT)
        before = processes.cpu_by_process(processes.marked(self._mark))
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        found = self.answer()
        after = processes.cpu_by_process(processes.marked(self._mark))
        return {**found, "cpu_s": sum(used - before.get(pid, 0.0) for pid, used in after.items())}


def serve(run: Callable[..., dict[str, Any]], **about: Any) -> None:
    """Answers questions until standard input ends; first says what it is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not get between answers

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say(about)
    for line in sys.stdin:
        say(run(**json.loads(line)))
