"""In which order ready tasks run: small, pure, and exchangeable, so that policies can be compared.

Before it come the priority classes, and inside of a class the fair turns of sessions and tenants (`rtml.graph.queues`).
A policy says when a task counts as *due*, on the core's clock; among those whose turn it is the one that is due first
runs first. `benchmarks/policies.py` compares them; docs/deadlines.md has its table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple


class Policy(NamedTuple):
    """How ready tasks are ordered."""

    name: str
    #: Seconds after its graph began at which a task without a deadline, or with a late one, counts as due. It guards
    #: them against starving behind an endless row of urgent ones.
    patience: float
    #: When a task is due, from its deadline and the seconds that it will probably run; None: deadlines do not matter.
    due: Callable[[float, float], float] | None
    #: A batch that is not full waits for more calls as long as the tightest deadline among them allows.
    defer: bool = False


def _deadline(deadline: float, predicted: float) -> float:
    return deadline


def _latest_start(deadline: float, predicted: float) -> float:
    return deadline - predicted


POLICIES: Final[dict[str, Policy]] = {
    policy.name: policy
    for policy in (
        Policy("fifo", 0.0, None),
        Policy("edf", 10.0, _deadline),
        Policy("slack", 10.0, _latest_start),
        Policy("deferred", 10.0, _deadline, defer=True),
    )
}

#: Most turns in a row.
TURNS_MAX: Final = 1_000

#: What dispatchers do unless they are told otherwise.
DEFAULT: Final = "edf"


class Scheduling(NamedTuple):
    """What an operator decides about the order of tasks, and their places."""

    policy: Policy = POLICIES[DEFAULT]
    #: Turns in a row of a tenant's graphs where others wait too; 1 for who is not named.
    weights: dict[str, int] = {}  # noqa: RUF012 - never changed
    #: Tasks go to other nodes without regard to where their arguments are.
    blind: bool = False
