"""Values that lie far away: how an event loop waits for them, and how they are had when they are lost."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rtml.errors import ObjectLost, RtmlError
from rtml.messages import ObjectRef

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.future import Future


def brought(client: Client, payload: Any) -> Generator[Any, None, Any]:
    """From a coroutine: fetches a payload of another machine in a thread. Returns what keeps it here."""
    import asyncio  # here, because programs without an event loop do without it

    return (yield from asyncio.to_thread(_keep, client, payload).__await__())


def _keep(client: Client, payload: ObjectRef) -> Any:
    try:
        return client.store.get(payload)
    except RtmlError:
        return None  # whoever decodes it gets the error


def again(client: Client, future: Future[Any], lost: ObjectLost) -> Any:
    """The value of a lost result: the engine runs the task that made it once more, if it can.

    Raises:
        ObjectLost: it cannot; the message says why.
    """
    payload = future._payload
    if not isinstance(payload, ObjectRef) or not payload.node:
        raise lost
    try:
        answer = client.query("rebuild", str(payload.id))
    except (RtmlError, RuntimeError, TimeoutError):
        raise lost from None  # also in an event loop, which must not wait
    kind, _, number = answer.partition(" ")
    if kind != "task" or not number.isdigit():
        raise ObjectLost(f"{lost}; {answer}") from None
    substitute = client.handle(int(number))
    value = substitute.result()
    with client.lock:
        future._held = [*(future._held or ()), substitute]
    return value
