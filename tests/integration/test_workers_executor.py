"""Executors and the code that they run: code that fights back, waits in odd ways, prints, forks, is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import rtml
from rtml import errors
from tests.integration.engine import eventually


@pytest.fixture(params=["unix", "zmq"], scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[rtml.Client]:
    with rtml.connect(workers=2, link=request.param) as client:
        yield client


def increment(x: int) -> int:
    return x + 1


def total(n: int) -> int:
    return sum(future.result() for future in [rtml.submit(increment, i) for i in range(n)])


# --- code that fights back
# ----------------------------------------------------------------------------------------------


def interrupt_self() -> None:
    raise KeyboardInterrupt


def exhaust_memory() -> int:
    return len(bytearray(1 << 60))


def recurse() -> None:
    recurse()


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (sys.exit, errors.TaskError),
        (interrupt_self, errors.TaskError),
        (exhaust_memory, (MemoryError, OverflowError)),
        (recurse, RecursionError),
    ],
)
def test_what_ends_a_program_only_ends_the_task(client: rtml.Client, function: Callable[[], Any], error: Any) -> None:
    before = {client.submit(os.getpid).result(10) for _ in range(8)}
    with pytest.raises(error):
        client.submit(function).result(10)
    assert {client.submit(os.getpid).result(10) for _ in range(8)} <= before | {client.submit(os.getpid).result(10)}


@rtml.task
async def exit_in_coroutine() -> None:
    await asyncio.sleep(0)
    sys.exit(4)


@pytest.mark.usefixtures("client")
def test_a_coroutine_cannot_end_the_loop() -> None:
    with pytest.raises(errors.TaskError, match="SystemExit: 4"):
        exit_in_coroutine.submit().result(10)
    with pytest.raises(errors.TaskError, match="SystemExit: 4"):
        exit_in_coroutine.submit().result(10)


def vandalise() -> int:
    os.chdir("/")
    sys.stdout = None
    threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return os.getpid()


def test_an_executor_survives_vandals(client: rtml.Client) -> None:
    pids = {client.submit(vandalise).result(10) for _ in range(4)}
    assert client.submit(total, 10).result(10) == 55
    assert client.submit(print, "still there").result(10) is None
    assert pids & {client.submit(os.getpid).result(10) for _ in range(8)}


def close_descriptors() -> str:
    os.closerange(3, 1024)
    return "closed"


def test_an_executor_that_lost_its_descriptors_comes_back_or_is_replaced(client: rtml.Client) -> None:
    with contextlib.suppress(errors.WorkerDied):
        client.submit(close_descriptors).result(20)
    assert client.submit(total, 10).result(20) == 55


def fork_and_return() -> int:
    """Its child, too, comes out of this function."""
    return os.fork()


def test_a_forked_child_never_becomes_an_executor(client: rtml.Client) -> None:
    child = client.submit(fork_and_return).result(10)
    assert child > 0
    # It ended by itself and is, at most, a zombie of the executor.
    assert eventually(
        lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()
    )


def start_process() -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def die_with_process(path: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGSEGV)


def test_what_a_dead_executor_started_ends_too(client: rtml.Client, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pytest.raises(errors.WorkerDied, match="SIGSEGV"):
        client.submit(rtml.task(retries=0)(die_with_process), str(path)).result(20)
    child = int(path.read_text())
    assert eventually(lambda: not Path(f"/proc/{child}").exists())


def limits() -> tuple[int, int, str | None]:
    return (
        os.getpriority(os.PRIO_PROCESS, 0),
        resource.getrlimit(resource.RLIMIT_CORE)[0],
        os.environ.get("OMP_NUM_THREADS"),
    )


def test_priority_and_threads(client: rtml.Client) -> None:
    nice, _, threads = client.submit(limits).result(10)
    assert nice == 19
    assert threads == "1"


# --- waiting
# ------------------------------------------------------------------------------------------------------------


def test_nested_gets(client: rtml.Client) -> None:
    assert client.submit(total, 30).result(20) == sum(range(31))
    futures = [client.submit(total, 10) for _ in range(20)]
    assert [future.result(20) for future in futures] == [55] * 20


def countdown(n: int) -> int:
    return 0 if n == 0 else 1 + int(rtml.submit(countdown, n - 1).result())


def test_nesting_deeper_than_one_process_allows(client: rtml.Client) -> None:
    assert client.submit(countdown, 80).result(60) == 80


def in_threads(n: int) -> list[int]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda i: int(rtml.submit(increment, i).result()), range(n)))


def test_threads_of_a_task_may_wait(client: rtml.Client) -> None:
    for _ in range(20):
        assert client.submit(in_threads, 8).result(20) == list(range(1, 9))
        assert client.submit(total, 10).result(20) == 55


def own_loop(n: int) -> int:
    async def main() -> int:
        return sum(await asyncio.gather(*[_awaited(rtml.submit(increment, i)) for i in range(n)]))

    return asyncio.run(main())


async def _awaited(future: Any) -> int:
    return int(await future)


def test_a_task_may_run_a_loop_of_its_own(client: rtml.Client) -> None:
    for _ in range(10):
        assert client.submit(own_loop, 5).result(20) == 15
    assert [future.result(20) for future in [client.submit(own_loop, 5) for _ in range(8)]] == [15] * 8


def later(x: int) -> int:
    time.sleep(0.2)
    return x


def woken_by_a_signal() -> float:
    """Results come while the loop of the main thread sleeps, and it is a signal's handler that receives them."""
    driver: Any = rtml.current().driver

    async def main() -> float:
        future = rtml.submit(later, 7)
        timer = threading.Timer(0.6, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
        timer.start()
        begin = time.monotonic()
        assert await asyncio.wait_for(future, 20) == 7
        return time.monotonic() - begin

    driver._receive_beside = lambda: time.sleep(0.01)  # the helper comes too late
    try:
        return asyncio.run(main())
    finally:
        del driver._receive_beside


def test_a_loop_that_sleeps_is_woken_by_what_a_signal_brings(client: rtml.Client) -> None:
    assert client.submit(woken_by_a_signal).result(40) < 10


def signalled_with_the_lock() -> int:
    future = rtml.submit(later, 1)
    driver: Any = rtml.current().driver
    driver.flush()
    select.select([driver._link._fds[0]], [], [], 10)  # the result: nobody receives while this task waits for nothing
    with rtml.current().lock:  # as code of ours does that is called by user code
        signal.raise_signal(signal.SIGUSR1)
    return int(future.result())


def test_a_signal_waits_for_whoever_has_the_lock(client: rtml.Client) -> None:
    assert client.submit(signalled_with_the_lock).result(20) == 1


class Patient:
    async def wait(self, x: int) -> int:
        return x + int(await rtml.submit(increment, 0))

    async def wait_long(self, path: str) -> None:
        await await_long(path)


def test_a_coroutine_that_nobody_expected_is_run(client: rtml.Client) -> None:
    method: Any = Patient().wait
    assert client.submit(method, 2).result(10) == 3


def with_callback() -> int:
    done = threading.Event()
    future = rtml.submit(increment, 41)
    future.add_done_callback(lambda _: done.set())
    assert done.wait(10)
    return int(future.result())


def test_callbacks_inside_a_task(client: rtml.Client) -> None:
    assert client.submit(with_callback).result(20) == 42


def wait_in_vain() -> str:
    future = rtml.submit(time.sleep, 30)
    try:
        future.result(0.1)
    except TimeoutError:
        future.cancel()
        return "gave up"
    return "no"


def test_a_timeout_inside_a_task(client: rtml.Client) -> None:
    assert client.submit(wait_in_vain).result(10) == "gave up"


@rtml.task
async def block_the_loop() -> int:
    return int(rtml.submit(increment, 1).result())


@rtml.task
async def block_beside_the_loop() -> int:
    return await asyncio.to_thread(lambda: int(rtml.submit(increment, 1).result()))


@pytest.mark.usefixtures("client")
def test_blocking_in_a_coroutine_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(RuntimeError, match="await"):
        block_the_loop.submit().result(10)
    assert block_beside_the_loop.submit().result(10) == 2


def first_of_two() -> float:
    """Another task would be run on top of this one if it waited for all."""
    futures = [rtml.submit(time.sleep, 5), rtml.submit(time.sleep, 0.01)]
    start = time.monotonic()
    rtml.wait(futures, num_returns=1)
    return time.monotonic() - start


def test_who_waits_for_the_first_is_not_held_up_by_the_others(client: rtml.Client) -> None:
    assert client.submit(first_of_two).result(10) < 2


def leave_children(path: str) -> str:
    rtml.submit(rtml.task(detached=True)(Path.touch), Path(path))
    return "gone"


def test_a_task_that_ends_has_sent_what_it_submitted(client: rtml.Client, tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert client.submit(leave_children, str(path)).result(10) == "gone"
    assert eventually(path.exists)


# --- cancelling
# -----------------------------------------------------------------------------------------------------------


def spin(path: str) -> None:
    try:
        Path(path).touch()
        while True:
            pass
    finally:
        Path(path).unlink()


def sleep_long(path: str) -> None:
    try:
        Path(path).touch()
        time.sleep(1000)
    finally:
        Path(path).unlink()


def lock_up(path: str) -> None:
    try:
        Path(path).touch()
        threading.Event().wait()
    finally:
        Path(path).unlink()


def wait_for_child(path: str) -> None:
    rtml.submit(spin, path).result()


def spin_on_top(path: str) -> None:
    try:
        Path(path + ".outer").touch()
        rtml.submit(spin, path).result()
    finally:
        Path(path + ".outer").unlink()


async def await_long(path: str) -> None:
    try:
        Path(path).touch()
        await asyncio.sleep(1000)
    finally:
        Path(path).unlink()


async def spin_in_loop(path: str) -> None:
    spin(path)


@pytest.mark.parametrize(
    "function",
    [spin, sleep_long, lock_up, wait_for_child, spin_on_top, await_long, spin_in_loop, Patient().wait_long],
    ids=lambda f: str(f.__name__),
)
def test_cancelling_reaches_running_code(client: rtml.Client, tmp_path: Path, function: Callable[[str], Any]) -> None:
    path = tmp_path / "running"
    before = client.submit(os.getpid).result(10)
    future = client.submit(function, str(path))
    assert eventually(path.exists)
    assert future.cancel()
    assert eventually(lambda: not list(tmp_path.iterdir()))
    assert client.submit(os.getpid).result(10)
    assert Path(f"/proc/{before}").exists()


def swallow(path: str) -> str:
    Path(path).touch()
    with contextlib.suppress(Exception):
        while True:
            time.sleep(0.001)
    return "swallowed"


def test_except_exception_does_not_swallow_a_cancellation(client: rtml.Client, tmp_path: Path) -> None:
    path = tmp_path / "running"
    future = client.submit(swallow, str(path))
    assert eventually(path.exists)
    future.cancel()
    busy = [client.submit(time.sleep, 0.01) for _ in range(4)]
    assert [other.result(10) for other in busy] == [None] * 4


def test_many_cancellations_hit_only_what_they_are_meant_for(client: rtml.Client) -> None:
    """Signals arrive while other tasks run: none of these may be interrupted."""
    kept, dropped = [], []
    for i in range(400):
        kept.append(client.submit(increment, i))
        dropped.append(client.submit(time.sleep, 0.002))
        kept.append(client.submit(total, 2))
    for future in dropped:
        future.cancel()
    assert [future.result(60) for future in kept[::2]] == list(range(1, 401))
    assert [future.result(60) for future in kept[1::2]] == [3] * 400


# --- output
# ---------------------------------------------------------------------------------------------------------------


def speak() -> None:
    print("one\ntwo")
    print("no newline", end="")
    sys.stderr.write("complaint\n")
    logging.getLogger("some").warning("logged")
    sys.stdout.buffer.write(b"bytes\n")


@rtml.task
async def speak_softly() -> None:
    print("from a coroutine")
    await asyncio.sleep(0)
    print("still there")


def test_output_reaches_the_submitter(client: rtml.Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.submit(speak).result(10)
    speak_softly.submit().result(10)
    captured = {"out": "", "err": ""}

    def arrived() -> bool:
        out, err = capsys.readouterr()
        captured["out"] += out
        captured["err"] += err
        return "still there" in captured["out"] and "logged" in captured["err"] and "no newline" in captured["out"]

    assert eventually(arrived), captured
    lines = captured["out"].splitlines()
    assert any(line.startswith("(speak ") and line.endswith("one") for line in lines)
    assert any(line.endswith("bytes") for line in lines)
    assert any(line.startswith("(speak_softly ") and line.endswith("from a coroutine") for line in lines)
    assert "complaint" in captured["err"]


def speak_and_go_on() -> None:
    print("early")
    time.sleep(1.5)


def test_output_does_not_wait_for_the_end(client: rtml.Client, capsys: pytest.CaptureFixture[str]) -> None:
    future = client.submit(speak_and_go_on)
    assert eventually(lambda: "early" in capsys.readouterr().out, 1.3)
    assert not future.done()
    future.result(10)


# --- batches
# --------------------------------------------------------------------------------------------------------------


@rtml.task(batch=16, batch_delay=0.05)
def halves(values: list[int], *, scale: list[int] | None = None) -> list[Any]:
    return [ValueError(f"odd: {value}") if value % 2 else (value // 2, len(values)) for value in values]


@rtml.task(batch=16, batch_delay=0.05)
def too_few(values: list[int]) -> list[int]:
    return values[1:]


@rtml.task(batch=8, batch_delay=0.05)
async def async_batch(values: list[int]) -> list[int]:
    await asyncio.sleep(0.001)
    return [value + 1 for value in values]


@pytest.mark.usefixtures("client")
def test_batches() -> None:
    futures = [halves.submit(value) for value in range(8)]
    for value, future in enumerate(futures):
        if value % 2:
            with pytest.raises(ValueError, match=f"odd: {value}"):
                future.result(10)
        else:
            assert future.result(10)[0] == value // 2
    mixed = [halves.submit(2), halves.submit(4, scale=1), halves.submit(6)]
    assert [future.result(10)[0] for future in mixed] == [1, 2, 3]
    with pytest.raises(Exception, match="must return a list"):
        too_few.submit(1).result(10)
    assert [future.result(10) for future in [async_batch.submit(value) for value in range(6)]] == [1, 2, 3, 4, 5, 6]
