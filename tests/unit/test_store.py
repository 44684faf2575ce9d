"""The store: contents, lifetime of views in this and other processes, recycling, limits."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from rtml.errors import LimitExceeded, ObjectLost, RtmlError
from rtml.exchange import Place
from rtml.messages import ObjectRef, session_of
from rtml.segment import ALIGNMENT, ENTRIES, HEADER_OFFSET, SEGMENT_MIN, Mapping, is_alive, size_class
from rtml.store import Store

MIB = 1 << 20
OWNER = 0x11
READER = 0x22


@pytest.fixture
def directory() -> Iterator[str]:
    made = tempfile.mkdtemp(dir="/dev/shm", prefix="test-store-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def owner(directory: str) -> Iterator[Store]:
    store = Store(directory, OWNER)
    yield store
    store.close()


@pytest.fixture
def reader(directory: str) -> Iterator[Store]:
    store = Store(directory, READER)
    yield store
    store.close()


def files(store: Store) -> list[str]:
    return sorted(path.name for path in Path(store.directory).glob(f"{store.session:08x}-*"))


# --- contents ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300_000), max_size=8))
def test_round_trip(parts: list[bytes]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-store-") as directory:
        owner, reader = Store(directory, OWNER), Store(directory, READER)
        for _ in range(2):  # fresh, then recycled
            ref = owner.put(parts)
            assert [bytes(view) for view in reader.get(ref)] == parts
            assert [bytes(view) for view in owner.get(ref)] == parts
            owner.free(ref.id)
        assert len(files(owner)) == 1
        owner.close()
        reader.close()


def test_views_are_aligned_and_read_only(owner: Store, reader: Store) -> None:
    ref = owner.put([b"x", np.arange(5.0).data, b"yz"])
    for store in (owner, reader):
        parts = store.get(ref)
        assert all(np.frombuffer(part, np.uint8).ctypes.data % ALIGNMENT == 0 for part in parts)
        assert all(part.readonly for part in parts)
        array = np.frombuffer(parts[1], np.float64)
        assert array.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_buffers_of_any_shape(owner: Store) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    ref = owner.put([array.data, bytearray(b"abc"), np.zeros((0, 3)).data])
    assert [bytes(part) for part in owner.get(ref)] == [array.tobytes(), b"abc", b""]


def test_big_parts_recycled_with_and_without_numpy(
    owner: Store, reader: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(1).randbytes(3 * MIB + 17)
    owner.free(owner.put([data]).id)
    ref = owner.put([b"", data])
    assert reader.get(ref)[1] == data
    owner.free(ref.id)
    monkeypatch.delitem(sys.modules, "numpy")
    ref = owner.put([b"1", data[::-1]])
    assert reader.get(ref)[1] == data[::-1]


def test_reference(owner: Store) -> None:
    first, second = owner.put([b"a"]), owner.put([b"b"])
    assert session_of(first.id) == OWNER
    assert first.id != second.id
    assert first.segment != second.segment
    assert Store(owner.directory, 3, place=Place("here:1")).put([b""]).node == "here:1"


@given(st.integers(1, 1 << 40))
def test_size_classes(size: int) -> None:
    capacity = size_class(size)
    assert capacity >= size
    assert capacity % 4096 == 0
    assert capacity == SEGMENT_MIN or capacity <= 1.25 * size
    assert size_class(capacity) == capacity


# --- lifetime ---------------------------------------------------------------------------------------------------------


def test_recycled_only_when_the_last_view_is_gone(owner: Store, reader: Store) -> None:
    for store in (owner, reader):
        ref = owner.put([bytes([7]) * MIB])
        kept = np.frombuffer(store.get(ref)[0], np.uint8)[10:][::2].reshape(-1, 1)
        owner.free(ref.id)
        other = owner.put([bytes([8]) * MIB])
        assert other.segment != ref.segment
        assert (kept == 7).all()
        del kept
        owner.free(other.id)
        owner.sweep()
        # Both are idle now; the next two objects use them again.
        again = [owner.put([bytes([9]) * MIB]) for _ in range(2)]
        assert {again[0].segment, again[1].segment} == {ref.segment, other.segment}
        for each in again:
            owner.free(each.id)


def test_several_gets_are_one_pin(owner: Store, reader: Store) -> None:
    ref = owner.put([b"x" * MIB])
    views = [reader.get(ref) for _ in range(3)]
    owner.free(ref.id)
    for _ in range(3):
        owner.sweep()
        assert owner.put([b"y" * MIB]).segment != ref.segment
        views.pop()
    owner.sweep()
    assert owner.put([b"z" * MIB]).segment == ref.segment


def test_views_outlive_both_stores(owner: Store, directory: str) -> None:
    reader = Store(directory, 0x33)
    ref = owner.put([b"x" * MIB])
    view = reader.get(ref)[0]
    reader.close()
    # The pin still counts after the reader's store is closed,
    owner.free(ref.id)
    owner.sweep()
    assert owner.put([b"y" * MIB]).segment != ref.segment
    assert view == b"x" * MIB
    # and the memory stays when its file is gone.
    owner.close()
    assert view == b"x" * MIB
    del view
    os.close(reader._presence._fd)
    with pytest.raises(RtmlError, match="closed"):
        reader.put([b""])


SHUTDOWN = """
import sys
import numpy as np
from rtml.messages import ObjectRef
from rtml.store import Store

store = Store(sys.argv[1], 0x55)
mine = store.get(store.put([b"x" * 100_000]))
array = np.frombuffer(store.get(ObjectRef(int(sys.argv[2]), 1, sys.argv[3]))[0], np.uint8)
cycle = [mine, array[5:]]
cycle.append(cycle)
sys.kept_until_the_very_end = cycle, store
"""


def test_views_at_the_end_of_the_interpreter(owner: Store) -> None:
    ref = owner.put([b"x" * MIB])
    done = subprocess.run(
        [sys.executable, "-c", SHUTDOWN, owner.directory, str(ref.id), ref.segment], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_view_in_a_garbage_cycle(owner: Store, reader: Store) -> None:
    ref = owner.put([b"x" * MIB])
    cycle: list[Any] = [reader.get(ref)]
    cycle.append(cycle)
    owner.free(ref.id)
    owner.sweep()
    del cycle
    gc.collect()
    owner.sweep()
    assert owner.put([b"x" * MIB]).segment == ref.segment


def test_free_is_idempotent_and_ignores_strangers(owner: Store) -> None:
    ref = owner.put([b"a"])
    owner.free(ref.id)
    owner.free(ref.id)
    owner.free(12345)
    assert owner.objects == 0
    first, second = owner.put([b"b"]), owner.put([b"c"])
    assert first.segment != second.segment


def test_free_while_the_lock_is_held(owner: Store) -> None:
    """As a signal handler or a finaliser would do in the middle of `put`."""
    ref = owner.put([b"a"])
    with owner._lock:
        owner.free(ref.id)
    assert owner.put([b"b"]).segment == ref.segment


def test_lost_objects(owner: Store, reader: Store) -> None:
    ref = owner.put([b"a"])
    reader.get(ref)
    owner.free(ref.id)
    owner.put([b"b"])
    for store in (owner, reader):
        with pytest.raises(ObjectLost, match="recycled"):
            store.get(ref)
    with pytest.raises(ObjectLost, match="no segment"):
        reader.get(ObjectRef(1, 1, "00000099-1"))
    with pytest.raises(ObjectLost, match="no segment name"):
        reader.get(ObjectRef(1, 1, "../secret"))
    shutil.rmtree(owner.directory)
    try:
        with pytest.raises(ObjectLost, match="gone"):
            owner.put([bytes(MIB)])
    finally:
        Store.make(owner.directory)


def test_readers_forget_removed_segments(owner: Store, reader: Store) -> None:
    refs = [owner.put([b"x"]) for _ in range(5)]
    for ref in refs:
        reader.get(ref)
    assert len(reader._foreign) == 5
    owner.close()
    reader.sweep()
    assert not reader._foreign


def test_close(owner: Store, directory: str) -> None:
    kept = Store(directory, 5)
    ref = kept.put([b"x"])
    kept.close(unlink=False)
    assert owner.get(ref) == [b"x"]
    Store.remove_session(directory, 5)
    assert not files(kept)
    owner.put([b"x"])
    owner.close()
    owner.close()
    assert os.listdir(directory) == []
    Store.remove(directory)
    Store.remove(directory)
    Store.make(directory)
    assert Path(directory).stat().st_mode & 0o777 == 0o700


def test_a_full_pin_table_means_copies(owner: Store, directory: str) -> None:
    ref = owner.put([b"x" * MIB])
    fd = os.open(f"{directory}/{ref.segment}", os.O_RDWR)
    crowd = [Mapping.open(fd, 2 * SEGMENT_MIN, 1 + n, owner=False) for n in range(ENTRIES)]
    os.close(fd)
    assert all(mapping.pinnable for mapping in crowd)
    late = Store(directory, 0x44)
    view = late.get(ref)[0]
    owner.free(ref.id)
    owner.put([b"y" * MIB])
    assert bytes(view) == b"x" * MIB
    crowd.pop()
    late.close()
    later = Store(directory, 0x45)
    ref = owner.put([b"z" * MIB])
    assert later.get(ref)[0].readonly
    later.close()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_capacity(directory: str) -> None:
    store = Store(directory, OWNER, capacity=4 * MIB)
    refs = [store.put([bytes(MIB - HEADER_OFFSET - ALIGNMENT)]) for _ in range(4)]
    assert store.allocated == 4 * MIB
    with pytest.raises(LimitExceeded, match=r"holds 4.0 MiB of its 4.0 MiB in 4 objects.*shm-size"):
        store.put([b"x"])
    for ref in refs:
        store.free(ref.id)
    # Idle memory of one size makes room for another.
    big = store.put([bytes(3 * MIB)])
    assert store.allocated <= 4 * MIB
    view = store.get(big)
    store.free(big.id)
    with pytest.raises(LimitExceeded, match="1 more are freed but still read"):
        store.put([bytes(3 * MIB)])
    del view
    store.put([bytes(3 * MIB)])
    store.close()


def test_idle_memory_is_bounded(directory: str) -> None:
    store = Store(directory, OWNER, capacity=8 * MIB)
    refs = [store.put([bytes(MIB // 2)]) for _ in range(12)]
    for ref in refs:
        store.free(ref.id)
    assert store.allocated <= 4 * MIB
    assert sum((Path(directory) / name).stat().st_size for name in files(store)) == store.allocated
    store.close()


def test_idle_memory_of_a_large_store_is_bounded_too(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtml.store.IDLE_MAX", 2 * MIB)
    store = Store(directory, OWNER, capacity=64 * MIB)
    for ref in [store.put([bytes(MIB // 2)]) for _ in range(12)]:
        store.free(ref.id)
    assert store.allocated <= 2 * MIB
    store.close()


def test_no_room_in_the_file_system(owner: Store) -> None:
    """The limit on file sizes fails the allocation as a full tmpfs does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, limits[1]))
    try:
        with pytest.raises(LimitExceeded, match="File too large"):
            owner.put([bytes(4 * MIB)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert owner.allocated == 0
    assert not files(owner)
    owner.put([bytes(4 * MIB)])


def test_default_capacity_is_half_of_the_file_system(owner: Store) -> None:
    about = os.statvfs(owner.directory)
    assert owner.capacity == about.f_blocks * about.f_frsize // 2


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads(owner: Store, reader: Store) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                data = bytes([rng.randrange(256)]) * rng.choice((10, 200_000, 1_200_000))
                ref = owner.put([data])
                views = [rng.choice((owner, reader)).get(ref)[0] for _ in range(rng.randrange(3))]
                owner.free(ref.id)
                assert all(view == data for view in views)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    owner.sweep()
    assert owner.objects == 0
    assert owner._idle_bytes == owner.allocated


# --- processes --------------------------------------------------------------------------------------------------------


def read_in_child(pipe: Connection, directory: str, session: int) -> None:
    """Holds what it is told to hold: a reference to get and keep, None to let all go."""
    store = Store(directory, session)
    held: list[Any] = []
    while True:
        message = pipe.recv()
        if message is None:
            held.clear()
        else:
            held.append(np.frombuffer(store.get(message)[0], np.uint8))
        pipe.send([int(array[0]) for array in held if (array == array[0]).all()])


@pytest.fixture(params=["fork", "exec"])
def child(request: pytest.FixtureRequest, directory: str) -> Iterator[tuple[int, Connection]]:
    """The pid of a process that runs `read_in_child`, and the pipe to it."""
    here, there = multiprocessing.Pipe()
    if request.param == "exec":
        code = (
            "from multiprocessing.connection import Connection; from tests.unit.test_store import read_in_child;"
            f"read_in_child(Connection({there.fileno()}), {directory!r}, {READER})"
        )
        os.set_inheritable(there.fileno(), True)
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    else:
        pid = os.fork()
        if pid == 0:
            here.close()
            try:
                read_in_child(there, directory, READER)
            finally:
                os._exit(1)
    there.close()
    yield pid, here
    here.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ask(pipe: Connection, message: ObjectRef | None) -> Any:
    pipe.send(message)
    assert pipe.poll(60)
    return pipe.recv()


def test_pins_of_another_process(owner: Store, child: tuple[int, Connection]) -> None:
    _, pipe = child
    ref = owner.put([bytes([1]) * MIB])
    assert ask(pipe, ref) == [1]
    owner.free(ref.id)
    owner.sweep()
    other = owner.put([bytes([2]) * MIB])
    assert other.segment != ref.segment
    assert ask(pipe, other) == [1, 2]
    assert ask(pipe, None) == []
    owner.sweep()
    assert owner.put([bytes([3]) * MIB]).segment == ref.segment


def test_pins_of_a_killed_process(owner: Store, child: tuple[int, Connection]) -> None:
    pid, pipe = child
    ref = owner.put([bytes([1]) * MIB])
    ask(pipe, ref)
    owner.free(ref.id)
    owner.sweep()
    assert is_alive(owner.directory, READER)
    os.kill(pid, signal.SIGKILL)
    # Dead but not yet reaped: a pid would still look alive.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    owner.sweep()
    assert not is_alive(owner.directory, READER)
    again = owner.put([bytes([2]) * MIB])
    assert again.segment == ref.segment
    # And its entry in the table can be claimed anew.
    with_entry = Store(owner.directory, 0x77)
    assert with_entry.get(again)[0].readonly
    assert with_entry._foreign[again.segment]._entry == 0
    with_entry.close()


def test_a_killed_owner_leaves_readable_objects(directory: str, reader: Store) -> None:
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = Store(directory, 0x99)
        ref = store.put([b"last" * MIB])
        os.write(there, f"{ref.id} {ref.segment}".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    text = os.read(here, 100).decode()
    os.waitpid(pid, 0)
    os.close(here)
    os.close(there)
    number, segment = text.split()
    ref = ObjectRef(int(number), 4 * MIB, segment)
    view = reader.get(ref)[0]
    Store.remove_session(directory, 0x99)
    assert view == b"last" * MIB
    reader.sweep()
    with pytest.raises(ObjectLost):
        reader.get(ref)


def test_a_forked_child_does_no_harm(owner: Store, reader: Store) -> None:
    ref = owner.put([b"x" * MIB])
    view = reader.get(ref)[0]
    pid = os.fork()
    if pid == 0:
        # The child reads copies, may not write, and its exit and its finalisers leave the parent's pins alone.
        code = 1
        try:
            copy = reader.get(ref)[0]
            del view
            gc.collect()
            if copy == b"x" * MIB and isinstance(copy.obj, bytes):
                owner.put([b"y"])
        except RtmlError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            owner.close()
            reader.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert owner.get(ref)[0] == b"x" * MIB
    owner.free(ref.id)
    owner.sweep()
    assert owner.put([b"y" * MIB]).segment != ref.segment
    assert view == b"x" * MIB


# --- everything at once -----------------------------------------------------------------------------------------------


class Sharing(RuleBasedStateMachine):
    """Whatever the order of puts, gets, drops and frees: a view always shows what was put."""

    refs = Bundle("refs")
    views = Bundle("views")

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.mkdtemp(dir="/dev/shm", prefix="test-store-")
        self.owner = Store(self.directory, OWNER, capacity=16 * MIB)
        self.readers = [self.owner, Store(self.directory, READER), Store(self.directory, READER + 1)]
        self.held: dict[int, tuple[memoryview, bytes]] = {}
        self.count = 0

    @rule(target=refs, size=st.sampled_from([100, 150_000, 1_000_000]))
    def put(self, size: int) -> tuple[ObjectRef, bytes] | None:
        self.count += 1
        data = self.count.to_bytes(4, "little") * (size // 4)
        try:
            return self.owner.put([data[:3], data]), data
        except LimitExceeded:
            assert self.owner.allocated > 14 * MIB
            return None

    @rule(target=views, made=refs, who=st.integers(0, 2))
    def get(self, made: tuple[ObjectRef, bytes] | None, who: int) -> int:
        self.count += 1
        if made is not None:
            self.held[self.count] = (self.readers[who].get(made[0])[1], made[1])
        return self.count

    @rule(view=consumes(views))
    def drop(self, view: int) -> None:
        self.held.pop(view, None)

    @rule(made=consumes(refs))
    def free(self, made: tuple[ObjectRef, bytes] | None) -> None:
        if made is not None:
            self.owner.free(made[0].id)

    @rule()
    def sweep(self) -> None:
        for store in self.readers:
            store.sweep()

    @invariant()
    def contents_stay(self) -> None:
        if hasattr(self, "held"):
            assert all(view == data for view, data in self.held.values())

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "held"):
            sizes = [(Path(self.directory) / name).stat().st_size for name in files(self.owner)]
            assert sum(sizes) == self.owner.allocated <= self.owner.capacity

    def teardown(self) -> None:
        if hasattr(self, "held"):
            self.held.clear()
            for store in self.readers:
                store.close()
            shutil.rmtree(self.directory)


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
