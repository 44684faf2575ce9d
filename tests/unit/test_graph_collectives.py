"""Plans of reductions: any arrival order, any deaths; each contributor once, the first k, nothing forgotten."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtml.graph.collectives import AGAIN_MAX, Again, Command, End, Fail, Plan, Source, Start, Step, Stop, shape


def starts(commands: list[Command]) -> list[Step]:
    return [command.step for command in commands if isinstance(command, Start)]


def test_all_on_one_node_is_one_step() -> None:
    plan = Plan(3, 3, "home")
    for position in (2, 0, 1):
        plan.arrived(position, "home")
    (step,) = starts(plan.advance())
    assert step.final
    assert step.sources == (Source(False, 2), Source(False, 0), Source(False, 1))
    plan.finished(step.number)
    assert plan.advance() == [End(step.number, [0, 1, 2])]


def test_what_comes_early_is_folded_while_others_are_awaited() -> None:
    plan = Plan(4, 4, "home")
    plan.arrived(0, "home")
    assert plan.advance() == []
    plan.arrived(1, "home")
    (early,) = starts(plan.advance())
    assert not early.final
    assert early.covers == (0, 1)
    plan.arrived(2, "home")
    plan.arrived(3, "home")
    assert plan.advance() == []  # it is not done
    plan.finished(early.number)
    (last,) = starts(plan.advance())
    assert last.final
    assert last.sources == (Source(True, early.number), Source(False, 2), Source(False, 3))


def test_the_first_k_count_and_a_late_one_replaces_what_is_lost() -> None:
    plan = Plan(3, 2, "home")
    plan.arrived(2, "far")
    plan.arrived(0, "home")
    plan.arrived(1, "home")
    (step,) = starts(plan.advance())
    assert set(step.covers) == {2, 0}
    plan.broken(step.number, [Source(False, 2)])
    stop, start = plan.advance()
    assert stop == Stop(step.number)
    assert isinstance(start, Start)
    assert set(start.step.covers) == {0, 1}


def test_failures_are_left_out_if_enough_others_are_there() -> None:
    plan = Plan(3, 2, "home")
    plan.failed(1)
    assert plan.advance() == []
    plan.failed(0)
    assert plan.advance() == [Fail(1)]


def test_a_lost_input_is_asked_for_again_if_there_is_no_other_so_often() -> None:
    plan = Plan(1, 1, "home")
    for _ in range(AGAIN_MAX):
        plan.arrived(0, "far")
        (step,) = starts(plan.advance())
        plan.broken(step.number, [Source(False, 0)])
        assert plan.advance() == [Stop(step.number), Again(0)]
    plan.arrived(0, "far")
    (step,) = starts(plan.advance())
    plan.broken(step.number, [Source(False, 0)])
    assert plan.advance() == [Stop(step.number), Fail(0)]


def test_a_chain_of_nodes_and_each_sends_once() -> None:
    plan = Plan(6, 6, "n0", latency=1e-3, bandwidth=1e6)
    for position in range(6):
        plan.arrived(position, f"n{position % 3}", 1_000_000)
    commands = plan.advance()
    far_1, far_2, last = starts(commands)
    assert (far_1.node, far_2.node, last.node) == ("n1", "n2", "n0")
    assert far_2.sources[-1] == Source(True, far_1.number)
    assert last.sources[-1] == Source(True, far_2.number)
    assert sorted(last.covers) == list(range(6))


def test_a_broken_node_is_tried_again_once_then_its_inputs_are_lost() -> None:
    plan = Plan(4, 4, "home")
    for position, node in enumerate(("far", "far", "home", "home")):
        plan.arrived(position, node, 1 << 20)
    far, last = starts(plan.advance())
    plan.broken(far.number)
    commands = plan.advance()
    assert {command.number for command in commands if isinstance(command, Stop)} == {far.number, last.number}
    again, _ = starts(commands)
    assert again.node == "far"
    plan.broken(again.number)
    asked = [command.position for command in plan.advance() if isinstance(command, Again)]
    assert asked == [0, 1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 31])
def test_shapes_lead_home(count: int) -> None:
    for size in (100, 100_000, 10_000_000):
        parents = shape(count, size, latency=1e-3, bandwidth=1e8)
        assert all(index < parent <= count for index, parent in enumerate(parents))
        children = [parents.count(one) for one in range(count + 1)]
        if count == 31:
            assert max(children) == {100: 31, 100_000: 2, 10_000_000: 1}[size]


class World:
    """Carries out a plan, with nodes that die, and checks every step's sources."""

    def __init__(self, seed: int, count: int, wanted: int, nodes: int) -> None:
        self.random = random.Random(seed)
        self.nodes = [f"n{number}" for number in range(nodes)]
        self.plan = Plan(count, wanted, "n0")
        self.wanted = wanted
        self.coming = list(range(count))
        self.random.shuffle(self.coming)
        self.where: dict[int, str] = {}
        self.dead: set[str] = set()
        self.steps: dict[int, Step] = {}
        #: What each step's value is made of, once it is done.
        self.values: dict[int, list[int]] = {}
        self.outcome: End | Fail | None = None
        self.order: list[int] = []

    def run(self, deaths: int) -> None:
        for _ in range(2000):
            self.obey()
            if self.outcome is not None:
                return
            choices = ["arrive"] * bool(self.coming) + ["finish"] * 3 * bool(self.open_steps())
            if deaths and len(self.dead) < len(self.nodes) - 1:
                choices.append("die")
            assert choices, "nothing can happen, and there is no result"
            what = self.random.choice(choices)
            if what == "arrive":
                self.arrive(self.coming.pop())
            elif what == "die":
                deaths -= 1
                self.dead.add(self.random.choice([node for node in self.nodes[1:] if node not in self.dead]))
            else:
                self.finish(self.random.choice(self.open_steps()))
        raise AssertionError("the plan goes round in circles")

    def arrive(self, position: int) -> None:
        if self.random.random() < 0.05:
            self.plan.failed(position)
            return
        self.where[position] = self.random.choice([node for node in self.nodes if node not in self.dead])
        self.order.append(position)
        self.plan.arrived(position, self.where[position], self.random.choice([10, 1 << 20]))

    def open_steps(self) -> list[Step]:
        """Those that can end: all that they are made of is there, or never will be."""
        return [step for step in self.steps.values() if step.number not in self.values and self.ready(step)]

    def ready(self, step: Step) -> bool:
        makers = [self.steps.get(source.number) for source in step.sources if source.made]
        return all(maker is None or maker.number in self.values or maker.node in self.dead for maker in makers)

    def finish(self, step: Step) -> None:
        if step.node in self.dead:
            self.plan.broken(step.number, gone=self.random.random() < 0.5)
            return
        blamed = [source for source in step.sources if self.lost(source)]
        if blamed:
            self.plan.broken(step.number, blamed)
            return
        value: list[int] = []
        for source in step.sources:
            value += self.values[source.number] if source.made else [source.number]
        self.values[step.number] = value
        self.plan.finished(step.number)

    def lost(self, source: Source) -> bool:
        node = self.steps[source.number].node if source.made else self.where[source.number]
        return node in self.dead

    def obey(self) -> None:
        while commands := self.plan.advance():
            self.carry_out(commands)

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            assert self.outcome is None
            if isinstance(command, Start):
                step = command.step
                assert all(source.number in self.steps for source in step.sources if source.made)
                self.steps[step.number] = step
            elif isinstance(command, Stop):
                del self.steps[command.number]
            elif isinstance(command, Again):
                del self.where[command.position]
                if self.random.random() < 0.8:
                    self.coming.append(command.position)
                else:
                    self.plan.failed(command.position)
                    self.plan.arrived(command.position, "n0")  # too late
            elif isinstance(command, End):
                self.outcome = command
                value = self.values[command.step]
                assert len(value) == len(set(value)) == self.wanted
                assert sorted(value) == command.contributors
            else:
                self.outcome = command


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 14), st.integers(1, 14), st.integers(1, 5), st.integers(0, 4))
def test_whatever_happens_each_contributor_counts_once(
    seed: int, count: int, wanted: int, nodes: int, deaths: int
) -> None:
    world = World(seed, count, min(count, wanted), nodes)
    world.run(deaths)
    assert world.outcome is not None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 14), st.integers(1, 14), st.integers(1, 5))
def test_without_deaths_the_first_to_arrive_are_taken(seed: int, count: int, wanted: int, nodes: int) -> None:
    world = World(seed, count, min(count, wanted), nodes)
    world.run(0)
    if isinstance(world.outcome, End):
        assert world.outcome.contributors == sorted(world.order[: world.wanted])
