"""Values that tasks wait for: the results of other tasks among their arguments, and the handles in their values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from rtml.graph.facts import completed_key
from rtml.graph.keeping import Keeping
from rtml.graph.state import State, TaskState, failure, inline_bytes
from rtml.graph.tables import Tables
from rtml.messages import INLINE_MAX, OK, ErrorInfo, ObjectRef, TaskResult


class Dependencies:
    """Puts results where they are arguments.

    Args:
        tables: what is known.
        keeping: keeps values and handles for those who need them.
        ending: ends that are due, see `rtml.graph.lifecycle`.
        fail: ends a task with an error of rtml's own.
        make_ready: called with a task that has all its arguments, and now.
        place: names the place where a payload is by now.
    """

    def __init__(
        self,
        tables: Tables,
        keeping: Keeping,
        ending: deque[tuple[TaskState, TaskResult]],
        fail: Callable[[TaskState, ErrorInfo], None],
        make_ready: Callable[[TaskState, float], None],
        place: Callable[[bytes | ObjectRef], bytes | ObjectRef],
    ) -> None:
        self.tables = tables
        self.keeping = keeping
        self._ending = ending
        self._fail = fail
        self._make_ready = make_ready
        self._place = place

    def link(self, task: TaskState, deps: list[tuple[int, bytes | ObjectRef | None]]) -> bool:
        """Attach the dependencies; False if one has failed already."""
        if len(deps) > self.tables.limits.dependencies_max:
            message = (
                f"task {task.profile.name!r} has {len(deps)} futures among its arguments, more than "
                f"{self.tables.limits.dependencies_max} (dependencies_max); combine them in several steps"
            )
            self._fail(task, failure("LimitExceeded", message, task))
            return False
        inputs: list[bytes | ObjectRef | None] = []
        task.inputs = inputs
        for position, (dep_id, payload) in enumerate(deps):
            inputs.append(payload)
            if payload is not None:
                if payload.__class__ is ObjectRef:
                    inputs[position] = self._place(payload)
                    self.keeping.need(task.id, payload.id)
                continue
            dep = self.tables.tasks.get(dep_id)
            if dep is task:
                self._fail(task, failure("ResourceDeadlock", "the task waits for its own result", task))
                return False
            if dep is None:
                message = f"argument {position + 1} is a future that the dispatcher does not know (any more)"
                self._fail(task, failure("ObjectLost", message, task))
                return False
            if dep.result is None:
                task.waiting += 1
                if dep.dependents is None:
                    dep.dependents = []
                dep.dependents.append((task, position))
            elif not self.supply(task, position, dep):
                return False
        return True

    def supply(self, task: TaskState, position: int, dep: TaskState) -> bool:
        """Put an ended dependency's value in its place; False if it has none."""
        result = dep.result
        assert result is not None
        if result.outcome != OK:
            error = result.error or failure("DependencyFailed", "a dependency failed", dep)
            chain = [*(error.chain or dep.chain()), task.profile.name]
            inherited = replace(error, chain=chain)
            self._ending.append((task, TaskResult(task.id, task.attempt, result.outcome, error=inherited)))
            return False
        assert task.inputs is not None
        task.inputs[position] = result.payload
        if isinstance(result.payload, ObjectRef):
            self.keeping.need(task.id, result.payload.id)
        if result.handles:
            # Whoever else holds them may let go before this task has even begun.
            inner = [handle for handle in result.handles if handle in self.tables.tasks]
            task.spec.handles = [*(task.spec.handles or ()), *inner]
            for handle in inner:
                self.tables.tasks[handle].holds += 1
        if result.batch_key and task.profile.batch:
            task.batch_key = completed_key(task, position, result.batch_key)
        if task.function.definition.rows:
            task.spec.items = max(task.spec.items, result.items)
        return True

    def resolve(self, task: TaskState, now: float) -> None:
        """Supply those who waited for this task."""
        assert task.dependents is not None
        for dependent, position in task.dependents:
            if dependent.state is State.DONE:
                continue
            if self.supply(dependent, position, task):
                dependent.waiting -= 1
                if not dependent.waiting and dependent.state is State.WAITING:
                    self._make_ready(dependent, now)
        task.dependents = None

    def too_large(self, task: TaskState) -> ErrorInfo | None:
        """Resolved dependencies travel in one frame, unless they are large enough to lie in shared memory."""
        inputs, most = task.inputs, self.tables.limits.inputs_max
        assert inputs is not None
        if len(inputs) * INLINE_MAX <= most or inline_bytes(inputs) <= most:
            return None
        message = (
            f"the {len(inputs)} futures among the arguments of task {task.profile.name!r} have more than {most} bytes "
            "in all (inputs_max); combine them in several steps"
        )
        return failure("LimitExceeded", message, task)

    def reachable(self, handles: list[int]) -> set[int]:
        """Tasks that whoever gets this value can reach: futures inside of it, and inside of their values."""
        found: set[int] = set()
        new = handles
        while new:
            task_id = new.pop()
            if task_id not in found:
                found.add(task_id)
                task = self.tables.tasks.get(task_id)
                if task is not None and task.result is not None:
                    new += task.result.handles or ()
        return found

    def let_go(self, task: TaskState) -> None:
        """The task needs its dependencies and handles no more."""
        for handle in task.spec.handles or ():
            self.keeping.unhold(handle)
        for payload in task.inputs or ():
            if isinstance(payload, ObjectRef):
                self.keeping.unneeded(payload.id, task.id)
