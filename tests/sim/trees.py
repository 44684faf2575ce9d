"""Trees of dispatchers under random work, with actors, streams, cancellation, cut links and nodes that die.

Unlike the worlds of `tests.sim.run`, these have no clock of their own and only the dispatchers' cores are real: see
`tests.unit.actorplay`.
"""

from __future__ import annotations

import traceback

from tests.unit.actorplay import ActorPlay


def run_tree(seed: int) -> str:
    """Run one seed; what went wrong, "" if nothing did."""
    try:
        play = ActorPlay(seed)
        for _ in range(play.random.randint(20, 150)):
            play.step()
        play.end()
    except Exception as problem:
        last = traceback.extract_tb(problem.__traceback__)[-1]
        return f"{type(problem).__name__} in {last.name}, line {last.lineno}: {problem}"
    return ""
