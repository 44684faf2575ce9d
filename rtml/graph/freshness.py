"""Freshness: a call that carries a newer observation takes the place of older ones that have not begun.

Calls of one function (on one actor, if it is a method) with the same `latest` key are observations of one thing. The
newest of them is worth running; one that waits when a newer one comes ends as `Superseded`. One that has begun goes on.
`max_age` bounds how old an observation may be when it begins: one that waits for longer ends as expired. So that
'handed over' means 'begun', such calls are never handed over ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable

from rtml.graph.state import State, TaskState, failure
from rtml.graph.tables import Tables
from rtml.messages import CANCELLED, EXPIRED, ErrorInfo

Key = tuple[int, int, str]


class Freshness:
    """Decides which waiting calls are too old.

    Args:
        tables: for timers and tasks.
        fail: ends a task with an error and outcome, at the next drain.
        drain: carries that out.
    """

    def __init__(
        self, tables: Tables, fail: Callable[[TaskState, ErrorInfo, int], None], drain: Callable[[float], None]
    ) -> None:
        self.tables = tables
        self._fail = fail
        self._drain = drain
        #: the newest unfinished call of each key
        self.newest: dict[Key, TaskState] = {}

    def arrived(self, task: TaskState, now: float) -> None:
        """A call with a key or an age was accepted."""
        profile = task.profile
        if profile.latest:
            older = self.newest.get(_key(task))
            if older is not None and older.state < State.ASSIGNED:
                self._supersede(older)
            self.newest[_key(task)] = task
        if profile.max_age is not None:
            self.tables.at(now + profile.max_age, self._aged, (task.id, 0))

    def returned(self, task: TaskState) -> None:
        """A call with a key or an age was handed over, and comes back before it has begun."""
        profile = task.profile
        if profile.latest and self.newest.get(_key(task), task) is not task:
            self._supersede(task)
        elif profile.max_age is not None:
            self.tables.at(task.submitted + profile.max_age, self._aged, (task.id, task.attempt))

    def ended(self, task: TaskState) -> None:
        """A call with a key has ended."""
        if self.newest.get(_key(task)) is task:
            del self.newest[_key(task)]

    def _supersede(self, task: TaskState) -> None:
        message = f"a newer call of {task.profile.name!r} with latest={task.profile.latest!r} came first"
        self._fail(task, failure("Superseded", message, task), CANCELLED)

    def _aged(self, task_attempt: tuple[int, int], now: float) -> None:
        """Timer of `max_age`: one that has begun since is not too old any more, also if it is to be tried again."""
        task_id, attempt = task_attempt
        task = self.tables.tasks.get(task_id)
        if task is not None and task.state < State.ASSIGNED and task.attempt == attempt:
            message = f"task {task.profile.name!r} waited for longer than its max_age of {task.profile.max_age:g} s"
            self._fail(task, failure("DeadlineExceeded", message, task, missing=[task.profile.name]), EXPIRED)
            self._drain(now)


def _key(task: TaskState) -> Key:
    return (task.function.definition.id, task.spec.actor, task.profile.latest)
