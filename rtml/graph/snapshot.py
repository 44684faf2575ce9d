"""What the core knows, in numbers, for operators."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rtml.graph.state import State

if TYPE_CHECKING:
    from rtml.graph.core import Core


def snapshot(core: Core) -> dict[str, Any]:
    """Numbers for `rtml status` and metrics; costs time in proportion to the tasks."""
    tables = core.tables
    states = [0, 0, 0, 0]
    for task in tables.tasks.values():
        states[task.state] += 1
    return {
        "tasks": dict(zip(State.NAMES, states, strict=True)),
        "sessions": len(tables.sessions),
        "peers": dict(Counter(session.role for session in tables.peers.values())),
        "functions": len(tables.functions),
        "objects": len(tables.objects),
        "dropped_messages": core.dropped,
        "nodes": [
            {
                "name": node.name,
                "cpu": node.cpu,
                "free_cpu": node.free_cpu,
                "resources": node.extra,
                "free": node.free_extra,
                "executors": [
                    {
                        "id": worker.id,
                        "role": worker.role,
                        "queued": len(worker.queue),
                        "blocked": len(worker.stack),
                        "lagging": worker.lagging,
                    }
                    for worker in node.workers.values()
                ],
            }
            for node in tables.nodes.values()
        ],
        "dispatchers": [
            {
                "name": worker.node.name,
                "above": worker.upward,
                "cpu": worker.node.cpu,
                "free_cpu": worker.node.free_cpu,
                "resources": worker.node.extra,
                "given": len(worker.queue),
                "taken": 0 if worker.session is None else len(worker.session.delegations),
                "connected": worker.session is not None and worker.session.peer is not None,
            }
            for worker in tables.remotes.values()
        ],
        "actors": core.actors.snapshot(),
    }
