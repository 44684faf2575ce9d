"""A client program: submits roots, waits, cancels some, and compares what it gets with what must come out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rtml.messages import Message
from tests.sim.plans import Plan
from tests.sim.process import Process
from tests.sim.submitter import Future, ObjectGone, Submitter, decode_value
from tests.sim.world import Violation, World

if TYPE_CHECKING:
    from tests.sim.dispatcher import Dispatcher

#: Seconds after which a buffered submission is sent.
_FLUSH = 2e-4


class Client(Process):
    """One driver program.

    Args:
        world: the simulation.
        number: for its name.
        dispatcher: where it connects.
        roots: its calls.
    """

    def __init__(self, world: World, number: int, dispatcher: Dispatcher, roots: list[Plan]) -> None:
        super().__init__(world, f"client{number}", dispatcher)
        self.submitter = Submitter(world, world.new_session(), world.settings.window)
        self.roots = roots
        self.futures: list[Future] = []
        self._flush_due = False
        self._checked = 0

    def start(self) -> None:
        """Connect, and submit the roots in bursts."""
        self.connect()
        delay = 0.0
        for _ in self.roots:
            if self.world.random.random() < 0.3:
                delay += self.world.random.choice((1e-4, 0.01, 0.2))
            self.after(delay, self._submit)

    def introduce(self) -> list[Message]:
        return [self.submitter.core.hello(name=self.name), *self.submitter.resume()]

    def poke(self) -> None:
        inbox, self.inbox = self.inbox, []
        for messages in inbox:
            for message in messages:
                self.submitter.receive(message)
        if self.submitter.core.pending_output:
            self._flush_soon()

    def _submit(self) -> None:
        # The next one: events that a freeze delayed may come in another order.
        plan = self.roots[len(self.futures)]
        deps = [self.futures[position] for position in plan.deps]
        handle = None if plan.handle is None else self.futures[plan.handle]
        actor = None if plan.on is None else self.futures[plan.on]
        future = self.submitter.submit(plan, deps, handle, actor=actor)
        self.world.log(self.name, "submits", future.id, "plan", plan.number)
        self.futures.append(future)
        if plan.cancel_after is not None:
            self.after(plan.cancel_after, self._cancel, future)
        self._flush_soon()

    def _cancel(self, future: Future) -> None:
        self.world.log(self.name, "cancels", future.id)
        self.submitter.cancel([future])
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self.after(self.world.random.choice((0.0, _FLUSH)), self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self.link is not None:
            self.send(self.submitter.collect())

    # --- the verdict

    @property
    def done(self) -> bool:
        """Whether it has all it asked for, or is gone."""
        if not self.alive:
            return True
        waited = [future for future in self.futures if not _lasts(future)]
        return len(self.futures) == len(self.roots) and all(self._ended(future) for future in waited)

    def _ended(self, future: Future) -> bool:
        return future.done and all(self._ended(inner) for inner in future.inner)

    def judge(self) -> None:
        """Compare all results with the plans."""
        for future in self.futures:
            assert future.plan is not None
            if _lasts(future):
                continue
            problem = self._problem(future, future.plan)
            if problem:
                raise Violation(f"{self.name}, task {future.id}: {problem}\n{future.plan}")

    def _problem(self, future: Future, plan: Plan) -> str:
        outcome = self._outcome(future)
        if isinstance(outcome, int):
            if plan.must_fail():
                return f"ended with a value, but cannot: {outcome}"
            return "" if outcome == plan.expected() else f"is {outcome}, expected {plan.expected()}"
        allowed = plan.errors() | self.world.excuses()
        if plan.on is not None and (self.world.settings.machines_fail or self.world.settings.program_faults):
            allowed |= {"ActorDied"}
        if self.world.disturbed and any(self.roots[position].errors() for position in plan.deps):
            # A new connection tells nothing of dependencies that had ended without a value.
            allowed |= {"ObjectLost"}
        return "" if outcome in allowed else f"failed with {outcome} ({future.error}), allowed: {sorted(allowed)}"

    def _outcome(self, future: Future) -> int | str:
        """The value with those of the futures inside, or the type of the error."""
        if future.payload is None:
            return future.error.type if future.error is not None else "nothing"
        try:
            total = decode_value(self.world, future.payload).number
        except ObjectGone:
            return "ObjectGone"
        for inner in future.inner:
            outcome = self._outcome(inner)
            if isinstance(outcome, str):
                self.world.log(self.name, "inner future", inner.id, inner.error)
                return outcome
            total += outcome
        return total

    def let_go(self) -> None:
        """Drop all futures."""
        for future in self.futures:
            assert future.plan is not None
            if future.plan.hosts is not None and future.plan.options is not None and future.plan.options.detached:
                self.submitter.core.end(future.id)
            self.submitter.drop(future)
        self.futures.clear()
        self._flush_soon()

    def leave(self) -> None:
        """The program ends."""
        self.world.log(self.name, "leaves")
        self.die()


def _lasts(future: Future) -> bool:
    """Whether it ends only with its actor."""
    return future.plan is not None and future.plan.hosts is not None
