"""Futures and the client as an executor, with the standard library's own tools and semantics."""

from __future__ import annotations

import concurrent.futures as cf
import copy
import functools
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import rtml
from rtml.client.client import Client
from rtml.client.future import Future
from rtml.errors import SerializationError, SubmitError, TaskCancelled
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


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def plus(self, n: int) -> int:
        return self.value + n

    def __call__(self, n: int) -> int:
        return self.value * n

    @classmethod
    def make(cls, start: int) -> int:
        return cls(start).value

    @rtml.task
    def remote(self, n: int) -> int:
        return self.value - n


# --- submit -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_callable(client: Client) -> None:
    factor = 3
    counter = Counter(5)
    cases = {
        client.submit(add, 1, b=2): 3,
        client.submit(lambda n: n * factor, 4): 12,
        client.submit(functools.partial(add, 10), b=5): 15,
        client.submit(functools.partial(counter.plus, 1)): 6,
        client.submit(counter.plus, 2): 7,
        client.submit(counter, 2): 10,
        client.submit(Counter.make, 4): 4,
        client.submit(pow, 2, 5): 32,
        client.submit("a,b".split, ","): ["a", "b"],
        client.submit(int, "12"): 12,
        counter.remote.submit(1): 4,
    }
    for future, expected in cases.items():
        assert future.result(10) == expected


def test_state_of_objects_is_what_it_is_at_submission(client: Client) -> None:
    counter = Counter(1)
    futures = []
    for value in (1, 2, 3):
        counter.value = value
        futures.append(client.submit(counter.plus, 0))
    assert [future.result(10) for future in futures] == [1, 2, 3]


def test_futures_among_the_arguments_become_values(client: Client) -> None:
    one, two = client.submit(add, 0), client.submit(add, 1)
    assert client.submit(add, one, b=two).result(10) == 3
    assert client.submit(lambda x: x, {"a": [one, (two,)]}).result(10) == {"a": [1, (2,)]}
    one.result(10)
    assert client.submit(add, one, b=two).result(10) == 3


def test_a_gathered_future_as_an_argument(client: Client) -> None:
    members = [client.submit(add, n) for n in range(3)]
    assert client.submit(sum, client.gather(*members)).result(10) == 6


def test_a_failed_dependency_fails_its_dependents(client: Client, fake: FakeDispatcher) -> None:
    failed = client.submit(fail)
    with pytest.raises(ValueError, match="broken"):
        client.submit(add, failed).result(10)
    assert isinstance(failed.exception(10), ValueError)
    with pytest.raises(ValueError, match="broken"):
        client.submit(add, failed).result(10)
    held = client.submit(hold)
    dependent = client.submit(add, held)
    assert held.cancel()
    with pytest.raises(cf.CancelledError):
        dependent.result(10)
    with pytest.raises(cf.CancelledError):
        client.submit(add, held).result(10)


def test_unpicklable_arguments_are_refused_at_once(client: Client) -> None:
    with pytest.raises(SerializationError, match="argument 1"):
        client.submit(add, threading.Lock())
    with pytest.raises(TypeError):
        client.submit(None)  # type: ignore[arg-type]


def test_functions_are_sent_once(client: Client, fake: FakeDispatcher) -> None:
    client.submit(add, 1).result(10)
    before = len(fake.functions)
    rtml.get([client.submit(add, n) for n in range(100)], 10)
    assert len(fake.functions) == before


def test_options_are_checked() -> None:
    with pytest.raises(SubmitError, match="unknown option 'gpus'"):
        rtml.task(gpus=1)(add)
    with pytest.raises(SubmitError, match="timeout"):
        rtml.task(timeout="soon")(add)
    with pytest.raises(SubmitError, match="negative"):
        rtml.task(cpu=-1)(add)
    with pytest.raises(SubmitError, match="whole number"):
        rtml.task(add).options(retries=1.5)
    with pytest.raises(SubmitError, match="retry_on"):
        rtml.task(add).options(retry_on=(OSError,))
    with pytest.raises(SubmitError, match="exception types"):
        rtml.task(retry_on=("OSError",))(add)


def test_options_travel_with_the_call(client: Client, fake: FakeDispatcher) -> None:
    remote = rtml.task(cpu=2)(add)
    assert remote(1) == 2
    future = remote.options(priority=5, deadline=100.0).options(name="sum").submit(1)
    assert future.result(10) == 2
    options = fake.tasks[future.id].options
    assert options is not None
    assert (options.priority, options.name, options.cpu) == (5, "sum", None)
    assert options.deadline is not None
    assert 90 < options.deadline <= 100
    assert fake.functions[fake.tasks[future.id].function].options.cpu == 2


# --- the standard library's semantics ---------------------------------------------------------------------------------


def test_it_is_a_future(client: Client) -> None:
    future = client.submit(hold, 7)
    assert isinstance(future, cf.Future)
    assert not future.done()
    assert future.running()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0)
    assert "pending" in repr(future)


def test_errors_keep_their_type_and_traceback(client: Client) -> None:
    error = client.submit(fail, "no luck").exception(10)
    assert isinstance(error, ValueError)
    assert error.args == ("no luck",)
    assert "raise ValueError(text)" in str(error.__cause__)
    assert client.submit(add, 1).exception(10) is None


def test_cancel_resolves_at_once_and_reaches_the_dispatcher(client: Client, fake: FakeDispatcher) -> None:
    future = client.submit(hold)
    assert future.cancel()
    assert future.done()
    assert future.cancelled()
    assert not future.cancel()
    for call in (future.result, future.exception):
        with pytest.raises(cf.CancelledError):
            call()
        with pytest.raises(TaskCancelled):
            call()
    ended = client.submit(add, 1)
    ended.result(10)
    assert not ended.cancel()
    assert not ended.cancelled()


def test_callbacks(client: Client, fake: FakeDispatcher, caplog: pytest.LogCaptureFixture) -> None:
    future = client.submit(hold, 5)
    seen: list[object] = []
    called = threading.Event()

    def broken(ended: object) -> None:
        raise RuntimeError("in a callback")

    future.add_done_callback(broken)
    future.add_done_callback(lambda ended: seen.append(ended.result()))
    future.add_done_callback(lambda ended: called.set())
    assert not called.is_set()
    fake.open_gate()
    assert called.wait(10)
    assert seen == [5]
    with caplog.at_level(logging.ERROR):
        future.add_done_callback(broken)
    future.add_done_callback(lambda ended: seen.append("at once"))
    assert seen == [5, "at once"]
    assert "in a callback" in caplog.text


def test_a_callback_may_submit_and_wait(client: Client) -> None:
    values: list[int] = []
    done = threading.Event()

    def more(ended: cf.Future[int]) -> None:
        values.append(client.submit(add, ended.result()).result(10))
        done.set()

    client.submit(add, 1).add_done_callback(more)
    assert done.wait(10)
    assert values == [3]


def test_standard_wait(client: Client, fake: FakeDispatcher) -> None:
    held, quick, failing = client.submit(hold), client.submit(add, 1), client.submit(fail)
    done, pending = cf.wait([held, quick], return_when=cf.FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {held})
    done, pending = cf.wait([held, failing], return_when=cf.FIRST_EXCEPTION)
    assert (done, pending) == ({failing}, {held})
    assert cf.wait([held], timeout=0.01) == (set(), {held})
    threading.Timer(0.05, fake.open_gate).start()
    done, pending = cf.wait([held, quick, failing], timeout=10)
    assert not pending
    fake.close_gate()
    cancelled, again = client.submit(hold), client.submit(hold)
    cancelled.cancel()
    threading.Timer(0.05, again.cancel).start()
    assert cf.wait([cancelled, again], timeout=10).not_done == set()


def test_standard_as_completed(client: Client, fake: FakeDispatcher) -> None:
    held = client.submit(hold, "last")
    others = [client.submit(add, n) for n in range(50)]
    standard: cf.Future[str] = cf.Future()
    standard.set_result("of the library")
    results: list[object] = []
    for future in cf.as_completed([held, *others, standard], timeout=10):
        results.append(future.result())
        if len(results) == 51:
            fake.open_gate()
    assert len(results) == 52
    assert results[-1] == "last"
    with pytest.raises(TimeoutError):
        fake.close_gate()
        list(cf.as_completed([client.submit(hold)], timeout=0.02))


def test_standard_wait_in_many_threads(client: Client, fake: FakeDispatcher) -> None:
    futures = [client.submit(hold, n) for n in range(40)]
    with cf.ThreadPoolExecutor(8) as pool:
        waits = [pool.submit(cf.wait, futures[k::4], 10) for k in range(8)]
        blocked = [pool.submit(future.result, 10) for future in futures[::5]]
        threading.Timer(0.05, fake.open_gate).start()
        assert all(not one.result().not_done for one in waits)
        assert [one.result() for one in blocked] == list(range(0, 40, 5))


def test_map(client: Client) -> None:
    assert list(client.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(client.map(add, range(10), chunksize=3)) == list(range(1, 11))
    assert list(client.map(rtml.task(add), range(4), range(3), chunksize=2)) == [0, 2, 4]
    assert list(client.map(add, [])) == []
    with pytest.raises(ValueError, match="chunksize"):
        client.map(add, [1], chunksize=0)
    rows = client.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert next(rows) == (0, 1)
    assert next(rows) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(rows)


def test_map_times_out_and_cancels_the_rest(client: Client, fake: FakeDispatcher) -> None:
    before = set(client._pending)
    results = client.map(hold, [1, 2], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    assert set(client._pending) == before


def test_an_engine_future_cannot_be_resolved_or_copied_by_users(client: Client) -> None:
    future = client.submit(add, 1)
    for call in (
        lambda: future.set_result(1),
        lambda: future.set_exception(OSError()),
        future.set_running_or_notify_cancel,
    ):
        with pytest.raises(cf.InvalidStateError):
            call()
    with pytest.raises(TypeError, match="rtml future"):
        copy.copy(future)


def test_shutdown() -> None:
    with connected() as (fake, client):
        with client:
            held = client.submit(hold, 1)
            threading.Timer(0.05, fake.open_gate).start()
        assert held.result() == 1
        with pytest.raises(RuntimeError, match="after shutdown"):
            client.submit(add, 1)
        client.shutdown()


def test_shutdown_without_waiting() -> None:
    with connected() as (fake, client):
        held = client.submit(hold, 1)
        client.shutdown(wait=False)
        with pytest.raises(RuntimeError, match="after shutdown"):
            client.submit(add, 1)
        fake.open_gate()
        assert held.result(10) == 1


def test_shutdown_cancels() -> None:
    with connected() as (_, client):
        held = [client.submit(hold) for _ in range(3)]
        client.shutdown(cancel_futures=True)
        assert all(future.cancelled() for future in held)


def test_a_forked_child_is_refused(client: Client) -> None:
    future = client.submit(add, 1)
    child = os.fork()
    if child == 0:
        try:
            client.submit(add, 1)
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert future.result(10) == 2


# --- rtml's own -------------------------------------------------------------------------------------------------------


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
        rtml.get([cf.Future()])  # type: ignore[arg-type]


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


def test_refs_stay_futures(client: Client, fake: FakeDispatcher) -> None:
    inner = client.submit(add, 1)
    waiting = client.submit(hold, 5)
    inner.result(10)
    seen = client.submit(lambda reference: type(reference.future).__name__, rtml.ref(waiting))
    assert seen.result(10) == "int"  # The fake's handles are plain ids.
    assert fake.tasks[seen.id].handles == [waiting.id]
    # One that has ended takes its value along.
    assert client.submit(lambda reference: reference.result(), rtml.ref(inner)).result(10) == 2


def test_futures_in_results_are_the_same_futures_again(client: Client) -> None:
    inner = client.submit(add, 1)
    inner.result(10)
    outer = client.submit(lambda box: box, {"ref": rtml.ref(inner)})
    assert outer.result(10)["ref"].future is inner


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
