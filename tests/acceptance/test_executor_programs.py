"""Programs for `concurrent.futures`, most from the standard library's documentation, with a client as the executor."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import rtml

PRIMES = [
    112272535095293, 112582705942171, 112272535095293, 115280095190773, 115797848077099, 1099726899285419,
]  # fmt: skip


@pytest.fixture
def executor() -> Iterator[concurrent.futures.Executor]:
    with rtml.connect(workers=2, logs=False, preimport=("pytest",)) as client:
        yield client


def is_prime(n: int) -> bool:
    if n < 2:
        return False
    if n == 2:
        return True
    if n % 2 == 0:
        return False
    # The documentation's numbers, looked at as far as this test's time allows.
    return all(n % i for i in range(3, min(math.isqrt(n), 20_000) + 1, 2))


def load_url(url: str, timeout: float) -> bytes:
    if "nonexistant" in url:
        raise OSError(f"no such host: {url}")
    time.sleep(0.01)
    return url.encode() * 10


def nothing() -> None:
    return


def wait_for_file(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.005)
    return path


def test_prime_checking(executor: concurrent.futures.Executor) -> None:
    found = dict(zip(PRIMES, executor.map(is_prime, PRIMES)))
    assert found == {number: is_prime(number) for number in PRIMES}
    assert list(executor.map(is_prime, range(20), chunksize=7)) == [is_prime(n) for n in range(20)]


def test_as_completed_loop(executor: concurrent.futures.Executor) -> None:
    urls = ["http://a.example/", "http://nonexistant.example/", "http://b.example/"]
    sizes, errors = {}, {}
    future_to_url = {executor.submit(load_url, url, 60): url for url in urls}
    for future in concurrent.futures.as_completed(future_to_url):
        url = future_to_url[future]
        try:
            data = future.result()
        except Exception as exc:
            errors[url] = str(exc)
        else:
            sizes[url] = len(data)
    assert sizes == {urls[0]: 170, urls[2]: 170}
    assert errors == {urls[1]: f"no such host: {urls[1]}"}


@pytest.mark.parametrize(
    ("when", "done_at_least"),
    [
        (concurrent.futures.FIRST_COMPLETED, 1),
        (concurrent.futures.FIRST_EXCEPTION, 1),
        (concurrent.futures.ALL_COMPLETED, 3),
    ],
)
def test_wait_of_the_standard_library(executor: concurrent.futures.Executor, when: str, done_at_least: int) -> None:
    futures: list[concurrent.futures.Future[Any]] = [executor.submit(nothing), executor.submit(divmod, 1, 0)]
    futures.append(executor.submit(time.sleep, 0.05))
    done, not_done = concurrent.futures.wait(futures, return_when=when)
    assert len(done) >= done_at_least
    assert done | not_done == set(futures)
    if when == concurrent.futures.FIRST_EXCEPTION:
        assert futures[1] in done


def test_map_raises_at_its_place_and_times_out(executor: concurrent.futures.Executor) -> None:
    results = executor.map(divmod, [5, 5, 5], [1, 0, 2])
    assert next(results) == (5, 0)
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(executor.map(time.sleep, [0, 5], timeout=0.2))
    assert list(executor.map(pow, [])) == []


def test_states_and_cancel(executor: concurrent.futures.Executor, tmp_path: Any) -> None:
    gate = tmp_path / "gate"
    blockers = [executor.submit(wait_for_file, str(gate)) for _ in range(2)]
    waiting = executor.submit(nothing)
    assert waiting.cancel()
    assert waiting.cancelled()
    assert waiting.done()
    assert not waiting.running()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.exception()
    gate.touch()
    assert [blocker.result(20) for blocker in blockers] == [str(gate)] * 2
    assert not blockers[0].cancel()
    assert blockers[0].exception() is None


def test_exceptions_keep_type_arguments_and_remote_traceback(executor: concurrent.futures.Executor) -> None:
    future = executor.submit(load_url, "nonexistant", 1.0)
    error = future.exception(20)
    assert isinstance(error, OSError)
    assert error.args == ("no such host: nonexistant",)
    assert "in load_url" in str(error.__cause__)
    with pytest.raises(OSError, match="no such host"):
        future.result()


def test_callbacks(executor: concurrent.futures.Executor) -> None:
    called: list[Any] = []
    event = threading.Event()
    future = executor.submit(pow, 2, 5)
    future.add_done_callback(lambda done: called.append(done.result()))
    future.add_done_callback(lambda done: event.set())
    assert event.wait(20)
    future.add_done_callback(lambda done: called.append("late"))
    assert called == [32, "late"]


def test_it_is_an_executor_for_event_loops(executor: concurrent.futures.Executor) -> None:
    async def main() -> tuple[int, list[int]]:
        loop = asyncio.get_running_loop()
        one = await loop.run_in_executor(executor, pow, 2, 6)
        return one, await asyncio.gather(*[loop.run_in_executor(executor, pow, 2, n) for n in range(4)])

    assert asyncio.run(main()) == (64, [1, 2, 4, 8])


def test_shutdown_waits_for_what_was_submitted_and_refuses_more() -> None:
    executor: concurrent.futures.Executor = rtml.connect(workers=2)
    futures = [executor.submit(time.sleep, 0.05) for _ in range(4)]
    executor.shutdown(wait=True)
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(nothing)
    executor.shutdown()


def test_shutdown_can_cancel(tmp_path: Any) -> None:
    executor: concurrent.futures.Executor = rtml.connect(workers=1)
    futures = [executor.submit(wait_for_file, str(tmp_path / "never")) for _ in range(3)]
    executor.shutdown(wait=True, cancel_futures=True)
    assert all(future.cancelled() for future in futures)


def test_the_same_program_on_three_executors() -> None:
    """What is observable must not depend on the executor."""

    def program(executor: concurrent.futures.Executor) -> list[Any]:
        with executor:
            futures: list[concurrent.futures.Future[Any]] = [executor.submit(pow, 2, n) for n in range(5)]
            futures += [executor.submit(divmod, 1, 0), executor.submit(int, "x")]
            seen: list[Any] = [type(future.exception()).__name__ for future in futures]
            seen += [future.result() for future in futures[:5]]
            seen += list(executor.map(str, range(3)))
            seen += [len(concurrent.futures.wait(futures).done), [future.running() for future in futures]]
            seen.append(sorted(future.result() for future in concurrent.futures.as_completed(futures[:5])))
            return seen

    assert program(rtml.connect(workers=2)) == program(concurrent.futures.ThreadPoolExecutor(2))
