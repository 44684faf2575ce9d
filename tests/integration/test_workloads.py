"""The papers' workloads (benchmarks/workloads), small: the same results however they are run, and whoever is killed."""

from __future__ import annotations

from typing import Any

import pytest

import rtml
from benchmarks.workloads import atari, hotos_rtml, hotos_single
from tests.integration.engine import children_of_this, eventually, kill, processes

#: Frames of a turn, rounds, simulations.
SMALL = (40, 12, 4)


@pytest.fixture(scope="module")
def expected() -> str:
    found: str = hotos_single.run(*SMALL)["fingerprint"]
    return found


def test_trajectories_do_not_depend_on_batches(expected: str) -> None:
    now = [atari.first(number) for number in range(SMALL[2])]
    for _ in range(SMALL[1]):
        now = [atari.simulate(one, atari.policy(atari.screens([one]))[0], SMALL[0]) for one in now]
    assert atari.fingerprint_of(now) == expected
    assert atari.fingerprint_of(now[1:]) != expected


class Killer:
    """`rtml.wait` that kills a process of this role when it is called for the sixth time."""

    def __init__(self, role: str, number: int) -> None:
        self._wait = rtml.wait
        self._role = role
        self._number = number
        self._left = 6

    @property
    def done(self) -> bool:
        """Whether it has killed one."""
        return self._left <= 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            (supervisor,) = children_of_this()
            assert eventually(lambda: len(processes(supervisor)[self._role]) > self._number)
            kill(processes(supervisor)[self._role][self._number])
        return self._wait(*arguments, **options)


@pytest.mark.parametrize(
    ("run", "victims"),
    [
        (hotos_rtml.bsp, [("executor", 0), ("dispatcher", 0), ("supervisor", 0)]),
        (hotos_rtml.pipelined, [("executor", 1), ("dispatcher", 0)]),
    ],
)
def test_kill_any_process_of_the_run(
    run: Any, victims: list[tuple[str, int]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotos_rtml, "GROUP", 2)
    runs = hotos_rtml.Runs(run)
    try:
        for role, number in victims:
            with monkeypatch.context() as patch:
                killer = Killer(role, number)
                patch.setattr(rtml, "wait", killer)
                assert runs(*SMALL)["fingerprint"] == expected, role
                assert killer.done
    finally:
        runs.close()
