"""Futures around a `ClientCore`: what `rtml.client.client.Client` is to real programs.

References are counted by hand (`hold`, `drop`), so that the moment of a release does not depend on the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from rtml.client.core import WINDOW, ClientCore
from rtml.messages import OK, ErrorInfo, Message, ObjectRef, Results, Task, TaskResult, Welcome, task_id
from tests.sim.plans import FUNCTIONS, Plan
from tests.sim.world import Violation, World


@dataclass(slots=True)
class Value:
    """A decoded payload."""

    number: int
    handles: list[int]


def encode_value(number: int, handles: list[int]) -> bytes:
    """The payload of a value with futures inside."""
    return ",".join(map(str, (number, *handles))).encode()


class ObjectGone(Exception):
    """The shared memory was freed while somebody still read it."""


def decode_value(world: World, payload: bytes | ObjectRef) -> Value:
    """The opposite of `encode_value`, through shared memory if need be."""
    if isinstance(payload, ObjectRef):
        content = world.memory.get(payload.id)
        if content is None:
            raise ObjectGone
        payload = content
    number, *handles = map(int, payload.split(b","))
    return Value(number, handles)


class Handle(NamedTuple):
    """A future inside of arguments. In real payloads it is pickled; here it goes beside them."""

    id: int
    done: bool
    payload: bytes | ObjectRef | None
    error: ErrorInfo | None


@dataclass(eq=False, slots=True)
class Future:
    """A submitter's handle of a task, its own or a foreign one."""

    id: int
    plan: Plan | None = None
    foreign: bool = False
    #: its own, but a handle of it came back
    kept: bool = False
    done: bool = False
    payload: bytes | ObjectRef | None = None
    error: ErrorInfo | None = None
    #: futures inside the value, held by this one
    inner: list[Future] = field(default_factory=list)
    refs: int = 0
    #: absolute end of its budget, as its program sees it
    deadline: float | None = None


class Submitter:
    """One session's futures.

    Args:
        world: the simulation.
        session: its number.
        window: most unresolved tasks at the dispatcher. Never reached in an executor: its tasks may need their own.
    """

    def __init__(self, world: World, session: int, window: int = WINDOW) -> None:
        self.world = world
        self.session = session
        self.core = ClientCore(session, window)
        self.known: dict[int, Future] = {}
        self._kept: dict[int, list[Future]] = {}
        self._sequence = 0

    # --- the program's side

    def submit(
        self, plan: Plan, deps: list[Future], handle: Future | None, parent: int = 0, actor: Future | None = None
    ) -> Future:
        """Submit a call; the caller holds the future."""
        self._sequence += 1
        number = task_id(self.session, self._sequence)
        task = Task(number, plan.function, str(plan.number).encode(), parent, options=plan.options)
        future = self.known[number] = Future(number, plan)
        kept = [*deps, handle] if handle is not None else list(deps)
        failed = [dep for dep in deps if dep.done and dep.payload is None]
        if failed:
            future.done, future.error = True, failed[0].error
            return self.hold(future)
        if plan.function in {104, 105, 106}:
            task.batch_key = f"k{plan.value % 2}"
        if plan.hosts is not None:
            task.actor, task.hosts, future.kept = number, replace(plan.hosts), True
            self.core.keep(number)
        if actor is not None:
            task.actor = actor.id
            kept.append(actor)
        if deps:
            task.deps = [(dep.id, dep.payload) for dep in deps]
        if handle is not None:
            # What has ended travels as its value; of what has not, or is inside of that, the ids.
            task.handles = [inner.id for inner in handle.inner] if handle.done else [handle.id]
            self.world.handles[number] = Handle(handle.id, handle.done, handle.payload, handle.error)
        if kept:
            self._kept[number] = [self.hold(each) for each in kept]
        definition = FUNCTIONS[plan.function]
        if not self.core.knows(definition.id):
            self.core.define(definition)
        if plan.options is not None and plan.options.deadline is not None:
            future.deadline = self.world.now + plan.options.deadline
        self.core.submit(task, future.deadline)
        return self.hold(future)

    def cancel(self, futures: list[Future]) -> None:
        """Give up; the futures end at once."""
        pending = [future for future in futures if not future.done]
        self.core.cancel([future.id for future in pending])
        for future in pending:
            future.done = True
            future.error = ErrorInfo("TaskCancelled", "cancelled here")

    def handle(self, number: int) -> Future:
        """The future of anybody's task; the caller holds it."""
        future = self.known.get(number)
        if future is None:
            future = self.known[number] = Future(number, foreign=True)
            self.core.watch(number)
        elif not future.foreign and self.core.keep(number):
            future.kept = True
        return self.hold(future)

    def hold(self, future: Future) -> Future:
        """One reference more."""
        future.refs += 1
        return future

    def drop(self, future: Future) -> None:
        """One reference less; the last one releases what the value holds."""
        future.refs -= 1
        if not future.refs and (future.done or future.foreign):
            self._forget(future)
        elif not future.refs and future.plan is not None and future.plan.hosts is not None:
            self.core.unwatch(future.id)

    def _forget(self, future: Future) -> None:
        if self.known.get(future.id) is future:
            del self.known[future.id]
        if isinstance(future.payload, ObjectRef):
            self.core.release([future.payload.id])
        if future.foreign or future.kept:
            self.core.unwatch(future.id)
        inner, future.inner = future.inner, []
        for each in inner:
            self.drop(each)

    # --- the wire's side

    def receive(self, message: Message) -> None:
        """Apply a message of the dispatcher."""
        for result in self.core.receive(message, self.world.now):
            self._resolve(result)
        if isinstance(message, Welcome):
            # A new dispatcher will not confirm what was cancelled before.
            for task in [task for task in self._kept if self.core.settled(task)]:
                for kept in self._kept.pop(task):
                    self.drop(kept)
        if isinstance(message, Results):
            # Cancelled ones too.
            for result in message.results:
                for kept in self._kept.pop(result.id, ()):
                    self.drop(kept)

    def _resolve(self, result: TaskResult) -> None:
        future = self.known.get(result.id)
        if future is None or (future.done and not future.error):
            raise Violation(f"session {self.session} got a result that it does not wait for: {result}")
        future.done = True
        if result.outcome == OK:
            future.payload = result.payload
            # Watched before the result is acknowledged, else the dispatcher might forget them.
            future.inner = [self.handle(number) for number in result.handles or ()]
        else:
            future.error = result.error or ErrorInfo("", "no error given")
        if not future.refs:
            self._forget(future)

    def collect(self) -> list[Message]:
        """What to send now."""
        if self.core.returning:
            self._refresh()
        return self.core.flush(self.world.now)

    def resume(self) -> list[Message]:
        """What to send on a new connection, after the `Hello`."""
        self._refresh()
        return self.core.resume(self.world.now)

    def _refresh(self) -> None:
        for task in self.core.unresolved_tasks():
            if task.deps is not None:
                ended = {kept.id: kept.payload for kept in self._kept[task.id] if kept.done}
                task.deps = [(dep, ended.get(dep) if payload is None else payload) for dep, payload in task.deps]
