"""The code of simulated tasks: generators that say what they want to do next."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from rtml.messages import Attempt, ErrorInfo, ObjectRef
from tests.sim.plans import FOR_EVER, Plan
from tests.sim.submitter import Future, ObjectGone, Submitter, Value, decode_value
from tests.sim.world import World


class Sleep(NamedTuple):
    """Compute for so long."""

    seconds: float


class Wait(NamedTuple):
    """Until so many of the futures are done."""

    futures: list[Future]
    needed: int


class Crash(NamedTuple):
    """The process ends here."""


class Returned(NamedTuple):
    """What the function returned: a value, with the futures that are inside."""

    value: int
    escaped: list[Future]


class Failed(Exception):
    """What the function raised."""

    def __init__(self, error: ErrorInfo, retryable: bool = False) -> None:
        self.error = error
        self.retryable = retryable


class Interrupted(BaseException):
    """Nobody wants the result any more."""


Step = Sleep | Wait | Crash
Program = Generator[Step, None, Returned]


@dataclass(eq=False)
class Frame:
    """One running call."""

    world: World
    attempt: Attempt
    plan: Plan
    submitter: Submitter
    #: references of this frame, to be dropped when it has ended
    held: list[Future] = field(default_factory=list)

    def run(self) -> Program:
        """The function."""
        plan = self.plan
        value = plan.value + (yield from self._arguments())
        yield Sleep(plan.run / 2)
        if self.attempt.attempt <= plan.times or plan.fault == "error":
            yield from self._fail()
        children = self._submit()
        escaped: list[Future] = []
        if plan.mode == "all":
            value += yield from self._values(children)
        elif plan.mode == "some" and children:
            yield Wait(children, 1)
            self.submitter.cancel(children)
        elif plan.mode == "escape":
            escaped = children
        yield Sleep(plan.run / 2)
        return Returned(value, escaped)

    def _arguments(self) -> Generator[Step, None, int]:
        """The sum of the dependencies, and of the task that is given as a handle."""
        total = 0
        values = [self._decode(payload) for payload in self.attempt.deps or ()]
        inside = [self._handle(number) for value in values for number in value.handles]
        total += sum(value.number for value in values)
        if self.plan.handle is not None:
            given = self.world.handles[self.attempt.id]
            if not given.done:
                inside.append(self._handle(given.id))
            elif given.payload is None:
                raise Failed(given.error or ErrorInfo("", "ended without error and value"))
            else:
                value = self._decode(given.payload)
                total += value.number
                inside += [self._handle(number) for number in value.handles]
        total += yield from self._values(inside)
        return total

    def _decode(self, payload: bytes | ObjectRef) -> Value:
        try:
            return decode_value(self.world, payload)
        except ObjectGone:
            raise Failed(ErrorInfo("ObjectLost", "an object in shared memory is gone")) from None

    def _handle(self, number: int) -> Future:
        future = self.submitter.handle(number)
        self.held.append(future)
        return future

    def _values(self, futures: list[Future]) -> Generator[Step, None, int]:
        """The sum of the futures' values, and of those inside of them."""
        total = 0
        if any(not future.done for future in futures):
            yield Wait(futures, len(futures))
        for future in futures:
            if future.payload is None:
                raise Failed(future.error or ErrorInfo("", "ended without error and value"))
            total += self._decode(future.payload).number
            total += yield from self._values(future.inner)
        return total

    def _fail(self) -> Generator[Step, None, None]:
        plan = self.plan
        if plan.fault == "crash":
            yield Crash()
        elif plan.fault == "hang":
            yield Sleep(FOR_EVER)
        elif plan.fault:
            raise Failed(ErrorInfo("UserError", "as planned"), retryable=plan.fault == "retry")

    def _submit(self) -> list[Future]:
        children: list[Future] = []
        for plan in self.plan.children:
            deps = [children[position] for position in plan.deps]
            handle = None if plan.handle is None else children[plan.handle]
            future = self.submitter.submit(plan, deps, handle, self.attempt.id)
            children.append(future)
        self.held += children
        return children
