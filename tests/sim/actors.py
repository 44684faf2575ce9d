"""Actors in the simulation: what programs ask of them, the processes that hold them, and what must be true of calls.

The processes are driven as `rtml.workers.actors` and `async_actors` drive theirs. A call is a plan like any other
(`Plan.on` says on which actor), so lost and doubled results show in the sums. Beside that:

* an ordered actor begins the calls of one submitter in the order of their submission, unless one is tried again;
* a call whose `retries` are 0 is begun at most once, whatever dies.
"""

from __future__ import annotations

from random import Random

from rtml.messages import ACTOR, ASYNC_ACTOR, OK, ActorOptions, Attempt, Options, TaskResult
from tests.sim.executor import AsyncExecutor, Executor, Level, SyncExecutor
from tests.sim.plans import ADD, CLASS, LOOPING, Plan
from tests.sim.submitter import encode_value
from tests.sim.world import Violation

#: Seeds with actors in them, of each ten.
_OF_TEN = 4


def draw(seed: int, plans: dict[int, Plan], roots: list[Plan], faults: bool, cpus: int) -> None:
    """Append the creation of an actor, and calls on it, to a client's program; in some seeds.

    The draws are apart from the seed's others, so that those without actors stay what they were.
    """
    random = Random(f"actors {seed} {len(plans)}")
    if random.randrange(10) >= _OF_TEN:
        return
    before = len(roots)
    for _ in range(random.choice((1, 1, 2))):
        looping = random.random() < 0.3
        concurrency = random.choice((1, 3, 100)) if looping else 1
        restarts = random.choice((0, 1, 50)) if faults or random.random() < 0.7 else 50
        detached = True if random.random() < 0.2 else None
        creation = Plan(len(plans) + 1, LOOPING if looping else CLASS, 0, siblings=roots)
        cpu = random.choice((0.0, 0.0, 0.1 if cpus > 1 else 0.0))
        creation.options = Options(cpu=cpu, retries=restarts, detached=detached)
        name = f"actor {creation.number}" if random.random() < 0.3 else ""
        creation.hosts = ActorOptions(name, concurrency, checkpoint_calls=random.choice((0, 1, 3)))
        plans[creation.number] = creation
        position = len(roots)
        roots.append(creation)
        retries = random.choice((0, 0, 3))
        for _ in range(random.choice((1, 5, 20, 60))):
            call = Plan(len(plans) + 1, ADD, random.randrange(1_000), siblings=roots)
            call.on = position
            call.run = random.choice((0.0, 1e-5, 1e-4, 0.001, 0.02))
            call.options = Options(cpu=0.0, retries=retries)
            if before and random.random() < 0.2:
                call.deps = [random.randrange(before)]
            if faults and random.random() < 0.03:
                call.fault, call.times = random.choice(("error", "crash")), 1
            if faults and random.random() < 0.05:
                call.cancel_after = random.choice((0.0, 0.001, 0.1))
            plans[call.number] = call
            roots.append(call)


class _Host(Executor):
    """What both kinds of processes do with their actor."""

    def create(self, attempt: Attempt) -> None:
        """The first call of the process."""
        assert attempt.creates is not None
        assert attempt.id not in self.world.alive_in or self.world.alive_in[attempt.id] is not self
        self.world.log(self.name, "creates", attempt.id, attempt.attempt, "from", attempt.checkpoint)
        self.count = int(bytes(attempt.checkpoint)) if attempt.checkpoint is not None else 0  # type: ignore[arg-type]
        self.options = attempt.creates.hosts or ActorOptions()
        self.world.alive_in[attempt.id] = self
        self.last_begun: dict[int, int] = {}
        self.core.host(attempt)

    def note(self, level: Level) -> None:
        """A call is begun here."""
        hosted = self.core.hosted
        (attempt,) = level.attempts
        plan = level.frames[0].plan
        if hosted is None or plan.on is None or plan.siblings[plan.on].number != int(bytes(hosted.args)):  # type: ignore[arg-type]
            raise Violation(f"call {attempt.id} is not in its actor's process")
        retries = plan.retries
        begun = self.world.begun[attempt.id] = self.world.begun.get(attempt.id, 0) + 1
        # A dispatcher that dies together with the process takes along who it was that had begun.
        if begun > 1 and not retries and not self.world.dispatcher_deaths:
            raise Violation(f"call {attempt.id} is begun for the {begun}th time")
        session = attempt.id >> 32
        if self.options.concurrency == 1 and not retries:
            if self.last_begun.get(session, 0) > attempt.id and not self.world.sessions_end:
                raise Violation(f"call {attempt.id} is begun after {self.last_begun[session]}")
            self.last_begun[session] = attempt.id

    def end(self, level: Level, interrupted: bool = False) -> None:
        self.count += 1
        if self.options.checkpoint_calls and self.count % self.options.checkpoint_calls == 0:
            self.core.save(str(self.count).encode())
        super().end(level, interrupted)

    def settle(self) -> None:
        """The actor may not be wanted any more."""
        if self.core.dismissed and len(self.core.running) <= 1:
            hosted, self.core.hosted = self.core.hosted, None
            assert hosted is not None
            self.core.leave()
            self.core.finish(TaskResult(hosted.id, hosted.attempt, OK, encode_value(0, [])))


class ActorProcess(_Host, SyncExecutor):
    """One call after the other."""

    role = ACTOR
    shown = 0

    def launch(self, group: list[Attempt]) -> None:
        if group[0].creates is not None:
            self.create(group[0])
            self.shown = group[0].id
            return
        level = self.begin(group)
        self.note(level)
        self.shown = group[0].id
        self._run(level)

    def running(self) -> list[int]:
        """The page shows the last call until the next one begins."""
        return [self.shown]

    def _block(self, level: Level) -> bool:
        """It has nothing to lend out."""
        self.transmit()
        return False


class AsyncActorProcess(_Host, AsyncExecutor):
    """Several calls at a time."""

    role = ASYNC_ACTOR

    def launch(self, group: list[Attempt]) -> None:
        if group[0].creates is not None:
            self.create(group[0])
            return
        level = self.begin(group)
        self.note(level)
        if len(self.levels) > self.options.concurrency:
            raise Violation(f"{len(self.levels)} calls at a time on an actor of {self.options.concurrency}")
        self.step(level)
