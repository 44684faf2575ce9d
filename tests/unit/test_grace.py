"""How long a submitter may be away: what it asked for, else what the dispatcher allows."""

from __future__ import annotations

import pytest

from rtml.graph.check import check
from rtml.graph.core import Core
from rtml.graph.tables import Limits
from rtml.messages import CLIENT, Define, Function, Hello, Submit, Task, task_id


@pytest.mark.parametrize(
    ("asked", "away", "kept"), [(0.0, 1.9, True), (0.0, 2.1, False), (30.0, 29.0, True), (30.0, 31.0, False)]
)
def test_tasks_wait_for_their_submitter_as_long_as_it_asked(asked: float, away: float, kept: bool) -> None:
    core = Core(1, Limits(session_grace=2.0))
    task = task_id(7, 1)
    core.handle(
        [(1, [Hello(CLIENT, 7, grace=asked), Define([Function(5, "f", "m:f")]), Submit([Task(task, 5, b"")])])], 0.0
    )
    core.handle([(1, None)], 1.0)
    core.handle([], 1.0 + away)
    assert (task in core.tables.tasks) is kept
    check(core)
