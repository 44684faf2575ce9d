"""Mapped segments: what keeps them mapped, and pinned."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from rtml.store import Store

MIB = 1 << 20


@pytest.fixture
def directory() -> Iterator[str]:
    made = tempfile.mkdtemp(dir="/dev/shm", prefix="test-segment-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def owner(directory: str) -> Iterator[Store]:
    store = Store(directory, 0x11)
    yield store
    store.close()


def test_views_in_garbage_outlive_the_finaliser_of_their_mapping(owner: Store, directory: str) -> None:
    class Late:
        """Looks at its view when it is finalised."""

        def __init__(self, cycle: list[Any]) -> None:
            self.cycle = cycle
            self.view = cycle[0]

        def __del__(self) -> None:
            seen.append(self.view[-1])

    seen: list[int] = []
    ref = owner.put([bytes([7]) * MIB])
    for session in range(0x30, 0x30 + 8):
        reader = Store(directory, session)
        # Not an array: the collector looks through views, and not into arrays.
        cycle: list[Any] = [reader.get(ref)[0]]
        cycle += [Late(cycle), *([Late(cycle)] if session % 2 else [])]
        reader._foreign.clear()
        del cycle
        gc.collect()
        reader.close()
    assert seen == [7] * 12
    assert not owner.pinned(ref.id)
    owner.free(ref.id)
    assert owner.put([bytes([3]) * MIB]).segment == ref.segment
