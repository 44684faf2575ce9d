"""The error tree: everything rtml raises by its own decision, with what a gateway says about it.

User exceptions keep their own type; they reach the submitter with the remote traceback attached
(`rtml.codec.decode_error`).
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any


class RtmlError(Exception):
    """Base of all errors of rtml itself."""

    #: What an HTTP gateway answers with.
    http_status: int = 500

    @property
    def details(self) -> dict[str, Any]:
        """Facts beside the message: numbers and names that travel with it, as the constructor takes them."""
        return {}

    @classmethod
    def made(cls, message: str, details: Mapping[str, Any] | None) -> RtmlError:
        """The error as it was elsewhere; details that this class does not know (any more) are dropped."""
        try:
            return cls(message, **details) if details else cls(message)
        except TypeError:
            return cls(message)


class ConnectionLost(RtmlError):
    """The dispatcher cannot be reached any more."""

    http_status = 503


class ProtocolError(RtmlError):
    """The peer speaks another protocol or version."""


class SubmitError(RtmlError):
    """A task was refused before it could run: unserialisable arguments, unknown options, a limit."""

    http_status = 400


class SerializationError(SubmitError, TypeError):
    """A function, argument or result cannot be pickled; the message names the part."""


class InvalidInput(RtmlError, ValueError):
    """The input is not what the program takes; the message says where. Programs may raise it, a gateway answers 400."""

    http_status = 400


class RowsDepend(RtmlError):
    """What a model makes of a row depends on the rows beside it: calls cannot share a run. The message says where."""


class LimitExceeded(SubmitError):
    """A graph grew over a limit (live tasks, depth, payload size); the message names the limit and how to raise it."""


class Unschedulable(SubmitError):
    """No worker can ever meet the task's resource request."""


class TaskError(RtmlError):
    """A remote exception whose own type could not be carried over; message and traceback are the remote ones."""


class TaskCancelled(concurrent.futures.CancelledError, RtmlError):
    """The task was cancelled: by its submitter, with its parent, or because nobody waits for it any more."""

    http_status = 499


class Superseded(TaskCancelled):
    """A newer call with the same `latest` key came before this one had begun."""


class OutOfTime(RtmlError, TimeoutError):
    """Something did not end in its time.

    Args:
        message: for people.
        missing: names of the steps that had not ended, as far as they are known.
    """

    http_status = 504

    def __init__(self, message: str = "", *, missing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = list(missing)

    @property
    def details(self) -> dict[str, Any]:
        """What was missing."""
        return {"missing": self.missing}


class DeadlineExceeded(OutOfTime):
    """The graph's deadline passed before the task ended."""


class TaskTimeout(OutOfTime):
    """One attempt ran longer than the task's `timeout`; its process was ended."""


class Overloaded(RtmlError):
    """The submission was refused at once: it could not have ended in time, or its tenant has too much unfinished.

    Args:
        message: for people.
        predicted: seconds that it would have taken; None if that was not the reason.
        budget: seconds that it had; None without a deadline.
        retry_after: seconds after which it is worth another try.
        quota: a limit of its tenant's own is the reason, not the load of the whole (HTTP 429 instead of 503).
    """

    http_status = 503

    def __init__(
        self,
        message: str = "",
        *,
        predicted: float | None = None,
        budget: float | None = None,
        retry_after: float = 1.0,
        quota: bool = False,
    ) -> None:
        super().__init__(message)
        self.predicted = predicted
        self.budget = budget
        self.retry_after = retry_after
        self.quota = quota
        if quota:
            self.http_status = 429

    @property
    def details(self) -> dict[str, Any]:
        """What was predicted, and when to come back."""
        names = ("predicted", "budget", "retry_after", "quota")
        return {name: getattr(self, name) for name in names}


class WorkerDied(RtmlError):
    """The executor process died while it ran the task, and no retry was left."""


class BatchError(RtmlError):
    """A batch function did not return what batch functions return: a list with one result per call."""


class ActorDied(RtmlError):
    """The actor has ended, or its process died with this call; the message says why."""


class UnknownSequence(InvalidInput):
    """A request goes on with a sequence that has not begun, or has ended; the message says which."""


class SequenceLost(RtmlError):
    """The process that held the state of a sequence has died; the sequence has to begin again."""

    http_status = 409


class DependencyFailed(RtmlError):
    """A future among the arguments ended without a value. Carries the dependency's own error as its cause."""


class NestingLimit(RtmlError):
    """Too many tasks of the node are blocked in `get` at the same time."""


class ResourceDeadlock(RtmlError):
    """The task needs a resource that only its own blocked ancestors hold."""


class ObjectLost(RtmlError):
    """A shared-memory object is gone and cannot be made again."""


def by_name(name: str) -> type[RtmlError] | None:
    """The class of this tree called `name`, or None."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, RtmlError) else None
