"""The rows that every system is asked for, measured in the same way for all of them.

An adapter (benchmarks/systems/) says how its system does each thing, in that system's own idiom; this file decides what
is timed. It runs in the peers' environments too, so it needs no more than the standard library and numpy, and imports
even numpy only after the cold start is taken.

Units are in the names: `_us` microseconds, `_s` seconds or per second, `_mib` MiB. Percentiles are over single rounds;
a round that takes long is repeated less often (`Plan.budget_s`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import processes

Future = Any  # each system has its own
MIB = 1 << 20

#: Rounds before those that count: memory that is recycled must have been used once.
WARM_ROUNDS = 10


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    rounds: int = 3000  # at most, of a row that takes microseconds
    budget_s: float = 4.0  # at most, for one row
    rounds_min: int = 5
    burst: int = 10_000
    bursts: int = 5
    idle_s: float = 5.0


QUICK = Plan(rounds=1000, budget_s=0.7, bursts=2, idle_s=2.0)
FULL = Plan()


class System(ABC):
    """How one system does what is measured. `None` from a method: the system has no such thing."""

    name = ""

    @abstractmethod
    def start(self) -> None:
        """Imports the system, starts it with two workers, and gets a first result."""

    def warm(self) -> None:
        """Whatever makes later calls representative: all workers up, all functions known."""
        self.burst(500)

    @abstractmethod
    def stop(self) -> None:
        """Ends it."""

    @abstractmethod
    def version(self) -> str:
        """Its version."""

    @abstractmethod
    def submit(self, value: int) -> Future:
        """Submits a task that returns `value`."""

    @abstractmethod
    def get(self, future: Future) -> Any:
        """Its result, waiting for it."""

    @abstractmethod
    def wait(self, futures: list[Future]) -> None:
        """Waits until all are finished, without fetching results."""

    def actor(self) -> Any:
        """A new actor that adds, once it lives; None if there are no actors."""
        return None

    def add(self, actor: Any, amount: int) -> Future:
        """Submits a call on it."""
        raise NotImplementedError

    def added(self, actor: Any, count: int) -> list[Any]:
        """The results of `count` calls on it, submitted before the first is waited for."""
        return [self.get(future) for future in [self.add(actor, 1) for _ in range(count)]]

    def burst(self, count: int) -> list[Any]:
        """The results of `count` tasks, submitted before the first is waited for."""
        return [self.get(future) for future in [self.submit(value) for value in range(count)]]

    @abstractmethod
    def fan(self, width: int) -> Any:
        """One task, `width` tasks that take its result, one that takes all of theirs. Returns the last one's result."""

    @abstractmethod
    def chain(self, length: int) -> Any:
        """`length` tasks, each adding one to the result of the one before. Returns the last one's result."""

    @abstractmethod
    def nested(self, width: int) -> Any:
        """A task that submits `width` tasks and gathers them. Returns their sum."""

    @abstractmethod
    def argument(self, array: Any) -> Any:
        """A task that takes the array and returns its last element."""

    @abstractmethod
    def put_and_read(self, array: Any, readers: int) -> list[Any]:
        """Makes the array available once; `readers` tasks each sum another MiB of it."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def timed(action: Callable[[], object], plan: Plan, rounds: int | None = None) -> list[float]:
    """Seconds of each round of `action`: at most `rounds`, and not many after the budget is used up."""
    taken: list[float] = []
    begin = time.perf_counter()
    for count in range(rounds or plan.rounds):
        if count >= plan.rounds_min and time.perf_counter() - begin > plan.budget_s:
            break
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return taken


class Rows:
    """The measured rows of one system, in the order of the table."""

    def __init__(self, system: System, plan: Plan, mark: str) -> None:
        self.system = system
        self.plan = plan
        self.mark = mark
        self.values: dict[str, float | None] = {}

    def add(self, name: str, value: float | None) -> None:
        """Keeps a row, and says so on stderr."""
        self.values[name] = value
        print(f"row {name} {'-' if value is None else f'{value:,.2f}'}", file=sys.stderr, flush=True)

    def _median_us(self, name: str, action: Callable[[], object], per: int = 1) -> None:
        """Adds the median of `action` in microseconds, divided by `per`; None if the system has no such thing."""
        if action() is None:
            self.add(name, None)
            return
        timed(action, self.plan, rounds=WARM_ROUNDS)
        self.add(name, percentile(timed(action, self.plan, rounds=500), 0.5) * 1e6 / per)

    def sync(self, prefix: str = "sync") -> None:
        """One task at a time: submit and result."""
        system = self.system
        for value in range(200):
            system.get(system.submit(value))
        taken = timed(lambda: system.get(system.submit(1)), self.plan)
        self.add(f"{prefix}_p50_us", percentile(taken, 0.5) * 1e6)
        self.add(f"{prefix}_p99_us", percentile(taken, 0.99) * 1e6)

    def idle(self) -> None:
        """Memory and CPU of all processes while nothing is asked of them."""
        pids = processes.tree(self.mark)
        self.add("idle_rss_mib", processes.pss_mib(pids))
        time.sleep(0.5)
        before, start = processes.cpu_seconds(pids), time.perf_counter()
        time.sleep(self.plan.idle_s)
        used = processes.cpu_seconds(pids) - before
        self.add("idle_cpu_percent", 100 * used / (time.perf_counter() - start))

    def throughput(self) -> None:
        """Many tasks at once."""
        count = self.plan.burst
        expected = list(range(count))
        rates: list[float] = []
        begin = time.perf_counter()
        while len(rates) < self.plan.bursts and (not rates or time.perf_counter() - begin < 2 * self.plan.budget_s):
            start = time.perf_counter()
            results = self.system.burst(count)
            rates.append(count / (time.perf_counter() - start))
            assert results == expected
        self.add("async_tasks_per_s", percentile(rates, 0.5))

    def actors(self) -> None:
        """Calls on one actor, one at a time and many at once; and how long a new one takes."""
        system, count = self.system, self.plan.burst
        actor = system.actor()
        if actor is None:
            return
        for _ in range(200):
            system.get(system.add(actor, 1))
        taken = timed(lambda: system.get(system.add(actor, 1)), self.plan)
        self.add("actor_sync_p50_us", percentile(taken, 0.5) * 1e6)
        rates: list[float] = []
        begin = time.perf_counter()
        while len(rates) < self.plan.bursts and (not rates or time.perf_counter() - begin < 2 * self.plan.budget_s):
            start = time.perf_counter()
            results = system.added(actor, count)
            rates.append(count / (time.perf_counter() - start))
            assert results == list(range(results[0], results[0] + count)), "calls are in order"
        self.add("actor_async_per_s", percentile(rates, 0.5))
        created = timed(system.actor, self.plan, rounds=20)
        self.add("actor_create_p50_us", percentile(created, 0.5) * 1e6)

    def graphs(self) -> None:
        """Tasks that depend on tasks, and tasks that make tasks."""
        system = self.system
        assert system.fan(100) == sum(range(100)), "fan"
        assert system.chain(100) == 100, "chain"
        assert system.nested(10) in (None, sum(range(10))), "nested"
        self._median_us("fan_1_100_1_p50_us", lambda: system.fan(100))
        self._median_us("chain100_per_task_us", lambda: system.chain(100), per=100)
        self._median_us("nested10_p50_us", lambda: system.nested(10))

    def arrays(self) -> None:
        """Arguments of one and of 64 MiB, and one array that many tasks read."""
        import numpy

        system = self.system
        small = numpy.arange(MIB // 8, dtype=numpy.float64)
        large = numpy.arange(64 * MIB // 8, dtype=numpy.float64)
        assert system.argument(small) == small[-1]
        assert system.argument(large) == large[-1]
        width = MIB // 8
        sums = [float(large[reader * width : (reader + 1) * width].sum()) for reader in range(10)]
        assert system.put_and_read(large, 10) == sums
        self._median_us("arg_1mib_p50_us", lambda: system.argument(small))
        self._median_us("arg_64mib_p50_us", lambda: system.argument(large))
        self._median_us("put_64mib_read10_p50_us", lambda: system.put_and_read(large, 10))

    def calls(self) -> None:
        """What the caller's own thread pays for a submit, and for the result of a finished task."""
        system, count = self.system, 1000
        in_burst: list[float] = []
        ready: list[float] = []
        for _ in range(3 if self.plan is QUICK else 7):
            start = time.perf_counter()
            futures = [system.submit(value) for value in range(count)]
            in_burst.append((time.perf_counter() - start) / count)
            system.wait(futures)
            for future in futures:
                start = time.perf_counter()
                system.get(future)
                ready.append(time.perf_counter() - start)
        lone: list[float] = []
        begin = time.perf_counter()
        while len(lone) < 300 and (
            len(lone) < self.plan.rounds_min or time.perf_counter() - begin < self.plan.budget_s
        ):
            start = time.perf_counter()
            future = system.submit(1)
            lone.append(time.perf_counter() - start)
            system.get(future)
        self.add("submit_us", percentile(in_burst, 0.5) * 1e6)
        self.add("submit_lone_us", percentile(lone, 0.5) * 1e6)
        self.add("get_ready_us", percentile(ready, 0.5) * 1e6)


GROUPS = ("idle", "sync", "throughput", "actors", "graphs", "arrays", "calls")


def main(system: System) -> None:
    """The command line of an adapter: measures, and prints `{"system", "version", "rows"}` on stdout."""
    parser = argparse.ArgumentParser(description=f"measure {system.name}; prints one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", choices=GROUPS, action="append", help="only these groups of rows")
    options = parser.parse_args()
    mark = processes.mark()
    start = time.perf_counter()
    system.start()
    cold_start_s = time.perf_counter() - start
    rows = Rows(system, QUICK if options.quick else FULL, mark)
    try:
        rows.add("cold_start_s", cold_start_s)
        system.warm()
        for group in options.only or GROUPS:
            getattr(rows, group)()
        version = system.version()
    finally:
        system.stop()
    print(json.dumps({"system": system.name, "version": version, "rows": rows.values}), flush=True)
