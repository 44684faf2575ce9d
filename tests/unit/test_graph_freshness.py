"""Newer observations take the place of older ones that have not begun."""

from __future__ import annotations

from rtml.messages import ActorOptions
from tests.unit.cores import Engine
from tests.unit.test_graph_actors import created
from tests.unit.test_graph_actors import engine as with_actors


def test_a_newer_call_supersedes_waiting_ones_of_its_key() -> None:
    e = Engine(1)
    e.define("look", latest="left")
    e.define("other", latest="left")
    e.submit("first", of="look")
    e.submit("second", of="look")
    e.submit("right", of="look", latest="right")
    e.submit("another function", of="other")
    e.submit("third", of="look")
    assert e.outcome("second") == "cancelled Superseded"
    assert "latest='left'" in e.error("second").message
    assert e.assigned("w1") == ["first"]  # it has begun, and nothing is handed over ahead
    e.finish("first", run=1e-6)
    assert len(e.assigned("w1")) == 1
    for name in ("right", "another function", "third"):
        e.finish(name, run=1e-6)
        assert e.outcome(name) == "ok"
    assert not e.core.lifecycle.freshness.newest


def test_what_waits_for_an_argument_is_superseded_too() -> None:
    e = Engine(2)
    e.define("look", latest="k")
    e.submit("frame")
    e.submit("old", of="look", deps=["frame"])
    e.submit("new", of="look")
    assert e.outcome("old") == "cancelled Superseded"


def test_an_observation_that_waits_for_too_long_expires() -> None:
    e = Engine(1)
    e.submit("busy")
    e.submit("frame", max_age=0.05)
    e.advance(0.1)
    assert e.outcome("frame") == "expired DeadlineExceeded"
    assert "max_age of 0.05 s" in e.error("frame").message
    e.finish("busy")
    e.submit("quick", max_age=0.05)
    e.advance(0.1)
    assert e.outcome("quick") == ""


def test_methods_have_keys_of_their_actor() -> None:
    e = with_actors()
    first = created(e, "a1", options=ActorOptions())
    second = created(e, "a2", options=ActorOptions())
    for actor in ("a1", "a2"):
        e.submit(f"{actor} running", f"{actor} old", f"{actor} new", of="m", actor=actor, latest="k")
    assert e.assigned(first) == ["a1", "a1 new"]
    assert e.assigned(second) == ["a2", "a2 new"]
    assert e.outcome("a1 running") == e.outcome("a2 old") == "cancelled Superseded"
