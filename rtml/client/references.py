"""What futures and tasks refer to: values that are there already, and claims that end with their holder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from rtml.client.future import PENDING, Future
from rtml.errors import LimitExceeded
from rtml.exchange import Places
from rtml.messages import ObjectRef

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.core import ClientCore
    from rtml.messages import Task

#: Bytes of values of ended futures among one call's arguments, beside what lies in shared memory: they share a frame.
_VALUES_BYTES_MAX: Final = 48 * 1024 * 1024


class Dropping(Protocol):
    """Who is told when a claim ends."""

    def drop(self, kind: str, number: int) -> None:
        """Called by finalisers in any thread: must take no lock."""


class Lease:
    """A claim that ends with its holder: on shared memory ("free" own, "release" results), or a watched task."""

    __slots__ = ("_kind", "_number", "_owner")

    def __init__(self, owner: Dropping, kind: str, number: int) -> None:
        self._owner = owner
        self._kind = kind
        self._number = number

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._owner.drop(self._kind, self._number)


class Special(Protocol):
    """What makes a call other than a plain one: on an actor, of a stream."""

    def prepare(self, client: Client, task: Task) -> None:
        """Complete the task before it is submitted. Under the client's lock."""


def refresh(core: ClientCore, kept: dict[int, list[Any]], places: Places) -> None:
    """Before a resume: a new dispatcher knows only what comes with the tasks. Under the lock.

    Args:
        core: has the unresolved tasks.
        kept: what they refer to.
        places: where objects are that have moved.
    """
    for task in core.unresolved_tasks():
        if task.deps is not None:
            ended = {
                one.id: one._payload
                for one in kept.get(task.id, ())
                if isinstance(one, Future) and one._state is not PENDING and one._payload is not None
            }
            known = [(dep, payload if payload is not None else ended.get(dep)) for dep, payload in task.deps]
            task.deps = [(dep, places.where(one) if isinstance(one, ObjectRef) else one) for dep, one in known]


def values_of(
    deps: Sequence[Future[Any]], places: Places
) -> tuple[list[tuple[int, bytes | ObjectRef | None]], Future[Any] | None]:
    """What `Task.deps` says of these futures: the payloads of those that have ended; and the first that has failed.

    The caller holds the driver's lock until the task is with the core (rule 1 of `rtml.client.core`).

    Raises:
        LimitExceeded: the values are too large together.
    """
    links: list[tuple[int, bytes | ObjectRef | None]] = []
    size = 0
    for dep in deps:
        if dep._state is PENDING:
            links.append((dep.id, None))
            continue
        if dep._failure is not None:
            return links, dep
        payload = dep._payload
        if isinstance(payload, bytes):
            size += len(payload)
        elif payload is not None:
            payload = dep._payload = places.where(payload)
        links.append((dep.id, payload))
    if size > _VALUES_BYTES_MAX:
        raise LimitExceeded(
            f"the values of the {len(deps)} futures among the arguments have {size} bytes together, more than "
            f"{_VALUES_BYTES_MAX}; combine them in several steps"
        )
    return links, None


def link(client: Client, task: Task, deps: Sequence[Future[Any]], handles: Sequence[Future[Any]]) -> Future[Any] | None:
    """Fill in what a task refers to, and keep it alive. Under the lock. Returns a dependency that has failed."""
    kept: list[Any] = list(deps)
    if deps:
        task.deps, failed = values_of(deps, client.store.places)
        if failed is not None:
            return failed
    if handles:
        task.handles = [future.id for future in handles]
        for future in handles:
            client._escaped[future.id] = future
        kept += handles
    if isinstance(task.args, ObjectRef):
        kept.append(Lease(client, "free", task.args.id))
    client._kept[task.id] = kept
    return None
