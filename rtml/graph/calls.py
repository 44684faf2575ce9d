"""What tasks call, learned from tasks that ended: the steps of each program, and what these calls cost.

A graph is made at run time, so nobody can say beforehand which functions a program will submit to; what its graphs
really did can be said. `Calls` gets all records of ended tasks, in bulk, and keeps for each root function the
functions of its descendants, and for each function how often it was called by others and where the time went. Calls
that clients make themselves are not counted here: a gateway knows those better.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rtml.graph.tables import Ended
from rtml.messages import OK

#: Graphs whose root has not ended yet; of older ones the steps are forgotten.
_OPEN_MAX: Final = 4_096
#: Functions that are kept apart, as callers and as called.
_NAMES_MAX: Final = 1_024
#: Batch sizes that are kept apart, for each function.
_BATCHES_MAX: Final = 256


class Called:
    """What one function's calls by other tasks came to, in seconds."""

    __slots__ = ("batches", "failed", "failed_seconds", "ok", "queued", "run", "seconds", "transfer")

    def __init__(self) -> None:
        self.ok = 0
        self.failed = 0
        self.seconds = 0.0
        self.failed_seconds = 0.0
        self.queued = 0.0
        self.transfer = 0.0
        self.run = 0.0
        #: Calls that shared a run -> how many calls, their transfer, their run times.
        self.batches: dict[int, list[float]] = {}

    def count(self, end: Ended) -> None:
        """Add a call that ended."""
        seconds = end.finished - end.submitted
        if end.outcome != OK or not end.assigned:
            self.failed += 1
            self.failed_seconds += seconds
            return
        transfer = max(0.0, end.finished - end.assigned - end.run)
        self.ok += 1
        self.seconds += seconds
        self.queued += end.assigned - end.submitted
        self.transfer += transfer
        self.run += end.run
        batch = self.batches.get(end.batch)
        if batch is None:
            if len(self.batches) >= _BATCHES_MAX:
                return
            batch = self.batches[end.batch] = [0, 0.0, 0.0]
        batch[0] += 1
        batch[1] += transfer
        batch[2] += end.run

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


class Calls:
    """All functions."""

    def __init__(self) -> None:
        #: Graph -> what its tasks but the root have called so far.
        self._open: dict[int, set[str]] = {}
        #: Root function -> functions of the tasks below, in the order in which they were first seen.
        self.steps: dict[str, dict[str, int]] = {}
        self.called: dict[str, Called] = {}

    def count(self, ended: Iterable[Ended]) -> None:
        """Learn from tasks that ended, in the order in which they did."""
        unfinished = self._open
        for end in ended:
            if end.parent:
                names = unfinished.get(end.graph)
                if names is None:
                    if len(unfinished) >= _OPEN_MAX:
                        del unfinished[next(iter(unfinished))]
                    names = unfinished[end.graph] = set()
                if len(names) < _NAMES_MAX:
                    names.add(end.function)
                called = self.called.get(end.function)
                if called is None:
                    if len(self.called) >= _NAMES_MAX:
                        continue
                    called = self.called[end.function] = Called()
                called.count(end)
            elif unfinished and end.graph in unfinished:
                self._learn(end.function, unfinished.pop(end.graph))

    def _learn(self, root: str, names: set[str]) -> None:
        steps = self.steps.get(root)
        if steps is None:
            if len(self.steps) >= _NAMES_MAX:
                return
            steps = self.steps[root] = {}
        for name in sorted(names - steps.keys())[: _NAMES_MAX - len(steps)]:
            steps[name] = 0
        for name in names & steps.keys():
            steps[name] += 1

    def describe(self) -> dict[str, Any]:
        """As plain data: "steps" (root function -> function -> graphs that called it), "called" (function -> costs)."""
        return {"steps": self.steps, "called": {name: called.describe() for name, called in self.called.items()}}
