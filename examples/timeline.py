"""When the steps of a graph ran and where their time went: recorded by the graph program itself.

Each future knows the durations of its task (`Future.timing`): waiting for its arguments, queued for an executor, on the
way, running. The program adds when it submitted the task, by its own clock, and the picture is complete.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

import rtml


class Step(msgspec.Struct):
    """One task of a graph. All times in seconds."""

    name: str
    #: From the graph's begin to this submission.
    at: float
    waiting: float
    queued: float
    transfer: float
    run: float
    #: Calls that shared its execution.
    batch: int

    @property
    def total(self) -> float:
        """From submission to result."""
        return self.waiting + self.queued + self.transfer + self.run


class Recorder:
    """Submits tasks and remembers when. One per graph."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._submitted: list[tuple[str, float, rtml.Future[Any]]] = []

    def submit(self, function: Any, *args: Any) -> rtml.Future[Any]:
        """Submit `function(*args)`."""
        at = time.perf_counter() - self._begin
        future: rtml.Future[Any] = function.submit(*args)
        self._submitted.append((function.__name__, at, future))
        return future

    def steps(self) -> list[Step]:
        """What is known of the tasks that have ended, in the order of their submission."""
        return [
            Step(name, at, timing.waiting, timing.queued, timing.transfer, timing.run, timing.batch)
            for name, at, future in self._submitted
            if (timing := future.timing) is not None
        ]
