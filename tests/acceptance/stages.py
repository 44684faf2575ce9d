"""A staged pipeline: init -> run -> reward, each stage with a bound, with failures of every kind in every stage."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

import rtml

BOUNDS = {"init": 3, "run": 2, "reward": 1}
STAGES = tuple(BOUNDS)
#: Seconds that a stage takes: of an item.
TAKES = {"init": 0.004, "run": 0.008, "reward": 0.003}
#: Kinds of failures, by the item's number within each twenty; the stage in which it happens goes round.
KINDS = {3: "raises", 7: "dies once", 11: "dies always"}
#: Items of which a stage never ends.
HANGS = {16: "init", 56: "run", 96: "reward"}
#: Seconds after which it is given up.
TIMEOUT = 3.0


class StageError(Exception):
    """An injected failure."""


class Span(NamedTuple):
    """When a stage worked on an item; all processes of a machine have the same monotonic clock."""

    stage: str
    begin: float
    end: float


def plan(item: int) -> tuple[str, str]:
    """(stage, kind) of the failure that the item meets; empty for none."""
    if item in HANGS:
        return HANGS[item], "hangs"
    kind = KINDS.get(item % 20, "")
    return (STAGES[(item // 20) % 3], kind) if kind else ("", "")


def ends(item: int) -> str:
    """How the item must end."""
    stage, kind = plan(item)
    return {"raises": f"{stage} raised", "dies always": f"{stage} died", "hangs": f"{stage} hung"}.get(kind, "done")


def work(stage: str, item: int) -> Span:
    """A stage's work on an item, and its injected failures."""
    begin = time.monotonic()
    failing, kind = plan(item)
    if failing == stage:
        current = rtml.current_task()
        assert current is not None
        if kind == "raises":
            raise StageError(stage)
        if kind == "dies always" or (kind == "dies once" and current.attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hangs":
            time.sleep(600)
    time.sleep(TAKES[stage])
    return Span(stage, begin, time.monotonic())


def init(item: int) -> tuple[int, list[Span]]:
    return item, [work("init", item)]


def run(started: tuple[int, list[Span]]) -> tuple[int, list[Span]]:
    item, spans = started
    return item, [*spans, work("run", item)]


def reward(ran: tuple[int, list[Span]]) -> tuple[int, list[Span]]:
    item, spans = ran
    return item, [*spans, work("reward", item)]


#: Only its own bound limits a stage.
WAY = [
    rtml.task(cpu=0, resources={stage.__name__: 1}, retries=1, timeout=TIMEOUT)(stage) for stage in (init, run, reward)
]


@rtml.task(retries=3)
async def rollout(item: int) -> tuple[int, str, list[Span]]:
    """One item's way through the stages: (item, how it ended, when each stage had it)."""
    value: Any = item
    for name, stage in zip(STAGES, WAY):
        try:
            value = await stage.submit(value)
        except StageError as error:
            return item, f"{error} raised", []
        except rtml.errors.WorkerDied:
            return item, f"{name} died", []
        except rtml.errors.TaskTimeout:
            return item, f"{name} hung", []
    assert value[0] == item
    return item, "done", value[1]
