"""Futures and the client as an executor, with the standard library's own tools and semantics."""

from __future__ import annotations

import concurrent.futures as cf
import copy
import functools
import io
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

import rtml
from rtml.client import progress
from rtml.client.actors import actor_at
from rtml.client.client import Client
from rtml.errors import SerializationError, SubmitError, TaskCancelled
from rtml.messages import Logs
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


class RowCounter:
    """Called with arrays, like a model."""

    __rtml_rows__ = True

    def __call__(self, array: Any) -> int:
        return len(array)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "option window is at least 1"),
        ({"window": -1}, "option window cannot be negative: -1"),
        ({"window": 1.5}, "option window is a whole number, not 1.5"),
        ({"name": 5}, "option name is text, not 5"),
        ({"tenant": b"x"}, "option tenant is text, not b'x'"),
        ({"latest": 5}, "option latest is text, not 5"),
        ({"latest": "\ud800"}, "a name among the options has at most 1000 Unicode characters"),
        ({"max_age": "x"}, "option max_age is a number, not 'x'"),
    ],
)
def test_options_of_the_wrong_kind_are_told_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SubmitError, match=message):
        rtml.task(**options)(add)
    with pytest.raises(SubmitError, match=message):
        rtml.task(add).options(**options)


def test_names_of_actors_are_text() -> None:
    with pytest.raises(TypeError, match="the name of an actor is text, not 5"):
        actor_at(cast(Any, None), cast(Any, 5))


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


class Dummy:
    def method(self) -> None:
        pass


def make_dummy(n: int) -> Dummy:
    return Dummy()


def test_nothing_holds_on_to_values(client: Client) -> None:
    for value in client.map(make_dummy, range(10)):
        seen = weakref.ref(value)
        del value
        assert seen() is None
    dummy = Dummy()
    gone = threading.Event()
    watched = weakref.ref(dummy, lambda _: gone.set())
    client.submit(dummy.method)
    del dummy
    assert gone.wait(10)
    assert watched() is None


def test_waiting_under_constant_switching(client: Client) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            futures = {client.submit(add, n) for n in range(100)}
            assert not cf.wait(futures, timeout=30).not_done
            assert {future.result(0) for future in futures} == set(range(1, 101))
    finally:
        sys.setswitchinterval(before)


def test_progress_of_long_maps(client: Client, fake: FakeDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "PERIOD", 0.01)
    threading.Timer(0.1, fake.open_gate).start()
    assert list(client.map(hold, range(100), timeout=20)) == list(range(100))
    written = terminal.getvalue()
    assert "hold [" in written
    assert " 0/100" in written
    assert written.endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(client.map(add, range(3))) == [1, 2, 3]


def test_what_tasks_print_is_shown_with_their_name(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.receive(Logs([(1, "crop", 12, "out", "a\nb"), (1, "crop", 12, "err", "c")]))
    shown = capsys.readouterr()
    assert shown.out == "(crop pid=12) a\n(crop pid=12) b\n"
    assert shown.err == "(crop pid=12) c\n"


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


def test_only_models_count_the_rows_of_arrays(client: Client, fake: FakeDispatcher) -> None:
    array = np.zeros((5, 2))
    for function, items in ((rtml.task(batch=4)(len), 1), (rtml.task(batch=4)(RowCounter()), 5)):
        future = function.submit_to(client, (array,), {})
        future.result(10)
        task = next(task for task in fake.tasks.values() if task.id == future.id)
        assert (task.batch_key, task.items) == ("<f8(2,)", items)
