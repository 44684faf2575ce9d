"""rtml's own functions over futures: get, wait, as_completed, gather, put, ref, and what they cost."""

from __future__ import annotations

import concurrent.futures
import gc
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import rtml
from rtml.client.client import Client
from rtml.client.future import Future
from rtml.errors import LimitExceeded
from rtml.messages import Release, Submit
from tests.fake_dispatcher import FakeDispatcher, connected

Pair = tuple[FakeDispatcher, Client]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with connected() as both:
        yield both


@pytest.fixture
def client(pair: Pair) -> Iterator[Client]:
    yield pair[1]
    pair[0].open_gate()
    pair[1].wait_idle(10)
    pair[0].close_gate()


@pytest.fixture
def fake(pair: Pair) -> FakeDispatcher:
    return pair[0]


def hold(value: Any = None) -> Any:
    return value


def add(a: int, b: int = 1) -> int:
    return a + b


def fail(text: str = "broken") -> None:
    raise ValueError(text)


def test_get(client: Client, fake: FakeDispatcher) -> None:
    assert rtml.get(client.submit(add, 1)) == 2
    assert rtml.get([client.submit(add, n) for n in range(1000)], timeout=10) == list(range(1, 1001))
    assert rtml.get([]) == []
    held = client.submit(hold)
    with pytest.raises(ValueError, match="broken"):
        rtml.get([held, client.submit(fail)], timeout=10)
    with pytest.raises(TimeoutError, match="1 of 2"):
        rtml.get([held, client.submit(add, 1)], timeout=0.1)
    with pytest.raises(TypeError):
        rtml.get([concurrent.futures.Future()])  # type: ignore[arg-type]
    for wrong in (5, None):
        with pytest.raises(TypeError, match=f"list of rtml futures, got {type(wrong).__name__}"):
            rtml.get(wrong)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="expected an rtml future"):
            rtml.cancel(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got one future"):
        rtml.wait(held)  # type: ignore[arg-type]


def test_wait(client: Client, fake: FakeDispatcher) -> None:
    futures = [client.submit(add, n) for n in range(10)]
    held = client.submit(hold)
    done, pending = rtml.wait([held, *futures], num_returns=10, timeout=10)
    assert (done, pending) == (futures, [held])
    done, pending = rtml.wait([held, *futures], num_returns=3)
    assert (done, pending) == (futures[:3], [held, *futures[3:]])
    assert rtml.wait([held], timeout=0.01) == ([], [held])
    assert rtml.wait([held, futures[0]], num_returns=2, timeout=0) == ([futures[0]], [held])
    with pytest.raises(ValueError, match="num_returns"):
        rtml.wait(futures, num_returns=11)
    with pytest.raises(ValueError, match="twice"):
        rtml.wait([held, held], timeout=0)


def test_one_by_one_of_a_thousand_is_not_quadratic_in_python(client: Client) -> None:
    pending = [client.submit(add, n) for n in range(1000)]
    begin = time.process_time()
    values = []
    while pending:
        (done,), pending = rtml.wait(pending, num_returns=1, timeout=10)
        values.append(done.result())
    assert sorted(values) == list(range(1, 1001))
    assert time.process_time() - begin < 5


def test_as_completed(client: Client, fake: FakeDispatcher) -> None:
    held = client.submit(hold, 0)
    futures = [client.submit(add, n) for n in range(100)]
    iterator = rtml.as_completed([held, *futures, held], timeout=10)
    first = [next(iterator) for _ in range(100)]
    assert set(first) == set(futures)
    fake.open_gate()
    assert list(iterator) == [held]
    assert list(rtml.as_completed([])) == []
    fake.close_gate()
    with pytest.raises(TimeoutError, match="1 of 2"):
        list(rtml.as_completed([client.submit(hold), client.submit(add, 1)], timeout=0.1))


def test_gather(client: Client, fake: FakeDispatcher) -> None:
    assert rtml.gather().result(1) == []
    assert rtml.gather(*[client.submit(add, n) for n in range(1000)]).result(10) == list(range(1, 1001))
    held = client.submit(hold, 3)
    both = rtml.gather(held, rtml.gather(client.submit(add, 1)))
    assert both.running()
    with pytest.raises(ValueError, match="broken"):
        rtml.gather(held, client.submit(fail)).result(10)
    kept = rtml.gather(client.submit(fail), client.submit(add, 1), return_exceptions=True).result(10)
    assert isinstance(kept[0], ValueError)
    assert kept[1] == 2
    fake.open_gate()
    assert both.result(10) == [3, [2]]


def test_futures_of_two_clients(client: Client, fake: FakeDispatcher) -> None:
    """Whichever of them ends last, the caller notices."""
    with connected() as (other_fake, other):
        held, other_held = client.submit(hold, 1), other.submit(hold, 2)
        ways = {
            "get": lambda: rtml.get([held, other_held], timeout=30),
            "wait": lambda: [future.result() for future in rtml.wait([other_held, held], 2, timeout=30)[0][::-1]],
            "as_completed": lambda: sorted(future.result() for future in rtml.as_completed([held, other_held], 30)),
            "gather": lambda: rtml.gather(held, other_held).result(30),
            "nested": lambda: [one for (one,) in rtml.gather(rtml.gather(held), rtml.gather(other_held)).result(30)],
        }
        for order in ((fake, other_fake), (other_fake, fake)):
            with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
                found = {name: pool.submit(way) for name, way in ways.items()}
                for one in order:
                    time.sleep(0.05)
                    one.open_gate()
                assert {name: future.result() for name, future in found.items()} == {name: [1, 2] for name in ways}
            fake.close_gate()
            other_fake.close_gate()
            held, other_held = client.submit(hold, 1), other.submit(hold, 2)
        with pytest.raises(TimeoutError, match="2 of 2"):
            rtml.get([held, other_held], timeout=0.01)
        with pytest.raises(TimeoutError, match="not ended within"):
            rtml.gather(held, other_held).result(0.01)


def test_cancelling_gathered(client: Client) -> None:
    members = [client.submit(hold), client.submit(hold)]
    both = rtml.gather(*members)
    assert both.cancel()
    assert all(member.cancelled() for member in members)
    assert both.cancelled()
    assert rtml.cancel(*members) == 0


def test_put_and_large_values(client: Client, fake: FakeDispatcher) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(200_000.0)
    stored = rtml.put(array)
    assert stored.done()
    assert client.submit(numpy.sum, stored).result(10) == array.sum()
    result = client.submit(numpy.negative, array)
    value = result.result(10)
    assert (value == -array).all()
    del value, result, stored
    gc.collect()
    client.submit(add, 1).result(10)
    deadline = time.monotonic() + 10
    while not any(isinstance(message, Release) for message in fake.received):
        assert time.monotonic() < deadline
        client.submit(add, 1).result(10)
    assert client.store.objects == 0


def test_too_many_small_values_for_one_call(client: Client) -> None:
    piece = client.submit(bytes, 60_000)
    piece.result(10)
    pieces = [rtml.put(bytes(60_000)) for _ in range(900)]
    with pytest.raises(LimitExceeded, match="900 futures"):
        client.submit(len, pieces)
    assert client.submit(len, [piece] * 900).result(20) == 900


def test_refs_stay_futures(client: Client, fake: FakeDispatcher) -> None:
    inner = client.submit(add, 1)
    waiting = client.submit(hold, 5)
    inner.result(10)
    seen = client.submit(lambda reference: type(reference).__name__, rtml.ref(waiting))
    assert seen.result(10) == "int"  # The fake's handles are plain ids.
    assert fake.tasks[seen.id].handles == [waiting.id]
    # One that has ended takes its value along.
    assert client.submit(lambda reference: reference.result(), rtml.ref(inner)).result(10) == 2


def test_futures_in_results_are_the_same_futures_again(client: Client) -> None:
    inner = client.submit(add, 1)
    inner.result(10)
    outer = client.submit(lambda box: box, {"ref": rtml.ref(inner)})
    assert outer.result(10)["ref"] is inner


def test_dropped_futures_still_run_and_leave_nothing(client: Client, fake: FakeDispatcher) -> None:
    for n in range(300):
        client.submit(add, n)
    assert client.wait_idle(10)
    assert not client._pending
    assert not client._kept


def test_kept_futures_are_small(client: Client) -> None:
    future = client.submit(add, 1)
    future.result(10)
    assert not vars(future) if hasattr(future, "__dict__") else True
    assert sys.getsizeof(future) < 250


def test_bursts_are_coalesced(client: Client, fake: FakeDispatcher) -> None:
    client.wait_idle(10)
    before = sum(isinstance(message, Submit) for message in fake.received)
    rtml.get([client.submit(add, n) for n in range(2000)], 20)
    frames = sum(isinstance(message, Submit) for message in fake.received) - before
    assert frames < 400


def test_a_lone_submission_is_sent_without_anybody_waiting(client: Client, fake: FakeDispatcher) -> None:
    first, second = client.submit(hold), client.submit(add, 1)
    deadline = time.monotonic() + 10
    while second.id not in fake.results:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    while not second.done():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not first.done()


def test_queries(client: Client) -> None:
    assert client.query("status", "x") == "status x"


def test_names() -> None:
    assert set(rtml.__all__) <= set(dir(rtml))
    with pytest.raises(AttributeError):
        rtml.nothing
    assert rtml.Future is Future
