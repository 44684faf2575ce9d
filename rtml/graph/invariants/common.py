"""What several invariants look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from rtml.graph.actorstate import ActorState
from rtml.graph.core import Core
from rtml.graph.state import State, TaskState, WorkerState

#: Resources are sums of floats.
TOLERANCE: Final = 1e-6

Check = Callable[[Core], Iterable[object]]


def all_tasks(core: Core) -> Iterable[TaskState]:
    """Everything that is known."""
    return core.tables.tasks.values()


def live(core: Core) -> list[TaskState]:
    """The unfinished tasks of this dispatcher."""
    return [task for task in core.tables.tasks.values() if task.state is not State.DONE and task.home is None]


def hosts(core: Core) -> list[ActorState]:
    """Actors of ours, and those of other dispatchers that are called from here."""
    return [task.hosted for task in core.tables.tasks.values() if task.hosted is not None]


def waiting_calls(core: Core) -> Iterable[tuple[ActorState, int, TaskState]]:
    """Calls that are with no process: the actor, the number of the submitter's session, the call."""
    for actor in hosts(core):
        for session, queue in actor.queues.items():
            for entry in (*queue.ordered, *queue.heap):
                if entry[4].entry == entry[3]:
                    yield actor, session, entry[4]


def is_idle(core: Core, worker: WorkerState) -> bool:
    """Whether the worker is listed as idle."""
    return core.workforce.idle[worker.role].get(worker.id) is worker
