"""Generators as tasks: items come in order, once, before the last is made; deaths, errors, ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import rtml
from rtml.errors import SubmitError, TaskCancelled, WorkerDied
from tests.integration.engine import children_of_this, eventually, kill, processes

LINKS = ["unix", "zmq"]


@rtml.task
def count(n: int, log: str = "") -> Iterator[int]:
    try:
        for number in range(n):
            if log:
                with Path(log).open("a") as file:
                    file.write(f"{number}\n")
            yield number
    except GeneratorExit:
        Path(log).with_suffix(".closed").touch()
        raise


@rtml.task
def tidy_up(path: str) -> Iterator[int]:
    try:
        yield from range(10**9)
    except GeneratorExit:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        Path(path).touch()
        raise


@rtml.task
async def count_async(n: int) -> AsyncIterator[int]:
    for number in range(n):
        await asyncio.sleep(0)
        yield number


@rtml.task
def then_fail() -> Iterator[str]:
    yield "one"
    yield "two"
    raise ValueError("three")


@rtml.task
def arrays(n: int) -> Iterator[Any]:
    for number in range(n):
        yield np.full(50_000, float(number))


@rtml.task
def gate(path: str) -> Iterator[str]:
    yield "before"
    while not Path(path).exists():
        time.sleep(0.01)
    yield "after"


@rtml.task
def pid_and_numbers(n: int) -> Iterator[int]:
    yield os.getpid()
    yield from range(n)


@rtml.task
def square(x: int) -> int:
    return x * x


@rtml.task
def futures_of(n: int) -> Iterator[Any]:
    for number in range(n):
        yield [square.submit(number)]


@rtml.task
def total(n: int) -> int:
    return sum(count.stream(n))


@rtml.task
async def total_async(n: int) -> int:
    return sum([item async for item in count.stream(n)])


class PagesClass:
    def __init__(self, n: int) -> None:
        self.n = n

    def read(self) -> Iterator[int]:
        yield from range(self.n)


Pages = rtml.actor(PagesClass)


@pytest.fixture(scope="module", params=LINKS)
def engine(request: pytest.FixtureRequest) -> Iterator[rtml.Client]:
    link: Literal["unix", "zmq"] = request.param
    with rtml.connect(workers=2, link=link) as client:
        yield client


def test_items_come_in_order_and_the_first_before_the_last_is_made(engine: rtml.Client, tmp_path: Path) -> None:
    assert list(count.stream(1000)) == list(range(1000))
    assert list(count.stream(0)) == []
    path = tmp_path / "go"
    stream = gate.stream(str(path))
    assert next(stream) == "before"
    path.touch()
    assert list(stream) == ["after"]
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.future.result() is None


def test_async_generators_and_async_consumers(engine: rtml.Client) -> None:
    async def consume() -> list[list[int]]:
        both = [count_async.stream(200), count.stream(200)]
        return [[item async for item in stream] for stream in both]

    async def begin() -> int:
        async with count.stream(1_000_000) as stream:
            first: int = await anext(stream)
        assert stream.future.cancelled()
        return first

    assert asyncio.run(consume()) == [list(range(200))] * 2
    assert asyncio.run(begin()) == 0
    assert list(count_async.stream(50)) == list(range(50))


def test_tasks_and_actors_stream_and_consume(engine: rtml.Client) -> None:
    assert total.submit(300).result() == total_async.submit(300).result() == sum(range(300))
    pages = Pages.create(30)
    assert list(pages.read.stream()) == list(range(30))


def test_large_items_and_futures_in_items(engine: rtml.Client) -> None:
    assert [array[0] for array in arrays.stream(50)] == list(range(50))
    assert [item[0].result() for item in futures_of.stream(40)] == [n * n for n in range(40)]


def test_errors_come_after_the_items_before(engine: rtml.Client) -> None:
    stream = then_fail.stream()
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(ValueError, match="three"):
        next(stream)
    with pytest.raises(SubmitError, match="use \\.stream"):
        count.submit(3).result()
    with pytest.raises(SubmitError, match="no generator function"):
        list(square.stream(3))
    with pytest.raises(TypeError, match="one consumer"):
        pickle.dumps(stream)


def test_the_producer_is_a_window_ahead_at_most(engine: rtml.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stream = count.options(window=4).stream(100, str(log))
    assert next(stream) == 0
    assert eventually(lambda: len(log.read_text().split()) >= 4)
    # Others run meanwhile: a producer that waits lends its cpu out.
    assert rtml.get([square.submit(n) for n in range(200)]) == [n * n for n in range(200)]
    assert len(log.read_text().split()) <= 6
    assert list(stream) == list(range(1, 100))


def test_closing_or_dropping_a_stream_ends_the_generator(engine: rtml.Client, tmp_path: Path) -> None:
    for number, end in enumerate(("close", "drop", "cancel")):
        log = tmp_path / f"{number}.log"
        stream = count.stream(10**9, str(log))
        assert next(stream) == 0
        assert eventually(lambda: waits_for_its_consumer(engine))  # one that computes is interrupted
        if end == "close":
            stream.close()
        elif end == "cancel":
            stream.future.cancel()
            with pytest.raises(TaskCancelled):
                list(stream)
        else:
            del stream
            gc.collect()
            square.submit(1).result()
        assert eventually(lambda log=log: log.with_suffix(".closed").exists())  # type: ignore[misc]


def waits_for_its_consumer(engine: rtml.Client) -> bool:
    """Whether a stream's producer is a window ahead, and blocked."""
    (node,) = json.loads(engine.query("status"))["nodes"]
    return any(executor["blocked"] for executor in node["executors"])


def test_what_a_generator_does_at_its_end_is_not_interrupted(engine: rtml.Client, tmp_path: Path) -> None:
    stream = tidy_up.stream(str(tmp_path / "tidy"))
    assert next(stream) == 0
    assert eventually(lambda: waits_for_its_consumer(engine))
    stream.close()
    assert eventually((tmp_path / "tidy").exists)


def test_kill_9_of_the_producer(engine: rtml.Client) -> None:
    stream = pid_and_numbers.stream(10**9)
    kill(next(stream))
    with pytest.raises(WorkerDied, match="SIGKILL"):
        for _ in stream:
            pass
    # With retries it is run again, and what was taken is left out.
    stream = pid_and_numbers.options(retries=3, window=2).stream(1000)
    pid = next(stream)
    items = [next(stream) for _ in range(100)]
    kill(pid)
    items += list(stream)
    assert items == list(range(1000))


@pytest.mark.parametrize("link", LINKS)
def test_kill_9_of_the_dispatcher(link: Literal["unix", "zmq"], tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        before = set(children_of_this())
        stack.enter_context(rtml.connect(workers=2, link=link))
        (supervisor,) = set(children_of_this()) - before
        log = tmp_path / "log"
        streams = [count.stream(3000, str(log)), count_async.stream(3000)]
        items: list[list[int]] = [[], []]
        for turn in range(3):
            for stream, got in zip(streams, items, strict=True):
                got += [next(stream) for _ in range(500)]
            for pid in processes(supervisor)["dispatcher"]:
                kill(pid)
            assert turn < 3
        for stream, got in zip(streams, items, strict=True):
            got += list(stream)
            assert got == list(range(3000))
        assert [int(line) for line in log.read_text().split()] == list(range(3000))
