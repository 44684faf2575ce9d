"""`rtml.anytime` on a real engine: in programs that wait, in graph programs, in sync tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import rtml
from rtml.client.client import Client
from rtml.errors import DeadlineExceeded
from tests.integration.engine import eventually


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with rtml.connect(workers=2, timings=True) as found:
        yield found


pytestmark = pytest.mark.usefixtures("client")


@rtml.task
def after(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


@rtml.task(name="broken")
def fails() -> None:
    raise ValueError("it is broken")


@rtml.task(name="never")
async def never() -> None:
    import asyncio

    await asyncio.Event().wait()


@rtml.task
async def program(within: float | None) -> Any:
    found = rtml.anytime({"quick": after.submit(0, 1), "slow": never.submit()}, within=within, fallback=0)
    return await found, found.missing, found.complete


@rtml.task
def waiting() -> Any:
    return rtml.anytime([after.submit(0, 1), never.submit()]).result()


@rtml.task
async def above() -> Any:
    return await program.submit(0.05)


def test_k_of_n_are_enough_and_the_others_are_cancelled() -> None:
    slow = [never.submit() for _ in range(3)]
    found = rtml.anytime([after.submit(0, "a"), *slow, after.submit(0.01, "b")], k=2)
    assert found.result() == ["a", "b"]
    assert found.complete
    assert found.missing == []
    assert all(future.cancelled() for future in slow)


def test_at_the_end_of_the_time_it_takes_what_is_there() -> None:
    futures = [after.submit(0, 1), never.submit(), fails.submit()]
    rtml.wait([futures[0], futures[2]], num_returns=2)
    found = rtml.anytime(futures, within=0.05)
    assert found.result() == [1]
    assert not found.complete
    assert found.missing == ["never", "task"], "what had ended before has no name any more"


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, [2, 1]),
        ({"fallback": None}, [2, None, 1]),
        ({"fallback": None, "k": 2}, [2, 1]),
        ({"best": max}, 2),
        ({"best": lambda values: values[-1]}, 1),
    ],
)
def test_what_is_missing(options: dict[str, Any], value: Any) -> None:
    futures = [after.submit(0, 2), never.submit(), after.submit(0, 1)]
    assert rtml.anytime(futures, within=0.5, **options).result() == value


def test_too_little_is_an_error_unless_there_is_a_fallback() -> None:
    assert rtml.anytime(never.submit(), within=0.01, fallback="nothing").result() == "nothing"
    assert rtml.anytime([never.submit()], within=0.01, fallback=7, best=max).result() == 7
    late = rtml.anytime(never.submit(), within=0.01)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match="0 of 1 values") as error:
            late.result()
        assert error.value.missing == ["never"]
    with pytest.raises(DeadlineExceeded, match="1 of 2"):
        rtml.anytime([after.submit(0, 1), never.submit()], within=0.2, least=2).result()
    with pytest.raises(ValueError, match="it is broken"):
        rtml.anytime([fails.submit(), fails.submit()]).result()
    assert rtml.anytime([], fallback=1).result() == []


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="k=3"):
        rtml.anytime([after.submit(0, 1)], k=3)
    with pytest.raises(TypeError, match="futures"):
        rtml.anytime(3)
    with pytest.raises(TypeError, match="int"):
        rtml.anytime([3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"within": "x"}, "within is a number of seconds .*, not 'x'"),
        ({"within": float("nan")}, "within is a number of seconds .*, not nan"),
        ({"within": True}, "within is a number of seconds"),
        ({"k": "a"}, "k is a whole number of values, not 'a'"),
        ({"k": 1.5}, "k is a whole number of values, not 1.5"),
        ({"least": True}, "least is a whole number of values, not True"),
        ({"best": 5}, "best makes the value of a list of values, like max; 5 cannot be called"),
        ({"k": 3}, "k=3 and least=1 of 2 futures: k is from 0 to 2, least from 0 to 2"),
    ],
)
def test_values_of_the_wrong_kind_are_told_at_the_call(options: dict[str, Any], message: str) -> None:
    futures = [rtml.put(1), rtml.put(2)]
    with pytest.raises((TypeError, ValueError), match=message):
        rtml.anytime(futures, **options)
    assert rtml.anytime(futures, within=-1, k=1).result() == [1]


def test_a_graph_program_goes_on_without_and_its_graph_says_so() -> None:
    future = program.submit(0.05)
    assert future.result() == ({"quick": 1, "slow": 0}, ["slow"], False)
    assert future.timing is not None
    assert future.timing.missing == ["slow"]
    outer = above.submit()
    outer.result()
    assert outer.timing is not None
    assert outer.timing.missing == ["slow"], "whatever task of the graph it was"


def test_the_deadline_of_the_graph_is_a_limit() -> None:
    begin = time.monotonic()
    # A twentieth is kept for the way back: on a busy machine it must not be short.
    futures = [program.options(deadline=4.0).submit(None), waiting.options(deadline=4.0).submit()]
    for future in futures:
        future.result()
        assert future.timing is not None
        assert future.timing.missing
        assert future.timing.slack is not None
        assert 0 < future.timing.slack < 1.0
    assert time.monotonic() - begin < 4.0


def test_whoever_gives_up_the_wait_gives_up_the_futures(client: Client) -> None:
    @rtml.task
    async def outer() -> None:
        await rtml.anytime([never.submit()])

    future = outer.submit()
    eventually(lambda: '"assigned":2' in client.query("status"))
    future.cancel()
    eventually(lambda: '"assigned":0' in client.query("status"))
