"""What the dispatcher learns of programs from tasks that ended."""

from __future__ import annotations

import pytest

from rtml.graph.calls import Calls
from rtml.graph.tables import Ended
from rtml.messages import ERROR, OK

ROOT = 7


def end(
    function: str, parent: int = ROOT, *, graph: int = 1, outcome: int = OK, batch: int = 1, ran: bool = True
) -> Ended:
    assigned = 10.3 if ran else 0.0
    return Ended(9, parent, graph, function, outcome, 1, 10.0, 10.1, assigned, 11.0, 0.5, 3, batch, "", None)


def test_the_steps_of_a_program_are_what_its_graphs_called() -> None:
    calls = Calls()
    calls.count([end("crop"), end("detect"), end("crop"), end("read", 0)])
    calls.count([end("detect", graph=2), end("read", 0, graph=2), end("alone", 0, graph=3)])
    calls.count([end("crop", graph=4)])  # its root has not ended
    assert calls.describe()["steps"] == {"read": {"crop": 1, "detect": 2}}


def test_calls_by_tasks_are_counted_with_where_their_time_went() -> None:
    calls = Calls()
    calls.count(
        [end("f"), end("f", batch=2), end("f", batch=2), end("f", outcome=ERROR), end("f", ran=False, outcome=ERROR)]
    )
    calls.count([end("f", 0)])  # a client's own call
    found = calls.describe()["called"]["f"]
    assert (found["ok"], found["failed"]) == (3, 2)
    assert found["seconds"] == pytest.approx(3.0)
    assert found["failed_seconds"] == pytest.approx(2.0)
    assert found["queued"] == pytest.approx(0.9)
    assert found["transfer"] == pytest.approx(0.6)
    assert found["run"] == pytest.approx(1.5)
    assert {size: batch[0] for size, batch in found["batches"].items()} == {1: 1, 2: 2}
    assert found["batches"][2][1:] == [pytest.approx(0.4), pytest.approx(1.0)]


def test_what_is_kept_is_bounded() -> None:
    calls = Calls()
    calls.count([end(f"f{number}", graph=number) for number in range(10_000)])
    assert len(calls.called) == 1024
    calls.count([end(f"root{number}", 0, graph=number) for number in range(10_000)])
    assert len(calls.steps) == 1024
    known = next(iter(calls.steps))
    calls.count([end(f"f{number}") for number in range(5_000)])
    calls.count([end(known, 0)])
    assert len(calls.steps[known]) == 1024
