"""What a task's record says about it: the key by which it is batched, and where its time went."""

from __future__ import annotations

from rtml.graph.state import TaskState
from rtml.messages import TaskResult, Timing


def completed_key(task: TaskState, position: int, facts: str) -> str:
    """The batch key of a task, with what is now known of its dependency at `position`.

    The submitter wrote "?" wherever an argument is a future: one for each dependency, in their order, unless some lie
    inside containers or stand there twice. Then nothing can be said about which is which.
    """
    asked = task.spec.batch_key
    if not asked:
        return facts if position == 0 else task.batch_key
    marks = [index for index, part in enumerate(asked.split("|")) if part == "?" or part.endswith("=?")]
    if len(marks) != len(task.spec.deps or ()):
        return task.batch_key
    if len(marks) == 1:
        return asked.replace("?", facts)
    parts = task.batch_key.split("|")
    # The separator may stand in the facts too (numpy writes |u1), and the places of the others are counted by it.
    parts[marks[position]] = parts[marks[position]][:-1] + facts.replace("|", "")
    return "|".join(parts)


def timing(task: TaskState, result: TaskResult, now: float) -> Timing:
    """For a result: seconds from submission to its end."""
    ready = task.ready_at or now
    assigned = task.assigned_at or now
    return Timing(
        waiting=ready - task.submitted,
        queued=max(0.0, assigned - ready),
        transfer=max(0.0, now - assigned - result.run),
        run=result.run,
        batch=task.batch_size,
        attempts=max(1, task.attempt),
        slack=None if task.deadline is None else task.deadline - now,
        missing=None if task.spec.parent else task.graph.missing,
    )
