"""The drivers: who receives, asyncio, lost connections, on both transports."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import rtml
from rtml.client import context
from rtml.client.client import Client
from rtml.client.connecting import Connector
from rtml.client.core import ClientCore
from rtml.client.loop import AsyncDriver
from rtml.client.threads import ThreadDriver
from rtml.errors import ConnectionLost, TaskCancelled
from rtml.messages import Ack, Submit
from rtml.store import Store
from tests.fake_dispatcher import FakeDispatcher, connected, running


def add(a: int, b: int = 1) -> int:
    return a + b


def hold(value: Any = None) -> Any:
    return value


def fail() -> None:
    raise ValueError("broken")


@pytest.fixture(params=["unix", "ipc"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[FakeDispatcher, Client]]:
    with connected(request.param) as both:
        yield both


@asynccontextmanager
async def on_loop(scheme: str = "unix") -> AsyncIterator[tuple[FakeDispatcher, Client]]:
    with running(scheme) as (fake, shm):
        session = random.randrange(1 << 20, 1 << 30)
        driver = AsyncDriver(Connector(fake.address, reconnect_timeout=10.0))
        client = Client(ClientCore(session), driver, Store(shm, session)).open()
        try:
            yield fake, client
        finally:
            client.cancel_all(list(client._pending.values()))
            client.shutdown(wait=False)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_many_threads_submit_and_wait(pair: tuple[FakeDispatcher, Client]) -> None:
    _, client = pair
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for n in range(50):
                assert client.submit(add, n, offset).result(20) == n + offset
            futures = [client.submit(add, n, offset) for n in range(200)]
            assert client.gather(*futures).result(20) == [n + offset for n in range(200)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_follower_leads_when_the_leader_is_done(pair: tuple[FakeDispatcher, Client]) -> None:
    fake, client = pair
    quick, held = client.submit(hold, 1), client.submit(hold, 2)
    got: list[int] = []
    threads = [threading.Thread(target=lambda f=f: got.append(f.result(20))) for f in (quick, held)]
    for thread in threads:
        thread.start()
    quick_ended = threading.Timer(0.05, lambda: rtml.cancel(quick))
    quick_ended.start()
    fake_opens = threading.Timer(0.15, fake.open_gate)
    fake_opens.start()
    # The first thread leaves with an error, which must hand the link on.
    before = threading.excepthook
    threading.excepthook = lambda arguments: None
    try:
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    finally:
        threading.excepthook = before
    assert got == [2]


def test_results_are_acknowledged_in_idle_time(pair: tuple[FakeDispatcher, Client]) -> None:
    fake, client = pair
    rtml.get([client.submit(add, n) for n in range(3000)], 20)
    client.submit(add, 1).result(10)
    acks = [message.ack if isinstance(message, Submit) else message.serial for message in fake.received
            if isinstance(message, Submit | Ack)]  # fmt: skip
    assert max(acks) > 0
    assert acks.count(0) <= 2 + sum(isinstance(message, Submit) for message in fake.received)


def test_nobody_answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running() as (_, shm):
        driver = ThreadDriver(Connector("unix:/nonexistent/socket", connect_timeout=0.1))
        store = Store(shm, 9)
        with pytest.raises(ConnectionLost, match="nonexistent"):
            Client(ClientCore(9), driver, store).open()
        driver = ThreadDriver(Connector("unix:/nonexistent/socket", connect_timeout=60, obstacle=lambda: "it crashed"))
        with pytest.raises(ConnectionLost, match="it crashed"):
            Client(ClientCore(9), driver, store).open()
        store.close()


# --- asyncio, with the threaded driver --------------------------------------------------------------------------------


def test_awaiting(pair: tuple[FakeDispatcher, Client]) -> None:
    fake, client = pair

    async def program() -> None:
        assert await client.submit(add, 1) == 2
        assert await rtml.gather(*[client.submit(add, n) for n in range(300)]) == list(range(1, 301))
        with pytest.raises(ValueError, match="broken"):
            await client.submit(fail)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(n)) for n in range(100)]
        assert [task.result() for task in tasks] == [n + 2 for n in range(100)]
        held = client.submit(hold)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(held), 0.02)
        assert held.cancelled()
        other = client.submit(hold)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await other
        assert other.cancelled()
        with pytest.raises(TaskCancelled):
            await other
        fake.open_gate()
        assert await asyncio.wrap_future(client.submit(hold, 4)) == 4

    async def one(n: int) -> int:
        return await client.submit(add, await client.submit(add, n))

    for _ in range(2):  # each run is a loop of its own
        fake.close_gate()
        asyncio.run(program())
    assert client.submit(add, 1).result(10) == 2


def test_awaiting_in_two_loops_and_blocking_at_once(pair: tuple[FakeDispatcher, Client]) -> None:
    _, client = pair
    failures: list[BaseException] = []

    async def program() -> None:
        for n in range(100):
            assert await client.submit(add, n) == n + 1

    def blocking() -> None:
        for n in range(100):
            assert client.submit(add, n).result(20) == n + 1

    def run(target: Any) -> None:
        try:
            target()
        except BaseException as error:
            failures.append(error)

    targets = [lambda: asyncio.run(program()), lambda: asyncio.run(program()), blocking]
    threads = [threading.Thread(target=run, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not failures


# --- asyncio, on the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["unix", "ipc"])
def test_the_loop_driver(scheme: str) -> None:
    async def program() -> None:
        async with on_loop(scheme) as (fake, client):
            assert await client.submit(add, 1) == 2
            before = fake.frames
            futures = [client.submit(add, n) for n in range(60)]
            assert await client.gather(*futures) == list(range(1, 61))
            assert fake.frames - before <= 2
            assert await asyncio.to_thread(lambda: client.submit(add, 5).result(10)) == 6
            held = client.submit(hold)
            with pytest.raises(RuntimeError, match="await"):
                held.result()
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(held.result, 0.02)
            called = asyncio.Event()
            held.add_done_callback(lambda ended: called.set())
            held.cancel()
            async with asyncio.timeout(10):
                await called.wait()
            with pytest.raises(TaskCancelled):
                await held

    asyncio.run(program())


def test_the_loop_driver_reconnects() -> None:
    async def program() -> None:
        async with on_loop() as (fake, client):
            held = [client.submit(hold, n) for n in range(5)]
            assert await client.submit(add, 1) == 2
            await asyncio.to_thread(fake.drop_links)
            fake.open_gate()
            async with asyncio.timeout(10):
                assert await client.gather(*held) == list(range(5))
                assert await client.submit(add, 1) == 2

    asyncio.run(program())


# --- lost connections -------------------------------------------------------------------------------------------------


def test_a_broken_link_is_made_again_and_nothing_is_lost(pair: tuple[FakeDispatcher, Client]) -> None:
    fake, client = pair
    held = [client.submit(hold, n) for n in range(100)]
    assert client.submit(add, 1).result(10) == 2
    for _ in range(3):
        fake.drop_links()
        more = [client.submit(add, n) for n in range(100)]
        assert rtml.get(more, timeout=20) == list(range(1, 101))
    fake.open_gate()
    assert rtml.get(held, timeout=20) == list(range(100))


def test_a_new_dispatcher_is_told_everything(pair: tuple[FakeDispatcher, Client]) -> None:
    fake, client = pair
    ended = client.submit(add, 41)
    assert ended.result(10) == 42
    held = client.submit(hold, 7)
    # Depends on one that the next dispatcher is told of, and one that it will never hear of.
    both = client.submit(add, held, ended)
    cancelled = client.submit(hold, 8)
    assert cancelled.cancel()
    assert client.query("status")
    fake.restart()
    fake.drop_links()
    fake.open_gate()
    assert both.result(20) == 49
    assert held.result(20) == 7
    assert cancelled.cancelled()


def test_rehello(pair: tuple[FakeDispatcher, Client]) -> None:
    fake, client = pair
    held = client.submit(hold, 7)
    assert client.query("status")
    fake.restart()
    fake.open_gate()
    # Any frame to the new incarnation is answered by a Rehello.
    assert client.submit(add, 1).result(20) == 2
    assert held.result(20) == 7


def test_in_the_end_all_futures_fail() -> None:
    with connected(reconnect_timeout=0.2) as (fake, client):
        futures = [client.submit(hold) for _ in range(3)]
        waiting = threading.Thread(target=futures[0].exception)
        waiting.start()
        fake.close()
        with pytest.raises(ConnectionLost, match=r"0\.2 s"):
            futures[1].result(20)
        waiting.join(10)
        assert not waiting.is_alive()
        assert all(isinstance(future.exception(0), ConnectionLost) for future in futures)
        with pytest.raises(ConnectionLost):
            client.submit(add, 1).result(1)


def test_waiting_can_time_out_while_disconnected() -> None:
    with connected() as (fake, client):
        held = client.submit(hold)
        fake.close()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            held.result(0.1)
        assert time.monotonic() - begin < 5


def test_current_client() -> None:
    with connected() as (_, client):
        assert rtml.current() is client
        assert rtml.submit(add, 1).result(10) == 2
        assert list(rtml.map(add, [1, 2])) == [2, 3]
        assert context.current_task() is None
