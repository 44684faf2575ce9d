"""Executors give shared memory back when they have nothing else to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rtml
from tests.integration.engine import eventually


@pytest.fixture(scope="module")
def client() -> Iterator[rtml.Client]:
    with rtml.connect(workers=1) as client:
        yield client


def read(array: Any) -> tuple[int, int]:
    return os.getpid(), int(array.sum())


async def read_async(array: Any) -> tuple[int, int]:
    return read(array)


def mapped_but_gone(pid: int) -> int:
    """Mappings of objects of the client's whose files are gone."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("/dev/shm/rtml-" in line and line.endswith("(deleted)") for line in lines)


@pytest.mark.parametrize("function", [read, read_async])
def test_an_idle_executor_forgets_what_its_owner_has_removed(client: rtml.Client, function: Any) -> None:
    pid, total = client.submit(function, np.ones(1 << 20, np.uint8)).result(20)
    assert total == 1 << 20
    client.wait_idle(10)
    client.store.sweep()
    client.store._drop_idle(0)
    assert mapped_but_gone(pid)
    assert eventually(lambda: not mapped_but_gone(pid))
