"""Arrays that are read on one node while they are made on another: real data endpoints, in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rtml.client.folding import Feed, UnlikeError, Whole, fold_into, operation
from rtml.client.following import Following, Growing
from rtml.codec.arrays import encode_tensor, grow_tensor
from rtml.errors import ObjectLost, RtmlError
from rtml.messages import ObjectRef
from rtml.store import Store
from tests.unit.test_transfer import Host, eventually, hosts

__all__ = ["hosts"]

SIZE = 300_000
Make = Callable[..., Host]


class Maker:
    """An array of ones that is made by hand."""

    def __init__(self, store: Store, name: int = 0) -> None:
        self.store = store
        self.incoming, self.array, self.start = grow_tensor(np.empty(SIZE, np.float32), store)
        self.growing = Growing(store, self.incoming, self.start, name)
        assert self.growing.shown
        self.go_on(1000)

    def go_on(self, upto: int) -> None:
        self.array[:upto] = 1
        self.growing.grown(self.start + upto * self.array.itemsize)

    def end(self) -> None:
        self.go_on(SIZE)
        self.growing.stop()
        self.store.publish(self.incoming)


def test_what_there_is_can_be_read_on_other_nodes_which_pass_it_on(hosts: Make) -> None:
    home, *others = [hosts(name) for name in "abc"]
    maker = Maker(home.store(1))
    followers = [Following(host.store(2 + number), maker.growing.ref) for number, host in enumerate(others)]
    maker.go_on(SIZE // 2)
    for follower in followers:
        there = follower.wait(SIZE // 2 - 1)
        assert SIZE // 2 <= there < SIZE
        assert bool((follower.flat[: SIZE // 2] == 1).all())
    maker.end()
    for follower in followers:
        assert follower.wait(SIZE - 1) == SIZE
        assert bool((follower.array == 1).all())
        follower.close()
    known = home.endpoint.holders.known(maker.incoming.id)
    assert set(known) == {host.address for host in others}
    late = Following(home.store(9), maker.growing.ref)
    assert late.wait(SIZE - 1) == SIZE
    late.close()
    del followers, follower, late


def test_what_is_not_begun_yet_is_awaited_by_its_name(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    found: list[Following] = []

    def follow(store: Store) -> None:
        found.append(Following(store, ObjectRef(0, 0, "", home.address), name=7, seconds=60.0))

    threads = [threading.Thread(target=follow, args=(host.store(2),)) for host in (home, other)]
    for thread in threads:
        thread.start()
    maker = Maker(home.store(1), name=7)
    for thread in threads:
        thread.join(60)
    maker.end()
    late = Following(other.store(3), ObjectRef(0, 0, "", home.address), name=7, seconds=60.0)
    for follower in (*found, late):
        assert follower.wait(SIZE - 1) == SIZE
        assert bool((follower.array == 1).all())
        follower.close()
    found.clear()
    del follower, late


def test_a_name_that_nobody_uses_is_not_waited_for_for_ever(hosts: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtml.transfer.naming.STILL_HERE", 0.02)
    monkeypatch.setattr("rtml.transfer.endpoint.STILL_HERE", 0.02)
    home, other = hosts("a"), hosts("b")
    for store in (home.store(2), other.store(3)):
        with pytest.raises(ObjectLost, match="nobody has begun it"):
            Following(store, ObjectRef(0, 0, "", home.address), name=8, seconds=0.1)
    with pytest.raises(ObjectLost, match=r"cannot be had from 127\.0\.0\.1:1: ConnectionRefused"):
        Following(other.store(4), ObjectRef(0, 0, "", "127.0.0.1:1"), name=8, seconds=60.0)
    began: list[Following] = []
    store = other.store(5)

    def follow() -> None:
        with pytest.raises((ObjectLost, RtmlError)):
            Following(store, ObjectRef(0, 0, "", home.address), name=8, seconds=600.0, began=began.append)

    thread = threading.Thread(target=follow)
    thread.start()
    eventually(lambda: began)
    began[0].stop()
    thread.join(60)
    assert not thread.is_alive()


def test_a_maker_that_gives_up_is_noticed_and_its_torso_is_no_object(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    maker = Maker(home.store(1))
    follower = Following(other.store(2), maker.growing.ref)
    maker.go_on(SIZE // 2)
    assert follower.wait(0) > 0
    maker.growing.stop()
    with pytest.raises(ObjectLost):
        follower.wait(SIZE - 1)
    assert follower.lost
    follower.stop()
    for host in (home, other):
        with pytest.raises(ObjectLost):
            Following(host.store(3), maker.growing.ref)
    del follower


def test_a_copy_that_nobody_wants_again_is_given_back(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    maker = Maker(home.store(1))
    maker.end()
    for keep in (True, False):
        follower = Following(other.store(2 + keep), maker.growing.ref, keep=keep)
        assert follower.wait(SIZE - 1) == SIZE
        follower.close()
        del follower
        eventually(lambda keep=keep: bool(other.endpoint.copies.held) is keep)  # type: ignore[misc]


def test_a_torso_is_no_object_for_an_endpoint_that_was_started_again(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    maker = Maker(home.store(1))
    maker.go_on(SIZE // 2)
    home.endpoint.copies._growing.clear()  # as if it had been
    with pytest.raises(ObjectLost):
        Following(other.store(2), maker.growing.ref)
    maker.end()
    follower = Following(other.store(3), maker.growing.ref)
    assert follower.wait(SIZE - 1) == SIZE
    assert bool((follower.array == 1).all())
    follower.close()
    del follower


def test_whoever_waits_can_be_told_to_stop(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    maker = Maker(home.store(1))
    follower = Following(other.store(2), maker.growing.ref)
    errors: list[str] = []
    thread = threading.Thread(target=wait, args=(follower, errors))
    thread.start()
    follower.stop()
    thread.join(30)
    assert errors
    del thread, follower
    maker.end()
    eventually(lambda: not home.endpoint.copies._growing)


def wait(follower: Following, errors: list[str]) -> None:
    try:
        follower.wait(SIZE - 1)
    except ObjectLost as error:
        errors.append(str(error))


def test_only_arrays_can_be_followed(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    text = home.store(1).put([b"no array at all", bytes(100_000)])
    with pytest.raises(UnlikeError):
        Following(other.store(2), text)
    with pytest.raises(ObjectLost):
        Following(other.store(3), ObjectRef(77, 100_000, "00000001-9", home.address))


def test_bandwidth_is_learned(hosts: Make) -> None:
    home, other = hosts("a"), hosts("b")
    ref = encode_tensor(np.ones(4_000_000, np.float32), home.store(1))
    assert isinstance(ref, ObjectRef)
    store = other.store(2)
    follower = Following(store, ref)
    follower.wait(follower.flat.size - 1)
    follower.close()
    assert store.asker.bandwidth > 0
    del follower


class Drip:
    """An array that comes in portions."""

    def __init__(self, array: Any, portion: int) -> None:
        self.array = self.flat = array
        self.portion = portion

    def wait(self, at: int) -> int:
        return int(min(self.flat.size, at + self.portion))


@pytest.mark.parametrize("name", ["add", "multiply", "minimum", "logical_or", "mean"])
def test_blocks_are_folded_as_they_come(name: str) -> None:
    arrays = [np.random.default_rng(seed).integers(0, 5, 100_000).astype(np.int16) for seed in range(3)]
    op = operation(name, None)
    out = np.empty(100_000, op.partial([array.dtype for array in arrays]))
    told: list[int] = []
    feeds: list[Feed] = [Drip(arrays[0], 7_001), Whole(arrays[1]), Drip(arrays[2], 30_000)]
    fold_into(out, feeds, op, len(arrays) if name == "mean" else 0, told.append)
    expected = op.finish(op.fold([array.astype(out.dtype) for array in arrays]), len(arrays))
    np.testing.assert_allclose(out, expected)
    assert told == sorted(told)
    assert told[0] <= 7_001
    assert told[-1] == 100_000


def test_what_cannot_be_folded_as_blocks() -> None:
    for wrong in (3.0, [1, 2], np.array(["a"]), np.array([object()])):
        with pytest.raises(UnlikeError):
            Whole(wrong)
