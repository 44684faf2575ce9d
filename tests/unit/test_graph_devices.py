"""Executors that see only the gpus that they were started for."""

from __future__ import annotations

from typing import Any

from rtml.messages import ActorOptions, Alternative, Define, Keep, Kept, Prepare, Prepared, StartExecutor
from tests.unit.cores import Engine


def engine(gpu: float = 2.0, **settings: Any) -> Engine:
    made = Engine(2, cpu=8.0, gpu=gpu, binds=True, **settings)
    for name, amount in (("whole", 1.0), ("half", 0.5), ("both", 2.0)):
        made.define(name, gpu=amount, cpu=1.0)
        made.define(f"{name} actor", gpu=amount, cpu=0.0, retries=0)
    made.define("async half", gpu=0.5, cpu=0.0, asynchronous=True)
    return made


def started(e: Engine) -> list[tuple[str, list[int]]]:
    """Processes that are to be started, which they are now: their names and devices."""
    found = []
    for message in e.heard("node", StartExecutor):
        assert isinstance(message, StartExecutor)
        name = next(name for name, peer in e.peers.items() if peer.worker == message.worker)
        found.append((name, message.devices))
        e.hello(name, devices=message.devices)
    return found


def test_each_gets_devices_of_its_own_and_others_see_none() -> None:
    e = engine()
    e.submit("a", of="whole")
    e.submit("c")
    assert e.assigned("w2") == ["c"]
    ((first, devices),) = started(e)
    assert devices == [0]
    assert e.assigned(first) == ["a"]
    e.submit("b", of="whole")
    ((second, devices),) = started(e)
    assert devices == [1]
    assert e.assigned(second) == ["b"]
    e.submit("waits", of="whole")
    assert started(e) == []
    e.finish("a")
    assert e.assigned(first) == ["waits"]
    assert e.assigned("w1") == []


def test_parts_share_a_device_and_leave_others_whole() -> None:
    e = engine()
    e.submit("a", of="half")
    ((first, devices),) = started(e)
    e.submit("b", of="half")
    ((second, others),) = started(e)
    assert devices == others == [0]
    e.submit("c", of="whole")
    assert started(e)[0][1] == [1]
    e.submit("d", of="half")
    assert started(e) == []
    e.finish("b")
    assert e.assigned(second) == ["d"]
    assert e.assigned(first) == ["a"]


def test_several_whole_ones_for_one_task() -> None:
    e = engine()
    e.submit("a", of="half")
    e.submit("wide", of="both")
    ((first, _),) = started(e)
    assert started(e) == []
    e.finish("a", on=first)
    ((wide, devices),) = started(e)
    assert devices == [0, 1]
    e.submit("b", of="half")
    assert e.assigned(first) == []
    e.finish("wide", on=wide)
    assert e.assigned(first) == ["b"]


def test_actors_and_async_functions() -> None:
    e = engine(loops=1)
    e.submit("actor", of="whole actor", hosts=ActorOptions())
    ((process, devices),) = started(e)
    assert devices == [0]
    assert e.assigned(process) == ["actor"]
    e.submit("x", "y", of="async half")
    ((loop, devices),) = started(e)
    assert devices == [1]
    assert e.assigned(loop) == ["x", "y"]
    assert e.assigned("l1") == []


def test_a_new_dispatcher_learns_who_sees_what() -> None:
    e = engine()
    e.submit("a", of="whole")
    ((first, devices),) = started(e)
    e.restart()
    e.hello("node")
    e.node()
    for name in ("w1", "w2", "ann"):
        e.hello(name)
    e.hello(first, devices=devices)
    e.again("a")
    e.submit("b", of="whole")
    assert started(e)[0][1] == [1]
    e.finish("a")
    e.submit("c", of="whole")
    assert e.assigned(first) == ["c"]


def test_one_that_is_idle_for_long_gives_its_memory_back() -> None:
    e = engine()
    e.submit("a", of="whole")
    ((first, _),) = started(e)
    e.finish("a")
    e.advance(30.0)
    assert not e.core.tables.workers[e.peers[first].worker].leaving
    e.advance(31.0)
    assert e.core.tables.workers[e.peers[first].worker].leaving


def test_alternatives_have_a_process_started_for_the_gpu_and_run_on_cpus_meanwhile_if_that_is_better() -> None:
    e = engine(gpu=1.0)
    e.define("either", alternatives=[Alternative(gpu=1.0, cpu=0.0), Alternative(cpu=1.0)])
    e.submit("a", of="either")
    ((first, devices),) = started(e)
    assert devices == [0]
    assert e.assigned(first) == ["a"]
    e.submit("b", of="either")
    assert e.assigned("w2") == ["b"]
    e.restart()
    for name in ("node", "w1", "w2", "ann"):
        e.hello(name)
    e.node()
    e.hello(first, devices=devices)
    e.again("a", "b")
    assert str(e.task("a").profile.shape) == "gpu=1"
    assert str(e.task("b").profile.shape) == "cpu=1"


def test_what_is_kept_for_gpus_is_made_ready_where_they_are_seen() -> None:
    e = engine(gpu=2.0)
    e.post("ann", Define([e.functions["whole"]]), Keep([e.functions["whole"].id]))
    found = started(e)
    assert sorted(devices for _, devices in found) == [[0], [1]]
    ready = []
    for _ in found:
        (name,) = [name for name, _ in found if e.heard(name, Prepare)]
        ready.append(name)
        e.post(name, Prepared(e.functions["whole"].id))
    assert sorted(ready) == sorted(name for name, _ in found)
    assert [message.executors for message in e.heard("ann", Kept) if isinstance(message, Kept)] == [2]
    assert not any(e.heard(name, Prepare) for name in ("w1", "w2"))
    e.advance(100.0)
    assert not any(e.core.tables.workers[e.peers[name].worker].leaving for name in ready)
