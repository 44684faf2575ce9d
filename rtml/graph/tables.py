"""The shared state of the core's parts, its timers, and what it wants done (effects).

`Lifecycle`, `Placement` and `Membership` each own a kind of decision; all of them read and write these tables. Nothing
here decides anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from rtml.graph.estimate import BatchCost
from rtml.graph.state import (
    FunctionState,
    NodeState,
    Profile,
    Session,
    Shape,
    StoredObject,
    TaskState,
    WorkerState,
)
from rtml.messages import DISPATCHER, Finished, Function, Message, ObjectRef, Options, Query, Results, TaskResult

#: Resolved options that are remembered.
PROFILES_KEPT: Final = 1_024


class Limits(NamedTuple):
    """Bounds that no legitimate program meets; every error names the field to raise. See `LIMITS_HELP`."""

    graph_tasks_max: int = 1_000_000
    depth_max: int = 1_000
    dependencies_max: int = 100_000
    inputs_max: int = 48 * 1024 * 1024
    functions_max: int = 100_000
    actors_max: int = 500
    session_grace: float = 2.0
    worker_grace: float = 10.0
    cancel_grace: float = 10.0
    recovery: float = 5.0
    tenant_graphs_max: int = 10_000
    hedge_share: float = 0.05


#: What each limit bounds, for people.
LIMITS_HELP: Final[dict[str, str]] = {
    "graph_tasks_max": "live tasks of one graph",
    "depth_max": "tasks between a task and its root",
    "dependencies_max": "futures among the arguments of one task",
    "inputs_max": "bytes of their values, but for those in shared memory",
    "functions_max": "function definitions known at a time",
    "actors_max": "actors at a time on each node, each of which has a process",
    "session_grace": "seconds a vanished submitter may take to come back before its graphs are cancelled",
    "worker_grace": "seconds a vanished executor, whose death nobody reported, may take to come back",
    "cancel_grace": "seconds unwanted code may ignore its cancellation before its process is ended",
    "recovery": "seconds after a restart of the dispatcher in which peers say what they hold",
    "tenant_graphs_max": "unfinished graphs of one tenant, above which its submissions are refused",
    "hedge_share": "portion of the attempts of functions with hedge= that may have a second one beside them",
}


class Send(msgspec.Struct):
    """Effect: one frame of these messages to the link `peer`."""

    peer: int
    messages: list[Message]


class Close(NamedTuple):
    """Effect: the link is not wanted any more."""

    peer: int


class Unlink(NamedTuple):
    """Effect: the object's owner is dead and nobody needs the object: remove its segment."""

    ref: ObjectRef


class Sweep(NamedTuple):
    """Effect: the process of this session is dead: remove all its segments but those that are still needed."""

    session: int
    keep: frozenset[str]


class Answer(NamedTuple):
    """Effect: an operator's question, which the shell answers from the core's snapshot and its own records."""

    peer: int
    query: Query


class Ahead(NamedTuple):
    """Effect: objects of other nodes that a task here will need."""

    refs: list[ObjectRef]


class LetGo(NamedTuple):
    """Effect: objects that the node's data endpoint keeps for others, and that nobody needs any more."""

    objects: list[int]


class Knock(NamedTuple):
    """Effect: find out whether this node's data endpoint lets anybody in; `Core.knocked` is told if it does not.

    `lost`: the node's link is broken. Else it has just joined, and nothing is told.
    """

    worker: int
    data: str
    lost: bool


Effect = Send | Close | Unlink | Sweep | Answer | Ahead | LetGo | Knock


class Ended(msgspec.Struct, frozen=True, gc=False):
    """The record of a task that ended, for metrics and traces."""

    task: int
    parent: int
    graph: int
    function: str
    outcome: int
    attempts: int
    submitted: float
    ready: float
    assigned: float
    finished: float
    run: float
    worker: int
    batch: int
    trace: str
    #: deadline minus end, in seconds; None without a deadline
    slack: float | None
    #: how the deadline of a graph ended, of its root; "" of other tasks
    ending: str = ""
    #: seconds that were predicted less those that it took; None if nothing was
    error: float | None = None


class Tables:
    """All state. See `rtml.graph.state` for the meaning of each record."""

    def __init__(self, epoch: int, limits: Limits, uplink: str = "") -> None:
        self.epoch = epoch
        self.limits = limits
        #: this node's name for the dispatcher above it; "" if there is none
        self.uplink = uplink
        #: this node's data endpoint, "host:port"; "" if there is none
        self.data = ""
        self.peers: dict[int, Session] = {}
        self.sessions: dict[int, Session] = {}
        self.functions: dict[int, FunctionState] = {}
        self.tasks: dict[int, TaskState] = {}
        self.workers: dict[int, WorkerState] = {}
        #: those whose executors are our own
        self.nodes: dict[str, NodeState] = {}
        #: other dispatchers that run tasks for us, by worker id; each has a node of its own that stands for all it has
        self.remotes: dict[int, WorkerState] = {}
        self.objects: dict[int, StoredObject] = {}
        #: tasks of other dispatchers that go back to them
        self.withdrawn: list[TaskState] = []
        #: owns detached actors whose submitters are gone; not among the sessions, as nobody speaks for it
        self.detached = Session(-1, "detached", "")
        self.effects: list[Effect] = []
        #: tasks that ended lately, how and when; `take_ended` makes records of them, when there is time
        self.ended: list[tuple[TaskState, TaskResult, float]] = []
        #: seconds that executors spent on attempts whose results nobody wanted
        self.wasted = 0.0
        #: submissions that were refused, as if they were tasks
        self.shed: list[Ended] = []
        #: sessions with something to send, in the order they got it
        self.dirty: dict[int, Session] = {}
        #: sync and async executors to be signalled
        self.interrupts: dict[int, WorkerState] = {}
        self._shapes: dict[Any, Shape] = {}
        #: resolved options of recent calls
        self._profiles: dict[Any, Profile] = {}
        #: a number greater than all before (never 0)
        self.next_sequence: Callable[[], int] = itertools.count(1).__next__
        #: a heap: when, in which order, what
        self.timers: list[tuple[float, int, Callable[[Any, float], None], Any]] = []

    # --- timers

    def at(self, when: float, action: Callable[[Any, float], None], argument: Any) -> None:
        """Call `action(argument, now)` at the first wake-up not before `when`."""
        heappush(self.timers, (when, self.next_sequence(), action, argument))

    def run_timers(self, now: float) -> None:
        """Fire everything that is due."""
        timers = self.timers
        while timers and timers[0][0] <= now:
            _, _, action, argument = heappop(timers)
            action(argument, now)

    def take_ended(self) -> list[Ended]:
        """The records of tasks that ended since the last call."""
        ended = [_record(task, result, now) for task, result, now in self.ended] + self.shed
        self.ended.clear()
        self.shed.clear()
        return ended

    # --- functions and profiles

    def shape(self, options: Options, asynchronous: bool) -> Shape:
        """The interned resource request of these options."""
        extra: dict[str, float] = dict(options.resources or {})
        if options.gpu:
            extra["gpu"] = options.gpu
        if options.memory:
            extra["memory"] = float(options.memory)
        cpu = options.cpu if options.cpu is not None else (0.0 if asynchronous else 1.0)
        shape = Shape(cpu, {name: amount for name, amount in extra.items() if amount > 0}, len(self._shapes))
        return self._shapes.setdefault(shape.key, shape)

    def define(self, definition: Function) -> FunctionState:
        """Record a function; a second definition of the same id changes nothing."""
        known = self.functions.get(definition.id)
        if known is None:
            if len(self.functions) >= self.limits.functions_max:
                self._forget_a_function()
            profile = self.profile(definition, definition.options)
            known = self.functions[definition.id] = FunctionState(definition, profile, BatchCost())
        return known

    def _forget_a_function(self) -> None:
        """Make room: the oldest definition that no live task uses goes."""
        unused = (number for number, known in self.functions.items() if not (known.users or known.pins))
        oldest = next(unused, None)
        if oldest is not None:
            del self.functions[oldest]

    def profile(self, definition: Function, options: Options) -> Profile:
        """What a call asks for: the call's options, else the function's. Calls with the same options share one."""
        o = options
        resources = None if o.resources is None else tuple(o.resources.items())
        # All but the deadline, which is different for each call and the task's business.
        key = (
            definition.id, o.cpu, o.gpu, o.memory, resources, o.retries, o.timeout, o.priority, o.detached, o.batch,
            o.batch_delay, o.name, o.tenant, o.admission, o.hedge, o.latest,
            o.max_age, None if o.alternatives is None else repr(o.alternatives),
        )  # fmt: skip
        profile = self._profiles.get(key)
        if profile is None:
            if len(self._profiles) >= PROFILES_KEPT:
                self._profiles.clear()
            merged = _merged(definition.options, options)
            profile = self._alternatives(definition, merged) if merged.alternatives else None
            if profile is None:
                profile = Profile(definition, merged, self.shape(merged, definition.asynchronous))
            self._profiles[key] = profile
        return profile

    def _alternatives(self, definition: Function, merged: Options) -> Profile:
        """The profile of calls that may run with one of several sets of resources."""
        found = []
        for one in merged.alternatives or ():
            options = replace(
                merged, cpu=one.cpu, gpu=one.gpu, memory=one.memory, resources=one.resources, alternatives=None
            )
            found.append(Profile(definition, options, self.shape(options, definition.asynchronous)))
        first = found[0]
        base = Profile(definition, merged, first.shape)
        base.lane = ("one of", *(one.lane for one in found))
        base.alternatives = tuple(found)
        for profile in found:
            profile.base = base
        return base

    # --- outgoing

    def endpoints(self) -> list[str]:
        """Data endpoints where those that share no memory with any node may put objects: our own, else our nodes'."""
        if self.data:
            return [self.data]
        below = [worker for worker in self.remotes.values() if not worker.upward and worker.node.data]
        return [worker.node.data for worker in below if worker.session is not None and worker.session.peer is not None]

    def tell(self, session: Session, message: Message) -> None:
        """Queue a message for the session's peer."""
        session.outbox.append(message)
        self.dirty[session.id] = session

    def resend(self, session: Session) -> list[Message]:
        """Everything the session has not acknowledged, again."""
        if session.role == DISPATCHER:
            return [Finished(r.serial, r.results) for r in session.unacked]
        # What is known to have come may still be among them (`core.ACKS_LATE`).
        return [Results(r.serial, r.results) for r in session.unacked if r.serial > session.acknowledged]


def _record(task: TaskState, result: TaskResult, now: float) -> Ended:
    worker, graph, deadline = task.worker, task.graph, task.deadline
    plan = None if task.spec.parent else graph.plan
    return Ended(
        task.id, task.spec.parent, graph.id, task.profile.name, result.outcome, task.attempt, task.submitted,
        task.ready_at, task.assigned_at, now, result.run, 0 if worker is None else worker.id, task.batch_size,
        graph.trace, None if deadline is None else deadline - now, "" if plan is None else plan.ending or "",
        None if plan is None else plan.error,
    )  # fmt: skip


def wake(_: None, now: float) -> None:
    """Timer without an action of its own: the scheduling pass that follows every wake-up does the work."""


def _merged(base: Options, options: Options) -> Options:
    """The options with the base's value wherever none is given."""
    fields = options.__struct_fields__
    given = (getattr(options, field) for field in fields)
    merged = Options(*(getattr(base, field) if own is None else own for field, own in zip(fields, given, strict=True)))
    if merged.alternatives and options.alternatives is None and options is not base:
        wants = (options.cpu, options.gpu, options.memory, options.resources)
        if any(want is not None for want in wants):
            return replace(merged, alternatives=None)  # the call says what it wants
    return merged
