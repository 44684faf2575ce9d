"""rtml: a real-time engine for dynamic graphs of machine-learning tasks.

    import rtml

    @rtml.task
    def square(x): return x * x

    with rtml.connect():
        print(rtml.get([square.submit(n) for n in range(10)]))

Every name is loaded when it is first used: the processes of an engine import parts of this package and must stay small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtml.client.actors import Actor, actor, get_actor, kill, method, stop
    from rtml.client.anytime import Anytime
    from rtml.client.api import (
        allreduce,
        anytime,
        as_completed,
        broadcast,
        cancel,
        connect,
        gather,
        get,
        map,
        put,
        reduce,
        ref,
        shutdown,
        submit,
        wait,
    )
    from rtml.client.api import client as current
    from rtml.client.client import Client
    from rtml.client.context import TaskInfo, current_task
    from rtml.client.functions import RemoteFunction, task
    from rtml.client.future import Future, Ref
    from rtml.client.served import served
    from rtml.models import model

__version__ = "0.1.0"

_API = "rtml.client.api"
_ACTORS = "rtml.client.actors"
_NAMES = {
    "Actor": _ACTORS,
    "Anytime": "rtml.client.anytime",
    "Client": "rtml.client.client",
    "Future": "rtml.client.future",
    "Ref": "rtml.client.future",
    "RemoteFunction": "rtml.client.functions",
    "TaskInfo": "rtml.client.context",
    "actor": _ACTORS,
    "allreduce": _API,
    "anytime": "rtml.client.anytime",
    "as_completed": _API,
    "broadcast": _API,
    "cancel": _API,
    "connect": _API,
    "current": _API,
    "current_task": "rtml.client.context",
    "gather": _API,
    "get": _API,
    "get_actor": _ACTORS,
    "kill": _ACTORS,
    "map": _API,
    "method": _ACTORS,
    "model": "rtml.models",
    "put": _API,
    "reduce": _API,
    "ref": _API,
    "served": "rtml.client.served",
    "shutdown": _API,
    "stop": _ACTORS,
    "submit": _API,
    "task": "rtml.client.functions",
    "wait": _API,
}

__all__ = [
    "Actor", "Anytime", "Client", "Future", "Ref", "RemoteFunction", "TaskInfo", "actor", "allreduce", "anytime",
    "as_completed", "broadcast", "cancel", "connect", "current", "current_task", "gather", "get", "get_actor", "kill",
    "map", "method", "model", "put", "reduce", "ref", "served", "shutdown", "stop", "submit", "task", "wait",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name)
    if module is None:
        raise AttributeError(f"module 'rtml' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), "client" if name == "current" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
