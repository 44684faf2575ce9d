"""Objects that have no room in shared memory: on the disk, and read from there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtml.errors import LimitExceeded
from rtml.exchange import Place
from rtml.store import Store

MIB = 1 << 20
OWNER = 0x11
READER = 0x22


@pytest.fixture
def directory() -> Iterator[str]:
    made = tempfile.mkdtemp(prefix="test-spilling-", dir="/dev/shm")
    yield made
    shutil.rmtree(made)


def spilling(directory: str, memory: int, spill_max: int) -> Store:
    disk = Path(directory, "disk")
    disk.mkdir(exist_ok=True)
    return Store(directory, OWNER, place=Place(memory=memory, spill=str(disk), spill_max=spill_max))


def test_what_has_no_room_lies_on_the_disk_and_is_read_from_there(directory: str) -> None:
    store = spilling(directory, 8 * MIB, 64 * MIB)
    reader = Store(directory, READER, place=store.place)
    refs = [store.put([bytes([number]) * (2 * MIB), b"tail"]) for number in range(10)]
    assert len(list(Path(store.place.spill).iterdir())) >= 6
    assert sum(path.stat().st_size for path in Path(directory).glob("*-*")) <= 8 * MIB
    for number, ref in enumerate(refs):
        for one in (store, reader):
            body, tail = one.get(ref)
            assert (body[0], body[-1], len(body), bytes(tail)) == (number, number, 2 * MIB, b"tail")
            del body, tail
    for ref in refs:
        store.free(ref.id)
    store.sweep()
    assert list(Path(store.place.spill).iterdir()) == []
    reader.close()
    store.close()


def test_the_oldest_that_nobody_reads_goes_first(directory: str) -> None:
    store = spilling(directory, 8 * MIB, 64 * MIB)
    first = store.put([bytes(2 * MIB)])
    kept = store.get(first)
    second = store.put([bytes(2 * MIB)])
    for _ in range(3):
        store.put([bytes(2 * MIB)])
    spilled = {path.name for path in Path(store.place.spill).iterdir()}
    assert second.segment in spilled
    assert first.segment not in spilled
    del kept
    store.close()
    assert list(Path(store.place.spill).iterdir()) == []


def test_a_full_disk_is_a_clear_error_and_not_the_end(directory: str) -> None:
    store = spilling(directory, 4 * MIB, 4 * MIB)
    refs = [store.put([bytes(MIB)]) for _ in range(5)]
    with pytest.raises(LimitExceeded, match=r"object_memory\); .*disk has .* of 4\.0 MiB \(spill_max\)"):
        refs.extend(store.put([bytes(MIB)]) for _ in range(5))
    for ref in refs:
        store.free(ref.id)
    store.put([bytes(MIB)])
    store.close()
