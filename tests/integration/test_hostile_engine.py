"""Programs that ask for odd things, against a whole engine on both links: the engine must outlive each of them."""

from __future__ import annotations

import asyncio
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

import pytest

import rtml
from rtml.client.client import Client
from rtml.errors import SubmitError, WorkerDied
from tests.integration.engine import children_of_this, processes


@pytest.fixture(scope="module", params=["unix", "zmq"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with rtml.connect(workers=2, link=request.param) as client:
        yield client


@rtml.task
def double(x: int) -> int:
    return 2 * x


def dispatcher_epoch(client: Client) -> int:
    client.query("status")
    return client.core.epoch


@pytest.mark.parametrize("seconds", [3e6, 1e10, 1e12])
@pytest.mark.parametrize("option", ["deadline", "timeout"])
def test_the_dispatcher_outlives_long_times(client: Client, option: str, seconds: float) -> None:
    epoch = dispatcher_epoch(client)
    assert double.options(**{option: seconds}).submit(2).result(10) == 4
    assert dispatcher_epoch(client) == epoch


@pytest.mark.parametrize("timeout", [3e6, 1e10, float("inf")])
def test_long_timeouts_of_waits(client: Client, timeout: float) -> None:
    assert client.submit(time.sleep, 0.01).result(timeout) is None
    done, _ = rtml.wait([client.submit(time.sleep, 0.01)], timeout=timeout)
    assert len(done) == 1
    assert list(client.map(abs, [-1], timeout=timeout)) == [1]

    @rtml.task
    def inside() -> int:
        return double.submit(4).result(timeout)

    assert inside.submit().result(10) == 8


@pytest.mark.parametrize("options", [{"name": "\ud800"}, {"name": "x" * 2000}, {"resources": {"\ud800": 1}}])
def test_names_that_cannot_be_sent_are_refused_at_once(client: Client, options: dict[str, Any]) -> None:
    with pytest.raises(SubmitError, match="Unicode"):
        double.options(**options)
    assert double.submit(1).result(10) == 2


def test_a_coroutine_that_stops_the_loop(client: Client) -> None:
    @rtml.task
    async def stop() -> str:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return "went on"

    assert stop.submit().result(10) == "went on"


def test_a_coroutine_whose_timer_ends_the_process_is_charged(client: Client) -> None:
    @rtml.task
    async def crash_later() -> None:
        asyncio.get_running_loop().call_later(0.01, os._exit, 3)
        await asyncio.sleep(5)

    @rtml.task
    async def innocent() -> int:
        await asyncio.sleep(0.1)
        return 1

    guilty, other = crash_later.submit(), innocent.submit()
    with pytest.raises(WorkerDied, match="exit code 3"):
        guilty.result(30)
    assert other.result(30) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"cpu": -1},
        {"resources": [1]},
        {"resources": {"a": -1}},
        {"workers": 1.5},
        {"workers": "2"},
        {"gpu": float("nan")},
    ],
)
def test_an_engine_with_wrong_amounts_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings)).removesuffix("s")):
        rtml.connect(**settings)


def test_ctrl_c_in_a_with_block_does_not_wait_for_the_tasks(tmp_path: Path) -> None:
    program = """
        import time, rtml
        with rtml.connect(workers=1) as client:
            futures = [client.submit(time.sleep, 60) for _ in range(3)]
            print("ready", flush=True)
            futures[0].result()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=15)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in errors


def test_an_address_without_a_path_is_refused_at_once() -> None:
    with pytest.raises(rtml.errors.RtmlError, match="is no address"):
        rtml.connect("unix:")


def test_references_in_lists_are_waited_for_in_every_way(client: Client) -> None:
    @rtml.task
    def consume(futures: list[rtml.Future[int]]) -> list[Any]:
        done, pending = rtml.wait(futures, num_returns=1)
        together = rtml.gather(*futures).result()
        return [rtml.get(futures), len(done) + len(pending), together, [f.result() for f in rtml.as_completed(futures)]]

    @rtml.task
    async def consume_async(futures: list[rtml.Future[int]]) -> list[int]:
        return [await futures[0], *await rtml.gather(*futures)]

    references = [rtml.ref(double.submit(n)) for n in range(3)]
    got, count, together, completed = consume.submit(references).result(10)
    assert got == together == sorted(completed) == [0, 2, 4]
    assert count == 3
    assert consume_async.submit(references).result(10) == [0, 0, 2, 4]


def test_a_question_that_the_engine_does_not_live_to_answer() -> None:
    earlier = children_of_this()
    with rtml.connect(workers=1) as client:
        (supervisor,) = set(children_of_this()).difference(earlier)
        (dispatcher,) = processes(supervisor)["dispatcher"]
        os.kill(dispatcher, signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (supervisor, signal.SIGKILL)).start()
        with pytest.raises(rtml.errors.ConnectionLost):
            client.query("status")
