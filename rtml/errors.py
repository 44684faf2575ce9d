"""The error tree: everything rtml raises by its own decision, with what a gateway says about it.

User exceptions keep their own type; they reach the submitter with the remote traceback attached
(`rtml.codec.decode_error`).
"""

from __future__ import annotations

import concurrent.futures


class RtmlError(Exception):
    """Base of all errors of rtml itself."""

    #: What an HTTP gateway answers with.
    http_status: int = 500


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


class LimitExceeded(SubmitError):
    """A graph grew over a limit (live tasks, depth, payload size); the message names the limit and how to raise it."""


class Unschedulable(SubmitError):
    """No worker can ever meet the task's resource request."""


class TaskError(RtmlError):
    """A remote exception whose own type could not be carried over; message and traceback are the remote ones."""


class TaskCancelled(concurrent.futures.CancelledError, RtmlError):
    """The task was cancelled: by its submitter, with its parent, or because nobody waits for it any more."""

    http_status = 499


class DeadlineExceeded(RtmlError, TimeoutError):
    """The graph's deadline passed before the task ended."""

    http_status = 504


class TaskTimeout(RtmlError, TimeoutError):
    """One attempt ran longer than the task's `timeout`; its process was ended."""

    http_status = 504


class WorkerDied(RtmlError):
    """The executor process died while it ran the task, and no retry was left."""


class BatchError(RtmlError):
    """A batch function did not return what batch functions return: a list with one result per call."""


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
