"""Executor processes around the real `WorkerCore`, as `rtml.workers.executor` and `async_executor` drive it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rtml.messages import (
    ASYNC_EXECUTOR,
    CANCELLED,
    ERROR,
    EXECUTOR,
    OK,
    Attempt,
    ErrorInfo,
    Message,
    ObjectRef,
    Rehello,
    TaskResult,
)
from rtml.workers.core import WorkerCore
from tests.sim.process import Process
from tests.sim.programs import Crash, Failed, Frame, Interrupted, Program, Returned, Sleep, Wait
from tests.sim.submitter import Submitter, decode_value, encode_value
from tests.sim.world import Violation, World

if TYPE_CHECKING:
    from tests.sim.dispatcher import Dispatcher
    from tests.sim.node import Node

#: Calls on top of each other in one process.
_NESTED_MAX = 3

#: Bytes that a large result claims to have.
_BIG = 1 << 20


@dataclass(eq=False)
class Level:
    """One call in progress: of one attempt, or of a batch of them."""

    frames: list[Frame]
    programs: list[Program]
    started: float
    waiting: Wait | None = None
    blocked: bool = False
    told: bool = False
    #: results of a batch's members that are known already
    outcomes: list[Returned | Failed | None] = field(default_factory=list)
    #: number of its current sleep
    sleep: int = 0

    @property
    def attempts(self) -> list[Attempt]:
        """Of all members."""
        return [frame.attempt for frame in self.frames]

    @property
    def ready(self) -> bool:
        """Whether what it waits for is there."""
        wait = self.waiting
        return wait is None or sum(future.done for future in wait.futures) >= min(wait.needed, len(wait.futures))


class Executor(Process):
    """What sync and async executors share.

    Args:
        world: the simulation.
        worker: the id that the supervisor gave it.
        dispatcher: where it connects.
        node: its supervisor.
    """

    role = EXECUTOR

    def __init__(self, world: World, worker: int, dispatcher: Dispatcher, node: Node) -> None:
        super().__init__(world, f"executor{worker}", dispatcher)
        self.worker = worker
        self.node = node
        session = world.new_session()
        self.core = WorkerCore(worker, session, self.role, pid=worker)
        self.submitter = Submitter(world, session)
        self.levels: list[Level] = []
        self._sleeps = 0

    # --- messages

    def introduce(self) -> list[Message]:
        return [self.core.hello(), *self.submitter.resume(), *self.core.resume_link()]

    def read(self) -> None:
        """Apply all frames that are there."""
        inbox, self.inbox = self.inbox, []
        for messages in inbox:
            for message in messages:
                if not self.core.receive(message, self.world.now):
                    self.submitter.receive(message)
                    if isinstance(message, Rehello):
                        self.core.rehello(message)
                        self.send([self.core.hello(), *self.submitter.collect(), *self.core.resume_link()])
        for number in self.core.freed:
            self.world.memory.pop(number, None)
        self.core.freed.clear()

    def transmit(self) -> None:
        """Send everything."""
        if self.submitter.core.pending_output:
            self.core.relay(self.submitter.collect())
        messages = self.core.flush()
        if messages:
            self.send(messages)

    def interrupt(self) -> None:
        """SIGUSR1."""
        raise NotImplementedError

    # --- calls

    def settle(self) -> None:
        """Nothing is to be begun now."""

    def launch(self, group: list[Attempt]) -> None:
        """Start what was taken."""
        raise NotImplementedError

    def begin(self, group: list[Attempt]) -> Level:
        """Start a call."""
        plans = [self.world.plans[int(bytes(attempt.args))] for attempt in group]  # type: ignore[arg-type]
        for attempt in group:
            deadline = self.core.deadline(attempt)
            if deadline is not None and deadline <= self.world.now:
                raise Violation(f"task {attempt.id} was started after its deadline")
            if attempt.function not in self.core.functions:
                raise Violation(f"task {attempt.id}: function {attempt.function} is not defined here")
            plain = self.role in (EXECUTOR, ASYNC_EXECUTOR)
            if plain and self.core.functions[attempt.function].asynchronous != (self.role == ASYNC_EXECUTOR):
                raise Violation(f"task {attempt.id} is on an executor of the wrong role")
        frames = [Frame(self.world, a, plan, self.submitter) for a, plan in zip(group, plans, strict=True)]
        level = Level(frames, [frame.run() for frame in frames], self.world.now)
        level.outcomes = [None] * len(frames)
        self.levels.append(level)
        self.world.log(self.name, "begins", *[(a.id, a.attempt, a.under) for a in group])
        self.node.check_capacity()
        return level

    def step(self, level: Level, error: BaseException | None = None) -> bool:
        """Let the call run on; False if it sleeps or waits now, or the process died."""
        pause = 0.0
        for index, program in enumerate(level.programs):
            if level.outcomes[index] is not None:
                continue
            try:
                wish = next(program) if error is None else program.throw(error)
            except StopIteration as end:
                level.outcomes[index] = end.value
            except Failed as failed:
                failed.__traceback__ = None
                level.outcomes[index] = failed
            except Interrupted:
                self.end(level, interrupted=True)
                return True
            else:
                if isinstance(wish, Crash):
                    self.node.kill(self, "exit code 1")
                    return False
                if isinstance(wish, Wait):
                    level.waiting = wish
                    return False
                pause = max(pause, wish.seconds if isinstance(wish, Sleep) else 0.0)
        if all(outcome is not None for outcome in level.outcomes):
            self.end(level)
            return True
        self._sleeps += 1
        level.sleep = self._sleeps
        self.after(pause, self._woken, level, level.sleep)
        return False

    def _woken(self, level: Level, sleep: int) -> None:
        if level in self.levels and level.sleep == sleep and level.waiting is None:
            level.sleep = 0
            self.woken(level)

    def woken(self, level: Level) -> None:
        """A sleep is over."""
        raise NotImplementedError

    def end(self, level: Level, interrupted: bool = False) -> None:
        """The call is over: report, and forget its futures."""
        self.levels.remove(level)
        if self.submitter.core.pending_output:
            self.core.relay(self.submitter.collect())
        run = self.world.now - level.started
        urgent = False
        for frame, outcome in zip(level.frames, level.outcomes, strict=True):
            result = self._result(frame, outcome if not interrupted else None, run)
            urgent = urgent or result.handles is not None or isinstance(result.payload, ObjectRef)
            self.world.log(self.name, "ends", result.id, result.attempt, result.outcome)
            self.core.finish(result)
        if urgent or self.core.unsent >= self.world.settings.coalesce:
            self.transmit()
        for frame in level.frames:
            for future in frame.held:
                self.submitter.drop(future)

    def _result(self, frame: Frame, outcome: Returned | Failed | None, run: float) -> TaskResult:
        attempt = frame.attempt
        result = TaskResult(attempt.id, attempt.attempt, OK, run=run)
        if isinstance(outcome, Returned):
            outcome = self._with_ended(outcome)
        if isinstance(outcome, Returned):
            escaped = [future.id for future in outcome.escaped]
            result.payload = encode_value(outcome.value, escaped)
            result.handles = escaped or None
            if frame.plan.big:
                number = self.world.store(self.submitter.session, result.payload)
                result.payload = ObjectRef(number, _BIG, str(number))
            number = frame.plan.number
            self.world.completed[number] = self.world.completed.get(number, 0) + 1
        elif outcome is None:
            result.outcome, result.error = CANCELLED, ErrorInfo("TaskCancelled", "interrupted")
        else:
            result.outcome, result.error, result.retryable = ERROR, outcome.error, outcome.retryable
        return result

    def _with_ended(self, outcome: Returned) -> Returned | Failed:
        """Futures that have ended are pickled with their values: the dispatcher may have forgotten them."""
        value, escaped = outcome.value, []
        for future in outcome.escaped:
            if not future.done:
                escaped.append(future)
            elif future.payload is None:
                return Failed(future.error or ErrorInfo("", "ended without error and value"))
            else:
                value += decode_value(self.world, future.payload).number
                escaped += future.inner
        return Returned(value, escaped)

    def running(self) -> list[int]:
        """Tasks that are inside a function, as the running page shows them."""
        return [attempt.id for level in self.levels for attempt in level.attempts]


class SyncExecutor(Executor):
    """Runs one call at a time, and descendants of a waiting one on top of it."""

    def poke(self) -> None:
        if not self.levels or self.levels[-1].waiting is not None:
            self.read()
            self.advance()

    def advance(self) -> None:
        """Do what can be done now."""
        while self.alive:
            top = self.levels[-1] if self.levels else None
            if top is not None and top.waiting is None:
                return  # it sleeps
            if top is not None and (top.ready or self._unwanted()):
                self._go_on(top)
                continue
            if top is not None and not top.blocked:
                if not self._block(top):
                    return
                continue
            group = self.core.take(self.world.now)
            if group:
                self.launch(group)
                continue
            self.settle()
            self.transmit()
            if self.core.leaving and not self.core.running:
                self.node.kill(self, "left")
            return

    def launch(self, group: list[Attempt]) -> None:
        self._run(self.begin(group))

    def _run(self, level: Level, error: BaseException | None = None) -> None:
        if not self.step(level, error) and self.alive and level.waiting is None:
            # What is behind a call that takes time must not wait for it.
            self.transmit()

    def _block(self, level: Level) -> bool:
        """It waits; False if nothing may be run on top of it."""
        self.transmit()
        level.blocked = True
        self.core.block(level.attempts[0], inline=len(self.levels) < _NESTED_MAX)
        return True

    def _go_on(self, level: Level) -> None:
        if level.blocked:
            level.blocked = False
            self.core.resume(level.attempts[0])
            self.transmit()
        level.waiting = None
        self._run(level, self._interruption())

    def _unwanted(self) -> bool:
        return any(not level.told and self._revoked(level) for level in self.levels)

    def _revoked(self, level: Level) -> bool:
        return all((attempt.id, attempt.attempt) in self.core.revoked for attempt in level.attempts)

    def _interruption(self) -> Interrupted | None:
        """To be raised in the innermost call, if it or one below it is not wanted any more."""
        if not self._unwanted():
            return None
        self.levels[-1].told = True
        return Interrupted()

    def woken(self, level: Level) -> None:
        self._run(level)
        self.read_between()
        self.advance()

    def read_between(self) -> None:
        """Between two calls the link is looked at, when a signal came. It does no harm otherwise."""
        if self.inbox and (not self.levels or self.levels[-1].waiting is not None):
            self.read()

    def interrupt(self) -> None:
        self._guarded(self._interrupted, ())

    def _interrupted(self) -> None:
        self.read()
        top = self.levels[-1] if self.levels else None
        if top is not None and top.waiting is None:
            self.transmit()
            error = self._interruption()
            if error is not None:
                self._run(top, error)
        self.advance()


class AsyncExecutor(Executor):
    """Runs any number of coroutines."""

    role = ASYNC_EXECUTOR

    def poke(self) -> None:
        self.read()
        self.advance()

    def interrupt(self) -> None:
        """It looks at its messages anyway."""

    def launch(self, group: list[Attempt]) -> None:
        self.step(self.begin(group))

    def woken(self, level: Level) -> None:
        self.step(level)
        self.advance()

    def advance(self) -> None:
        """Start what is there, wake who can go on."""
        while self.alive:
            group = self.core.take(self.world.now)
            if group:
                self.launch(group)
                continue
            due = next((level for level in self.levels if self._due(level)), None)
            if due is None:
                break
            due.waiting = None
            self.step(due, self._interruption(due))
        if self.alive:
            self.settle()
            self.transmit()
            if self.core.leaving and not self.core.running:
                self.node.kill(self, "left")

    def _due(self, level: Level) -> bool:
        return (level.waiting is not None and level.ready) or self._unwanted(level)

    def _unwanted(self, level: Level) -> bool:
        revoked = self.core.revoked
        return not level.told and all((attempt.id, attempt.attempt) in revoked for attempt in level.attempts)

    def _interruption(self, level: Level) -> Interrupted | None:
        if not self._unwanted(level):
            return None
        level.told = True
        return Interrupted()
