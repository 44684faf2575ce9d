"""Actors in real processes, on both links: order, threads and coroutines, deaths of every kind, handles that travel."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import rtml
from rtml.errors import ActorDied, SubmitError, TaskError
from tests.integration.engine import eventually, kill

LINKS = ["unix", "zmq"]


class CounterClass:
    """Counts."""

    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise ValueError("a counter starts at zero or above")
        self.n = start
        self.seen: list[int] = []

    def add(self, n: int) -> int:
        self.n += n
        self.seen.append(n)
        return self.n

    def order(self) -> list[int]:
        return self.seen

    def fail(self) -> None:
        raise KeyError("as asked")

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def total(self, values: Any) -> float:
        return float(values.sum())

    def double(self) -> rtml.Actor:
        return Counter.create(2 * self.n)

    @rtml.method(batch=64)
    def many(self, numbers: list[int]) -> list[tuple[int, int]]:
        return [(number, len(numbers)) for number in numbers]


class LedgerClass:
    """Keeps what it was told over the deaths of its process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.entries: list[int] = []

    def note(self, entry: int) -> int:
        self.entries.append(entry)
        return len(self.entries)

    def die_once(self) -> list[int]:
        if not Path(self.path).exists():
            Path(self.path).touch()
            os.kill(os.getpid(), 9)
        return self.entries

    def __rtml_save__(self) -> list[int]:
        return self.entries

    def __rtml_restore__(self, entries: list[int]) -> None:
        self.entries = entries


class MeetingClass:
    """Several coroutines at a time."""

    def __init__(self) -> None:
        self.present = 0
        self.opened = asyncio.Event()

    async def enter(self, needed: int) -> int:
        self.present += 1
        if self.present >= needed:
            self.opened.set()
        await self.opened.wait()
        return self.present

    def count(self) -> int:
        return self.present


class ThreadsClass:
    """Plain methods in threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(4)

    def meet(self) -> str:
        self.barrier.wait(10)
        return threading.current_thread().name

    def fail(self, error: BaseException) -> None:
        raise error


# Not as decorators: type checkers do not see what a decorator makes of a class.
Counter = rtml.actor(CounterClass)
Ledger = rtml.actor(max_restarts=5, max_task_retries=3, checkpoint_calls=1)(LedgerClass)
Meeting = rtml.actor(MeetingClass)
Threads = rtml.actor(concurrency=4)(ThreadsClass)


@rtml.task
def count_up(counter: Any, times: int) -> int:
    return int(rtml.get([counter.add.submit(1) for _ in range(times)])[-1])


@rtml.task
def start_counter(start: int) -> Any:
    return Counter.create(start)


@rtml.task
def late(value: int, seconds: float) -> int:
    time.sleep(seconds)
    return value


@pytest.fixture(scope="module", params=LINKS)
def engine(request: pytest.FixtureRequest) -> Iterator[rtml.Client]:
    link: Literal["unix", "zmq"] = request.param
    with rtml.connect(workers=2, link=link) as client:
        yield client


def test_calls_change_state_in_the_order_of_submission(engine: rtml.Client) -> None:
    counter = Counter.create(10)
    futures = [counter.add.submit(late.submit(1, 0.1)), *[counter.add.submit(n) for n in range(2, 50)]]
    assert rtml.get(futures)[0] == 11
    assert counter.order.submit().result() == list(range(1, 50))
    assert Counter(5).add(1) == 6  # here, as if it were not decorated


def test_errors_of_methods_and_constructors_keep_their_types(engine: rtml.Client) -> None:
    counter = Counter.create()
    with pytest.raises(KeyError, match="as asked"):
        counter.fail.submit().result()
    assert counter.add.submit(1).result() == 1
    with pytest.raises(AttributeError, match="has no method 'ad'; there are add, "):
        counter.ad
    with pytest.raises(TypeError, match="submit"):
        counter.add(1)
    with pytest.raises(ActorDied, match="a counter starts at zero or above"):
        Counter.create(-1).add.submit(1).result()


def test_handles_travel_in_arguments_results_and_closures(engine: rtml.Client) -> None:
    counter = Counter.create()
    assert count_up.submit(counter, 10).result() == 10
    assert rtml.submit(lambda: counter.add.submit(5).result()).result() == 15
    doubled = counter.double.submit().result()
    assert doubled.add.submit(0).result() == 30
    assert start_counter.submit(7).result().add.submit(1).result() == 8
    back = rtml.submit(lambda handle: handle, counter).result()
    assert back == counter
    assert back.add.submit(1).result() == 16


def test_errors_in_threads_arrive_whatever_they_are(engine: rtml.Client) -> None:
    threads = Threads.create()
    with pytest.raises(KeyError, match="as asked") as raised:
        threads.fail.submit(KeyError("as asked")).result(20)
    assert "rtml" not in str(raised.value.__cause__)
    with pytest.raises(TaskError, match="SystemExit: 1"):
        threads.fail.submit(SystemExit(1)).result(20)
    with pytest.raises(RuntimeError, match="StopIteration"):
        threads.fail.submit(StopIteration()).result(20)
    assert len(set(rtml.get([threads.meet.submit() for _ in range(4)], timeout=20))) == 4


def test_large_arguments_and_results(engine: rtml.Client) -> None:
    counter = Counter.create()
    assert counter.total.submit(np.ones(1_000_000)).result() == 1_000_000


def test_coroutines_run_together_and_threads_too(engine: rtml.Client) -> None:
    meeting = Meeting.create()
    assert rtml.get([meeting.enter.submit(20) for _ in range(20)], timeout=20) == [20] * 20
    assert meeting.count.submit().result() == 20
    threads = Threads.create()
    assert len(set(rtml.get([threads.meet.submit() for _ in range(4)], timeout=20))) == 4


def test_calls_of_many_are_executed_as_one(engine: rtml.Client) -> None:
    counter = Counter.create()
    blocking = counter.sleep.submit(0.2)
    results = rtml.get([counter.many.submit(n) for n in range(100)])
    assert blocking.done()
    assert [number for number, _ in results] == list(range(100))
    assert max(size for _, size in results) == 64


def test_kill_stop_and_the_last_handle(engine: rtml.Client) -> None:
    counter = Counter.create()
    sleeping = counter.sleep.submit(0.3)
    end = rtml.stop(counter)
    assert sleeping.result() == 0.3
    assert end.result() is None
    with pytest.raises(ActorDied, match="stopped"):
        counter.add.submit(1).result()

    counter = Counter.create()
    pid = counter.pid.submit().result()
    sleeping = counter.sleep.submit(60)
    rtml.kill(counter)
    with pytest.raises(ActorDied, match="killed"):
        sleeping.result(20)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())

    counter = Counter.create()
    pid = counter.pid.submit().result()
    pending = counter.sleep.submit(0.2)
    del counter, sleeping
    gc.collect()
    assert pending.result() == 0.2  # a call on it keeps it
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_names_and_detached_actors_outlive_their_creators(engine: rtml.Client) -> None:
    @rtml.task
    def start() -> int:
        lasting = Counter.options(name="lasting", lifetime="detached").create(3)
        return int(lasting.add.submit(1).result())

    assert start.submit().result() == 4
    found = rtml.get_actor("lasting")
    assert found.add.submit(1).result() == 5
    with pytest.raises(ActorDied, match="'lasting' exists already"):
        second = Counter.options(name="lasting").create()
        second.add.submit(1).result()
    rtml.kill(found)
    assert eventually(lambda: _is_gone("lasting"))


def _is_gone(name: str) -> bool:
    try:
        rtml.get_actor(name)
    except LookupError:
        return True
    return False


def test_after_a_kill_9_the_state_of_the_checkpoint_is_back_and_calls_are_tried_again(
    engine: rtml.Client, tmp_path: Path
) -> None:
    ledger = Ledger.create(str(tmp_path / "died"))
    futures = [ledger.note.submit(n) for n in range(20)]
    entries = ledger.die_once.submit()
    futures += [ledger.note.submit(n) for n in range(20, 40)]
    assert entries.result() == list(range(20))
    assert rtml.get(futures) == list(range(1, 41))


def test_without_restarts_a_kill_9_ends_calls_with_the_reason(engine: rtml.Client) -> None:
    counter = Counter.create()
    pid = counter.pid.submit().result()
    sleeping = counter.sleep.submit(60)
    kill(pid)
    with pytest.raises(ActorDied, match="SIGKILL"):
        sleeping.result(20)
    with pytest.raises(ActorDied, match="SIGKILL"):
        counter.add.submit(1).result(20)


def test_wrong_options_are_named() -> None:
    with pytest.raises(SubmitError, match="unknown option 'colour' of an actor class"):
        rtml.actor(colour=1)(Counter.function)
    with pytest.raises(SubmitError, match="max_restarts"):
        Counter.options(max_restarts=-2)
    with pytest.raises(SubmitError, match="__rtml_save__"):
        Counter.options(checkpoint_calls=1)
    with pytest.raises(SubmitError, match="lifetime"):
        Counter.options(lifetime="for ever")
    with pytest.raises(SubmitError, match="decorates classes"):
        rtml.actor(len)


def test_actors_end_with_their_driver(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import os, rtml\n"
        "@rtml.actor\n"
        "class A:\n"
        "    def pid(self): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    a = A.create()\n"
        "    print(a.pid.submit().result(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
