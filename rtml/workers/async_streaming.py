"""Async generators as tasks in an async executor.

A stream whose consumer is a window behind just awaits: a coroutine holds no slot anyway.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from rtml.messages import Attempt
from rtml.workers.calls import Loaded
from rtml.workers.streaming import encode_item, is_generator, no_generator

if TYPE_CHECKING:
    from rtml.workers.async_executor import AsyncExecutor


async def run_async_stream(executor: AsyncExecutor, attempt: Attempt, loaded: Loaded, generator: Any) -> None:
    """Run a generator to its end. Cancelled like any coroutine; the generator is closed then."""
    if not is_generator(generator):
        if inspect.iscoroutine(generator):
            generator.close()
        raise no_generator(loaded, generator)
    outlet = executor.core.open(attempt)
    event = executor.credits[attempt.id] = asyncio.Event()
    asynchronous = inspect.isasyncgen(generator)
    try:
        while True:
            while outlet.full:
                event.clear()
                await event.wait()
            try:
                value = await generator.__anext__() if asynchronous else next(generator)
            except (StopIteration, StopAsyncIteration):
                return
            if outlet.skips:
                outlet.skip()
                continue
            outlet.put(encode_item(executor.calls, attempt, value))
            client = executor.driver._client
            if client.core.urgent:
                executor.core.relay(client.collect())  # what was submitted comes before the items that refer to it
            executor.core.relay([outlet.send()])
            executor.driver.transmit_soon()
            if not asynchronous:
                await asyncio.sleep(0)
    finally:
        del executor.credits[attempt.id]
        if asynchronous:
            await generator.aclose()
        else:
            generator.close()
