"""How the requests of a server end when it stops."""

from __future__ import annotations

import asyncio

from rtml.serving.draining import Draining


async def answering(draining: Draining, until: asyncio.Event) -> str:
    task = draining.enter()
    try:
        await until.wait()
    except asyncio.CancelledError:
        if not draining.given_up(task):
            raise
        return "given up"
    finally:
        draining.leave(task)
    return "answered"


def test_what_runs_ends_by_itself() -> None:
    async def main() -> None:
        draining, event = Draining(), asyncio.Event()
        task = asyncio.create_task(answering(draining, event))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(draining.drain(60))
        await asyncio.sleep(0)
        assert draining.begun
        assert not stopping.done()
        event.set()
        await stopping
        assert await task == "answered"

    asyncio.run(main())


def test_what_takes_too_long_is_told_so() -> None:
    async def main() -> None:
        draining = Draining()
        task = asyncio.create_task(answering(draining, asyncio.Event()))
        await asyncio.sleep(0)
        await draining.drain(0.01)
        assert await task == "given up"
        assert task.cancelling() == 0

    asyncio.run(main())


def test_a_client_that_goes_away_cancels_as_ever() -> None:
    async def main() -> None:
        draining = Draining()
        task = asyncio.create_task(answering(draining, asyncio.Event()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await draining.drain(60)  # nothing runs any more

    asyncio.run(main())


def test_a_beginning_without_requests_does_not_end_the_drain() -> None:
    async def main() -> None:
        draining, event = Draining(), asyncio.Event()
        draining.begin()
        first = asyncio.create_task(answering(draining, event))
        event.set()
        await first
        event.clear()
        second = asyncio.create_task(answering(draining, event))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(draining.drain(60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not stopping.done()
        event.set()
        await stopping
        assert await second == "answered"

    asyncio.run(main())
