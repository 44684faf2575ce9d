"""A second attempt beside one that takes unusually long, for functions that say that they bear it (`hedge=`).

While an attempt runs longer than the function's learned quantile, and an executor is idle that nobody else wants, the
task gets a *spare*: a second record of the same task, with the next attempt number, on another executor. It is in that
executor's queue and nowhere else; `TaskState.pair` joins the two. The first result wins, the other attempt becomes a
ghost as after a cancellation, so there is one result as ever. If the first attempt is lost with its process, the spare
takes its place. At most a portion of all attempts gets a spare (`Limits.hedge_share`), so that hedging cannot feed an
overload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rtml.graph.placement import Placement
from rtml.graph.predict import Quantiles
from rtml.graph.state import State, TaskState
from rtml.graph.tables import Tables
from rtml.graph.workforce import Workforce
from rtml.messages import EXECUTOR, OK, TaskResult

#: Runs that must have been seen before a quantile of them means something.
RUNS_MIN: Final = 20

#: Seconds between an executor and the dispatcher that are not the function's.
_HOPS: Final = 1e-3


class Hedging:
    """Decides which attempts get a spare, and which of the two counts."""

    def __init__(self, tables: Tables, workforce: Workforce, placement: Placement) -> None:
        self.tables = tables
        self.workforce = workforce
        self.placement = placement
        placement.on_hedgeable = self.watch
        #: set by `Lifecycle`: tell the executor of a task's attempt that nobody wants it
        self.revoke: Callable[[TaskState, float], None]
        #: runs that must have been seen
        self.runs_min = RUNS_MIN
        #: attempts of functions that may be hedged, and their spares
        self.watched = 0
        self.spares = 0
        #: spares that won and that lost; attempts that got none because there had been too many
        self.won = self.lost = self.capped = 0

    # --- beginning

    def watch(self, task: TaskState, now: float) -> None:
        """An attempt of a function that may be hedged was handed to a sync executor."""
        if task.spare:
            return
        self.watched += 1
        if task.function.runs is None:
            task.function.runs = Quantiles()
        limit = self._limit(task)
        if limit is not None:
            self.tables.at(now + limit, self._look, (task, task.attempt))

    def _limit(self, task: TaskState) -> float | None:
        """Seconds after which an attempt is unusually long; None if that is not known."""
        runs = task.function.runs
        usual = runs.at(task.profile.hedge) if len(runs) >= self.runs_min else None
        return None if usual is None else usual + _HOPS

    def _look(self, task_attempt: tuple[TaskState, int], now: float) -> None:
        """Timer: the attempt may be a straggler."""
        task, attempt = task_attempt
        worker, limit = task.worker, self._limit(task)
        if task.state is not State.ASSIGNED or task.attempt != attempt or task.pair is not None:
            return
        if worker is None or limit is None or task.blocked or task.children:
            return
        since = max(worker.head_since, task.assigned_at)
        if next(iter(worker.queue.values()), None) is not task or now < since + limit * 0.999:
            self.tables.at(max(since, now - limit / 2) + limit, self._look, task_attempt)
            return
        other = None if self.placement.wanted(EXECUTOR) else self.placement.pick_idle(task)
        if other is None:
            # Whoever is behind by itself is not helped by more work.
            self.tables.at(now + limit, self._look, task_attempt)
        elif self.spares + 1 > self.tables.limits.hedge_share * self.watched:
            self.capped += 1
        else:
            self.spares += 1
            spare = self._spare(task)
            self.placement.assign(other, [spare], now)
            task.attempts = spare.attempt

    def _spare(self, task: TaskState) -> TaskState:
        spare = TaskState(
            task.id, task.spec, task.function, task.profile, task.session, task.owner, task.graph, task.submitted
        )
        spare.spare = True
        spare.attempt = task.attempt
        spare.inputs, spare.deadline, spare.due, spare.depth = task.inputs, task.deadline, task.due, task.depth
        spare.ancestors, spare.hops, spare.data_only = task.ancestors, task.hops, task.data_only
        spare.pair, task.pair = task, spare
        spare.move(State.READY)
        return spare

    # --- ends

    def decide(self, task: TaskState, result: TaskResult, now: float) -> TaskState | None:
        """One of a pair has a result: the task whose result it is; None if the other goes on."""
        pair = task.pair
        assert pair is not None
        task.pair = pair.pair = None
        if not task.spare:
            self.lost += 1
            self._give_up(pair, now)
            return task
        task.move(State.DONE)
        if result.outcome != OK:
            self.lost += 1
            return None
        self.won += 1
        if pair.worker is not None:
            # It would have taken at least this long: else only the quick ones would be learned from.
            pair.function.runs.observe(now - max(pair.worker.head_since, pair.assigned_at))
            self.revoke(pair, now)
        # Where its value lies. (The attempt that lost is known by its number, in the queue of its executor.)
        pair.worker = task.worker
        return pair

    def drop(self, task: TaskState, now: float) -> None:
        """The task has ended, or its spare is not wanted any more: end the spare."""
        spare = task if task.spare else task.pair
        if spare is not None and spare.pair is not None:
            self._part(spare)
            self.lost += 1
            self._give_up(spare, now)

    def gone(self, spare: TaskState) -> None:
        """The spare's attempt is lost, or was given back unstarted: the first one goes on alone."""
        if spare.pair is not None:
            self._part(spare)
            self.lost += 1
        spare.move(State.DONE)

    def promote(self, task: TaskState) -> bool:
        """The first attempt is lost: the spare takes its place, if there is one."""
        spare = task.pair
        if spare is None or spare.worker is None:
            return False
        spare.pair = task.pair = None
        worker = spare.worker
        worker.queue = {number: task if held is spare else held for number, held in worker.queue.items()}
        task.worker, task.attempt = worker, spare.attempt
        task.assigned_at, task.cost, task.blocked = spare.assigned_at, spare.cost, False
        spare.move(State.DONE)
        return True

    def _part(self, spare: TaskState) -> None:
        first, spare.pair = spare.pair, None
        if first is not None:
            first.pair = None

    def _give_up(self, spare: TaskState, now: float) -> None:
        self.revoke(spare, now)
        spare.move(State.DONE)
