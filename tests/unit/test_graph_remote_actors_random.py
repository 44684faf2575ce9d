"""Actors and streams on trees of dispatchers under random calls, deaths and cuts: a few of the seeds of `make sim`."""

from __future__ import annotations

import pytest

from tests.sim.trees import run_tree

SEEDS = 20


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_call_and_every_item_comes_once_and_in_order(seed: int) -> None:
    assert run_tree(seed) == ""
