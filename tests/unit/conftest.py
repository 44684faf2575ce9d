"""Fixtures that several unit tests share."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from rtml.store import Store


@pytest.fixture
def directory() -> Iterator[str]:
    made = tempfile.mkdtemp(dir="/dev/shm", prefix="test-codec-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def store(directory: str) -> Iterator[Store]:
    made = Store(directory, 1)
    yield made
    made.close()


@pytest.fixture
def other(directory: str) -> Iterator[Store]:
    made = Store(directory, 2)
    yield made
    gc.collect()  # arrays that a traceback refers to
    made.close()
