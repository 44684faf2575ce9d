"""Tasks whose first step is taken at once, on both kinds of loops."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from rtml.workers.eager import make_task

# The first one opens a pipe for the process.
pytest.importorskip("uvloop").new_event_loop().close()

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="")


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop() if request.param == "asyncio" else pytest.importorskip("uvloop").new_event_loop()
    yield made
    AT_ONCE.clear()
    made.close()


#: tasks that had ended after their first step
AT_ONCE: set[asyncio.Task[Any]] = set()


def begin(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Inside of a callback of the running loop, as executors do."""
    made: list[asyncio.Task[Any]] = []

    def callback() -> None:
        context = contextvars.copy_context()
        context.run(VARIABLE.set, "inside")
        task, step = make_task(loop, coroutine, "name", context)
        step()
        if task.done():
            AT_ONCE.add(task)
        made.append(task)
        loop.stop()

    loop.call_soon(callback)
    loop.run_forever()
    return made[0]


async def what_is_there() -> tuple[str, asyncio.Task[Any] | None]:
    return VARIABLE.get(), asyncio.current_task()


def test_a_coroutine_that_never_waits_is_done_at_once(loop: asyncio.AbstractEventLoop) -> None:
    task = begin(loop, what_is_there())
    assert task in AT_ONCE
    assert task.result() == ("inside", task)
    assert task.get_name() == "name"
    assert VARIABLE.get() == ""


def test_one_that_waits_goes_on_in_the_same_task(loop: asyncio.AbstractEventLoop) -> None:
    async def waits() -> list[Any]:
        before = await what_is_there()
        async with asyncio.timeout(10):
            await asyncio.sleep(0)
        return [before, await what_is_there()]

    task = begin(loop, waits())
    assert task not in AT_ONCE
    assert loop.run_until_complete(task) == [("inside", task)] * 2


def test_errors_and_cancellation(loop: asyncio.AbstractEventLoop) -> None:
    async def fails() -> None:
        raise KeyError("x")

    async def waits() -> None:
        await asyncio.sleep(100)

    with pytest.raises(KeyError):
        begin(loop, fails()).result()
    task = begin(loop, waits())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_the_loop_schedules_as_before(loop: asyncio.AbstractEventLoop) -> None:
    called: list[int] = []

    async def schedules() -> None:
        schedule: Callable[..., Any] = loop.call_soon
        schedule(called.append, 1)
        await asyncio.gather(asyncio.sleep(0), what_is_there())

    loop.run_until_complete(begin(loop, schedules()))
    assert called == [1]
    assert "call_soon" not in vars(loop)
