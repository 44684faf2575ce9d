"""Load in virtual time: the dispatcher's and the executors' pure cores run as they are.

Only time, run times and arrivals are made up, from a seed. So a minute of load is simulated in seconds, and the same on
every machine. Each hand-over between processes takes `HOP` seconds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from math import pi, sin
from typing import Any, Final, NamedTuple

from rtml.graph.core import Core
from rtml.graph.policy import POLICIES, Scheduling
from rtml.graph.tables import Limits, Send
from rtml.messages import (
    CANCELLED,
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
#: How many times longer than others a straggler takes.
STRAGGLER: Final = 5.0
#: Seconds in which the machine becomes slow and quick again.
DRIFT_PERIOD: Final = 8.0

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
    #: The quantile of its runs above which a second attempt begins, if it bears that.
    hedge: float | None = None
    #: An attempt that is not wanted any more goes on to its end, as native code does.
    native: bool = True

    @property
    def best(self) -> float:
        """Seconds of an executor for a request, at best."""
        return self.fixed / max(1, self.batch) + self.item


class Noise(NamedTuple):
    """How run times differ from what they are on average: by a factor of 1 on average for each call."""

    #: Of a lognormal distribution; 0: evenly, by up to a seventh.
    sigma: float = 0.0
    #: Portion of calls that take `STRAGGLER` times as long.
    stragglers: float = 0.0
    #: The machine becomes so many times slower and quick again, slowly.
    drift: float = 1.0
    #: From when to when all calls are stragglers.
    storm: tuple[float, float] = (0.0, 0.0)

    def factor(self, random: random.Random, now: float) -> float:
        """Of one call that begins now."""
        found = random.lognormvariate(-(self.sigma**2) / 2, self.sigma) if self.sigma else random.uniform(6 / 7, 8 / 7)
        if self.storm[0] <= now < self.storm[1]:
            return found * STRAGGLER
        slow = self.stragglers > 0.0 and random.random() < self.stragglers
        return found * (STRAGGLER if slow else 1.0) / (1.0 + (STRAGGLER - 1.0) * self.stragglers)

    def speed(self, now: float) -> float:
        """Of the machine, compared with its (geometric) mean."""
        return float(self.drift ** (0.5 * sin(2 * pi * now / DRIFT_PERIOD)))


class Scenario(NamedTuple):
    """What comes, and how."""

    name: str
    models: tuple[Model, ...]
    #: Requests come in bursts of so many on average; 1: Poisson.
    burst: int = 1
    noise: Noise = Noise()

    @property
    def capacity(self) -> float:
        """Requests a second that the executors can do at best."""
        return WORKERS / sum(model.portion * model.best for model in self.models)


class Asked(NamedTuple):
    """One request: when it came, and what it asks for."""

    came: float
    budget: float
    model: int


class Simulation:
    """One scenario under one policy at one load."""

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        load: float,
        admission: bool,
        seed: int = 1,
        limits: Limits | None = None,
    ) -> None:
        self.scenario = scenario
        self.admission = admission
        self.rate = load * scenario.capacity
        # Whatever is decided, the same comes at the same time.
        self.arrivals = random.Random(seed)
        self.runs = random.Random(seed + 1)
        self.core = Core(1, limits, scheduling=Scheduling(POLICIES[policy]))
        self.now = 0.0
        self.numbers = count(1)
        self.events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.workers = [WorkerCore(number + 1, 10 + number) for number in range(WORKERS)]
        #: what each executor runs: the calls of a batch, and when it ends
        self.running: list[tuple[list[Attempt], float]] = [([], 0.0)] * WORKERS
        self.models = dict(enumerate(scenario.models, 1))
        self.asked: dict[int, Asked] = {}
        #: tasks that were answered in time, too late, or refused at once
        self.in_time: set[int] = set()
        self.late: set[int] = set()
        self.shed: set[int] = set()
        self.latencies: list[float] = []
        self.ended = self.calls = self.items = 0
        #: seconds that executors were busy
        self.worked = 0.0
        self._join()

    def at(self, when: float, action: Callable[[Any], None], argument: Any) -> None:
        """Something happens later."""
        heappush(self.events, (when, next(self.numbers), action, argument))

    def run(self, seconds: float) -> None:
        """Requests come for so long, then the rest is done."""
        for asked in self._arrivals(seconds):
            self.at(asked.came, self._ask, asked)
        while self.events or self.core.next_wakeup() is not None:
            wakeup = self.core.next_wakeup()
            if wakeup is not None and (not self.events or wakeup < self.events[0][0]):
                self.now = max(self.now, wakeup)
                self._tell(0)
                continue
            self.now, _, action, argument = heappop(self.events)
            action(argument)
        assert self.ended == len(self.asked), "every request ends"

    def _arrivals(self, seconds: float) -> Iterator[Asked]:
        when, random, burst = 0.0, self.arrivals, self.scenario.burst
        portions = [model.portion for model in self.models.values()]
        while True:
            size = 1 if burst == 1 else 1 + int(random.expovariate(1 / (burst - 1)))
            when += random.expovariate(self.rate / burst)
            if when > seconds:
                return
            for _ in range(size):
                model = random.choices(list(self.models), portions)[0]
                yield Asked(when, random.choice(self.models[model].deadlines), model)

    def _join(self) -> None:
        self._tell(SUPERVISOR_PEER, Hello(SUPERVISOR, 1), Node("n", float(WORKERS)))
        for number, worker in enumerate(self.workers):
            self._tell(FIRST_WORKER_PEER + number, worker.hello())
        functions = [
            Function(
                number, model.name, f"m:{model.name}", options=Options(batch=model.batch or None, hedge=model.hedge)
            )
            for number, model in self.models.items()
        ]
        self._tell(CLIENT_PEER, Hello(CLIENT, 2), Define(functions))

    def _ask(self, asked: Asked) -> None:
        number = task_id(2, len(self.asked) + 1)
        self.asked[number] = asked
        options = Options(deadline=asked.budget - HOP, admission=self.admission)
        self._send(CLIENT_PEER, [Submit([Task(number, asked.model, b"", options=options)])])

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
                    asked = self.asked[result.id]
                    self.ended += 1
                    if result.outcome == OK:
                        self.latencies.append(self.now - asked.came)
                        (self.in_time if self.now - asked.came <= asked.budget else self.late).add(result.id)
                    elif result.error is not None and result.error.type == "Overloaded":
                        self.shed.add(result.id)
                self._send(CLIENT_PEER, [Ack(message.serial)])

    def _assigned(self, sent: tuple[int, list[Message]]) -> None:
        number = sent[0] - FIRST_WORKER_PEER
        if number < 0:
            return
        worker = self.workers[number]
        for message in sent[1]:
            worker.receive(message, self.now)
        group, _ = self.running[number]
        if worker.revoked and group and not self.models[group[0].function].native:
            self._end(number, CANCELLED)
        self._work(number)

    def _work(self, number: int) -> None:
        worker = self.workers[number]
        if not self.running[number][0]:
            group = worker.take(self.now)
            if group:
                model, noise = self.models[group[0].function], self.scenario.noise
                seconds = model.fixed + model.item * len(group)
                seconds *= noise.factor(self.runs, self.now) / noise.speed(self.now)
                self.calls += 1
                self.items += len(group)
                self.running[number] = (group, self.now)
                self.at(self.now + seconds, self._worked, (number, group))
        if worker.dirty:
            self._send(FIRST_WORKER_PEER + number, worker.flush())

    def _worked(self, done: tuple[int, list[Attempt]]) -> None:
        number, group = done
        if self.running[number][0] is group:
            self._end(number, OK)
            self._work(number)

    def _end(self, number: int, outcome: int) -> None:
        group, since = self.running[number]
        self.running[number] = ([], 0.0)
        self.worked += self.now - since
        for attempt in group:
            self.workers[number].finish(TaskResult(attempt.id, attempt.attempt, outcome, run=self.now - since))

    # --- what came of it

    def work(self, chosen: set[int] | None = None) -> float:
        """Seconds of executors at best for some requests, or all."""
        numbers = self.asked if chosen is None else chosen
        return sum(self.models[self.asked[number].model].best for number in numbers)

    def kinds(self, chosen: set[int] | None = None) -> Counter[tuple[str, float]]:
        """How many of each model and budget."""
        found = [self.asked[number] for number in (self.asked if chosen is None else chosen)]
        return Counter((self.models[asked.model].name, asked.budget) for asked in found)

    @property
    def missed(self) -> float:
        """Of those that were let in, the portion that missed."""
        return 1 - len(self.in_time) / max(1, len(self.asked) - len(self.shed))

    def possible(self) -> float:
        """Seconds of executors' work at best that nobody could exceed: a bound that no schedule reaches.

        As if both executors worked together on the request that is due first, knew no messages, could stop at any time,
        and got credit for parts of requests. Then earliest deadline first is the best that there is.
        """
        noise, step = self.scenario.noise, 1e-3
        requests = sorted(self.asked.values())
        waiting: list[tuple[float, float]] = []
        done, position, number = 0.0, 0.0, 0
        while number < len(requests) or waiting:
            if not waiting:
                position = max(position, requests[number].came)
            while number < len(requests) and requests[number].came <= position:
                asked = requests[number]
                heappush(waiting, (asked.came + asked.budget, self.models[asked.model].best))
                number += 1
            room = WORKERS * step * noise.speed(position)
            position += step
            while waiting and room > 0:
                deadline, left = heappop(waiting)
                if deadline < position:
                    continue
                taken = min(left, room)
                done, room = done + taken, room - taken
                if left > taken:
                    heappush(waiting, (deadline, left - taken))
        return done
