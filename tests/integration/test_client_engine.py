"""The client with a whole embedded engine, on both links: programs as users write them."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.client.client import Client
from rtml.errors import TaskCancelled
from tests.integration.engine import eventually


@pytest.fixture(scope="module", params=["unix", "zmq"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with rtml.connect(workers=2, link=request.param) as client:
        yield client


@rtml.task
def add(a: int, b: int = 1) -> int:
    return a + b


@rtml.task
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@rtml.task
def fibonacci(n: int) -> int:
    if n < 2:
        return n
    return sum(rtml.get([fibonacci.submit(n - 1), fibonacci.submit(n - 2)]))


@rtml.task
async def fan(width: int) -> list[int]:
    return await rtml.gather(*[add.submit(n) for n in range(width)])


@rtml.task
def resolve(reference: rtml.Future[Any]) -> Any:
    return reference.result()


@rtml.task
async def wait_for(reference: rtml.Future[Any]) -> Any:
    return await reference


@rtml.task
def make_future(n: int) -> rtml.Ref:
    return rtml.ref(add.submit(n))


def run_program(text: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program given by -c, as a user would."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_calls(client: Client) -> None:
    assert add.submit(1).result(20) == 2
    assert add.submit(add.submit(1), b=add.submit(2)).result(20) == 5
    assert rtml.get([add.submit(n) for n in range(500)], timeout=20) == list(range(1, 501))
    assert list(client.map(pow, range(50), range(50), chunksize=7)) == list(map(pow, range(50), range(50)))


def test_tasks_make_tasks(client: Client) -> None:
    assert fibonacci.submit(7).result(60) == 13


def test_async_tasks(client: Client) -> None:
    assert fan.submit(50).result(30) == list(range(1, 51))
    assert rtml.get([fan.submit(5) for _ in range(20)], timeout=30) == [list(range(1, 6))] * 20


def connect_and_shut_down() -> tuple[list[int], bool]:
    with rtml.connect() as inside:
        futures = [inside.submit(add, n) for n in range(3)]
    done = all(future.done() for future in futures)
    inside.shutdown(cancel_futures=True)
    return [future.result() for future in futures], done


def test_a_task_cannot_shut_its_executor_down(client: Client) -> None:
    """Written as a program of its own it waits for what it submitted, and the tasks after it do as well."""
    for _ in range(2 * len(os.sched_getaffinity(0))):
        assert client.submit(connect_and_shut_down).result(30) == ([1, 2, 3], True)
    assert fibonacci.submit(5).result(30) == 5
    assert client.submit(np.ones, 100_000).result(30).sum() == 100_000


def test_a_client_in_a_task_is_the_engine_s_own(client: Client) -> None:
    assert client.submit(lambda: client.submit(add, 1).result()).result(30) == 2
    assert client.submit(lambda given: list(given.map(add, [1, 2])), client).result(30) == [2, 3]
    assert client.submit(lambda: client).result(30) is client


def test_standard_library_program(client: Client) -> None:
    futures: dict[cf.Future[Any], int] = {client.submit(pow, n, 2): n for n in range(20)}
    for future in cf.as_completed(futures, timeout=20):
        assert future.result() == futures[future] ** 2
    done, pending = cf.wait([client.submit(pow, 2, n) for n in range(5)], timeout=20)
    assert {future.result() for future in done} == {1, 2, 4, 8, 16}
    assert not pending


def test_asyncio_program(client: Client) -> None:
    async def program() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(client, pow, 2, 3) == 8
        assert await rtml.gather(*[add.submit(n) for n in range(20)]) == list(range(1, 21))

    asyncio.run(program())


def test_progressive_wait(client: Client) -> None:
    pending = [sleep.submit(0.002 * (n % 3)) for n in range(30)]
    count = 0
    while pending:
        done, pending = rtml.wait(pending, num_returns=1, timeout=20)
        count += len(done)
    assert count == 30


def test_references(client: Client) -> None:
    slow = sleep.submit(0.1)
    assert resolve.submit(rtml.ref(slow)).result(20) == 0.1
    assert resolve.submit(rtml.ref(slow)).result(20) == 0.1
    assert wait_for.submit(rtml.ref(sleep.submit(0.2))).result(20) == 0.2
    inner = make_future.submit(4).result(20)
    assert inner.result(20) == 5


def test_large_values(client: Client) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(500_000.0)
    stored = rtml.put(array)
    sums = [client.submit(numpy.sum, stored) for _ in range(4)]
    assert rtml.get(sums, timeout=20) == [array.sum()] * 4
    negative = client.submit(numpy.negative, stored)
    assert (negative.result(20) == -array).all()
    assert client.submit(numpy.sum, negative).result(20) == -array.sum()


def test_cancelling_a_running_task(client: Client) -> None:
    future = sleep.submit(30)
    while not future.running():
        time.sleep(0.001)
    time.sleep(0.05)
    begin = time.monotonic()
    assert future.cancel()
    with pytest.raises(TaskCancelled):
        future.result()
    assert rtml.get([add.submit(n) for n in range(10)], timeout=10) == list(range(1, 11))
    assert time.monotonic() - begin < 10


def test_errors(client: Client) -> None:
    error = add.submit(1, b="x").exception(20)
    assert isinstance(error, TypeError)
    assert "in add" in str(error.__cause__)


def test_many_threads(client: Client) -> None:
    with cf.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: add.submit(n).result(30), range(200)))
    assert results == list(range(1, 201))


@pytest.mark.parametrize("link", ["unix", "zmq"])
def test_a_killed_dispatcher_loses_nothing(link: Any) -> None:
    with rtml.connect(workers=2, link=link) as client:
        assert add.submit(1).result(20) == 2
        (dispatcher,) = _dispatchers_of(client)
        futures = [sleep.submit(0.001 * (n % 5)) for n in range(500)]
        time.sleep(0.05)
        os.kill(dispatcher, signal.SIGKILL)
        futures += [sleep.submit(0.0) for _ in range(100)]
        assert rtml.get(futures, timeout=60) == [0.001 * (n % 5) for n in range(500)] + [0.0] * 100


@pytest.mark.parametrize("link", ["unix", "zmq"])
def test_a_dispatcher_that_is_killed_again_and_again_loses_nothing(link: Any) -> None:
    """Somebody who kills it has not shown that it cannot run."""
    with rtml.connect(workers=2, link=link) as client:
        futures = [add.submit(n) for n in range(400)]
        killed: set[int] = set()
        for number in range(8):
            assert futures[40 * number].result(60) == 40 * number + 1
            assert eventually(lambda: bool(_dispatchers_of(client) - killed))
            (dispatcher,) = _dispatchers_of(client) - killed
            os.kill(dispatcher, signal.SIGKILL)
            killed.add(dispatcher)
        assert rtml.get(futures, timeout=60) == list(range(1, 401))


def _dispatchers_of(client: Client) -> set[int]:
    entries = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {int(entry.name) for entry in entries if _is_dispatcher_of(entry, client)}


def _is_dispatcher_of(entry: Path, client: Client) -> bool:
    try:
        command = (entry / "cmdline").read_bytes()
    except OSError:
        return False
    directory = client.store.directory.rpartition("/")[2].encode()
    return b"rtml.dispatcher" in command and directory in command


def test_main_functions_lambdas_and_the_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import rtml

            SCALE = 10

            class Point:
                def __init__(self, x): self.x = x
                def moved(self, by): return Point(self.x + by)

            @rtml.task
            def scaled(n):
                return n * SCALE

            @rtml.task
            def nested(n):
                return sum(rtml.get([scaled.submit(k) for k in range(n)]))

            @rtml.task(retries=0)
            async def graph(n):
                return await scaled.submit(n) + await rtml.submit(lambda: n)

            def shout(n):
                print("shouting", n)
                return n

            if __name__ == "__main__":
                print(scaled.submit(2).result(30), nested.submit(4).result(30), graph.submit(5).result(30))
                print(rtml.submit(Point(1).moved, 2).result(30).x)
                print(rtml.submit(shout, 3).result(30))
                print([f.result() for f in rtml.as_completed([rtml.submit(lambda: 7)])])
            """
        )
    )
    ended = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "shouting" not in line]
    assert lines == ["20 60 55", "3", "3", "[7]"]
    assert "(shout pid=" in ended.stdout


def test_unfinished_work_is_finished_at_the_end_of_the_program(tmp_path: Path) -> None:
    target = tmp_path / "written"
    ended = run_program(
        f"""
        import pathlib, time, rtml
        def work():
            time.sleep(0.3)
            pathlib.Path({str(target)!r}).write_text("done")
        rtml.submit(work)
        """
    )
    assert ended.returncode == 0, ended.stderr
    assert target.read_text() == "done"


def test_several_clients_at_the_end_of_the_program(tmp_path: Path) -> None:
    ended = run_program(
        f"""
        import pathlib, time, rtml
        def work(name):
            time.sleep(0.2)
            (pathlib.Path({str(tmp_path)!r}) / name).write_text("done")
        first, second = rtml.connect(workers=1), rtml.connect(workers=1)
        first.submit(work, "a")
        first.shutdown(wait=False)
        second.submit(work, "b")
        """
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_program_that_crashes_ends_at_once() -> None:
    begin = time.monotonic()
    ended = run_program(
        """
        import time, rtml
        rtml.connect(workers=1)
        rtml.submit(time.sleep, 60)
        raise KeyError("oh")
        """
    )
    assert ended.returncode == 1
    assert "oh" in ended.stderr
    assert time.monotonic() - begin < 30


def test_cold_start() -> None:
    ended = run_program(
        """
        import time
        begin = time.perf_counter()
        import rtml
        assert rtml.submit(pow, 2, 3).result() == 8
        print(time.perf_counter() - begin)
        """
    )
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 5


def test_importing_is_lean() -> None:
    ended = run_program(
        """
        import sys, rtml
        rtml.connect
        print([name for name in ("numpy", "zmq", "asyncio", "aiohttp", "uvloop", "prometheus_client", "cloudpickle")
               if name in sys.modules])
        """
    )
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr


def test_waiting_is_interrupted_by_ctrl_c() -> None:
    program = """
    import signal, threading, time, os, rtml
    rtml.connect(workers=1)
    rtml.submit(pow, 1, 1).result()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        rtml.submit(time.sleep, 60).result()
    except KeyboardInterrupt:
        rtml.shutdown(cancel_futures=True)
        print("stopped")
    """
    begin = time.monotonic()
    ended = run_program(program)
    assert ended.stdout.strip() == "stopped", ended.stderr
    assert time.monotonic() - begin < 30


def test_ctrl_c_while_the_program_waits_at_its_end_cancels_the_rest() -> None:
    program = """
    import atexit, os, signal, threading, time, rtml
    atexit.register(lambda: print(open(f"/proc/self/task/{os.getpid()}/children").read().split()))
    rtml.connect(workers=1)
    rtml.submit(pow, 1, 1).result()
    rtml.submit(time.sleep, 60)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    """
    begin = time.monotonic()
    ended = run_program(program)
    assert ended.stdout.strip() == "[]", ended.stderr
    assert "KeyboardInterrupt" in ended.stderr
    assert time.monotonic() - begin < 30


def test_threads_are_gone_after_shutdown() -> None:
    before = threading.active_count()
    with rtml.connect(workers=1):
        assert add.submit(1).result(20) == 2
    assert threading.active_count() == before
