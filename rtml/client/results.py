"""How futures end: with a result, by their submitter's wish, or with the connection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rtml.client import handles, streams
from rtml.client.future import PENDING, Future, outcome_of
from rtml.client.waiting import offer
from rtml.errors import TaskCancelled
from rtml.messages import CANCELLED, ERROR, OK, Results, WatchResults

if TYPE_CHECKING:
    from rtml.client.client import Client


def resolve(client: Client, message: Results | WatchResults) -> None:
    """Tasks have ended: so do their futures, and whoever waits for them is told."""
    told: list[tuple[Future[Any], int]] = []
    resolved: list[Future[Any]] = []
    freed: list[list[Any] | None] = []
    with client.lock:
        pop = client._pending.pop
        for result in client.core.receive(message, 0.0):
            future = pop(result.id, None)
            if future is None:
                future = client._handles.get(result.id)
                if future is None or future._state is not PENDING:
                    continue
            future._timing = result.timing
            if result.folded is not None:
                future._used = result.folded.used
            payload, outcome = result.payload, result.outcome
            if result.handles or payload.__class__ is not bytes:
                handles.hold(client, future, result)
            if outcome == OK:
                waited = future._settle(payload, None, OK)
            else:
                waited = future._settle(None, outcome_of(result), outcome)
            if waited:
                told.append((future, outcome))
            resolved.append(future)
        ends = streams.ended(client, message.results) if client._streams else ()
        if client._kept:
            freed = [client._kept.pop(result.id, None) for result in message.results]
    for future, outcome in told:
        future._announce(outcome)
    for waiter in ends:
        waiter.notify(None)
    if client._groups:
        offer(client, resolved)
    # Dropped here, without the lock: finalisers of what was kept may do anything.
    del freed


def cancel(client: Client, futures: Iterable[Future[Any]]) -> list[Future[Any]]:
    """Cancel those of this client's futures that have not ended, and return them."""
    told = []
    with client.lock:
        chosen = [future for future in futures if future._state is PENDING]
        client.core.cancel([future.id for future in chosen])
        for future in chosen:
            client._pending.pop(future.id, None)
            if future._settle(None, TaskCancelled("the task was cancelled by its submitter"), CANCELLED):
                told.append(future)
    for future in told:
        future._announce(CANCELLED)
    if chosen:
        offer(client, chosen)
        streams.abandon(client, chosen)
        client.driver.flush()
    return chosen


def fail_all(client: Client, error: BaseException) -> None:
    """The connection is lost for good: all futures end with `error`."""
    with client.lock:
        client._lost, client._closed = error, True
        futures = list(client._pending.values())
        client.core.cancel(list(client._pending))
        client._pending.clear()
        watched = [future for future in client._handles.values() if future._state is PENDING]
        futures = list(dict.fromkeys([*futures, *watched]))
        told = [future for future in futures if future._settle(None, error, ERROR)]
    for future in told:
        future._announce(ERROR)
    offer(client, futures)
    streams.abandon(client, futures)
    for waiter, body in list(client._queries.values()):
        body.append("")
        waiter.notify(None)
