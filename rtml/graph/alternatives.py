"""Tasks that may run on one of several kinds of resources: on the one that will have ended them first, as predicted.

The predicted end is the wait until what the alternative asks for is free, plus its learned run time. So a task waits
for a gpu that is free soon if a cpu would take longer all in all, and takes the cpu if many others wait for the gpu.
An alternative that was never tried counts as taking no time: it is, as soon as there is room for it; until its first
result it counts as no better than the others. Where two end equally soon, the one that was named first is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from rtml.graph.state import TRIED, NodeState, Profile, Shape, TaskState, WorkerState
from rtml.graph.workforce import UNKNOWN_COST
from rtml.messages import EXECUTOR

#: Seconds by which one alternative must be better than an earlier one, and in which a decision to wait is looked at.
_MARGIN: Final = 1e-4
_LOOK_AGAIN: Final = 5e-3


class Choice:
    """The best of what was offered so far for one task.

    Args:
        task: it has alternatives.
    """

    def __init__(self, task: TaskState) -> None:
        self.task = task
        self.profile: Profile | None = None
        #: who runs it at once; None: it had better wait
        self.worker: WorkerState | None = None
        self._end = 0.0
        #: the best end of what could begin now
        self._now: float | None = None

    def offer(self, profile: Profile, worker: WorkerState | None, begins: float) -> None:
        """It could begin so in `begins` seconds; with this worker, if that is now."""
        end = begins + (self.seconds(profile) or 0.0)
        if self.profile is None or end < self._end - _MARGIN:
            self.profile, self.worker, self._end = profile, worker, end
        if worker is not None and (self._now is None or end < self._now):
            self._now = end

    def seconds(self, profile: Profile) -> float | None:
        """The learned run time of an alternative; None if it was never tried."""
        times = self.task.function.times
        known = None if times is None else times.get(profile.shape.number)
        if times is None or known is None or known >= 0:
            return known
        return max(0.0, *times.values())  # it is being tried: no better than others until its first result

    def take(self) -> None:
        """The task gets what was chosen."""
        task, profile = self.task, self.profile
        assert profile is not None
        task.profile = profile
        times = task.function.times = task.function.times or {}
        times.setdefault(profile.shape.number, TRIED)

    @property
    def patience(self) -> float | None:
        """Seconds after which a decision to wait is to be looked at again; None: nothing else could begin."""
        return None if self._now is None else max(_LOOK_AGAIN, self._now - self._end)


def wait_for(
    choice: Choice, profile: Profile, node: NodeState, running: Iterable[tuple[TaskState, float]], ahead: Counter[int],
    now: float,
) -> float | None:  # fmt: skip
    """Seconds until there is room for an alternative at a node that has none now; None: nobody can tell.

    Args:
        choice: whose task is to wait.
        profile: the alternative.
        node: it could ever fit there.
        running: tasks of that node, and since when.
        ahead: how many wait for each shape already, before this one.
        now: the time.
    """
    left = sorted(_left(task, since, now) for task, since in running if _shares(task.profile.shape, profile.shape))
    if not left:
        return None
    position = ahead[profile.shape.number]
    rounds, place = divmod(position, len(left))
    return left[place] + rounds * (choice.seconds(profile) or 0.0)


def running_here(node: NodeState) -> Iterable[tuple[TaskState, float]]:
    """What the executors of a node run."""
    for worker in node.workers.values():
        if worker.role == EXECUTOR and worker.queue:
            yield next(iter(worker.queue.values())), worker.head_since


def _left(task: TaskState, since: float, now: float) -> float:
    """Predicted seconds until it ends; what takes longer than was predicted is believed to take as long again."""
    times = task.function.times
    known = None if times is None else times.get(task.profile.shape.number)
    predicted = known if known is not None else task.function.estimate
    if predicted is None or predicted < 0:
        return max(now - since, UNKNOWN_COST)
    return abs(since + predicted - now)


def _shares(held: Shape, wanted: Shape) -> bool:
    """Whether the end of what holds this makes room for that."""
    if wanted.extra:
        return any(name in held.extra for name in wanted.extra)
    return held.cpu > 0
