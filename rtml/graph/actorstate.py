"""What is known of an actor that has not ended, and what is said of actors."""

from __future__ import annotations

from typing import Any

from rtml.graph.queues import ReadyQueue
from rtml.graph.state import TaskState, WorkerState
from rtml.messages import ACTOR, ASYNC_ACTOR, ActorOptions, ErrorInfo, ObjectRef, TaskResult


class ActorState:
    """An actor that has not ended: one of ours, or one of another dispatcher's that is called from here."""

    __slots__ = (
        "awaited", "calls", "checkpoint", "claims", "killed", "leaving", "options", "ordered", "queues", "retried",
        "role", "stopping", "task",
    )  # fmt: skip

    def __init__(self, task: TaskState, options: ActorOptions) -> None:
        #: that created it, or the proxy of that
        self.task = task
        self.options = options
        several = task.function.definition.asynchronous or options.concurrency > 1
        self.role = ASYNC_ACTOR if several else ACTOR
        self.ordered = options.concurrency <= 1
        #: unfinished calls, by id
        self.calls: dict[int, TaskState] = {}
        #: those that no process has, by the session that submitted them first; the next one to be served comes first
        self.queues: dict[int, ReadyQueue] = {}
        #: calls that went to where the actor was before it came here: later ones of their submitters come after them
        self.awaited: set[int] = set()
        self.checkpoint: bytes | ObjectRef | None = None
        #: accepts no more calls, and ends after those it has (or, elsewhere, is about to be told so)
        self.stopping = False
        #: a call was tried again after it had begun: those handed over behind it come before its next attempt
        self.retried = False
        #: its process was told so; or its dispatcher, that nobody here has a handle
        self.leaving = False
        #: its process was ordered to be ended
        self.killed = False
        #: it waits to hear that its name is its own
        self.claims = False

    @property
    def name(self) -> str:
        """For messages."""
        return self.task.profile.name


def reason(which: str, result: TaskResult) -> ErrorInfo:
    """What calls on an actor that ended so fail with."""
    error = result.error
    if error is not None and error.type == "ActorDied":
        return error
    why = "it was stopped" if error is None else f"{error.type}: {error.message}"
    traceback = "" if error is None else error.traceback
    return ErrorInfo("ActorDied", f"{which} has ended: {why}", traceback)


def describe(number: int, name: str, methods: Any, concurrent: bool) -> dict[str, Any]:
    """What makes a handle of an actor."""
    return {"id": number, "name": name, "methods": methods, "concurrent": concurrent}


def name_taken(name: str) -> str:
    """For people."""
    return f"an actor named {name!r} exists already; see rtml.get_actor"


def reachable(checkpoint: bytes | ObjectRef | None, gone: WorkerState) -> bytes | ObjectRef | None:
    """A checkpoint, unless it lay with a dispatcher that is gone: then the actor begins anew."""
    lost = isinstance(checkpoint, ObjectRef) and checkpoint.node in ("", gone.node.data)
    return None if lost else checkpoint
