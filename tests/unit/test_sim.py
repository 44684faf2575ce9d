"""The simulator itself: the same seed gives the same run, and it does find what it is there to find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtml.graph.keeping import Keeping
from rtml.graph.workforce import Workforce
from tests.sim.run import run_seed

_DIGESTS = "from tests.sim.run import run_seed; print(*[run_seed(seed).digest for seed in range(12)])"


def _digests(hash_seed: str) -> str:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", _DIGESTS]
    return subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout


def test_same_seed_same_log() -> None:
    """Also in other processes, where sets of strings have another order."""
    first, second = _digests("1"), _digests("2")
    assert first == second
    assert first.split() == [run_seed(seed).digest for seed in range(12)]


def test_seeds_differ() -> None:
    assert len({run_seed(seed).digest for seed in range(6)}) == 6


def test_finds_lost_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What executors give back is forgotten: some program waits for ever, or an invariant says why it would."""
    monkeypatch.setattr(Workforce, "returned", lambda *_: [])
    assert any(run_seed(seed).error for seed in range(30))


def test_finds_results_that_are_forgotten_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeping, "hold", lambda *_: None)
    assert any(run_seed(seed).error for seed in range(60))


def test_finds_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeping, "unwatch", lambda *_: None)
    assert any(run_seed(seed).error for seed in range(60))
