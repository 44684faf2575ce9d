"""CPU time of the pure core for one no-op task (submit, assign, finish, acknowledge), with few and with many pending.

The core is driven as a dispatcher drives it: wake-ups that bring a frame of submissions and the workers' results. Only
`Core.handle` is timed, as CPU time, so that a busy machine does not matter much; building and decoding messages is the
wire's cost and not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

from rtml.graph.core import Core
from rtml.graph.tables import Send
from rtml.messages import (
    CLIENT,
    EXECUTOR,
    OK,
    SUPERVISOR,
    Ack,
    Assign,
    Define,
    Finished,
    Function,
    Hello,
    Message,
    Node,
    Results,
    Submit,
    Task,
    TaskResult,
    task_id,
)

WORKERS = 2
FUNCTION = 1
PAYLOAD = b"x" * 16
#: Wake-ups without a finished task that show an error.
IDLE_WAKES_MAX = 100

SUPERVISOR_PEER, CLIENT_PEER, FIRST_WORKER_PEER = 1, 2, 3


class Driver:
    """Plays a supervisor, a client and `WORKERS` executors that answer everything at once."""

    def __init__(self) -> None:
        self.core = Core(epoch=1)
        self.now = 0.0
        self.sequence = 0
        self.finished = 0
        self.cpu_s = 0.0
        self.serials = [0] * WORKERS
        self.arrivals: dict[int, list[Message]] = {}

    def join(self) -> None:
        """Everybody says hello."""
        node = Node(name="node", cpu=float(WORKERS))
        self._bring(SUPERVISOR_PEER, Hello(role=SUPERVISOR, session=1), node)
        for number in range(WORKERS):
            hello = Hello(role=EXECUTOR, session=10 + number, worker=number + 1)
            self._bring(FIRST_WORKER_PEER + number, hello)
        definition = Function(id=FUNCTION, name="no-op", ref="module:no_op")
        self._bring(CLIENT_PEER, Hello(role=CLIENT, session=2), Define([definition]))
        self._wake()

    def submit(self, count: int) -> None:
        """The client's next frame."""
        first = self.sequence
        self.sequence += count
        tasks = [Task(task_id(2, number), FUNCTION, PAYLOAD) for number in range(first, first + count)]
        self._bring(CLIENT_PEER, Submit(tasks))

    def _bring(self, peer: int, *messages: Message) -> None:
        self.arrivals.setdefault(peer, []).extend(messages)

    def _wake(self) -> None:
        """One wake-up: all that arrived goes in, answers to its effects arrive for the next one."""
        arrivals = list(self.arrivals.items())
        self.arrivals = {}
        self.now += 200e-6
        start = time.process_time_ns()
        effects = self.core.handle(arrivals, self.now)
        effects += self.core.settle()
        self.core.take_ended()
        self.cpu_s += (time.process_time_ns() - start) / 1e9
        for effect in effects:
            if isinstance(effect, Send):
                self._answer(effect)

    def _answer(self, effect: Send) -> None:
        for message in effect.messages:
            if isinstance(message, Assign):
                results = [TaskResult(a.id, a.attempt, OK, PAYLOAD, run=2e-6) for a in message.attempts]
                number = effect.peer - FIRST_WORKER_PEER
                self.serials[number] += 1
                self._bring(effect.peer, Finished(self.serials[number], results))
            elif isinstance(message, Results):
                self.finished += len(message.results)
                self._bring(CLIENT_PEER, Ack(message.serial))

    def run(self, pending: int, count: int) -> float:
        """CPU microseconds per task over `count` tasks, while about `pending` others wait."""
        for _ in range(50):  # run times are known from here on, so that work is prefetched
            self._step(pending)
        begin_s, begin = self.cpu_s, self.finished
        while self.finished - begin < count:
            self._step(pending)
        return (self.cpu_s - begin_s) / (self.finished - begin) * 1e6

    def _step(self, pending: int) -> None:
        missing = pending - (self.sequence - self.finished)
        if missing > 0:
            self.submit(missing)
        before = self.finished
        for _ in range(IDLE_WAKES_MAX):
            self._wake()
            if self.finished > before:
                return
        raise RuntimeError(f"nothing finished in {IDLE_WAKES_MAX} wake-ups")


def main() -> None:
    """Prints one JSON object: `core_us_per_task` (100,000 pending), `core_us_per_task_at_100` and their ratio."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tasks")
    options = parser.parse_args()
    count = 20_000 if options.quick else 100_000
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)  # as the dispatcher does
    figures = {}
    for pending in (100, 100_000):
        driver = Driver()
        driver.join()
        figures[pending] = driver.run(pending, count)
        print(f"row core at {pending:,}: {figures[pending]:.2f} us", file=sys.stderr, flush=True)
        del driver
        gc.collect()
    rows = {
        "core_us_per_task": figures[100_000],
        "core_us_per_task_at_100": figures[100],
        "core_growth_ratio": figures[100_000] / figures[100],
    }
    print(json.dumps({"system": "rtml", "version": "core", "rows": rows}))


if __name__ == "__main__":
    main()
