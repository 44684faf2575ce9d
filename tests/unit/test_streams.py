"""Both ends of a stream, and the dispatcher between them."""

from __future__ import annotations

from rtml.messages import Attempt, Consumed, Item, Items, ObjectRef, TaskResult
from rtml.workers.core import WorkerCore
from rtml.workers.outlets import Outlet
from tests.unit.cores import Engine

BIG = ObjectRef(77, 1 << 20, "segment")


def outlet(window: int = 3, skip: int = 0) -> Outlet:
    return Outlet(Attempt(5, 1, 9, b"", stream=window, skip=skip))


def test_an_outlet_is_full_until_items_are_taken() -> None:
    out = outlet()
    for number in range(3):
        assert not out.full
        out.put(Item(str(number).encode()))
    assert out.full
    assert out.send() == Items(5, 1, 0, [Item(b"0"), Item(b"1"), Item(b"2")])
    assert out.taken(2) == []
    assert out.unsent == 0
    out.put(Item(b"3"))
    assert out.send() == Items(5, 1, 3, [Item(b"3")])
    out.put(Item(b"4"))
    assert out.again() == [Items(5, 1, 2, [Item(b"2"), Item(b"3")])]
    assert out.send() == Items(5, 1, 4, [Item(b"4")])


def test_what_was_taken_of_an_earlier_attempt_is_left_out() -> None:
    out = outlet(skip=2)
    while out.skips:
        out.skip()
    out.put(Item(b"2"))
    assert out.send().first == 2


def test_objects_that_may_have_to_be_sent_again_are_not_recycled() -> None:
    out = outlet()
    out.put(Item(BIG))
    assert out.unsent_objects() == [77]
    out.send()
    assert out.keeps(77)
    assert not out.keeps(78)
    assert out.taken(1) == [77]


def test_an_executor_sends_again_what_may_be_lost_and_gives_the_rest_with_the_result() -> None:
    core = WorkerCore(1, 2)
    attempt = Attempt(5, 1, 9, b"", stream=3)
    core.running[5, 1] = attempt
    out = core.open(attempt)
    out.put(Item(b"0"))
    core.relay([out.send()])
    assert core.flush() == [Items(5, 1, 0, [Item(b"0")])]
    assert core.resume_link() == [Items(5, 1, 0, [Item(b"0")])]
    core.receive(Consumed(5, 0, again=True), 0.0)
    assert core.flush() == [Items(5, 1, 0, [Item(b"0")])]
    out.put(Item(b"1"))
    core.receive(Consumed(5, 1), 0.0)
    result = TaskResult(5, 1, 0)
    core.close(out, result)
    assert (result.made, result.tail) == (2, [Item(b"1")])


def streaming() -> Engine:
    e = Engine(2)
    e.submit("s")
    e.core.tables.tasks[e.ids["s"]].spec.stream = 4
    return e


def test_items_and_credits_pass_the_dispatcher() -> None:
    e = streaming()
    on = e.holder("s")
    e.post(on, Items(e.ids["s"], 1, 0, [Item(b"a")]))
    assert e.heard("ann", Items) == [Items(e.ids["s"], 1, 0, [Item(b"a")])]
    e.post("ann", Consumed(e.ids["s"], 1))
    assert e.heard(on, Consumed) == [Consumed(e.ids["s"], 1)]
    e.post(on, Items(e.ids["s"], 7, 1, [Item(b"stale")]))
    assert not e.heard("ann", Items)


def test_a_large_item_is_kept_for_its_consumer_and_then_freed() -> None:
    e = streaming()
    on = e.holder("s")
    big = e.stored(on, "item")
    e.post(on, Items(e.ids["s"], 1, 0, [Item(big)]))
    assert big.id in e.core.tables.objects
    from rtml.messages import Free, Release

    e.post("ann", Release([big.id]))
    assert e.heard(on, Free) == [Free([big.id])]
    late = e.stored(on, "late")
    e.cancel("s")
    e.post(on, Items(e.ids["s"], 1, 1, [Item(late)]))
    assert e.heard(on, Free) == [Free([late.id])]


def test_another_attempt_hears_what_was_taken() -> None:
    e = streaming()
    on = e.holder("s")
    e.post("ann", Consumed(e.ids["s"], 3))
    e.die(on, running=["s"])
    assert e.attempt("s").skip == 3
    assert e.attempt("s").stream == 4


def test_futures_inside_of_items_outlive_the_generator() -> None:
    e = streaming()
    on = e.holder("s")
    e.submit("child", parent="s")
    e.post(on, Items(e.ids["s"], 1, 0, [Item(b"a", [e.ids["child"]])]))
    e.finish("s")
    assert e.outcome("child") == ""
    e.finish("child")
    assert e.known("child")
