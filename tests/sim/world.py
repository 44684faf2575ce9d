"""Virtual time, the seed's randomness, the log, and what was drawn for the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING, Any

from rtml.messages import task_id
from tests.sim.plans import Plan

if TYPE_CHECKING:
    from tests.sim.submitter import Handle

#: Objects of a session are numbered from here, tasks from one.
_OBJECTS_FROM = 1 << 31

#: Seconds after which everybody who lives has connected again.
LONGEST_ABSENCE = 2.0

#: A seed that needs more never ends.
_EVENTS_MAX = 100_000


class Violation(AssertionError):
    """The simulated engine did something that it must never do."""


@dataclass(frozen=True)
class Settings:
    """How a seed's world is built."""

    cpus: int
    blocked_max: int
    clients: int
    tasks: int
    #: seconds of one-way latency, usually
    latency: float
    session_grace: float
    worker_grace: float
    recovery: float
    #: the most results that an executor collects before it sends
    coalesce: int
    window: int
    #: calls fail, crash, hang by themselves
    program_faults: bool
    #: per second of the time of faults
    kill_rate: float
    freeze_rate: float
    cut_rate: float
    restart_rate: float
    vanish_rate: float
    spike_rate: float

    @property
    def machines_fail(self) -> bool:
        """Whether anything but the programs goes wrong."""
        rates = (self.kill_rate, self.freeze_rate, self.cut_rate, self.restart_rate, self.vanish_rate)
        return any(rates)


def draw_settings(random: Random) -> Settings:
    """A third of the seeds has no faults of machines, a third some kinds, a third all."""
    kinds = random.choice((0.0, 0.4, 1.0))

    def rate(*choices: float) -> float:
        return random.choice(choices) if random.random() < kinds else 0.0

    return Settings(
        cpus=random.choice((1, 2, 2, 3, 4)),
        blocked_max=random.choice((1, 4, 64, 64, 64)),
        clients=random.choice((1, 1, 2, 3)),
        tasks=random.choice((10, 30, 60, 120)),
        latency=random.choice((2e-5, 2e-4, 2e-3)),
        session_grace=random.choice((0.2, 3.0)),
        worker_grace=random.choice((0.5, 10.0)),
        recovery=random.choice((0.1, 2.5, 5.0)),
        coalesce=random.choice((1, 8, 64)),
        window=random.choice((4, 50, 65_536)),
        program_faults=random.random() < 0.6,
        kill_rate=rate(0.5, 3.0),
        freeze_rate=rate(0.5, 3.0),
        cut_rate=rate(0.5, 3.0),
        restart_rate=rate(0.3, 1.0),
        vanish_rate=rate(0.2, 0.5),
        spike_rate=rate(0.5, 2.0),
    )


class World:
    """Everything that exists in one seed's run.

    Args:
        seed: from which all else follows.
        verbose: print the log while it is written.
    """

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.seed = seed
        self.verbose = verbose
        self.random = Random(seed)
        self.settings = draw_settings(self.random)
        self.now = 100.0
        self.records: list[tuple[float, str, tuple[Any, ...]]] = []
        self.plans: dict[int, Plan] = {}
        #: shared memory: object id -> content
        self.memory: dict[int, bytes] = {}
        self._objects = _OBJECTS_FROM
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._session = 0
        self.happened = 0
        #: latency is this many times the usual one
        self.slowness = 1.0
        #: task id -> the future in its arguments
        self.handles: dict[int, Handle] = {}
        #: task id -> times that its process died with it inside
        self.died_inside: dict[int, int] = {}
        #: plan number -> times that an attempt of it returned a value
        self.completed: dict[int, int] = {}
        #: task id of an actor -> where it lives
        self.alive_in: dict[int, object] = {}
        #: task id of a call on an actor -> times that it was begun
        self.begun: dict[int, int] = {}
        #: the dispatcher may believe somebody dead who is not
        self.disturbed = False
        self.dispatcher_deaths = 0

    def log(self, who: str, *what: Any) -> None:
        """Remember (and print) what happened."""
        self.records.append((self.now, who, what))
        if self.verbose:
            print(line(self.records[-1]))

    def at(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` after `delay` seconds; ties in the order of the calls."""
        self._sequence += 1
        heappush(self._events, (self.now + max(0.0, delay), self._sequence, action, arguments))

    def run(self, until: float, stop: Callable[[], bool]) -> bool:
        """Let time pass; True if `stop` said so before `until`."""
        events = self._events
        while not stop():
            if not events or events[0][0] > until:
                self.now = until
                return stop()
            self.now, _, action, arguments = heappop(events)
            action(*arguments)
            self.happened += 1
            if self.happened > _EVENTS_MAX:
                raise Violation(f"more than {_EVENTS_MAX} events: something goes round in circles")
        return True

    def latency(self) -> float:
        """Seconds that the next frame takes."""
        return self.settings.latency * self.slowness * self.random.uniform(0.5, 2.0)

    @property
    def sessions_end(self) -> bool:
        """Whether somebody may be away for so long that the dispatcher lets go of what is his, and begins anew."""
        return self.disturbed and self.settings.session_grace < LONGEST_ABSENCE

    def excuses(self) -> set[str]:
        """Types of errors that the seed's faults may cause in any task."""
        found: set[str] = set()
        if self.settings.kill_rate or self.disturbed:
            found.add("WorkerDied")
        if self.settings.machines_fail or self.settings.spike_rate:
            # The time of an attempt counts from the dispatcher's decision.
            found.add("TaskTimeout")
        if self.dispatcher_deaths:
            # What was delivered and is only known by handles is lost with the dispatcher.
            found.add("ObjectLost")
            if self.settings.recovery < LONGEST_ABSENCE or self.settings.window < self.settings.tasks:
                # Somebody may have been away, or may not have said all, for longer than a new dispatcher waits.
                found |= {"TaskCancelled", "ObjectGone"}
        if self.sessions_end:
            found |= {"ObjectLost", "ObjectGone"}
        if self.settings.blocked_max < 64:
            found.add("NestingLimit")
        return found

    def new_session(self) -> int:
        """A session number, unique in this world."""
        self._session += 1
        return self._session

    def store(self, session: int, content: bytes) -> int:
        """Put an object of `session` into shared memory."""
        self._objects += 1
        number = task_id(session, self._objects)
        self.memory[number] = content
        return number


def line(record: tuple[float, str, tuple[Any, ...]]) -> str:
    """A log record as text."""
    when, who, what = record
    return f"{when - 100.0:10.6f} {who:12} {' '.join(map(str, what))}"
