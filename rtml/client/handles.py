"""Futures by the ids of their tasks: ours that travelled and come back, and others' that came here."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any

from rtml.client.future import PENDING, Future
from rtml.client.references import Lease
from rtml.client.waiting import offer
from rtml.messages import CANCELLED, ERROR, OK, ObjectRef, TaskResult

if TYPE_CHECKING:
    from rtml.client.client import Client


def known(client: Client, task: int) -> Future[Any] | None:
    """The future of a task, if this process has one. Under the lock."""
    return client._pending.get(task) or client._escaped.get(task) or client._handles.get(task)


def handle(client: Client, task: int) -> Future[Any]:
    """The future of a task of anybody's, by its id. Under the lock."""
    future = known(client, task)
    if future is None:
        future = client._handles[task] = Future(client, task)
        future._held = [Lease(client, "unwatch", task)]
        client.core.watch(task)
    elif task not in client._handles and client.core.keep(task):
        future._held = [*(future._held or ()), Lease(client, "unwatch", task)]
    return future


def ended(client: Client, task: int, payload: bytes | ObjectRef | None, failure: Any) -> Future[Any]:
    """The future of a task that had ended when its handle was sent."""
    cancelled = isinstance(failure, concurrent.futures.CancelledError)
    outcome = OK if failure is None else CANCELLED if cancelled else ERROR
    tell = False
    with client.lock:
        future = known(client, task)
        if future is None:
            future = client._handles[task] = Future(client, task)
        settled = future._state is PENDING and task not in client._pending
        if settled:
            tell = future._settle(payload, failure, outcome)
    if tell:
        future._announce(outcome)
    if settled and client._groups:
        offer(client, [future])
    return future


def ended_value(client: Client, task: int, value: Any) -> Future[Any]:
    """The future of a task that had ended, with a large value that is this process's business from now on."""
    with client.lock:
        future = known(client, task)
    return client.put(value) if future is None else future


def hold(client: Client, future: Future[Any], result: TaskResult) -> None:
    """Keep alive what the result refers to: its shared memory, the futures in it. Under the lock."""
    held: list[Any] = [] if future._held is None else future._held
    if isinstance(result.payload, ObjectRef):
        held.append(Lease(client, "release", result.payload.id))
    # Watched before the result is acknowledged, else the dispatcher might forget them.
    held += [handle(client, task) for task in result.handles or ()]
    future._held = held
