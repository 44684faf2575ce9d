"""What simulated user programs do, and what must come out of them.

A `Plan` is one call: its function, what it computes, what it submits, how it fails. Plans travel as their number; the
payload of a task is `str(number)`. Values are sums, so that a lost, doubled or exchanged result shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from rtml.messages import ActorOptions, Function, Options

PLAIN, QUICK, HALF, GPU, DISK, BATCH, DELAYED, ASYNC, LIMITED, WHOLE_GPU = range(100, 110)
CLASS, LOOPING, ADD, HEDGED = range(110, 114)

#: The functions of all programs. Labels and fractions are only taken by leaves: two parents that wait for what the
#: other holds would be the program's own deadlock.
FUNCTIONS: dict[int, Function] = {
    function.id: function
    for function in (
        Function(PLAIN, "plain", "m:plain"),
        Function(QUICK, "quick", "m:quick"),
        Function(HALF, "half", "m:half", options=Options(cpu=0.5)),
        Function(GPU, "gpu", "m:gpu", options=Options(cpu=0.5, gpu=0.5)),
        Function(DISK, "disk", "m:disk", options=Options(cpu=0.0, resources={"disk": 1.0})),
        Function(BATCH, "batch", "m:batch", options=Options(batch=4)),
        Function(DELAYED, "delayed", "m:delayed", options=Options(batch=3, batch_delay=0.01)),
        Function(ASYNC, "async", "m:async", asynchronous=True),
        Function(LIMITED, "limited", "m:limited", options=Options(timeout=0.3)),
        Function(WHOLE_GPU, "whole_gpu", "m:whole_gpu", options=Options(gpu=1.0)),
        Function(CLASS, "class", "m:class"),
        Function(LOOPING, "looping", "m:looping", asynchronous=True),
        Function(ADD, "add", method="add"),
        Function(HEDGED, "hedged", "m:hedged", options=Options(hedge=0.3)),
    )
}
_LEAVES = (PLAIN, PLAIN, QUICK, QUICK, QUICK, HALF, GPU, DISK, BATCH, BATCH, DELAYED, ASYNC, LIMITED, HEDGED, HEDGED)
_PARENTS = (HEDGED, PLAIN, PLAIN, PLAIN, QUICK, HALF, ASYNC, ASYNC)

#: These must not wait for other tasks: they hold what those may need, or share a call with them.
_NEVER_WAIT = frozenset({GPU, DISK, BATCH, DELAYED})

#: Seconds that stand for 'for ever'.
FOR_EVER = 1e6


@dataclass(slots=True)
class Plan:
    """One call. `children` are submitted by it in this order."""

    number: int
    function: int
    value: int
    #: seconds of computing, half of it before its children are submitted
    run: float = 0.0
    children: list[Plan] = field(default_factory=list)
    #: all: wait for all; some: wait for one, cancel the others; leave: do not wait; escape: return their futures
    mode: str = "all"
    #: siblings before it whose values are its arguments
    deps: list[int] = field(default_factory=list)
    #: a sibling before it whose future it is given as a handle
    handle: int | None = None
    #: "", error, retry, crash, hang: how the first `times` attempts end
    fault: str = ""
    times: int = 0
    #: the result lies in shared memory
    big: bool = False
    options: Options | None = None
    #: where `deps` and `handle` point: the parent's children, or the roots of its client
    siblings: list[Plan] = field(default_factory=list, repr=False)
    #: the program cancels it after so many seconds (roots only)
    cancel_after: float | None = None
    #: it creates an actor (roots only)
    hosts: ActorOptions | None = None
    #: it is a call on the actor that this sibling creates
    on: int | None = None

    @property
    def retries(self) -> int:
        """Further attempts that it asks for."""
        given = None if self.options is None else self.options.retries
        return 2 if given is None else given

    @property
    def waited(self) -> list[Plan]:
        """Calls whose values become part of its own."""
        plans = [self.siblings[position] for position in self.deps]
        if self.handle is not None:
            plans.append(self.siblings[self.handle])
        if self.mode in {"all", "escape"}:
            plans += self.children
        return plans

    def expected(self) -> int:
        """The value when nothing goes wrong."""
        return self.value + sum(plan.expected() for plan in self.waited)

    def must_fail(self) -> bool:
        """Whether it cannot end with a value."""
        # One that fails its first attempts may end well even so: attempts that were given back count as well.
        return self.fault in {"error", "hang"} or any(plan.must_fail() for plan in self.waited)

    def errors(self) -> set[str]:
        """Types of errors that it may end with through no fault of the machines."""
        found = {
            "error": {"UserError"},
            "retry": {"UserError"} if self.times > self.retries else set(),
            "crash": {"WorkerDied"} if self.times > self.retries else set(),
            "hang": {"TaskTimeout"} if self.function == LIMITED else {"TaskCancelled"},
        }.get(self.fault, set())
        if self.options is not None and self.options.deadline is not None:
            found = found | {"DeadlineExceeded"}
            if self.options.admission:
                found = found | {"Overloaded"}
        if self.cancel_after is not None:
            found = found | {"TaskCancelled"}
        if self.function == WHOLE_GPU and self.children:
            found = found | {"ResourceDeadlock"}
        for plan in self.waited:
            found = found | plan.errors()
        return found

    def family(self) -> list[Plan]:
        """It and all below."""
        return [self, *(plan for child in self.children for plan in child.family())]


class Drawer:
    """Draws programs.

    Args:
        random: the seed's source.
        plans: where every plan is entered by number.
        faults: whether calls may fail by themselves.
    """

    def __init__(self, random: Random, plans: dict[int, Plan], faults: bool) -> None:
        self.random = random
        self.plans = plans
        self.faults = faults
        self._left = 0

    def roots(self, count: int, tasks: int) -> list[Plan]:
        """Root calls of one client, about `tasks` calls in all."""
        random = self.random
        roots: list[Plan] = []
        for _ in range(count):
            self._left = max(1, tasks // count)
            plan = self._plan(depth=0, siblings=roots)
            if random.random() < 0.15:
                deadline = random.choice((0.0, 0.005, 0.05, 0.3))
                plan.options = Options(
                    deadline=deadline,
                    priority=random.choice((None, 1)),
                    retries=plan.retries,
                    admission=random.random() < 0.5,
                    tenant=random.choice((None, "a", "b")),
                )
            if self.faults and (random.random() < 0.1 or _stuck(plan)):
                plan.cancel_after = random.choice((0.0, 0.001, 0.02, 0.2))
            roots.append(plan)
        return roots

    def _plan(self, depth: int, siblings: list[Plan]) -> Plan:
        random = self.random
        self._left -= 1
        parent = depth < 4 and self._left > 0 and random.random() < (0.8 if depth == 0 else 0.35)
        function = random.choice(_PARENTS if parent else _LEAVES)
        plan = Plan(len(self.plans) + 1, function, random.randrange(1_000), siblings=siblings)
        self.plans[plan.number] = plan
        plan.run = random.choice((0.0, 1e-5, 1e-5, 1e-4, 0.001, 0.01, 0.03))
        if function in {QUICK, ASYNC}:
            plan.run = min(plan.run, 1e-4)
        plan.big = random.random() < 0.15
        self._refer(plan, siblings)
        if parent:
            self._give_children(plan, depth)
        if self.faults and not parent:
            self._break(plan)
        if depth and random.random() < 0.1:
            plan.options = Options(
                retries=plan.retries,
                priority=random.choice((-1, 0, 2)),
                detached=True if random.random() < 0.3 else None,
            )
        return plan

    def _refer(self, plan: Plan, siblings: list[Plan]) -> None:
        random = self.random
        if siblings and random.random() < 0.3:
            count = random.randint(1, min(3, len(siblings)))
            plan.deps = sorted(random.sample(range(len(siblings)), count))
        if plan.function in _NEVER_WAIT:
            plan.deps = [position for position in plan.deps if siblings[position].mode != "escape"]
        elif siblings and random.random() < 0.1:
            plan.handle = random.randrange(len(siblings))

    def _give_children(self, plan: Plan, depth: int) -> None:
        random = self.random
        plan.mode = random.choice(("all", "all", "all", "all", "some", "leave", "escape"))
        if random.random() < 0.03:
            # The child needs what its waiting parent holds.
            plan.function, plan.mode, plan.deps, plan.handle = WHOLE_GPU, "all", [], None
            child = Plan(len(self.plans) + 1, GPU, 1, siblings=plan.children)
            self.plans[child.number] = child
            plan.children.append(child)
            return
        wanted = random.choice((1, 2, 3, 5, 10, 20))
        while wanted and self._left > 0:
            wanted -= 1
            plan.children.append(self._plan(depth + 1, plan.children))

    def _break(self, plan: Plan) -> None:
        random = self.random
        if random.random() > 0.08:
            return
        plan.fault = random.choice(("error", "retry", "retry", "crash", "crash", "hang"))
        plan.times = random.choice((1, 1, 2, 3))
        if plan.fault == "hang":
            # Something must end it: its own timeout.
            plan.function, plan.run, plan.times = LIMITED, 0.0, 1_000
        if plan.fault == "crash" and random.random() < 0.3:
            plan.options = Options(retries=0)


def _stuck(plan: Plan) -> bool:
    return any(member.fault == "hang" and member.function != LIMITED for member in plan.family())
