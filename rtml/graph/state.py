"""What the core knows: sessions, functions, tasks, workers, nodes. Data and the transition table; no decisions.

A task's life:

    WAITING --dependencies resolved--> READY --assigned--> ASSIGNED --result--> DONE
       |                                 ^ |                   |
       |                                 | +--cancel/expire----|--------------> DONE
       |                                 +---returned/retried--+
       +--dependency failed/cancel/expire-------------------------------------> DONE

(After a restart of the dispatcher a task may be found assigned before its dependencies are back; if that attempt is
lost it goes from ASSIGNED to WAITING.)

There is no 'cancelled but still running' state: a task that ends while an executor works on it is DONE at once, and the
attempt that is still out there is a *ghost* in that worker's queue, whose late result is dropped. Attempt numbers tell
a late result from a current one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from rtml.messages import (
    ASYNC_EXECUTOR,
    EXECUTOR,
    Attempt,
    ErrorInfo,
    Function,
    Message,
    ObjectRef,
    Options,
    Results,
    Task,
    TaskResult,
)

if TYPE_CHECKING:
    from rtml.graph.actorstate import ActorState


class State:
    """Where a task is in its life. Plain integers: an enum's hash alone would cost more than a transition."""

    WAITING: Final = 0
    READY: Final = 1
    ASSIGNED: Final = 2
    DONE: Final = 3

    NAMES: Final = ("waiting", "ready", "assigned", "done")


#: An amount of a resource called NAME=VALUE that only says that the label is there: `rtml worker --label` offers 1e9.
_PLENTY: Final = 1e6

#: from -> allowed next states; `TaskState.move` asserts it, and nothing else changes a state.
TRANSITIONS: Final[tuple[frozenset[int], ...]] = (
    frozenset({State.READY, State.DONE}),
    frozenset({State.ASSIGNED, State.DONE}),
    frozenset({State.READY, State.DONE, State.WAITING}),
    frozenset(),
)


#: In `FunctionState.times`: this alternative runs for the first time.
TRIED: Final = -1.0


class Shape:
    """An interned resource request: tasks of one shape are interchangeable for placement."""

    __slots__ = ("cpu", "extra", "key", "number")

    def __init__(self, cpu: float, extra: dict[str, float], number: int = 0) -> None:
        self.cpu = cpu
        #: unique among the interned ones
        self.number = number
        #: gpu, memory and custom labels; only what is above zero
        self.extra = extra
        self.key = (cpu, *sorted(extra.items()))

    def __str__(self) -> str:
        parts = [f"cpu={self.cpu:g}"] if self.cpu else []
        parts += amounts(self.extra)
        return ", ".join(parts) or "nothing"


def amounts(resources: dict[str, float]) -> list[str]:
    """Resources for people: "gpu=0.5", "memory=8000000000"; a label, of which there is plenty, as it is: "zone=a"."""
    return [
        # Bytes in scientific notation are for nobody.
        name if _is_label(name, amount) else f"{name}={amount:{'g' if amount < 1e5 else '.0f'}}"
        for name, amount in sorted(resources.items())
    ]


def _is_label(name: str, amount: float) -> bool:
    return "=" in name and (amount == 1 or amount >= _PLENTY)


class Profile:
    """A function's options with every default filled in: what one call of it asks for."""

    __slots__ = (
        "admission", "alternatives", "base", "batch", "batch_delay", "detached", "hedge", "lane", "latest", "max_age",
        "name", "priority", "prompt", "retries", "role", "shape", "simple", "tenant", "timeout",
    )  # fmt: skip

    def __init__(self, function: Function, options: Options, shape: Shape) -> None:
        self.role = ASYNC_EXECUTOR if function.asynchronous else EXECUTOR
        self.shape = shape
        #: what tasks must have in common to be interchangeable for placement, but for batches
        self.lane: Any = shape.number * 2 + (self.role == ASYNC_EXECUTOR)
        #: one for each set of resources that would do, best first; and of one of these, the whole
        self.alternatives: tuple[Profile, ...] = ()
        self.base: Profile | None = None
        self.retries = 2 if options.retries is None else options.retries
        self.timeout = options.timeout
        self.priority = options.priority or 0
        self.detached = bool(options.detached)
        self.batch = options.batch or 0
        self.batch_delay = options.batch_delay or 0.0
        self.name = options.name or function.name
        self.tenant = options.tenant or ""
        self.admission = bool(options.admission)
        self.hedge = options.hedge or 0.0
        self.latest = options.latest or ""
        self.max_age = options.max_age
        #: it is handed over only to begin at once
        self.prompt = bool(self.latest) or self.max_age is not None
        #: a call of it is placed by its cpus alone, by itself, on any sync executor
        self.simple = self.role == EXECUTOR and not (shape.extra or self.batch or options.alternatives)


class FunctionState:
    """A function and what was learned about it."""

    __slots__ = (
        "cost",
        "definers",
        "definition",
        "estimate",
        "forecast",
        "managed",
        "pins",
        "profile",
        "runs",
        "times",
        "users",
        "usual",
    )

    def __init__(self, definition: Function, profile: Profile, cost: Any) -> None:
        self.definition = definition
        self.profile = profile
        #: options of the last call that had some, and what they ask for: mostly the next one's, too
        self.usual: tuple[Options, Profile] | None = None
        #: high quantile of one call's run time in seconds; None until one was seen (then nothing is prefetched)
        self.estimate: float | None = None
        #: the same by number of the shape, of calls that had alternatives
        self.times: dict[int, float] | None = None
        #: run time by batch size (`estimate.BatchCost`)
        self.cost = cost
        #: of graphs that begin with it (`predict.Forecast`); None until one was to be planned
        self.forecast: Any = None
        #: run times (`predict.Quantiles`), if it may be hedged and has begun to run
        self.runs: Any = None
        #: live tasks
        self.users = 0
        #: submitters that keep it, live graphs whose context it is, contexts in use that name it
        self.pins = 0
        #: it was pinned once: what is neither pinned nor used any more is forgotten everywhere
        self.managed = False
        #: ids of the submitters that sent the definition, and believe that it is known
        self.definers: set[int] = set()


class Session:
    """A submitter's life: a client process, or an executor process in its role as a submitter.

    It owns root tasks like a running task owns its children.
    """

    def __init__(self, session_id: int, role: str, name: str) -> None:
        self.id = session_id
        self.role = role
        self.name = name
        #: link number; None while disconnected
        self.peer: int | None = None
        self.timings = False
        #: seconds that it may be gone before it is given up
        self.grace = 0.0
        self.data_only = False
        #: it came back on another connection: it may ask about what never arrived here, or is forgotten
        self.returned = False
        #: the dispatcher incarnation that it had spoken to before its last Hello
        self.epoch = 0
        #: unfinished root tasks, in order of submission
        self.children: dict[int, TaskState] = {}
        #: results of this wake-up, not yet in a message
        self.results: list[TaskResult] = []
        self.watch_results: list[TaskResult] = []
        self.serial = 0
        #: sent and not yet acknowledged, oldest first
        self.unacked: deque[Results] = deque()
        #: the last of them that it said it has; and whether some of them refer to what is kept for them
        self.acknowledged = 0
        self.referring = False
        #: objects delivered to this session and not yet released
        self.objects: set[int] = set()
        #: tasks kept because this session has handles of them
        self.held: set[int] = set()
        #: other messages for this peer, in this wake-up
        self.outbox: list[Message] = []
        self.worker: WorkerState | None = None
        #: when a disconnected session is given up
        self.gone_at: float | None = None
        #: another dispatcher's unfinished tasks that are here: its attempt number of each
        self.delegations: dict[int, int] = {}
        #: those that it gets back without a result
        self.returning: set[int] = set()


class TaskState(msgspec.Struct, eq=False, weakref=True):
    """One task from submission until its result is safe. A struct, because a class costs half a microsecond to call."""

    id: int
    spec: Task
    function: FunctionState
    profile: Profile
    #: who submitted it and gets the result
    session: Session
    #: the parent task, or the session for a root: whoever ends takes it along
    owner: TaskState | Session
    graph: Graph
    submitted: float
    state: int = State.WAITING
    attempt: int = 0
    #: unfinished children, in order of submission; None until there is one
    children: dict[int, TaskState] | None = None
    #: dependencies still unresolved
    waiting: int = 0
    #: payloads of the dependencies, in the order of the spec; None entries are unresolved
    inputs: list[bytes | ObjectRef | None] | None = None
    #: unfinished tasks that wait for this one: (task, position)
    dependents: list[tuple[TaskState, int]] | None = None
    watchers: list[Session] | None = None
    worker: WorkerState | None = None
    result: TaskResult | None = None
    receipt: Receipt | None = None
    deadline: float | None = None
    #: absolute time from `deadline`, or patience after submission: the order among ready tasks
    due: float = 0.0
    depth: int = 0
    ready_at: float = 0.0
    assigned_at: float = 0.0
    #: predicted seconds, as counted into the worker's load
    cost: float = 0.0
    #: number of the ready-queue entry that is valid; 0: none
    entry: int = 0
    lane: Any = None
    #: other tasks and sessions that need the result kept
    holds: int = 0
    #: tasks whose futures are inside of the result
    inner: Sequence[int] = ()
    #: the submitter has the result: only `holds` keep the record
    acknowledged: bool = False
    failures: int = 0
    #: was running beside others when a process died: runs alone until it has shown what it does
    alone: bool = False
    suspected: int = 0
    #: its process died while it was blocked: no descendant runs on top of it again, so that one that crashes is found
    apart: bool = False
    #: calls that share its execution; `batch_head` marks the one that stands for the batch in the cost model
    batch_size: int = 1
    batch_head: bool = False
    #: items of all calls of the batch, at its head
    batch_items: int = 1
    batch_key: str = ""
    #: blocked in `get` on its executor
    blocked: bool = False
    #: not ours, only known by its handle: the dispatcher to ask for its result
    home: WorkerState | None = None
    #: the attempt of another dispatcher's that its result was told for
    answered: int = 0
    #: until when it may wait for the node that has its arguments; 0: nobody has thought about it yet
    patience: float = 0.0
    #: dispatchers that have handed it on, and the names of its ancestors there
    hops: int = 0
    #: whoever wants the result over there unpickles nothing
    data_only: bool = False
    ancestors: Sequence[str] = ()
    #: the actor that it is a call on; the actor that it created
    actor: ActorState | None = None
    #: of a stream: items that the consumer has taken, and the futures inside of items
    consumed: int = 0
    yielded: Sequence[int] = ()
    hosted: ActorState | None = None
    #: the other one of a task and its spare (`rtml.graph.hedging`), while both run; and whether this is the spare
    pair: TaskState | None = None
    spare: bool = False
    #: the highest attempt number that was given away, if that was to a spare
    attempts: int = 0

    def move(self, state: int) -> None:
        """Change the state: the only place that does."""
        assert state in TRANSITIONS[self.state], (self.id, self.state, state)
        self.state = state

    def chain(self) -> list[str]:
        """Names from the root task to this one."""
        names: list[str] = []
        task: TaskState | Session = self
        while isinstance(task, TaskState):
            names.append(task.profile.name)
            names += reversed(task.ancestors)
            task = task.owner
        return names[::-1]


class Graph(msgspec.Struct, eq=False):
    """All tasks that descend from one root submission."""

    id: int
    session: Session
    order: int
    trace: str
    #: what its tasks can look up where they run
    context: FunctionState | None = None
    #: with whom it shares its turns among ready tasks: its session's id, with the tenant if there is one
    share: Any = 0
    live: int = 0
    #: what is expected of it (`backlog.Plan`), if it has a deadline or asked for admission
    plan: Any = None
    #: names of steps that its tasks went on without
    missing: list[str] | None = None


class Receipt(msgspec.Struct, eq=False):
    """One `Finished` message of a worker: forgotten there when all its results are safe with their submitters."""

    worker: WorkerState
    serial: int
    remaining: int


class NodeState:
    """The one accountant of a node's resources."""

    def __init__(self, name: str, cpu: float, extra: dict[str, float]) -> None:
        self.name = name
        self.cpu = cpu
        self.extra = extra
        self.free_cpu = cpu
        self.free_extra = dict(extra)
        self.supervisor: Session | None = None
        #: the data endpoint of another dispatcher's node, "" if it has none
        self.data = ""
        #: bytes a second that it fetches from other nodes
        self.bandwidth = 250e6
        self.blocked_max = 64
        #: sync executors that stay although nothing is to be done
        self.warm = max(1.0, cpu)
        self.can_grow = False
        #: its executors see only the gpus that they were started for
        self.binds = False
        #: the executor that makes a function ready: one at a time, the others go on at full speed
        self.preparing: WorkerState | None = None
        self.workers: dict[int, WorkerState] = {}
        #: sync executors among them
        self.sync = 0
        #: executors in a row that died before they said Hello; none is started before `start_after`
        self.start_failures = 0
        self.start_after = 0.0

    def add(self, worker: WorkerState) -> None:
        """An executor is started here."""
        self.workers[worker.id] = worker
        self.sync = sum([one.role == EXECUTOR for one in self.workers.values()])

    def drop(self, worker: WorkerState) -> None:
        """An executor is gone."""
        self.workers.pop(worker.id, None)
        self.sync = sum([one.role == EXECUTOR for one in self.workers.values()])

    def fits(self, shape: Shape) -> bool:
        """Whether the shape can be taken now."""
        if shape.cpu > self.free_cpu + 1e-9:
            return False
        if not shape.extra:
            return True
        return all(amount <= self.free_extra.get(name, 0.0) + 1e-9 for name, amount in shape.extra.items())

    def could_fit(self, shape: Shape) -> bool:
        """Whether the shape could be taken if the node were empty."""
        if shape.cpu > self.cpu + 1e-9:
            return False
        return all(amount <= self.extra.get(name, 0.0) + 1e-9 for name, amount in shape.extra.items())

    def take(self, shape: Shape) -> None:
        """Count the shape as used."""
        self.free_cpu -= shape.cpu
        if shape.extra:
            for name, amount in shape.extra.items():
                # An executor that outlived a dispatcher may be back before its node.
                self.free_extra[name] = self.free_extra.get(name, 0.0) - amount

    def give(self, shape: Shape) -> None:
        """Count the shape as free again."""
        self.free_cpu += shape.cpu
        if shape.extra:
            for name, amount in shape.extra.items():
                self.free_extra[name] = self.free_extra.get(name, 0.0) + amount


class WorkerState:
    """An executor process."""

    def __init__(self, worker_id: int, role: str, node: NodeState) -> None:
        self.id = worker_id
        self.role = role
        self.node = node
        #: None until it said Hello
        self.session: Session | None = None
        #: attempts handed to it, running first: task id -> task. A DONE task in here is a ghost (see module docstring).
        self.queue: dict[int, TaskState] = {}
        #: the resources its queue occupies (sync executors: one shape at a time); None when idle
        self.shape: Shape | None = None
        #: tasks blocked in `get`, outermost first, each with the shape it holds (its cpu is lent out)
        self.stack: list[tuple[TaskState, Shape]] = []
        #: descendants may be run on top of the innermost blocked task
        self.inline = True
        #: shapes of children that were on their way when the task below them went on, and their ids: less cpu. They may
        #: still be run on top of it if it blocks again, so what they need is kept until they are back
        self.leftover: list[tuple[Shape, set[int]]] = []
        #: predicted seconds of work in `queue`
        self.load = 0.0
        #: when the head of the queue began, as far as can be told
        self.head_since = 0.0
        #: seconds of the batch that was reported last
        self.batch_took = 0.0
        self.functions: set[int] = set()
        #: functions that it made ready, or tried to, for `Keep`
        self.prepared: set[int] = set()
        #: the one that it is making ready; 0: none
        self.preparing = 0
        #: objects it was told to free lately: told again when it comes back, as the message may be lost
        self.freed: deque[int] = deque(maxlen=4096)
        self.outgoing: list[Attempt] = []
        self.recalling = False
        #: signals are repeated until it reacts
        self.repeating = False
        self.leaving = False
        self.dying = False
        self.lagging = False
        #: an async executor that runs a task alone (see `TaskState.alone`)
        self.secluded = False
        #: attempts that it holds since before this dispatcher, of tasks that nobody has claimed yet
        self.unclaimed: set[int] = set()
        self.idle_since = 0.0
        #: number of its last `Finished`
        self.serial = 0
        self.receipts: deque[Receipt] = deque()
        self.safe = 0
        self.safe_sent = 0
        self.batch_number = 0
        #: it is the dispatcher above this one
        self.upward = False
        #: the one it was started for
        self.actor: ActorState | None = None
        #: gpus of its node that it sees, and what it was started for, if that asks for any (`rtml.graph.devices`)
        self.devices: tuple[int, ...] = ()
        self.meant: Shape | None = None

    @property
    def ready(self) -> bool:
        """Whether it may be given work."""
        session = self.session
        return (
            session is not None
            and session.peer is not None
            and not (self.leaving or self.dying or self.recalling or self.unclaimed)
        )


class StoredObject:
    """A result in shared memory, and who still needs it (session and task ids)."""

    __slots__ = ("holders", "lineage", "ref", "worker")

    def __init__(self, ref: ObjectRef, worker: WorkerState) -> None:
        self.ref = ref
        self.worker = worker
        self.holders: set[int] = set()
        #: how it was made, if that can be done again (`rtml.graph.lineage`)
        self.lineage: Any = None


def inline_bytes(payloads: Iterable[bytes | ObjectRef | None]) -> int:
    """Bytes of those payloads that travel inside messages."""
    return sum(len(payload) for payload in payloads if isinstance(payload, bytes))


def failure(kind: str, message: str, task: TaskState | None = None, **details: Any) -> ErrorInfo:
    """An error that rtml itself raises for a task; `kind` names a class of `rtml.errors`, `details` are its own."""
    return ErrorInfo(
        type=kind, message=message, chain=task.chain() if task is not None else [], details=details or None
    )
