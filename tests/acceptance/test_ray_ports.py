"""Patterns of Ray's documentation, ported line by line: what Ray's users write must be as short here, and right.

`f.remote(x)` is `f.submit(x)`, `ray.get`, `ray.wait` and `ray.put` keep their names, and
`Class.remote()` is `Class.create()`.
"""

from __future__ import annotations

import asyncio
import operator
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rtml


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[rtml.Client]:
    with rtml.connect(workers=2, logs=False, preimport=("pytest",)) as client:
        yield client


# --- tasks ------------------------------------------------------------------------------------------------------------


@rtml.task
def my_function() -> int:
    return 1


@rtml.task
def slow_function(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@rtml.task
def function_with_an_argument(value: int) -> int:
    return value + 1


@rtml.task
def add(one: Any, other: Any) -> Any:
    return one + other


def test_tasks_and_their_results() -> None:
    assert rtml.get(my_function.submit()) == 1
    assert rtml.get([slow_function.submit(0.01 * n) for n in range(4)]) == [0.0, 0.01, 0.02, 0.03]


def test_objects_as_arguments() -> None:
    obj_ref1 = my_function.submit()
    obj_ref2 = function_with_an_argument.submit(obj_ref1)
    assert rtml.get(obj_ref2) == 2
    # Nested in an object: Ray gives references inside lists as references; here `rtml.ref` says so.
    echo_and_get = rtml.task(rtml.get)
    assert rtml.get(echo_and_get.submit([rtml.ref(rtml.put(n)) for n in range(3)])) == [0, 1, 2]


def test_several_results() -> None:
    """Ray's `num_returns=3`: here a task's tuple is taken apart by tasks, or read once."""
    triple = rtml.task(lambda: (0, 1, 2))
    result = triple.submit()
    zero, one, two = (rtml.submit(operator.itemgetter(n), result) for n in range(3))
    assert rtml.get([zero, one, two]) == [0, 1, 2]


def test_cancelling() -> None:
    obj_ref = slow_function.submit(600.0)
    rtml.cancel(obj_ref)
    with pytest.raises(rtml.errors.TaskCancelled):
        rtml.get(obj_ref)


def test_get_with_a_timeout() -> None:
    obj_ref = slow_function.submit(600.0)
    with pytest.raises(TimeoutError):
        rtml.get(obj_ref, timeout=0.05)
    rtml.cancel(obj_ref)


def test_options_at_the_call() -> None:
    assert rtml.get(my_function.options(cpu=2, name="big").submit()) == 1
    with pytest.raises(rtml.errors.Unschedulable):
        rtml.get(my_function.options(cpu=64).submit())


# --- patterns ---------------------------------------------------------------------------------------------------------


def partition(collection: list[int]) -> tuple[list[int], int, list[int]]:
    pivot = collection.pop()
    greater: list[int] = []
    lesser: list[int] = []
    for element in collection:
        (greater if element > pivot else lesser).append(element)
    return lesser, pivot, greater


@rtml.task
def quick_sort_distributed(collection: list[int]) -> list[int]:
    """Pattern: nested tasks."""
    if len(collection) <= 200:
        return sorted(collection)
    smaller, pivot, greater = partition(collection)
    lesser = quick_sort_distributed.submit(smaller)
    above = quick_sort_distributed.submit(greater)
    return [*rtml.get(lesser), pivot, *rtml.get(above)]


def test_nested_tasks_quick_sort() -> None:
    numbers = [random.Random(7).randrange(1_000_000) for _ in range(4_000)]
    unsorted = [*numbers[:1], *random.Random(8).sample(range(1_000_000), 4_000)]
    assert rtml.get(quick_sort_distributed.submit(list(unsorted))) == sorted(unsorted)


def test_limiting_pending_tasks_with_wait() -> None:
    """Pattern: back-pressure by `wait`; each result is read once."""
    max_pending, seen = 10, []
    result_refs: list[rtml.Future[int]] = []
    for number in range(100):
        if len(result_refs) > max_pending:
            ready_refs, result_refs = rtml.wait(result_refs, num_returns=1)
            seen += rtml.get(ready_refs)
        result_refs.append(function_with_an_argument.submit(number))
    seen += rtml.get(result_refs)
    assert sorted(seen) == list(range(1, 101))


def test_results_in_the_order_in_which_they_are_ready() -> None:
    """Anti-pattern of Ray: processing results in submission order. The loop that it recommends."""
    unfinished = [slow_function.submit(seconds) for seconds in (0.3, 0.01, 0.02)]
    order = []
    while unfinished:
        finished, unfinished = rtml.wait(unfinished, num_returns=1)
        order.append(rtml.get(finished[0]))
    assert order[-1] == 0.3


def test_wait_with_a_timeout_gives_what_is_ready() -> None:
    refs = [slow_function.submit(0.0), slow_function.submit(600.0)]
    rtml.wait(refs)
    ready, unready = rtml.wait(refs, num_returns=2, timeout=0.05)
    assert (ready, unready) == (refs[:1], refs[1:])
    assert rtml.wait(refs, timeout=0) == (refs[:1], refs[1:])
    rtml.cancel(*unready)


def test_tree_reduce() -> None:
    """Tips for first-time users: `values = values[2:] + [add.remote(values[0], values[1])]`."""
    values: list[Any] = [function_with_an_argument.submit(n) for n in range(64)]
    while len(values) > 1:
        values = [*values[2:], add.submit(values[0], values[1])]
    assert rtml.get(values[0]) == sum(range(1, 65))


def test_one_large_object_for_many_tasks() -> None:
    import numpy as np

    total = rtml.task(lambda array, n: float(array[n]))
    array = rtml.put(np.arange(1_000_000, dtype=np.float64))
    assert rtml.get([total.submit(array, n) for n in range(10)]) == [float(n) for n in range(10)]


def test_map_reduce_word_count() -> None:
    corpus = [["a", "b", "a"], ["b", "c"], ["a", "c", "c"]] * 10
    reducers = 3

    def map_words(words: list[str]) -> list[dict[str, int]]:
        parts: list[dict[str, int]] = [{} for _ in range(reducers)]
        for word in words:
            part = parts[ord(word) % reducers]
            part[word] = part.get(word, 0) + 1
        return parts

    def reduce_words(number: int, mapped: list[list[dict[str, int]]]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for parts in mapped:
            for word, count in parts[number].items():
                counts[word] = counts.get(word, 0) + count
        return counts

    mapped = [rtml.submit(map_words, words) for words in corpus]
    merged: dict[str, int] = {}
    for counts in rtml.get([rtml.submit(reduce_words, number, mapped) for number in range(reducers)]):
        merged.update(counts)
    assert merged == {"a": 30, "b": 20, "c": 30}


def test_monte_carlo_pi_with_a_progress_actor() -> None:
    """Ray's first example: sampling tasks report to an actor, which the driver asks.

    Nobody waits for the reports: `detached`, or they are given up with their task.
    """

    @rtml.task
    def sampling_task(samples: int, task: int, progress: Any) -> int:
        drawn, inside = random.Random(task), 0
        for number in range(samples):
            inside += drawn.random() ** 2 + drawn.random() ** 2 <= 1
            if (number + 1) % 1000 == 0:
                report = progress.report_progress.options(detached=True)
                report.submit(task, number + 1)
        return inside

    tasks, samples = 4, 5_000
    progress = ProgressActor.create(tasks * samples)
    results = [sampling_task.submit(samples, task, progress) for task in range(tasks)]
    pi = 4 * sum(rtml.get(results)) / (tasks * samples)
    assert rtml.get(progress.get_progress.submit()) == 1.0
    assert 3.0 < pi < 3.3


# --- actors -----------------------------------------------------------------------------------------------------------


class ProgressActorClass:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done_per_task: dict[int, int] = {}

    def report_progress(self, task: int, done: int) -> None:
        self.done_per_task[task] = done

    def get_progress(self) -> float:
        return sum(self.done_per_task.values()) / self.total


class CounterClass:
    def __init__(self) -> None:
        self.value = 0

    def increment(self) -> int:
        self.value += 1
        return self.value

    def get_counter(self) -> int:
        return self.value


class ParameterServerClass:
    def __init__(self, size: int) -> None:
        self.weights = [0.0] * size

    def apply_gradients(self, *gradients: list[float]) -> list[float]:
        for gradient in gradients:
            self.weights = [weight - 0.1 * part for weight, part in zip(self.weights, gradient)]
        return self.weights

    def get_weights(self) -> list[float]:
        return self.weights


class DataWorkerClass:
    def __init__(self, aim: float) -> None:
        self.aim = aim

    def compute_gradients(self, weights: list[float]) -> list[float]:
        return [weight - self.aim for weight in weights]


class SignalActorClass:
    """Ray's test utility: tasks wait until somebody sends."""

    def __init__(self) -> None:
        self.ready_event = asyncio.Event()

    async def send(self, clear: bool = False) -> None:
        self.ready_event.set()
        if clear:
            self.ready_event.clear()

    async def wait(self) -> str:
        await self.ready_event.wait()
        return "went"


class SupervisorClass:
    """Pattern: a tree of actors."""

    def __init__(self, children: int) -> None:
        self.trainers = [Counter.create() for _ in range(children)]

    def work(self) -> list[int]:
        return rtml.get([trainer.increment.submit() for trainer in self.trainers])


ProgressActor, Counter = rtml.actor(ProgressActorClass), rtml.actor(CounterClass)
ParameterServer, DataWorker = rtml.actor(ParameterServerClass), rtml.actor(DataWorkerClass)
SignalActor, Supervisor = rtml.actor(SignalActorClass), rtml.actor(SupervisorClass)


def test_counters() -> None:
    counter = Counter.create()
    assert rtml.get(counter.increment.submit()) == 1
    counters = [Counter.create() for _ in range(3)]
    assert rtml.get([one.increment.submit() for one in counters]) == [1, 1, 1]
    assert rtml.get([counters[0].increment.submit() for _ in range(5)]) == [2, 3, 4, 5, 6]


def test_handles_are_passed_around() -> None:
    @rtml.task
    def increase(counter: Any) -> None:
        for _ in range(10):
            rtml.get(counter.increment.submit())

    counter = Counter.create()
    rtml.get([increase.submit(counter) for _ in range(3)])
    assert rtml.get(counter.get_counter.submit()) == 30


def test_named_actors() -> None:
    Counter.options(name="orange", lifetime="detached").create()
    counter = rtml.get_actor("orange")
    assert rtml.get(counter.increment.submit()) == 1
    assert rtml.get(rtml.submit(lambda: rtml.get(rtml.get_actor("orange").increment.submit()))) == 2
    rtml.kill(counter)
    with pytest.raises(rtml.errors.ActorDied):
        rtml.get(counter.increment.submit())
    with pytest.raises(LookupError, match="orange"):
        rtml.get_actor("orange")


@pytest.mark.parametrize("synchronous", [True, False])
def test_parameter_server(synchronous: bool) -> None:
    server = ParameterServer.create(4)
    workers = [DataWorker.create(aim) for aim in (1.0, 2.0, 3.0)]
    current_weights = server.get_weights.submit()
    if synchronous:
        for _ in range(60):
            gradients = [worker.compute_gradients.submit(current_weights) for worker in workers]
            current_weights = server.apply_gradients.submit(*gradients)
        assert rtml.get(current_weights) == pytest.approx([2.0] * 4, abs=0.2)
        return
    rtml.get([worker.compute_gradients.submit([0.0] * 4) for worker in workers])
    gradients_of = {worker.compute_gradients.submit(current_weights): worker for worker in workers}
    for _ in range(90):
        ready, _pending = rtml.wait(list(gradients_of))
        worker = gradients_of.pop(ready[0])
        current_weights = server.apply_gradients.submit(ready[0])
        gradients_of[worker.compute_gradients.submit(current_weights)] = worker
    assert all(0.9 < weight < 3.1 for weight in rtml.get(current_weights))


def test_concurrent_calls_of_a_coroutine_actor() -> None:
    signal = SignalActor.create()
    waiting = [rtml.submit(lambda: rtml.get(signal.wait.submit())) for _ in range(2)]
    rtml.get(signal.send.submit())
    assert rtml.get(waiting, timeout=20) == ["went", "went"]


def test_tree_of_actors() -> None:
    supervisors = [Supervisor.create(2) for _ in range(2)]
    assert rtml.get([supervisor.work.submit() for supervisor in supervisors]) == [[1, 1], [1, 1]]


def test_actor_pool() -> None:
    """`ray.util.ActorPool.map_unordered`, as one writes it with `wait`."""
    idle, values, results = [Counter.create() for _ in range(2)], list(range(20)), []
    busy: dict[Any, Any] = {}
    while values or busy:
        while idle and values:
            values.pop()
            actor = idle.pop()
            busy[actor.increment.submit()] = actor
        (ready,), _ = rtml.wait(list(busy))
        idle.append(busy.pop(ready))
        results.append(rtml.get(ready))
    assert len(results) == 20
    assert sum(rtml.get([actor.get_counter.submit() for actor in idle])) == 20


def test_awaiting_in_a_program_with_asyncio() -> None:
    async def main() -> Any:
        counter = Counter.create()
        return await counter.increment.submit(), await asyncio.wait_for(my_function.submit(), 20)

    assert asyncio.run(main()) == (1, 1)


def test_fault_tolerance() -> None:
    """`max_retries` and `retry_exceptions` of Ray's tasks."""

    @rtml.task(retries=5, retry_on=ValueError)
    def potentially_fail(failures: int) -> int:
        current = rtml.current_task()
        assert current is not None
        if current.attempt <= failures:
            raise ValueError("again")
        return current.attempt

    assert rtml.get(potentially_fail.submit(3)) == 4
    with pytest.raises(ValueError, match="again"):
        rtml.get(potentially_fail.options(retries=1).submit(3))


def test_closures_capture_objects() -> None:
    """Ray warns of large captured objects; small and stored ones are fine in both."""
    stored = rtml.put([1, 2, 3])

    def make(factor: int) -> Callable[[], int]:
        def scaled() -> int:
            numbers = rtml.get(stored)
            return factor * sum(numbers)

        return scaled

    assert rtml.get([rtml.submit(make(factor)) for factor in (1, 2)]) == [6, 12]
