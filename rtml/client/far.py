"""Values that lie far away: how an event loop waits for them, and how they are had when they are lost."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from rtml.errors import ObjectLost, RtmlError
from rtml.messages import ObjectRef

if TYPE_CHECKING:
    from rtml.client.client import Client
    from rtml.client.future import Future

#: Nodes that are asked for a copy of what is lost.
_ATTEMPTS: Final = 4


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
    """The value of a lost result: another node has a copy, or the engine runs the task that made it once more.

    Raises:
        ObjectLost: it cannot; the message says why.
    """
    payload = future._payload
    for _ in range(_ATTEMPTS):
        if not isinstance(payload, ObjectRef) or not payload.node:
            break
        try:
            answer = client.query("rebuild", f"{payload.id} {payload.node}")
        except (RtmlError, RuntimeError, TimeoutError):
            break  # also in an event loop, which must not wait
        kind, _, where = answer.partition(" ")
        if kind == "at":
            payload = msgspec.structs.replace(payload, node=where)
            try:
                return client.decode(payload, future)
            except ObjectLost:
                continue
        if kind != "task" or not where.isdigit():
            raise ObjectLost(f"{lost}; {answer}") from None
        substitute = client.handle(int(where))
        value = substitute.result()
        with client.lock:
            future._held = [*(future._held or ()), substitute]
        return value
    raise lost from None
