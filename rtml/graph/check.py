"""The invariants of the core, numbered, each in one sentence. Tests and the simulator call `check` after every wake-up.

They hold between two calls of `Core.handle`, not inside one. The cost is in proportion to everything the core knows,
so production code does not call this.
"""

from __future__ import annotations

from typing import Final

from rtml.graph.core import Core
from rtml.graph.invariants import actors, kept, tasks, workers
from rtml.graph.invariants.common import Check

#: I1, I2, ... in this order.
INVARIANTS: Final[tuple[Check, ...]] = (
    tasks.tasks_by_id,
    tasks.done_has_result,
    tasks.ready_is_queued,
    tasks.lane_counts,
    tasks.assigned_is_held,
    tasks.waiting_is_awaited,
    tasks.owned,
    tasks.children,
    tasks.live_counts,
    tasks.pins,
    workers.queue_contents,
    workers.idle_workers,
    workers.crowded_workers,
    workers.blocked_workers,
    workers.accounts,
    workers.shapes,
    workers.loads,
    kept.serials,
    kept.undelivered,
    kept.receipts,
    kept.holds,
    kept.objects,
    kept.inputs,
    kept.peers,
    workers.nodes,
    kept.proxies,
    kept.delegations,
    kept.settled,
    tasks.work_conserving,
    tasks.plans,
    actors.actors,
    actors.calls_in_order,
    actors.actors_served,
    workers.pairs,
)


def check(core: Core) -> None:
    """Look at everything the core knows.

    Raises:
        AssertionError: an invariant does not hold; the message has its number, its sentence and the offenders.
    """
    for number, invariant in enumerate(INVARIANTS, 1):
        broken = list(invariant(core))
        assert not broken, f"I{number}: {invariant.__doc__} But: {broken[:5]}"
