"""Actors on trees of dispatchers under random calls, deaths and cuts: see `actorplay`."""

from __future__ import annotations

import pytest

from tests.unit.actorplay import ActorPlay

SEEDS = 60


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_call_ends_once_and_in_order(seed: int) -> None:
    play = ActorPlay(seed)
    for _ in range(play.random.randint(20, 150)):
        play.step()
    play.end()
