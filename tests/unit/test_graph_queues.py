"""Lanes and their queues: the order of ready tasks, fair turns, and entries that went stale."""

from __future__ import annotations

import pytest

from rtml.graph.estimate import BatchCost
from rtml.graph.queues import Lane, ReadyQueue
from rtml.graph.state import FunctionState, Graph, Profile, Session, Shape, TaskState
from rtml.messages import CLIENT, EXECUTOR, Function, Options, Task

FUNCTION = Function(1, "f", "m:f")
SESSIONS = {name: Session(number, CLIENT, name) for number, name in enumerate(("ann", "bob", "eve"), 1)}


def profile(priority: int = 0, batch: int = 0) -> Profile:
    return Profile(FUNCTION, Options(priority=priority, batch=batch), Shape(1.0, {}))


class Tasks:
    """Makes tasks that carry what the order depends on, and pushes them."""

    def __init__(self) -> None:
        self.lane = Lane(profile())
        self.names: dict[int, str] = {}
        self.sequence = 0

    def push(
        self, name: str, *, by: str = "ann", due: float = 0.0, order: int = 0, depth: int = 0, priority: int = 0
    ) -> TaskState:
        self.sequence += 1
        session = SESSIONS[by]
        asked = profile(priority)
        function = FunctionState(FUNCTION, asked, BatchCost())
        graph = Graph(self.sequence, session, order, "", share=session.id)
        task = TaskState(self.sequence, Task(self.sequence, 1, b""), function, asked, session, session, graph, 0.0)
        task.due, task.depth = due, depth
        self.names[task.id] = name
        self.lane.push(task, self.sequence)
        return task

    def drain(self, look: bool = True) -> str:
        """The names in the order in which they come out; if one looks, the head is what `pop` then takes."""
        names = []
        while self.lane.count:
            head = self.lane.head() if look else None
            popped = self.lane.pop()
            assert head in (popped, None)
            assert popped.lane is None
            names.append(self.names[popped.id])
        return " ".join(names)


@pytest.mark.parametrize(
    ("pushes", "order"),
    [
        ([("a", {}), ("b", {}), ("c", {})], "a b c"),
        ([("late", {"due": 2.0}), ("soon", {"due": 1.0})], "soon late"),
        ([("young", {"order": 2}), ("old", {"order": 1})], "old young"),
        ([("root", {"depth": 0}), ("deep", {"depth": 3})], "deep root"),
        ([("due", {"due": 1.0, "order": 9}), ("old", {"due": 2.0, "order": 1})], "due old"),
        ([("old", {"order": 1, "depth": 0}), ("deep", {"order": 2, "depth": 9})], "old deep"),
        ([("low", {"due": 1.0}), ("high", {"priority": 1, "due": 9.0}), ("least", {"priority": -1})], "high low least"),
        # ascending, then one that belongs between: the deque and the heap are merged
        ([("a", {"due": 1.0}), ("c", {"due": 3.0}), ("b", {"due": 2.0}), ("d", {"due": 4.0})], "a b c d"),
        ([("c", {"due": 3.0}), ("b", {"due": 2.0}), ("a", {"due": 1.0})], "a b c"),
        # equal entries keep the order in which they came, on either side
        ([("c", {"due": 3.0}), ("a", {"due": 1.0}), ("b", {"due": 1.0})], "a b c"),
    ],
)
def test_the_order_within_one_session(pushes: list[tuple[str, dict[str, float]]], order: str) -> None:
    tasks = Tasks()
    for name, facts in pushes:
        tasks.push(name, **facts)  # type: ignore[arg-type]
    assert tasks.drain() == order


@pytest.mark.parametrize(
    ("pushes", "order"),
    [
        ("ann:1 ann:2 ann:3 bob:1 bob:2", "ann:1 bob:1 ann:2 bob:2 ann:3"),
        ("ann:1 bob:1 eve:1 ann:2 bob:2 eve:2", "ann:1 bob:1 eve:1 ann:2 bob:2 eve:2"),
        ("ann:1 ann:2 ann:3 ann:4 bob:1", "ann:1 bob:1 ann:2 ann:3 ann:4"),
        ("bob:1 ann:1 ann:2", "bob:1 ann:1 ann:2"),
    ],
)
def test_sessions_take_turns(pushes: str, order: str) -> None:
    tasks = Tasks()
    for name in pushes.split():
        tasks.push(name, by=name.split(":")[0])
    assert tasks.drain() == order


def test_a_turn_does_not_depend_on_due_times() -> None:
    tasks = Tasks()
    for number in range(3):
        tasks.push(f"ann:{number}", by="ann", due=1.0)
    tasks.push("bob", by="bob", due=9.0)
    assert tasks.drain() == "ann:0 bob ann:1 ann:2"


def test_a_priority_is_drained_before_the_next_whatever_the_turns() -> None:
    tasks = Tasks()
    for name in ("ann:low", "bob:low"):
        tasks.push(name, by=name[:3])
    for name in ("ann:high", "ann:higher"):
        tasks.push(name, by="ann", priority=2)
    assert tasks.drain() == "ann:high ann:higher ann:low bob:low"


def test_an_urgent_task_comes_before_what_was_there() -> None:
    tasks = Tasks()
    tasks.push("a")
    tasks.push("b")
    assert tasks.names[tasks.lane.pop().id] == "a"
    tasks.push("urgent", priority=1)
    assert tasks.drain() == "urgent b"


@pytest.mark.parametrize("gone", ["a", "b", "c", "d", "a b", "c d", "a b c", "a c d"])
@pytest.mark.parametrize("sessions", [("ann",), ("ann", "bob")])
@pytest.mark.parametrize("look", [False, True])
def test_tasks_that_left_are_skipped(gone: str, sessions: tuple[str, ...], look: bool) -> None:
    tasks = Tasks()
    dues = {"b": 2.0, "d": 4.0, "a": 1.0, "c": 3.0}  # b and d go to the deque, a and c to the heap
    made = {
        name: tasks.push(name, by=sessions[number % len(sessions)], due=due)
        for number, (name, due) in enumerate(dues.items())
    }
    for name in gone.split():
        tasks.lane.remove(made[name])
        assert made[name].lane is None
    left = [name for name in "abcd" if name not in gone.split()]
    assert tasks.lane.count == len(left)
    popped = tasks.drain(look).split()
    assert sorted(popped) == left
    if len(sessions) == 1:
        assert popped == left


def test_a_task_that_left_and_came_back_has_its_new_place() -> None:
    tasks = Tasks()
    first = tasks.push("first", due=1.0)
    tasks.push("second", due=2.0)
    tasks.lane.remove(first)
    first.due = 3.0
    tasks.lane.push(first, 100)
    assert tasks.drain() == "second first"


@pytest.mark.parametrize("look", [False, True])
def test_a_session_of_which_all_tasks_left_loses_its_turn(look: bool) -> None:
    tasks = Tasks()
    left = [tasks.push(f"ann:{number}", by="ann") for number in range(3)]
    urgent = tasks.push("ann:urgent", by="ann", priority=5)
    tasks.push("bob", by="bob")
    for task in (*left, urgent):
        tasks.lane.remove(task)
    assert tasks.drain(look) == "bob"


def test_a_lane_whose_tasks_left_forgets_everything() -> None:
    tasks = Tasks()
    tasks.lane.remove(tasks.push("a", priority=3))
    assert (tasks.lane.count, tasks.lane._classes, tasks.lane._priorities) == (0, {}, [])
    tasks.push("c")
    assert tasks.drain() == "c"


def test_the_only_queue_of_a_lane_stays_for_the_next_task() -> None:
    tasks = Tasks()
    for name in "ab":
        tasks.push(name, priority=3)
    for _ in range(2):
        tasks.lane.pop()
    (queue,) = tasks.lane._classes[3].values()
    assert (tasks.lane.count, list(queue.ordered), queue.heap) == (0, [], [])
    for name, by, priority in (("b", "ann", 1), ("c", "bob", 3), ("d", "ann", 5), ("e", "ann", 3)):
        tasks.push(name, by=by, priority=priority)
    assert tasks.drain() == "d e c b"  # the session keeps its turn, too


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sessions", [("ann",), ("ann", "bob"), ("ann", "bob", "eve")])
def test_what_is_put_back_is_where_it_was(sessions: tuple[str, ...], count: int) -> None:
    def filled() -> Tasks:
        tasks = Tasks()
        for name in sessions:
            for number in range(count):
                tasks.push(f"{name}:{number}", by=name)
        return tasks

    undisturbed, tasks = filled().drain().split(), filled()
    for name in undisturbed:
        for _ in range(2):
            tasks.lane.unpop(tasks.lane.pop())
        assert tasks.lane.items == tasks.lane.count
        assert tasks.names[tasks.lane.pop().id] == name


def test_an_empty_queue_has_no_head() -> None:
    queue = ReadyQueue()
    assert queue.head() is None
    assert queue.pop() is None


def test_a_lane_says_what_it_holds() -> None:
    lane = Lane(profile(batch=8))
    assert (lane.batch, lane.profile.role, lane.count) == (8, EXECUTOR, 0)
