"""Actors that live at one dispatcher and are called from others."""

from __future__ import annotations

from typing import Any

from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    STOP,
    ActorOptions,
    Cancel,
    Checkpoint,
    ObjectRef,
    Query,
    Reply,
    StartExecutor,
    Unwatch,
    Watch,
)
from tests.unit.trees import Member, Tree


def tree(nodes: int = 2, **settings: Any) -> Tree:
    made = Tree(nodes=nodes, gpu=1.0, **settings)  # the root has none
    made.root.define("C", cpu=0.0, gpu=0.1, retries=0)
    made.root.define("R", cpu=0.0, gpu=0.1, retries=3)
    made.root.define("L", cpu=0.0, gpu=0.1, retries=0, asynchronous=True)
    made.root.define("m", method="m", cpu=0.0, retries=0)
    made.root.define("again", method="m", cpu=0.0, retries=3)
    made.root.define("free", method="m", cpu=0.0, retries=0, asynchronous=True)
    made.root.define("stop", method=STOP, cpu=0.0, retries=5)
    return made


def greet(tree: Tree) -> None:
    """Processes of actors that were started say Hello."""
    tree.settle()
    for member in (tree.root, *tree.nodes.values()):
        for message in member.heard("node", StartExecutor):
            assert isinstance(message, StartExecutor)
            if message.role in (ACTOR, ASYNC_ACTOR):
                member.hello(f"a{message.worker}")
    tree.settle()


def place(tree: Tree, name: str, /, of: str = "C", at: Member | None = None, **options: Any) -> tuple[Member, str]:
    """An actor that lives: where, and in which process."""
    (at or tree.root).submit(name, of=of, hosts=ActorOptions(**options))
    greet(tree)
    return lives(tree, name)


def lives(tree: Tree, name: str) -> tuple[Member, str]:
    for member in (tree.root, *tree.nodes.values()):
        for peer in member.peers:
            if peer.startswith("a") and peer != "ann" and name in member.assigned(peer):
                return member, peer
    raise AssertionError(f"{name} lives nowhere")


def stranger(tree: Tree, actor: str, *homes: Member) -> Member:
    """A task with the actor's handle, "user", runs at none of these dispatchers: where it does."""
    for number in range(10):
        name = "user" if not number else f"user{number}"
        tree.root.submit(name, handles=[actor])
        tree.settle()
    for member in tree.nodes.values():
        found = [name for name in member.assigned("w1") if name.startswith("user")]
        if member not in homes and found:
            tree.root.ids["user"] = tree.root.ids[found[0]]
            return member
    raise AssertionError("it runs nowhere else")


def test_a_task_on_a_third_node_calls_it() -> None:
    t = tree()
    home, process = place(t, "actor")
    there = stranger(t, "actor", home)
    there.submit("c1", "c2", of="m", actor="actor", parent="user")
    t.settle()
    assert home.assigned(process) == ["actor", "c1", "c2"]
    home.finish("c1", value=b"one")
    home.finish("c2", value=b"two")
    t.settle()
    assert there.results["c1"].payload == b"one"
    assert there.results["c2"].payload == b"two"


def test_calls_keep_the_order_of_each_submitter_on_their_way() -> None:
    t = tree()
    home, process = place(t, "actor")
    there = stranger(t, "actor", home)
    there.submit("slow", parent="user")
    there.submit("c1", of="m", actor="actor", parent="user", deps=["slow"])
    there.submit("c2", of="m", actor="actor", parent="user")
    there.block("user")  # so that its child has a place
    t.settle()
    assert home.assigned(process) == ["actor"]
    there.finish("slow")
    t.settle()
    assert home.assigned(process) == ["actor", "c1", "c2"]


def test_calls_that_need_no_order_overtake_others() -> None:
    t = tree()
    home, process = place(t, "actor", of="L", concurrency=5)
    there = stranger(t, "actor", home)
    there.submit("slow", parent="user")
    there.submit("c1", of="free", actor="actor", parent="user", deps=["slow"])
    there.submit("c2", of="free", actor="actor", parent="user")
    t.settle()
    assert home.assigned(process) == ["actor", "c2"]


def test_anybody_may_kill_and_stop_it() -> None:
    for end in ("kill", "stop"):
        t = tree()
        home, process = place(t, "actor")
        there = stranger(t, "actor", home)
        there.submit("c1", of="m", actor="actor", parent="user")
        t.settle()
        if end == "kill":
            there.post("w1", Cancel([t.root.ids["actor"]]))
            t.settle()
            assert there.outcome("c1") == "error ActorDied"
            home.die(process)
        else:
            there.submit("end", of="stop", actor="actor", parent="user")
            t.settle()
            assert home.assigned(process) == ["actor", "c1"]
            home.finish("c1")
            t.settle()
            assert home.assigned(process) == ["actor", "end"]
            home.finish("end")
            home.finish("actor")
            t.settle()
            assert there.outcome("end") == "ok"
        t.settle()
        assert t.root.outcome("actor").startswith("error ActorDied" if end == "kill" else "ok")
        there.submit("late", of="m", actor="actor", parent="user")
        t.settle()
        assert there.outcome("late") == "error ActorDied"
        # The node itself goes on.
        assert all(worker.ready for worker in t.root.core.tables.remotes.values())


def test_its_node_dies_and_calls_from_elsewhere_go_on_with_the_next_one() -> None:
    t = tree(nodes=3)
    home, process = place(t, "actor", of="R")
    there = stranger(t, "actor", home)
    there.submit("c1", of="m", actor="actor", parent="user")
    there.submit("c2", of="again", actor="actor", parent="user")
    t.settle()
    t.kill(home.name)
    t.advance(15.0, step=0.5)
    greet(t)
    assert there.outcome("c1") == "error ActorDied"
    other, process = lives(t, "actor")
    assert other is not home
    assert other.assigned(process) == ["actor", "c2"]
    other.finish("c2", value=b"again")
    t.settle()
    assert there.results["c2"].payload == b"again"


def test_the_caller_s_node_may_become_its_home() -> None:
    t = tree(nodes=2)
    home, process = place(t, "actor", of="R")
    there = stranger(t, "actor", home)
    there.submit("c1", "c2", of="again", actor="actor", parent="user")
    t.settle()
    t.kill(home.name)
    t.advance(15.0, step=0.5)
    there.submit("c3", of="again", actor="actor", parent="user")
    greet(t)
    other, process = lives(t, "actor")
    assert other is there
    there.submit("c4", of="again", actor="actor", parent="user")
    t.settle()
    assert there.assigned(process) == ["actor", "c1", "c2", "c3", "c4"]
    there.finish("c1", "c2", "c3", "c4", on=process)
    t.settle()
    assert [there.outcome(name) for name in ("c1", "c2", "c3", "c4")] == ["ok"] * 4


def test_a_handle_that_was_given_away_may_come_back() -> None:
    t = tree(nodes=1)
    home, process = place(t, "actor")
    t.root.submit("user", handles=["actor"])
    t.settle()
    home.post("w1", Watch([t.root.ids["actor"]]))  # it keeps the handle
    home.finish("user")
    t.root.post("ann", Unwatch([t.root.ids["actor"]]))
    t.settle()
    assert t.root.outcome("actor") == ""
    t.root.submit("back")
    t.settle()
    home.finish("back", handles=["actor"])
    t.settle()
    home.post("w1", Unwatch([t.root.ids["actor"]]))
    t.settle()
    assert home.assigned(process) == ["actor"]
    t.root.submit("c", of="m", actor="actor")
    t.settle()
    home.finish("c")
    t.settle()
    assert t.root.outcome("c") == "ok"
    t.root.ack()
    t.root.post("ann", Unwatch([t.root.ids["actor"]]))
    t.settle()
    assert home.heard(process, Unwatch) == []
    home.finish("actor")
    t.settle()
    assert t.root.outcome("actor") == "ok"


def test_its_last_checkpoint_comes_along_to_the_next_node() -> None:
    t = tree(nodes=3)
    home, process = place(t, "actor", of="R")
    home.post(process, Checkpoint(t.root.ids["actor"], 1, b"state 1"))
    home.post(process, Checkpoint(t.root.ids["actor"], 1, b"state 2"))
    t.settle()
    t.kill(home.name)
    t.advance(15.0, step=0.5)
    greet(t)
    other, process = lives(t, "actor")
    assert other.attempt("actor").checkpoint == b"state 2"
    # What lies in the memory of a node is gone with it: then it begins anew.
    other.post(process, Checkpoint(t.root.ids["actor"], 1, ObjectRef(7 << 32, 1 << 22, "s", f"{other.name}:1")))
    t.settle()
    t.kill(other.name)
    t.advance(15.0, step=0.5)
    greet(t)
    assert lives(t, "actor")[0].attempt("actor").checkpoint is None


def test_a_restarted_root_learns_the_checkpoint_from_the_node() -> None:
    t = tree(nodes=2)
    home, process = place(t, "actor", of="R")
    home.post(process, Checkpoint(t.root.ids["actor"], 1, b"state"))
    t.settle()
    restart_root(t)
    assert t.root.task("actor").hosted.checkpoint == b"state"  # type: ignore[union-attr]
    assert lives(t, "actor") == (home, process)


def test_a_restarted_root_makes_no_second_one_while_its_node_is_not_back() -> None:
    t = tree(nodes=2)
    home, process = place(t, "actor", of="R")
    for name in list(t.nodes):
        t.cut(name)
    t.root.restart()
    t.root.hello("ann")
    t.root.again("actor")
    other = next(name for name in t.nodes if name != home.name)
    t.connect(other)
    greet(t)
    t.advance(2.0, step=0.5)
    greet(t)
    t.connect(home.name)
    t.settle()
    t.advance(6.0, step=0.5)
    greet(t)
    assert lives(t, "actor") == (home, process)
    assert not t.node(other).core.tables.tasks


def test_a_restarted_root_makes_one_whose_node_does_not_come_back() -> None:
    t = tree(nodes=2)
    home, _ = place(t, "actor", of="R")
    for name in list(t.nodes):
        t.cut(name)
    t.root.restart()
    t.root.hello("ann")
    t.root.again("actor")
    other = next(name for name in t.nodes if name != home.name)
    t.connect(other)
    del t.nodes[home.name]
    t.advance(6.0, step=0.5)
    greet(t)
    assert lives(t, "actor")[0] is t.node(other)


def restart_root(t: Tree) -> None:
    for name in list(t.nodes):
        t.cut(name)
    t.root.restart()
    t.root.hello("node")
    t.root.node()
    t.root.hello("ann")
    t.root.again("actor")
    for name in t.nodes:
        t.connect(name)
    t.settle()
    t.advance(6.0, step=0.5)


def born_below(t: Tree, name: str = "", **options: Any) -> tuple[Member, str]:
    """An actor that a task on a node creates there, and whose handle comes to the root."""
    t.root.submit("maker")
    t.settle()
    home = next(member for member in t.nodes.values() if "maker" in member.assigned("w1"))
    home.submit("actor", of="R", parent="maker", hosts=ActorOptions(name, **options))
    greet(t)
    home.finish("maker", handles=["actor"])
    t.settle()
    return lives(t, "actor")


def test_one_that_a_task_created_survives_its_node_with_its_checkpoint() -> None:
    t = tree(nodes=3)
    home, process = born_below(t)
    home.post(process, Checkpoint(t.root.ids["actor"], 1, b"state"))
    t.settle()
    t.root.submit("c1", of="m", actor="actor")
    t.settle()
    assert home.assigned(process) == ["actor", "c1"]
    t.root.submit("c2", of="again", actor="actor")
    t.settle()
    t.kill(home.name)
    t.advance(15.0, step=0.5)
    greet(t)
    other, process = lives(t, "actor")
    assert other.attempt("actor").checkpoint == b"state"
    assert t.root.outcome("c1") == "error ActorDied"
    assert other.assigned(process) == ["actor", "c2"]
    other.finish("c2")
    t.settle()
    assert t.root.outcome("c2") == "ok"
    t.root.ack()
    t.root.post("ann", Unwatch([t.root.ids["actor"]]))
    t.settle()
    other.finish("actor")
    other.die(process, reason="left")
    t.settle()
    t.root.submit("carries what is safe")
    t.settle()
    assert all(t.root.ids["actor"] not in member.core.tables.tasks for member in (t.root, other))
    assert not t.root.core.remote.abroad.wards


def test_nobody_s_actor_ends_with_its_node() -> None:
    t = tree(nodes=2)
    home, _ = born_below(t)
    t.root.ack()
    t.root.post("ann", Unwatch([t.root.ids["actor"]]))
    t.settle()
    t.kill(home.name)
    t.advance(15.0, step=0.5)
    assert t.root.ids["actor"] not in t.root.core.tables.tasks
    assert not t.root.core.remote.abroad.wards


def ask(t: Tree, member: Member, name: str) -> str:
    member.post("ann", Query(1, "actor", name))
    t.settle()
    (reply,) = member.heard("ann", Reply)
    assert isinstance(reply, Reply)
    return reply.body


def test_names_are_found_from_every_dispatcher() -> None:
    t = tree(nodes=3)
    home, process = born_below(t, "alice")
    for number, member in enumerate((t.root, *t.nodes.values())):
        assert str(t.root.ids["actor"]) in ask(t, member, "alice")
        assert ask(t, member, "bob") == "null"
        call = f"c{number}"
        member.submit(call, of="m", actor="actor")
        t.settle()
        home.finish(call, on=process)
        t.settle()
        assert member.outcome(call) == "ok"
    # One of the root's.
    place(t, "other", name="carol")
    for member in t.nodes.values():
        assert str(t.root.ids["other"]) in ask(t, member, "carol")


def test_a_name_is_unique_among_all_dispatchers() -> None:
    t = tree(nodes=2)
    born_below(t, "alice")
    for number, member in enumerate((t.root, *t.nodes.values())):
        member.submit(f"again{number}", of="R", hosts=ActorOptions("alice"))
        t.settle()
        assert member.outcome(f"again{number}") == "error SubmitError"
    # It is free again after its end.
    t.root.post("ann", Cancel([t.root.ids["actor"]]))
    t.settle()
    home, process = lives(t, "actor")
    home.die(process, reason="killed")
    t.settle()
    for member in t.nodes.values():
        assert ask(t, member, "alice") == "null"
    place(t, "new", at=t.node("n2"), name="alice")
    assert str(t.root.ids["new"]) in ask(t, t.node("n1"), "alice")


def test_a_name_is_claimed_again_from_a_restarted_root() -> None:
    t = tree(nodes=2)
    place(t, "actor", at=t.node("n1"), name="alice")
    for name in list(t.nodes):
        t.cut(name)
    t.root.restart()
    for name in ("node", "ann"):
        t.root.hello(name)
    t.root.node()
    assert ask(t, t.root, "alice") == "null"
    for name in t.nodes:
        t.connect(name)
    t.settle()
    assert str(t.root.ids["actor"]) in ask(t, t.root, "alice")
    assert str(t.root.ids["actor"]) in ask(t, t.node("n2"), "alice")


def test_who_asks_while_the_root_is_away_hears_of_it_later() -> None:
    t = tree(nodes=2)
    place(t, "actor", name="alice")
    t.cut("n2")
    t.node("n2").post("ann", Query(1, "actor", "alice"))
    t.settle()
    assert t.node("n2").heard("ann", Reply) == []
    t.connect("n2")
    t.settle()
    (reply,) = t.node("n2").heard("ann", Reply)
    assert isinstance(reply, Reply)
    assert str(t.root.ids["actor"]) in reply.body


def test_a_node_that_was_out_of_reach_gives_up_what_was_made_again() -> None:
    t = tree(nodes=2)
    home, process = born_below(t)
    t.cut(home.name)
    t.root.advance(15.0)
    greet(t)
    others = [member for member in t.nodes.values() if member is not home]
    assert any("actor" in member.assigned("a2") for member in others)
    t.connect(home.name)
    t.settle()
    assert home.core.tables.workers[home.peers[process].worker].dying
