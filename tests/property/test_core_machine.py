"""The dispatcher's core under arbitrary sequences of messages, against a naive oracle; `check` after every step.

The oracle knows only what was asked for and what was answered: which tasks were submitted, which attempts are out, what
each executor was told. It says what may be handed out, what each result must be, and that all ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from rtml.graph.check import check
from rtml.graph.core import Core
from rtml.graph.tables import Close, Limits, Send, Sweep
from rtml.messages import (
    CANCELLED,
    CLIENT,
    ERROR,
    EXECUTOR,
    EXPIRED,
    OK,
    SUPERVISOR,
    Ack,
    Assign,
    Attempt,
    Blocked,
    Cancel,
    Define,
    ErrorInfo,
    ExecutorDied,
    Finished,
    Function,
    Hello,
    KillExecutor,
    Leave,
    Message,
    Node,
    Options,
    Recall,
    Results,
    Resumed,
    Returned,
    Revoke,
    StartExecutor,
    Submit,
    Task,
    TaskResult,
    Unwatch,
    Watch,
    WatchResults,
    session_of,
    task_id,
)

CPUS = 2
PLAIN, HALF, GPU, BATCH, HEDGED = 1, 2, 3, 4, 5
FUNCTIONS = [
    Function(PLAIN, "plain", "m:f"),
    Function(HALF, "half", "m:f", options=Options(cpu=0.5)),
    Function(GPU, "gpu", "m:f", options=Options(cpu=0.0, gpu=1.0)),
    Function(BATCH, "batch", "m:f", options=Options(batch=3)),
    Function(HEDGED, "hedged", "m:f", options=Options(hedge=0.3)),
]
FUNCTION_IDS = st.sampled_from([function.id for function in FUNCTIONS])
SUPERVISOR_PEER = 1


@dataclass
class Executor:
    """What one executor process knows."""

    worker: int
    peer: int
    session: int
    queue: list[Attempt] = field(default_factory=list)
    blocked: list[Attempt] = field(default_factory=list)
    revoked: set[tuple[int, int]] = field(default_factory=set)
    serial: int = 0
    sequence: int = 0
    recall: bool = False
    leaving: bool = False
    killed: bool = False


@dataclass
class Submitted:
    """What the oracle knows of a task."""

    id: int
    peer: int
    deps: list[int]
    parent: int
    deadline: float | None = None
    result: TaskResult | None = None
    attempts: int = 0
    hedged: bool = False


class CoreMachine(RuleBasedStateMachine):
    """Clients 2 and 3, a supervisor, and executors that come and go."""

    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(7, Limits(session_grace=1.0, worker_grace=1.0, hedge_share=1.0))
        self.core.hedging.runs_min = 1
        self.now = 10.0
        self.peers = 10
        self.sequences = {2: 0, 3: 0}
        self.known: dict[int, Submitted] = {}
        self.executors: dict[int, Executor] = {}
        self.starting: list[int] = []
        self.serials: dict[int, int] = {}

    # --- the world

    def tell(self, peer: int, *messages: Message) -> None:
        self.step([(peer, list(messages))])

    def step(self, arrivals: list[tuple[int, list[Message] | None]]) -> None:
        effects = self.core.handle(arrivals, self.now)
        check(self.core)
        effects += self.core.settle()
        sent = [(effect.peer, message) for effect in effects if isinstance(effect, Send) for message in effect.messages]
        assert all(isinstance(effect, Send | Close | Sweep) for effect in effects), effects
        # Frames of one wake-up have no order among peers: what has ended is known before what follows from it.
        for peer, message in sorted(sent, key=lambda one: not isinstance(one[1], Results)):
            self.on_message(peer, message)
        check(self.core)

    def on_message(self, peer: int, message: Message) -> None:
        executor = next((executor for executor in self.executors.values() if executor.peer == peer), None)
        if isinstance(message, Results):
            assert message.serial == self.serials.get(peer, 0) + 1, "results are numbered without gaps"
            self.serials[peer] = message.serial
            for result in message.results:
                self.on_result(peer, result)
        elif isinstance(message, WatchResults):
            for result in message.results:
                known = self.known.get(result.id)
                assert known is None or known.result is None or known.result.outcome == result.outcome or result.error
        elif isinstance(message, Assign):
            assert executor is not None
            assert not executor.leaving
            for attempt in message.attempts:
                self.on_attempt(attempt)
            executor.queue += message.attempts
        elif isinstance(message, Revoke):
            assert executor is not None
            executor.revoked |= set(message.attempts)
        elif isinstance(message, Recall):
            assert executor is not None
            executor.recall = True
        elif isinstance(message, StartExecutor):
            self.starting.append(message.worker)
        elif isinstance(message, KillExecutor):
            self.starting = [worker for worker in self.starting if worker != message.worker]
            if message.worker in self.executors:
                self.executors[message.worker].killed = True
        elif isinstance(message, Leave):
            assert executor is not None
            executor.leaving = True

    def on_attempt(self, attempt: Attempt) -> None:
        task = self.known[attempt.id]
        assert task.result is None, "handed out after its end"
        assert attempt.attempt == task.attempts + 1, "attempts are numbered without gaps"
        task.attempts = attempt.attempt
        assert attempt.budget is None or attempt.budget > 0, "handed out after its deadline"
        values = []
        for dep in task.deps:
            result = self.known[dep].result
            assert result is not None, "handed out before its dependency has ended"
            assert result.outcome == OK, "handed out although its dependency has failed"
            values.append(result.payload)
        assert (attempt.deps or []) == values

    def on_result(self, peer: int, result: TaskResult) -> None:
        task = self.known[result.id]
        assert task.peer == peer, "a result goes to its submitter"
        assert task.result is None, "exactly one result"
        task.result = result
        if result.outcome == OK:
            # Of two that run at a time either may win; a third one begins when the first has failed.
            current = range(task.attempts - 1, task.attempts + 1) if task.hedged else [task.attempts]
            assert result.attempt in current, "the result of the current attempt"
            assert result.payload == b"%d.%d" % (result.id, result.attempt)
        if result.outcome == EXPIRED:
            assert self.deadline(task) is not None
        if task.deps and result.outcome == OK:
            ended = [self.known[dep].result for dep in task.deps]
            assert all(dep is not None and dep.outcome == OK for dep in ended)

    def deadline(self, task: Submitted) -> float | None:
        """The earliest deadline of the task, its ancestors, and what it depends on."""
        own = [task.deadline]
        if task.parent:
            own.append(self.deadline(self.known[task.parent]))
        own += [self.deadline(self.known[dep]) for dep in task.deps]
        return min((deadline for deadline in own if deadline is not None), default=None)

    # --- rules

    @initialize()
    def begin(self) -> None:
        for peer in (2, 3):
            self.tell(peer, Hello(CLIENT, peer), Define(FUNCTIONS))
        self.tell(
            SUPERVISOR_PEER,
            Hello(SUPERVISOR, SUPERVISOR_PEER),
            Node("n", float(CPUS), gpu=1.0, executors=[(worker, EXECUTOR, worker) for worker in (1, 2)], blocked_max=3),
        )
        self.starting = [1, 2]

    @rule(
        target=tasks,
        peer=st.sampled_from([2, 3]),
        function=FUNCTION_IDS,
        deps=st.lists(tasks, max_size=2, unique=True),
        deadline=st.sampled_from([None, None, None, 0.0, 0.5, 5.0]),
        priority=st.sampled_from([None, 1, -1]),
        retries=st.sampled_from([None, 0]),
        root=st.sampled_from([{}, {}, {"admission": True}, {"admission": True, "tenant": "a"}, {"tenant": "b"}]),
    )
    def submit(
        self,
        peer: int,
        function: int,
        deps: list[int],
        deadline: float | None,
        priority: int | None,
        retries: int | None,
        root: dict[str, Any],
    ) -> int:
        self.sequences[peer] += 1
        task = Task(task_id(peer, self.sequences[peer]), function, b"", items=1)
        task.options = Options(deadline=deadline, priority=priority, retries=retries, **root)
        self.send_task(peer, task, deps, None if deadline is None else self.now + deadline)
        return task.id

    def send_task(self, peer: int, task: Task, deps: list[int], deadline: float | None = None) -> None:
        # Only what the dispatcher has certainly kept: results of others may be forgotten.
        deps = [dep for dep in deps if self.core.tables.tasks.get(dep) is not None]
        task.deps = [(dep, None) for dep in deps] or None
        hedged = task.function == HEDGED
        self.known[task.id] = Submitted(task.id, peer, deps, task.parent, deadline, hedged=hedged)
        self.tell(peer, Submit([task]))

    @precondition(lambda self: any(executor.queue for executor in self.executors.values()))
    @rule(target=tasks, data=st.data(), function=FUNCTION_IDS, count=st.integers(1, 3))
    def submit_children(self, data: st.DataObject, function: int, count: int) -> object:
        executor = data.draw(st.sampled_from([e for e in self.executors.values() if e.queue]))
        children = []
        for _ in range(count):
            executor.sequence += 1
            child = Task(task_id(executor.session, executor.sequence), function, b"", parent=executor.queue[0].id)
            self.send_task(executor.peer, child, [])
            children.append(child.id)
        return multiple(*children)

    @precondition(lambda self: bool(self.starting))
    @rule()
    def executor_joins(self) -> None:
        worker = self.starting.pop(0)
        self.peers += 1
        executor = self.executors[worker] = Executor(worker, self.peers, 100 + self.peers)
        self.serials.pop(executor.peer, None)
        self.tell(executor.peer, Hello(EXECUTOR, executor.session, worker=worker), Define(FUNCTIONS))

    @precondition(lambda self: any(executor.queue for executor in self.executors.values()))
    @rule(
        data=st.data(),
        outcome=st.sampled_from([OK, OK, OK, ERROR]),
        retryable=st.booleans(),
        run=st.sampled_from([1e-5, 0.01]),
    )
    def executor_finishes(self, data: st.DataObject, outcome: int, retryable: bool, run: float) -> None:
        executor = data.draw(st.sampled_from([e for e in self.executors.values() if e.queue]))
        self.finish(executor, outcome, retryable, run)

    def finish(self, executor: Executor, outcome: int = OK, retryable: bool = False, run: float = 1e-5) -> None:
        """The first call of the queue ends: one attempt, or a batch."""
        first = executor.queue[0]
        batch = [attempt for attempt in executor.queue if attempt.batch == first.batch] if first.batch else [first]
        executor.queue = [attempt for attempt in executor.queue if attempt not in batch]
        results = []
        for attempt in batch:
            result = TaskResult(attempt.id, attempt.attempt, outcome, b"%d.%d" % (attempt.id, attempt.attempt), run=run)
            if (attempt.id, attempt.attempt) in executor.revoked:
                result.outcome, result.payload = CANCELLED, b""
            elif outcome == ERROR:
                result.payload, result.retryable, result.error = b"", retryable, ErrorInfo("ValueError", "")
            results.append(result)
        executor.serial += 1
        messages: list[Message] = [Finished(executor.serial, results)]
        if executor.recall:
            messages.append(self.give_back(executor))
        self.tell(executor.peer, *messages)

    def give_back(self, executor: Executor) -> Returned:
        """Everything that has not begun; with something running, all but that."""
        first = executor.queue[:1]
        if first and first[0].batch:
            first = [attempt for attempt in executor.queue if attempt.batch == first[0].batch]
        returned = [attempt for attempt in executor.queue if attempt not in first]
        executor.queue = first
        executor.recall = False
        return Returned([(attempt.id, attempt.attempt) for attempt in returned])

    @precondition(lambda self: any(executor.recall for executor in self.executors.values()))
    @rule()
    def executor_returns(self) -> None:
        executor = next(executor for executor in self.executors.values() if executor.recall)
        self.tell(executor.peer, self.give_back(executor))

    @precondition(lambda self: any(e.queue and not e.queue[0].batch for e in self.executors.values()))
    @rule(data=st.data(), inline=st.booleans())
    def executor_blocks(self, data: st.DataObject, inline: bool) -> None:
        able = [e for e in self.executors.values() if e.queue and not e.queue[0].batch and len(e.blocked) < 3]
        if able:
            executor = data.draw(st.sampled_from(able))
            first, *rest = executor.queue
            executor.queue = []
            executor.blocked.append(first)
            returned = [(attempt.id, attempt.attempt) for attempt in rest]
            self.tell(executor.peer, Blocked(first.id, first.attempt, returned, inline=inline))

    @precondition(lambda self: any(e.blocked and not e.queue for e in self.executors.values()))
    @rule(data=st.data())
    def executor_resumes(self, data: st.DataObject) -> None:
        executor = data.draw(st.sampled_from([e for e in self.executors.values() if e.blocked and not e.queue]))
        self.resume(executor)

    def resume(self, executor: Executor) -> None:
        attempt = executor.blocked.pop()
        executor.queue.insert(0, attempt)
        self.tell(executor.peer, Resumed(attempt.id, attempt.attempt))

    @precondition(lambda self: bool(self.executors))
    @rule(data=st.data(), reported=st.booleans())
    def executor_dies(self, data: st.DataObject, reported: bool) -> None:
        self.die(data.draw(st.sampled_from(sorted(self.executors))), reported)

    def die(self, worker: int, reported: bool) -> None:
        """Its process ends."""
        executor = self.executors.pop(worker)
        running = [attempt.id for attempt in [*executor.blocked, *executor.queue[:1]]] if reported else []
        self.step([(executor.peer, None)])
        self.tell(SUPERVISOR_PEER, ExecutorDied(executor.worker, "signal SIGKILL", running))
        for task in self.known.values():
            if task.peer == executor.peer and task.result is None:
                # Nobody is there any more to be told.
                task.result = TaskResult(task.id, 0, CANCELLED)

    @rule(task=consumes(tasks))
    def cancel(self, task: int) -> None:
        submitted = self.known[task]
        if submitted.peer in (2, 3):
            self.tell(submitted.peer, Cancel([task]))
            assert submitted.result is not None, "a cancelled task ends at once"

    @rule(peer=st.sampled_from([2, 3]))
    def acknowledge(self, peer: int) -> None:
        if peer in self.serials:
            self.tell(peer, Ack(self.serials[peer]))

    @rule(peer=st.sampled_from([2, 3]), task=tasks)
    def watch(self, peer: int, task: int) -> None:
        self.tell(peer, Watch([task]))

    @rule(peer=st.sampled_from([2, 3]), task=tasks)
    def unwatch(self, peer: int, task: int) -> None:
        self.tell(peer, Unwatch([task]))

    @rule(seconds=st.sampled_from([0.001, 0.1, 1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.step([])

    # --- invariants

    @invariant()
    def ended_exactly_when_answered(self) -> None:
        for task in self.known.values():
            state = self.core.tables.tasks.get(task.id)
            assert (state is None or state.result is not None) == (task.result is not None), task

    @invariant()
    def capacity(self) -> None:
        """Naively counted: the gpu is never given twice; the cpus only beyond by those that resumed."""
        gpus = 0
        for executor in self.executors.values():
            held = [*executor.blocked, *executor.queue[:1]]
            gpus += sum(attempt.function == GPU for attempt in held)
        assert gpus <= 1

    def teardown(self) -> None:
        """Whatever happened: everything ends, and nothing is kept for nobody."""
        for _ in range(2_000):
            if all(task.result is not None for task in self.known.values()):
                break
            self.now += 0.2
            self.step([])
            while self.starting:
                self.executor_joins()
            for executor in list(self.executors.values()):
                if executor.killed:
                    self.die(executor.worker, reported=True)
                elif executor.queue:
                    self.finish(executor)
                elif executor.blocked:
                    self.resume(executor)
        unfinished = [task for task in self.known.values() if task.result is None]
        assert not unfinished, unfinished
        for peer in (2, 3):
            self.tell(peer, Ack(self.serials.get(peer, 0)), Unwatch(list(self.known)))
        for executor in self.executors.values():
            self.tell(executor.peer, Ack(self.serials.get(executor.peer, 0)))
        left = [task for task in self.core.tables.tasks if session_of(task) in (2, 3)]
        assert not left, left
        super().teardown()


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
