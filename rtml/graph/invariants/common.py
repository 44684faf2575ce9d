"""What several invariants look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from rtml.graph.actors import ActorState
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


def waiting_calls(core: Core) -> Iterable[tuple[ActorState, int, TaskState]]:
    """Calls that are with no process: the actor, the number of the submitter's session, the call."""
    for task in live(core):
        for session, queue in task.hosted.queues.items() if task.hosted is not None else ():
            for entry in (*queue.ordered, *queue.heap):
                if entry[4].entry == entry[3]:
                    yield task.hosted, session, entry[4]  # type: ignore[misc]


def is_idle(core: Core, worker: WorkerState) -> bool:
    """Whether the worker is listed as idle."""
    return core.workforce.idle[worker.role].get(worker.id) is worker
