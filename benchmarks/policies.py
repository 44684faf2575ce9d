"""Policies compared: goodput within deadlines and latency at several loads, in virtual time.

The dispatcher's and the executors' pure cores run as they are; only time, run times and arrivals are made up, from a
seed. So a minute of load is simulated in seconds, and the same on every machine. An executor finishes what it has begun
(as native code does), and each hand-over between processes takes `HOP` seconds.

    python -m benchmarks.policies [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any, Final, NamedTuple

from rtml.graph.core import Core
from rtml.graph.policy import POLICIES, Scheduling
from rtml.graph.tables import Send
from rtml.messages import (
    CLIENT,
    OK,
    SUPERVISOR,
    Ack,
    Attempt,
    Define,
    Function,
    Hello,
    Message,
    Node,
    Options,
    Results,
    Submit,
    Task,
    TaskResult,
    task_id,
)
from rtml.workers.core import WorkerCore

WORKERS: Final = 2
#: Seconds that a message takes from one process to another.
HOP: Final = 100e-6
LOADS: Final = (0.5, 0.9, 1.2, 2.0)

SUPERVISOR_PEER, CLIENT_PEER, FIRST_WORKER_PEER = 1, 2, 3


class Model(NamedTuple):
    """One kind of request."""

    name: str
    #: Portion of the requests.
    portion: float
    #: Seconds of a call: of its fixed part, and for each item.
    fixed: float
    item: float
    #: Seconds of budget; one of them for each request.
    deadlines: tuple[float, ...]
    #: Most items of one call; 0: no batches.
    batch: int = 0

    @property
    def best(self) -> float:
        """Seconds of an executor for a request, at best."""
        return self.fixed / max(1, self.batch) + self.item


class Scenario(NamedTuple):
    """What comes, and how."""

    name: str
    models: tuple[Model, ...]
    #: Requests come in bursts of so many on average; 1: Poisson.
    burst: int = 1

    @property
    def capacity(self) -> float:
        """Requests a second that the executors can do at best."""
        return WORKERS / sum(model.portion * model.best for model in self.models)


MIXED: Final = (
    Model("small", 0.6, 0.0, 0.005, (0.05, 0.1)),
    Model("large", 0.4, 0.0, 0.02, (0.1, 0.25, 0.5)),
)
BATCHED: Final = (
    Model("batched", 0.7, 0.008, 0.001, (0.05, 0.1, 0.2), batch=16),
    Model("single", 0.3, 0.0, 0.005, (0.05, 0.2)),
)
ONE: Final = (Model("one", 1.0, 0.0, 0.005, (0.05, 0.1, 0.2)),)
SCENARIOS: Final = (
    Scenario("one model", ONE),
    Scenario("one model, bursts", ONE, burst=20),
    Scenario("mixed", MIXED),
    Scenario("mixed, bursts", MIXED, burst=20),
    Scenario("batches", BATCHED),
    Scenario("batches, bursts", BATCHED, burst=20),
)


class Row(NamedTuple):
    """What one run gave."""

    scenario: str
    policy: str
    load: float
    #: Executors' time at best for the answers that came within their deadlines, as a portion of all that there was.
    goodput: float
    #: Answers within their deadlines, as a portion of what was asked; and the least that one kind of request got of it.
    met: float
    least: float
    #: Of those that were let in, the portion that missed.
    missed: float
    #: Seconds until an answer that was one, in time or not.
    p50: float
    p99: float
    batch: float


class Simulation:
    """One scenario under one policy at one load."""

    def __init__(self, scenario: Scenario, policy: str, load: float, admission: bool, seed: int = 1) -> None:
        self.scenario = scenario
        self.admission = admission
        self.rate = load * scenario.capacity
        self.random = random.Random(seed)
        self.core = Core(1, scheduling=Scheduling(POLICIES[policy]))
        self.now = 0.0
        self.numbers = count(1)
        self.events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.workers = [WorkerCore(number + 1, 10 + number) for number in range(WORKERS)]
        self.busy = [False] * WORKERS
        self.models = dict(enumerate(scenario.models, 1))
        #: when each request came, and its budget
        self.asked: dict[int, tuple[float, float, int]] = {}
        #: requests by model and budget, and those of them that were answered in time
        self.kinds: Counter[tuple[int, float]] = Counter()
        self.in_time: Counter[tuple[int, float]] = Counter()
        self.latencies: list[float] = []
        self.shed = self.ended = self.calls = self.items = 0
        self._join()

    def at(self, when: float, action: Callable[[Any], None], argument: Any) -> None:
        """Something happens later."""
        heappush(self.events, (when, next(self.numbers), action, argument))

    def run(self, seconds: float) -> None:
        """Requests come for so long, then the rest is done."""
        for when, model in self._arrivals(seconds):
            self.at(when, self._ask, model)
        while self.events or self.core.next_wakeup() is not None:
            wakeup = self.core.next_wakeup()
            if wakeup is not None and (not self.events or wakeup < self.events[0][0]):
                self.now = max(self.now, wakeup)
                self._tell(0)
                continue
            self.now, _, action, argument = heappop(self.events)
            action(argument)

    def _arrivals(self, seconds: float) -> Iterator[tuple[float, int]]:
        when = 0.0
        portions = [model.portion for model in self.models.values()]
        while True:
            size = 1 if self.scenario.burst == 1 else 1 + int(self.random.expovariate(1 / (self.scenario.burst - 1)))
            when += self.random.expovariate(self.rate / max(1, self.scenario.burst))
            if when > seconds:
                return
            for _ in range(size):
                yield when, self.random.choices(list(self.models), portions)[0]

    def _join(self) -> None:
        self._tell(SUPERVISOR_PEER, Hello(SUPERVISOR, 1), Node("n", float(WORKERS)))
        for number, worker in enumerate(self.workers):
            self._tell(FIRST_WORKER_PEER + number, worker.hello())
        functions = [
            Function(number, model.name, f"m:{model.name}", options=Options(batch=model.batch or None))
            for number, model in self.models.items()
        ]
        self._tell(CLIENT_PEER, Hello(CLIENT, 2), Define(functions))

    def _ask(self, model: int) -> None:
        budget = self.random.choice(self.models[model].deadlines)
        number = task_id(2, len(self.asked) + 1)
        self.asked[number] = (self.now, budget, model)
        self.kinds[model, budget] += 1
        options = Options(deadline=budget - HOP, admission=self.admission)
        self._send(CLIENT_PEER, [Submit([Task(number, model, b"", options=options)])])

    def _send(self, peer: int, messages: list[Message]) -> None:
        self.at(self.now + HOP, lambda sent: self._tell(peer, *sent), messages)

    def _tell(self, peer: int, *messages: Message) -> None:
        arrivals = [(peer, list(messages))] if messages else []
        for effect in self.core.handle(arrivals, self.now):
            if isinstance(effect, Send):
                receive = self._answered if effect.peer == CLIENT_PEER else self._assigned
                self.at(self.now + HOP, receive, (effect.peer, effect.messages))
        self.core.take_ended()

    def _answered(self, sent: tuple[int, list[Message]]) -> None:
        for message in sent[1]:
            if isinstance(message, Results):
                for result in message.results:
                    came, budget, model = self.asked[result.id]
                    self.ended += 1
                    if result.outcome == OK:
                        self.latencies.append(self.now - came)
                        self.in_time[model, budget] += self.now - came <= budget
                    elif result.error is not None and result.error.type == "Overloaded":
                        self.shed += 1
                self._send(CLIENT_PEER, [Ack(message.serial)])

    def _assigned(self, sent: tuple[int, list[Message]]) -> None:
        number = sent[0] - FIRST_WORKER_PEER
        if number < 0:
            return
        for message in sent[1]:
            self.workers[number].receive(message, self.now)
        self._work(number)

    def _work(self, number: int) -> None:
        worker = self.workers[number]
        if not self.busy[number]:
            group = worker.take(self.now)
            if group:
                self.busy[number] = True
                model = self.models[group[0].function]
                seconds = (model.fixed + model.item * len(group)) * self.random.uniform(0.9, 1.2)
                self.calls += 1
                self.items += len(group)
                self.at(self.now + seconds, self._worked, (number, group, seconds))
        if worker.dirty:
            self._send(FIRST_WORKER_PEER + number, worker.flush())

    def _worked(self, done: tuple[int, list[Attempt], float]) -> None:
        number, group, seconds = done
        for attempt in group:
            self.workers[number].finish(TaskResult(attempt.id, attempt.attempt, OK, run=seconds))
        self.busy[number] = False
        self._work(number)

    def row(self, policy: str, load: float, seconds: float) -> Row:
        """The figures."""
        assert self.ended == len(self.asked), "every request ends"
        ordered = sorted(self.latencies) or [0.0]
        let_in = len(self.asked) - self.shed
        met = self.in_time.total()
        useful = sum(count * self.models[model].best for (model, _), count in self.in_time.items())
        least = min(self.in_time[kind] / count for kind, count in self.kinds.items())
        return Row(
            self.scenario.name, policy + (" + admission" if self.admission else ""), load,
            useful / (WORKERS * seconds), met / len(self.asked), least, 1 - met / max(1, let_in),
            ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))], self.items / max(1, self.calls),
        )  # fmt: skip


def measure(seconds: float, scenarios: tuple[Scenario, ...] = SCENARIOS) -> Iterator[Row]:
    """All rows."""
    for scenario in scenarios:
        for load in LOADS:
            for policy in POLICIES:
                for admission in (False, True):
                    simulation = Simulation(scenario, policy, load, admission)
                    simulation.run(seconds)
                    yield simulation.row(policy, load, seconds)


def main() -> None:
    """Prints a table, or with `--json` a list of objects."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="three simulated seconds instead of ten")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args()
    rows = []
    for row in measure(3.0 if options.quick else 10.0):
        rows.append(row._asdict())
        if not options.json:
            line = (
                f"{row.scenario:16} {row.load:4.1f} {row.policy:22} goodput {row.goodput:6.1%} of capacity, "
                f"{row.met:6.1%} of requests, least {row.least:6.1%}; missed {row.missed:6.1%}; "
                f"p50 {row.p50 * 1e3:6.1f} ms, p99 {row.p99 * 1e3:6.1f} ms; batch {row.batch:4.1f}\n"
            )
            sys.stdout.write(line)
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
