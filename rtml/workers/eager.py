"""Coroutines that take their first step at once: most calls of async methods end in it.

asyncio makes a task, schedules its first step for the next turn of the loop, and its end for the turn after that. A
task that is made here is an ordinary one, but its first step is given to the caller, who takes it at once (as tasks of
Python 3.12 can with `eager_start`): a call that never waits costs no turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any


def make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], name: str, context: contextvars.Context
) -> tuple[asyncio.Task[Any], Callable[[], object]]:
    """A task of the coroutine, and its first step; without that it does not begin.

    Take the step outside of any task of the loop, or schedule it: a task's step may not run inside of another's.
    """
    taken: list[Callable[[], object]] = []

    def take(callback: Callable[[], object], *arguments: object, context: object = None) -> None:
        taken.append(callback)

    scheduling: Any = loop
    scheduling.call_soon = take  # the task's constructor looks it up at the loop
    try:
        task = asyncio.Task(coroutine, loop=loop, name=name, context=context)
    finally:
        del scheduling.call_soon
    step = taken[0]
    return task, lambda: context.run(step)
