"""Nodes and processes that are killed in the midst of a run (Ray, OSDI'18, figures 11a and 11b).

*Lineage*: chains of tasks whose large results lie on nodes; a node is killed, later another joins. What was lost is
made again. *Actors*: each takes calls in order; a quarter of their processes is killed, or a node. A call returns how
far the actor is, and the program goes on from there: calls since the last checkpoint are made again. Every execution
writes a line into one file, so that what ran twice is counted, not computed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import rtml
from benchmarks.workloads import ray_start, turns
from benchmarks.workloads.cluster import Cluster, cluster

#: Seconds of time in which executions are counted.
BIN = 0.25

NODES = 3
#: Tasks at a time on a node. They sleep: what is shown is not how fast this machine's cpus are.
CPUS = 4
#: Seconds after which the root gives up a node that vanished.
GRACE = 1.0
#: Tasks of a chain (lineage goes back at most 16), seconds of one, numbers in its result (400 KB).
LENGTH, SECONDS, NUMBERS = 12, 0.05, 50_000
CHAINS = {False: 240, True: 60}
#: Seconds after the first task at which the node dies, and another joins.
KILL_AT, JOIN_AT = {False: 4.0, True: 1.0}, {False: 10.0, True: 2.5}

ACTORS = 16
#: The same for actors.
ACTORS_AT = {False: (0.7, 1.7), True: (0.5, 1.0)}
#: Calls of each actor, and how many are submitted at a time.
CALLS, AHEAD = {False: 400, True: 200}, 16
CALL_SECONDS = 0.002
#: Calls between two checkpoints.
EVERY = 10


def note(log: str, *what: object) -> None:
    """A line for this execution, with the time."""
    line = " ".join(map(str, (time.monotonic(), *what))) + "\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def following(value: int, number: int) -> int:
    """What a task of a chain computes."""
    return (value * 6364136223846793005 + number) % (1 << 61)


@rtml.task
def link(before: Any, chain: int, number: int, log: str) -> Any:
    """A task of a chain: it takes the whole result of the one before. The last one's is small."""
    time.sleep(SECONDS)
    note(log, os.environ["RTML_BENCH_MARK"], chain, number)
    return np.full(NUMBERS if number < LENGTH - 1 else 1, following(int(before[-1]), number))


def expected(chain: int) -> int:
    """What a chain ends with."""
    value = chain
    for number in range(LENGTH):
        value = following(value, number)
    return value


def chains(count: int, log: str) -> dict[str, Any]:
    """All chains; their last results are right."""
    ends = []
    for chain in range(count):
        now: Any = np.full(1, chain)
        for number in range(LENGTH):
            now = link.submit(now, chain, number, log)
        ends.append(now)
    values = [int(array[-1]) for array in rtml.get(ends, timeout=200)]
    return {"right": values == [expected(chain) for chain in range(count)]}


class Stepper:
    """An actor that counts its calls."""

    def __init__(self, actor: int, log: str) -> None:
        self._actor = actor
        self._log = log
        self._position = 0

    def step(self, number: int) -> int:
        """Call `number`, unless it was made or one before it is missing. Returns how many were made."""
        if number == self._position:
            time.sleep(CALL_SECONDS)
            note(self._log, os.environ["RTML_BENCH_MARK"], self._actor, number)
            self._position += 1
        return self._position

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def __rtml_save__(self) -> int:
        return self._position

    def __rtml_restore__(self, position: int) -> None:
        self._position = position


def steps(calls: int, checkpoint: int, kill: bool, log: str) -> dict[str, Any]:
    """All calls of all actors, in rounds; half-way a quarter of their processes is killed, if so wanted."""
    options = {"max_restarts": -1, **({"checkpoint_calls": checkpoint} if checkpoint else {})}
    kind: Any = rtml.actor(**options)(Stepper)
    actors = [kind.create(number, log) for number in range(ACTORS)]
    victims = rtml.get([actor.pid.submit() for actor in actors[::4]], timeout=60) if kill else []
    positions = [0] * ACTORS
    failed = 0
    while min(positions) < calls:
        asked = [
            [actor.step.submit(number) for number in range(position, min(position + AHEAD, calls))]
            for actor, position in zip(actors, positions)
        ]
        if victims and min(positions) >= calls // 2:
            asked[0][AHEAD // 2].result(60)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            victims = []
        for number, futures in enumerate(asked):
            answers = rtml.gather(*futures, return_exceptions=True).result(60)
            failed += sum(isinstance(answer, rtml.errors.ActorDied) for answer in answers)
            known = [answer for answer in answers if isinstance(answer, int)]
            positions[number] = known[-1] if known else positions[number]
    for actor in actors:
        rtml.kill(actor)
    return {"right": positions == [calls] * ACTORS, "failed": failed}


def run(what: str, log: str, **more: Any) -> dict[str, Any]:
    """One of both."""
    return chains(log=log, **more) if what == "chains" else steps(log=log, **more)


def read(made: Cluster, log: Path) -> dict[str, Any]:
    """What the file says: executions over time on each node, and how many were not the first."""
    names = made.names()
    lines = [line.split() for line in log.read_text().splitlines()]
    seen = Counter((chain, number) for _, _, chain, number in lines)
    start = min(float(at) for at, *_ in lines)
    counts = Counter((int((float(at) - start) / BIN), names[mark]) for at, mark, *_ in lines)
    bins = max(number for number, _ in counts) + 1
    return {
        "executed": len(lines),
        "again": len(lines) - len(seen),
        "seconds": max(float(at) for at, *_ in lines) - start,
        # node -> executions in each BIN of time
        "rates": {node: [counts[number, node] for number in range(bins)] for node in sorted({n for _, n in counts})},
    }


def interfere(made: Cluster, log: Path, kill_at: float, join_at: float) -> threading.Thread:
    """Kills node 2 so long after the first line of the file; later starts it again."""

    def work() -> None:
        while not log.exists():
            time.sleep(0.01)
        time.sleep(kill_at)
        made.kill(2)
        time.sleep(join_at - kill_at)
        made.start(2)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def measure(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """What was killed -> executions, repetitions, times."""
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        cluster(NODES, cpus=CPUS, root=("--worker-grace", str(GRACE))) as made,
        made.program("recovery", "benchmarks.workloads.ray_recovery") as program,
    ):
        program.answer()

        def one(name: str, thread: bool = False, **question: Any) -> None:
            log = Path(directory) / name.replace(" ", "-")
            at = (KILL_AT[quick], JOIN_AT[quick]) if question["what"] == "chains" else ACTORS_AT[quick]
            killer = interfere(made, log, *at) if thread else None
            answer = program.ask(log=str(log), **question)
            if killer is not None:
                killer.join()
            assert answer["right"], f"{name}: wrong results"
            row = found[name] = {**read(made, log), **answer, **question}
            if killer is not None:
                row |= {"kill_at": at[0], "join_at": at[1]}
            figures = f"{row['executed']} executions in {row['seconds']:.1f} s, {row['again']} of them again"
            say(f"recovery, {name}: {figures}")

        one("chains, nobody killed", what="chains", count=CHAINS[quick] // 4)
        one("chains, a node killed", True, what="chains", count=CHAINS[quick])
        calls = CALLS[quick]
        one("actors, no checkpoints, processes killed", what="steps", calls=calls, checkpoint=0, kill=True)
        one("actors, checkpoints, processes killed", what="steps", calls=calls, checkpoint=EVERY, kill=True)
        if quick:
            return found
        one("actors, no checkpoints, a node killed", True, what="steps", calls=calls, checkpoint=0, kill=False)
        one("actors, checkpoints, a node killed", True, what="steps", calls=calls, checkpoint=EVERY, kill=False)
    return found


if __name__ == "__main__":
    with ray_start.connect(sys.argv[1:], NODES):
        turns.serve(run)
