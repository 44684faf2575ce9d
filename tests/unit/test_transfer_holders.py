"""Who is sent to whom: the directory of one endpoint's objects, alone."""

from __future__ import annotations

import random

from rtml.transfer.holders import HOME, Holders, Lease

MIB = 1024 * 1024


def test_receivers_that_come_together_form_a_chain() -> None:
    holders = Holders()
    leases = {}
    for number, name in enumerate("abcd"):
        leases[name] = holders.join(1, name)
        sources, spare = holders.assign(leases[name], MIB, [])
        assert sources == ["abcd"[number - 1] if number else HOME]
        assert spare == []
    other = holders.join(2, "b")
    assert holders.assign(other, MIB, []) == ([HOME], [])  # of another object


def test_a_source_that_fails_is_replaced_by_the_one_before_it() -> None:
    holders = Holders()
    leases = {name: holders.join(1, name) for name in "abcd"}
    for lease in leases.values():
        holders.assign(lease, MIB, [])
    assert holders.assign(leases["c"], MIB, ["b"])[0] == [HOME]  # which has as little to do as the first
    holders.leave(leases["b"], False)
    assert holders.assign(leases["c"], MIB, ["b"])[0] == ["a"]
    # Never one that asked later, however little it has to do.
    again = holders.join(1, "b")
    assert holders.assign(again, MIB, ["a"])[0] == [HOME]
    late = holders.join(1, "e")
    assert holders.assign(late, MIB, [])[0] == ["d"]


def test_complete_copies_are_sources_for_all_and_the_idle_ones_come_first() -> None:
    holders = Holders()
    leases = {name: holders.join(1, name) for name in "abc"}
    for lease in leases.values():
        holders.assign(lease, MIB, [])
    for name in "ab":
        holders.leave(leases[name], True)
    # The first has nobody to serve any more, but the home neither, which counts as the last of its kind.
    late = holders.join(1, "d")
    assert holders.assign(late, MIB, [])[0] == ["a"]
    assert holders.assign(late, 100 * MIB, [])[0] == ["a", HOME]
    another = holders.join(1, "e")
    assert holders.assign(another, MIB, [])[0] == ["d"]
    assert holders.known(1) == {"a": True, "b": True, "c": False, "d": False, "e": False}


def test_whoever_goes_gives_its_source_back_and_is_asked_no_more() -> None:
    holders = Holders()
    first, second = holders.join(1, "a"), holders.join(1, "b")
    assert holders.assign(first, MIB, [])[0] == [HOME]
    assert holders.assign(second, MIB, [])[0] == ["a"]
    holders.leave(first, False)
    assert holders.assign(second, MIB, ["a"])[0] == [HOME]
    # Back again it keeps its place, as the second may read from it still.
    again = holders.join(1, "a")
    assert holders.assign(again, MIB, [])[0] == [HOME]
    holders.leave(first, False)  # the end of the earlier connection is noticed late
    assert holders.known(1) == {"a": False, "b": False}
    holders.leave(again, True)
    holders.leave(second, True)
    # Without its copy it begins anew, behind all others.
    evicted = holders.join(1, "a")
    assert holders.assign(evicted, MIB, [])[0] == ["b"]


def test_nobody_waits_in_a_circle_whatever_fails() -> None:
    """Random joins, failures and ends: partial copies are only ever read by those behind them."""
    chance = random.Random(4)
    for _ in range(200):
        holders = Holders()
        leases: dict[str, Lease] = {}
        complete: set[str] = set()
        for _ in range(60):
            name = chance.choice("abcdef")
            lease = leases.get(name)
            if lease is None:
                if any(name in held.sources for held in leases.values()):
                    continue  # a copy that is read is not dropped
                complete.discard(name)
                leases[name] = lease = holders.join(1, name)
                holders.assign(lease, 20 * MIB, [])
            elif chance.random() < 0.5:
                holders.assign(lease, 20 * MIB, lease.sources[:1])
            else:
                done = chance.random() < 0.5
                holders.leave(leases.pop(name), done)
                if done:
                    complete.add(name)
            waits = {one: [s for s in held.sources if s and s not in complete] for one, held in leases.items()}
            for start in waits:
                seen, new = set[str](), [start]
                while new:
                    for source in waits.get(new.pop(), ()):
                        assert source != start
                        if source not in seen:
                            seen.add(source)
                            new.append(source)
        for lease in leases.values():
            holders.leave(lease, False)
        assert not holders._objects[1].load
