"""Collectives on one node: a real engine, its shared memory, arrivals in any order, failures, the first k."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.client.client import Client
from rtml.errors import TaskCancelled
from tests.integration.engine import eventually

#: Elements of an array that lies in shared memory.
LARGE = 200_000


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with rtml.connect(workers=2) as found:
        yield found


pytestmark = pytest.mark.usefixtures("client")


@rtml.task
def array(number: int, size: int, seconds: float = 0.0) -> Any:
    time.sleep(seconds)
    return np.full(size, number, np.float32)


@rtml.task
def fails() -> None:
    raise ValueError("no gradient today")


@rtml.task
async def never() -> None:
    await asyncio.Event().wait()


@rtml.task
def tree(number: int) -> dict[str, Any]:
    return {"weights": [np.full((2, 3), number), np.arange(3.0)], "steps": number}


@pytest.mark.parametrize("size", [3, LARGE])
def test_all_of_them_as_one(size: int) -> None:
    futures = [array.submit(number, size) for number in range(9)]
    total = rtml.reduce(futures)
    value = total.result(30)
    assert value.dtype == np.float32
    assert value.shape == (size,)
    assert (value == sum(range(9))).all()
    assert total.contributors == list(range(9))


@pytest.mark.parametrize(
    ("op", "expected"),
    [("mean", 3.0), ("multiply", 15.0), ("minimum", 1.0), (np.maximum, 5.0), (np.hypot, 35**0.5)],
)
@pytest.mark.parametrize("size", [3, LARGE])
def test_operations_of_numpy(op: Any, expected: float, size: int) -> None:
    value = rtml.reduce([array.submit(number, size) for number in (5, 1, 3)], op).result(30)
    np.testing.assert_allclose(value, np.full(size, expected, np.float32), rtol=1e-6)


def test_the_mean_of_small_integers_does_not_overflow() -> None:
    futures = [rtml.put(np.full(LARGE, 100, np.int8)) for _ in range(4)]
    value = rtml.reduce(futures, "mean").result(30)
    assert value.dtype == np.float64
    assert (value == 100).all()


def test_functions_of_the_user_on_values_of_any_kind() -> None:
    futures = [rtml.put({number, "all"}) for number in range(4)]
    total = rtml.reduce(futures, lambda left, right: left | right)
    assert total.result(30) == {0, 1, 2, 3, "all"}
    large = [array.submit(number, LARGE) for number in (1, 7, 3)]
    blocks = rtml.reduce(large, lambda left, right: np.where(left > right, left, right), elementwise=True)
    assert (blocks.result(30) == 7).all()


def test_numbers_and_containers_of_arrays() -> None:
    assert rtml.reduce([rtml.put(number) for number in (1, 2, 3)]).result(30) == 6
    value = rtml.reduce([tree.submit(number) for number in (1, 2, 6)], "mean").result(30)
    assert value["steps"] == 3
    np.testing.assert_array_equal(value["weights"][0], np.full((2, 3), 3.0))
    np.testing.assert_array_equal(value["weights"][1], np.arange(3.0))


def test_the_first_k_to_arrive_and_who_they_were() -> None:
    late = never.submit()
    futures = [array.submit(0, LARGE), late, array.submit(2, LARGE), array.submit(3, LARGE)]
    total = rtml.reduce(futures, num=3)
    assert (total.result(30) == 5).all()
    assert total.contributors == [0, 2, 3]
    assert not late.done()
    late.cancel()


def test_what_fails_is_left_out_only_if_the_caller_allows_it() -> None:
    futures = [fails.submit(), array.submit(1, LARGE), array.submit(2, LARGE)]
    with pytest.raises(ValueError, match="no gradient today"):
        rtml.reduce(futures).result(30)
    enough = rtml.reduce(futures, num=2)
    assert (enough.result(30) == 3).all()
    assert enough.contributors == [1, 2]
    with pytest.raises(ValueError, match="no gradient today"):
        rtml.reduce([fails.submit(), futures[1], fails.submit()], num=2).result(30)


def test_staggered_arrivals_are_folded_meanwhile_and_the_future_is_an_argument_at_once() -> None:
    @rtml.task
    def first(value: Any) -> float:
        return float(value[0])

    futures = [array.submit(number, LARGE, 0.02 * number) for number in range(6)]
    total = rtml.reduce(futures)
    assert first.submit(total).result(30) == 15
    assert first.submit(rtml.reduce([total, total, futures[1]])).result(30) == 31


def test_in_a_graph_program_and_awaited() -> None:
    @rtml.task
    async def program(count: int) -> Any:
        total = rtml.reduce([array.submit(number, LARGE) for number in range(count)], "max")
        value = await total
        return float(value[-1]), total.contributors

    assert program.submit(4).result(30) == (3.0, [0, 1, 2, 3])


def test_shapes_that_differ_are_an_error_or_broadcast_as_numpy_does() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        rtml.reduce([array.submit(1, LARGE), array.submit(1, LARGE + 1)]).result(30)
    value = rtml.reduce([array.submit(1, LARGE), rtml.put(2.5)]).result(30)
    assert (value == 3.5).all()


def test_the_result_is_shared_and_its_memory_comes_back(client: Client) -> None:
    for _ in range(20):
        value = rtml.reduce([array.submit(number, LARGE) for number in range(4)]).result(30)
        assert not value.flags.writeable
        assert not value.flags.owndata
    del value
    assert eventually(lambda: len(os.listdir(client.store.directory)) < 40)


def test_a_cancelled_reduction_leaves_its_inputs_alone() -> None:
    futures = [array.submit(1, LARGE), never.submit()]
    total = rtml.reduce(futures)
    assert total.cancel()
    with pytest.raises(TaskCancelled):
        total.result(30)
    assert not futures[1].done()
    futures[1].cancel()


def test_what_makes_no_sense_is_said_at_once() -> None:
    future = rtml.put(1)
    with pytest.raises(ValueError, match="at least one future"):
        rtml.reduce([])
    with pytest.raises(ValueError, match="num=3 of 2"):
        rtml.reduce([future, future], num=3)
    with pytest.raises(ValueError, match="no operation 'plus'; there are add"):
        rtml.reduce([future], "plus")
    with pytest.raises(ValueError, match=r"numpy\.negative takes 1"):
        rtml.reduce([future], np.negative)
    with pytest.raises(TypeError, match="expected a list of rtml futures, got Future"):
        rtml.reduce(future)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        rtml.reduce([1])  # type: ignore[list-item]


def test_the_executor_that_folds_dies() -> None:
    @rtml.task
    async def here() -> int:
        return os.getpid()

    futures = [array.submit(1, LARGE), array.submit(2, LARGE, 0.5)]
    total = rtml.reduce(futures)
    os.kill(here.submit().result(30), signal.SIGKILL)
    assert (total.result(30) == 3).all()
