"""Generators as processes of their own, started together; their results as those of one."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import sys
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Final, NamedTuple

import numpy as np

from loadtests.schedule import Plan
from loadtests.sender import Sender, Sent, Target, closed

#: Seconds that a generator may take until it is ready, and beyond its plan until it has ended.
_PATIENCE: Final = 60.0
#: Seconds between two looks at how far they are, for the progress bar.
_LOOK: Final = 0.2


class Outcome(NamedTuple):
    """A plan and what became of it."""

    plan: Plan
    sent: Sent


def _child(pipe: multiprocessing.connection.Connection, target: Target, plan: Plan, shared: list[Any]) -> None:
    import uvloop

    def progress(sent: int, ended: int) -> None:
        shared[0].value, shared[1].value = sent, ended

    async def work() -> Sent:
        sender = Sender(target, plan, progress)
        await sender.prepare(min(64, len(plan.times)))
        pipe.send("ready")
        start = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        return await sender.run(start)

    try:
        pipe.send(uvloop.run(work()))
    except (ConnectionError, EOFError, KeyboardInterrupt) as error:
        pipe.send(error)


def _closed_child(
    pipe: multiprocessing.connection.Connection, target: Target, concurrency: int, seconds: float
) -> None:
    import uvloop

    try:
        pipe.send(uvloop.run(closed(target, concurrency, seconds)))
    except (ConnectionError, KeyboardInterrupt) as error:
        pipe.send(error)


def run(target: Target, plan: Plan, processes: int = 1, bar: Callable[[float, int, int], None] | None = None) -> Outcome:
    """Sends the plan from so many processes.

    Args:
        target: Where to, and what.
        plan: When, and which.
        processes: Each sends every n-th request.
        bar: Told the part of the plan's time that is over, and how many requests were sent and have ended.

    Raises:
        ConnectionError: nothing listens there.
    """
    context = multiprocessing.get_context("spawn")
    children: list[tuple[SpawnProcess, multiprocessing.connection.Connection, list[Synchronized[int]]]] = []
    try:
        for number in range(processes):
            ours, theirs = context.Pipe()
            shared = [context.Value("l", 0), context.Value("l", 0)]
            child = context.Process(target=_child, args=(theirs, target, plan.part(number, processes), shared))
            child.start()
            theirs.close()
            children.append((child, ours, shared))
        for _, pipe, _ in children:
            _received(pipe, _PATIENCE)
        start = time.monotonic() + 0.1
        for _, pipe, _ in children:
            pipe.send(start)
        seconds = float(plan.times[-1]) if len(plan.times) else 0.0
        _watch([pipe for _, pipe, _ in children], [shared for _, _, shared in children], start, seconds, bar)
        parts = [_received(pipe, _PATIENCE + target.timeout) for _, pipe, _ in children]
    finally:
        _end([child for child, _, _ in children])
    return Outcome(plan, _together(parts, len(plan.times)))


def keep(target: Target, concurrency: int, seconds: float) -> Sent:
    """Closed loop: so many requests under way for so long, from one process.

    Raises:
        ConnectionError: nothing listens there.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_closed_child, args=(theirs, target, concurrency, seconds))
    child.start()
    theirs.close()
    try:
        return _received(ours, seconds + _PATIENCE + target.timeout)
    finally:
        _end([child])


def _received(pipe: multiprocessing.connection.Connection, patience: float) -> Any:
    if not pipe.poll(patience):
        raise ConnectionError(f"a generator said nothing for {patience:g} seconds")
    try:
        found = pipe.recv()
    except EOFError:
        raise ConnectionError("a generator died") from None
    if isinstance(found, BaseException):
        raise found
    return found


def _watch(
    pipes: list[multiprocessing.connection.Connection],
    shared: list[list[Synchronized[int]]],
    start: float,
    seconds: float,
    bar: Callable[[float, int, int], None] | None,
) -> None:
    """Until the first has ended."""
    while not multiprocessing.connection.wait(pipes, _LOOK):
        over = (time.monotonic() - start) / max(seconds, 1e-9)
        if bar is not None:
            bar(min(1.0, max(0.0, over)), *(sum(values[index].value for values in shared) for index in (0, 1)))
        if time.monotonic() > start + seconds + _PATIENCE + 60:
            return


def _together(parts: list[Sent], count: int) -> Sent:
    whole = Sent(np.empty(count), np.empty(count), np.empty(count, np.int16))
    for number, part in enumerate(parts):
        for name in ("sent", "done", "status"):
            getattr(whole, name)[number :: len(parts)] = getattr(part, name)
    whole.cpu = max((part.cpu for part in parts), default=0.0)
    whole.waited = sum(part.waited for part in parts)
    return whole


def _end(children: list[SpawnProcess]) -> None:
    for child in children:
        child.join(5.0)
        if child.is_alive():
            sys.stderr.write(f"generator {child.pid} does not end; killed\n")
            child.kill()
            child.join()
