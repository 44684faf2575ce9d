"""Every message on the wire, in one place.

A *frame* is what a link carries: a msgpack array of messages, so that one wake-up costs one frame per peer however many
tasks it concerns. Rules of this file:

* Messages are tagged, array-like structs: compact, fast, and validated against their types while they are decoded.
* The wire only ever *appends fields with defaults*; a peer with another major version is refused at `Hello`.
* The dispatcher decodes these headers and never what is inside a payload. A payload is inline bytes of at most
  `INLINE_MAX`, or an `ObjectRef` to shared memory; both are opaque here (see `rtml.codec`).
* Ids are unsigned 63-bit integers. A task id is chosen by its submitter: 31 random bits that name the submitter's
  session, then 32 bits of a counter (`task_id`). A function id is a hash of its definition, equal everywhere.
* Times are durations in seconds (remaining budgets, run times), never instants: clocks of two machines do not compare.

Who sends what:

    submitter  -> dispatcher   Hello, Define, Submit, Cancel, Watch, Unwatch, Release, Holding, Ack, Query, Keep,
                               Consumed, Farewell
    dispatcher -> submitter    Welcome, Refused, Rehello, Results, WatchResults, Logs, Reply, Kept, Forgot
    executor   -> dispatcher   Hello, Finished, Blocked, Resumed, Returned, LoopLag, Prepared, Hosting, Checkpoint,
                               Items; also all of a submitter
    dispatcher -> executor     Welcome, Define, Assign, Revoke, Recall, Free, Safe, Prepare, Forget, and as a submitter
    supervisor -> dispatcher   Hello, Node, ExecutorStarted, ExecutorDied, HandOver, Moved
    dispatcher -> supervisor   Welcome, StartExecutor, StopExecutor, KillExecutor, Interrupt, Leavings
    dispatcher <-> dispatcher  Hello, Welcome, Offer, Define, Delegate, Finished, Returned, Revoke, Recall, Safe, Free,
                               Watch, Unwatch, WatchResults, Cancel, Hosting, Hosted, Checkpoint, Query, Reply, Logs,
                               Moved: each is the other's submitter and the other's worker; to the one below Keep,
                               and back Kept, Forgot
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

#: (major, minor). Another major is refused; a newer minor only appends defaulted fields.
WIRE_VERSION: Final = (1, 0)

#: Largest payload carried inside a message, in bytes; anything bigger travels as an `ObjectRef`.
INLINE_MAX: Final = 64 * 1024

#: Largest frame that a receiver accepts, in bytes. Links split frames into packets as their transport needs.
FRAME_MAX: Final = 64 * 1024 * 1024

# What peers may say in numbers. Bounds are checked while a frame is decoded; a NaN is within none.
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Duration = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Portion = Annotated[float, msgspec.Meta(ge=0, le=1)]
Priority = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=1 << 31)]

# Roles in `Hello`.
CLIENT: Final = "client"
EXECUTOR: Final = "executor"
ASYNC_EXECUTOR: Final = "async"
SUPERVISOR: Final = "supervisor"
#: Another dispatcher: a node's as its parent sees it, and the parent as the node sees it.
DISPATCHER: Final = "dispatcher"
#: Processes that hold one actor each: sync methods one at a time; coroutines, or sync methods in several threads.
ACTOR: Final = "actor"
ASYNC_ACTOR: Final = "async-actor"
#: All who run user code.
EXECUTORS: Final = (EXECUTOR, ASYNC_EXECUTOR, ACTOR, ASYNC_ACTOR)

#: `Function.method` of the call that ends an actor after everything else that it was asked for.
STOP: Final = "__rtml_stop__"

# Outcomes in `TaskResult`: a task ends exactly once, with one of these.
OK: Final = 0
ERROR: Final = 1
CANCELLED: Final = 2
EXPIRED: Final = 3

OUTCOMES: Final = ("ok", "error", "cancelled", "expired")

_SEQUENCE_BITS: Final = 32
SESSION_MAX: Final = (1 << 31) - 1


def task_id(session: int, sequence: int) -> int:
    """The id of the `sequence`-th task of the submitter session `session` (31 random bits)."""
    return (session << _SEQUENCE_BITS) | sequence


def session_of(task: int) -> int:
    """The submitter session that chose the task id `task`."""
    return task >> _SEQUENCE_BITS


class ObjectRef(msgspec.Struct, array_like=True, frozen=True):
    """Where a payload above `INLINE_MAX` lies: a segment of shared memory on `node`, named by its data endpoint.

    `id` is unique for ever (segments are recycled, ids are not) and its upper bits name the owner as in `task_id`.
    """

    id: int
    size: int
    segment: str
    node: str = ""


Payload = bytes | ObjectRef


class ErrorInfo(msgspec.Struct, array_like=True):
    """An error as every peer can read it. Only Python clients look into `pickled`; gateways never do."""

    #: A name of `rtml.errors` (`WorkerDied`), or the qualified name of a user's exception class.
    type: str
    message: str
    traceback: str = ""
    #: Names of the tasks that led here, root first, the failing task last.
    chain: list[str] = []
    pickled: bytes = b""
    #: Facts beside the message, for the constructor of the class that `type` names (`rtml.errors`).
    details: dict[str, bool | float | str | list[str] | None] | None = None


class Alternative(msgspec.Struct, array_like=True, frozen=True):
    """Resources with which a task may run instead of others; see `Options`."""

    cpu: Amount | None = None  # [1.0]
    gpu: Amount | None = None
    memory: Count | None = None
    resources: dict[str, Amount] | None = None


class Options(msgspec.Struct, array_like=True, omit_defaults=False, frozen=True):
    """What may be asked of a task. In a `Function` these are its defaults, in a `Task` what this call overrides.

    None means 'as the function says', and there 'as rtml's default says' (in brackets).
    """

    cpu: Amount | None = None  # [1.0; async functions 0.0]
    gpu: Amount | None = None  # [0.0]
    memory: Count | None = None  # bytes [0]
    resources: dict[str, Amount] | None = None  # custom labels
    retries: Count | None = None  # further attempts after the first; worker death always counts as retryable [2]
    timeout: Amount | None = None  # seconds one attempt may run; then its process is ended
    deadline: Duration | None = None  # remaining budget of the graph in seconds, on a root submission or to tighten it
    priority: Priority | None = None  # higher is more urgent [that of the submitting task, 0 for a root]
    detached: bool | None = None  # outlives its parent
    batch: Count | None = None  # most items of one call; >0 makes a batch function: it takes and returns lists
    batch_delay: Amount | None = None  # seconds to wait for a fuller batch [0]
    name: str | None = None  # shown instead of the function's name
    tenant: str | None = None  # of a root submission: whose share its graph counts against [""]
    admission: bool | None = None  # of a root submission: refuse it at once if it cannot end within its deadline
    hedge: Portion | None = None  # an attempt slower than this quantile of all gets a second one beside it [0: none]
    window: Count | None = None  # items that a stream may be ahead of its consumer [16]
    latest: str | None = None  # of calls with the same key only the newest is worth beginning [""]
    max_age: Amount | None = None  # seconds after its submission in which it has to begin
    alternatives: list[Alternative] | None = (
        None  # in place of cpu, gpu, ...: the one that will end it first; best first
    )


class Function(msgspec.Struct, array_like=True):
    """A function's definition, sent once per peer. `id` is `rtml.codec.function_id` of the rest."""

    id: int
    name: str
    #: "module:qualname" if the workers have the code, else "" and `pickled` holds it.
    ref: str = ""
    pickled: bytes | ObjectRef = b""
    asynchronous: bool = False
    options: Options = Options()
    #: A call counts for as many items as its first array has rows (models); else for one.
    rows: bool = False
    #: A definition that is no function but a graph's context (see `Task.context`): the functions that it names.
    members: list[int] = []
    #: Not a function with code of its own, but the method of this name of whatever actor it is called on. Then
    #: `asynchronous` says that calls need not begin in their order.
    method: str = ""


class ActorOptions(msgspec.Struct, array_like=True):
    """What is asked of an actor, beside the `Options` of its creation (whose `retries` are its restarts)."""

    #: Under which `Query` "actor" finds it; "" for none.
    name: str = ""
    #: Calls at a time. With 1, the calls of each submitter run in the order of their submission.
    concurrency: Count = 1
    #: A checkpoint is taken after so many calls, and after a call when so many seconds have passed; 0: not for that.
    checkpoint_calls: Count = 0
    checkpoint_seconds: Amount = 0.0
    #: The submitter still has a handle, and will say `Unwatch` when it has none.
    held: bool = True
    #: Its methods with the options of their calls, for those who find it by its name.
    methods: dict[str, Options] = {}


class Task(msgspec.Struct, array_like=True, gc=False):
    """One submitted call."""

    id: int
    function: int
    args: bytes | ObjectRef
    #: The running task that submitted this one; 0 opens a new graph.
    parent: int = 0
    #: Futures among the arguments, to be replaced by their values, in the order of the placeholders in `args`.
    #: The payload is given where the submitter already has it; else the dispatcher waits for it.
    deps: list[tuple[int, bytes | ObjectRef | None]] | None = None
    #: Ids of futures contained elsewhere (closures, attributes): they travel as handles and must stay alive meanwhile.
    handles: list[int] | None = None
    options: Options | None = None
    #: Only tasks with equal keys share a batch (for arrays: dtype and shape but the first dimension).
    batch_key: str = ""
    #: Items this call counts for in a batch (see `Function.rows`).
    items: Count = 1
    #: W3C trace id, for a root submission that continues a caller's trace.
    trace: str = ""
    #: On a root submission: the definition that every task of the graph can look up where it runs, 0 for none. There
    #: a gateway names its versions of models. As long as the graph lives no member of it is forgotten.
    context: int = 0
    #: The actor that this is a call on, by the id of the task that created it; that task names itself.
    actor: int = 0
    #: In the task that creates an actor: what is asked of it. The task ends when the actor does.
    hosts: ActorOptions | None = None
    #: The function is a generator, and may be so many items ahead of their consumer; 0: it is not.
    stream: Count = 0


class Timing(msgspec.Struct, array_like=True):
    """Where a task's time went, in seconds, as the dispatcher saw it."""

    waiting: float  # submitted -> all dependencies resolved
    queued: float  # ready -> handed to an executor
    transfer: float  # handed over -> started, and finished -> reported (less `run`)
    run: float  # inside the function
    batch: int = 1  # calls that shared the execution
    attempts: int = 1
    #: remaining budget of the graph when it ended; None without a deadline
    slack: float | None = None
    #: Names of steps that the graph ended without, because there was no time for them (`rtml.anytime`).
    missing: list[str] | None = None


class Item(msgspec.Struct, array_like=True, gc=False):
    """What a stream yielded."""

    payload: bytes | ObjectRef
    #: Futures contained in the value.
    handles: list[int] | None = None


class Folded(msgspec.Struct, array_like=True, gc=False):
    """How the value of a reduction was made."""

    #: The positions of the inputs that it is made of.
    used: list[int]
    #: The arguments of a call of the same function that makes it again of these inputs, if that may be needed.
    args: bytes = b""
    inputs: list[bytes | ObjectRef] | None = None


class TaskResult(msgspec.Struct, array_like=True, gc=False):
    """How one attempt (from an executor) or the task (to its submitter) ended."""

    id: int
    attempt: int
    outcome: int
    payload: bytes | ObjectRef = b""
    error: ErrorInfo | None = None
    #: Seconds inside the function (of the whole batch, when it ran in one).
    run: Amount = 0.0
    #: The executor matched the error against the function's retry_on types.
    retryable: bool = False
    #: Futures contained in the value.
    handles: list[int] | None = None
    #: Facts about the value, for a consumer's batch: see `Task`. An array has as many items as rows.
    batch_key: str = ""
    items: int = 1
    timing: Timing | None = None
    #: Names of steps that the task gave up waiting for and went on without.
    missing: list[str] | None = None
    #: Of a stream: how many items it made, and the last ones of them, at least those that were not `Consumed`.
    made: Count = 0
    tail: list[Item] | None = None
    #: Bytes of arguments that were fetched from other nodes since the last result, and the seconds that took.
    moved: Count = 0
    moving: Amount = 0.0
    #: Of a reduction: what the value is made of.
    folded: Folded | None = None


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """One try at a task, as an executor is told to run it."""

    id: int
    attempt: int
    function: int
    args: bytes | ObjectRef
    deps: list[bytes | ObjectRef] | None = None
    #: Remaining seconds of the graph's deadline.
    budget: float | None = None
    #: Consecutive attempts of one `Assign` with the same non-zero number are one call of a batch function.
    batch: int = 0
    graph: int = 0
    #: Names of the ancestor tasks, root first (for error reports and logs).
    chain: list[str] | None = None
    #: The blocked task of this executor on top of which this descendant of it is to be run; 0: nothing is blocked.
    under: int = 0
    #: The submitter unpickles nothing: see `Hello`.
    data_only: bool = False
    #: The graph's, see `Task`; defined before the attempt.
    context: int = 0
    #: This attempt creates an actor, and goes on until the actor ends. The executor keeps the spec for `Hosting`.
    creates: Task | None = None
    #: What the actor's last `Checkpoint` held.
    checkpoint: bytes | ObjectRef | None = None
    #: See `Task`; and how many items the consumer has from earlier attempts, which are not to be sent again.
    stream: Count = 0
    skip: Count = 0


class Delegated(msgspec.Struct, array_like=True):
    """A ready task that one dispatcher hands to another: it carries values, and depends on nothing any more."""

    task: Task
    attempt: int
    #: The graph at its home.
    graph: int = 0
    #: Names of the ancestor tasks, root first.
    chain: list[str] = []
    #: Dispatchers that have handed it on.
    hops: Count = 0
    #: See `Hello.data_only`.
    data_only: bool = False
    #: It creates an actor again: what the last `Checkpoint` held.
    checkpoint: bytes | ObjectRef | None = None


# --- both directions ------------------------------------------------------------------------------------------------


class Define(msgspec.Struct, array_like=True, tag=1):
    """Function definitions, before the first use of each on a connection."""

    functions: list[Function]


# --- any peer -> dispatcher -------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, array_like=True, tag=10):
    """First message of a connection, and the answer to `Rehello`.

    After it a returning submitter sends again all unresolved tasks, a returning executor all results not yet safe.
    """

    role: str
    session: int  # 31 random bits, unique per process life
    wire: tuple[int, int] = WIRE_VERSION
    pid: int = 0
    name: str = ""
    python: str = ""
    #: Executors: the id that the supervisor gave them; and what they hold unfinished: (task, attempt), running first.
    worker: int = 0
    holds: list[tuple[int, int]] = []
    #: The dispatcher incarnation (`Welcome.epoch`) this peer last spoke to; 0 on a first connection.
    epoch: int = 0
    #: Wants `TaskResult.timing` in its results (a gateway does; it costs a microsecond a task).
    timings: bool = False
    #: Unpickles nothing (a gateway does not): executors encode results for it as data (`rtml.codec.encode_data`).
    data_only: bool = False
    #: Seconds for which a lost connection is no farewell: a network may be cut. 0: the dispatcher's own limit, which is
    #: for peers on its machine, whose links break only when they end.
    grace: Amount = 0.0
    #: Dispatchers: the data endpoint of their node, "host:port"; "" if it has none.
    data: str = ""
    #: Executors: see `StartExecutor`.
    devices: list[Count] = []


class Submit(msgspec.Struct, array_like=True, gc=False, tag=11):
    """Tasks in the order of submission, then an acknowledgement as in `Ack` (0: nothing new)."""

    tasks: list[Task]
    ack: int = 0


class Ack(msgspec.Struct, array_like=True, gc=False, tag=12):
    """All `Results` up to `serial` are safe with the submitter.

    It covers no result that was applied after the last `Submit` was built.
    """

    serial: int


class Cancel(msgspec.Struct, array_like=True, tag=13):
    """End these tasks and all their unfinished descendants as cancelled."""

    tasks: list[int]


class Watch(msgspec.Struct, array_like=True, tag=14):
    """Ask for the results of tasks that somebody else submitted (through a handle); answered by `WatchResults`."""

    tasks: list[int]


class Unwatch(msgspec.Struct, array_like=True, tag=15):
    """The handles of these tasks are gone here."""

    tasks: list[int]


class Release(msgspec.Struct, array_like=True, tag=16):
    """Results that lie in shared memory are no longer needed by this submitter."""

    objects: list[int]


class Query(msgspec.Struct, array_like=True, tag=17):
    """A question of an operator, gateway or program; answered by `Reply`.

    `what` is "status", "metrics", "trace", "calls", "actor" (the one of this name) or "rebuild".
    """

    id: int
    what: str
    argument: str = ""


class Logs(msgspec.Struct, array_like=True, tag=18):
    """Lines printed or logged by tasks: (task id, task name, pid, "out" | "err", text), for the root submitter."""

    lines: list[tuple[int, str, int, str, str]]


class Heartbeat(msgspec.Struct, array_like=True, tag=19):
    """Nothing to say. Sent on links that cannot see a peer vanish (ZeroMQ)."""


class Holding(msgspec.Struct, array_like=True, tag=20):
    """After a `Hello` on a later connection: all objects not yet released, all tasks not yet unwatched."""

    objects: list[int]
    handles: list[int]


class Farewell(msgspec.Struct, array_like=True, tag=26):
    """The last message of a submitter that ends in order: it will not come back, nothing is kept for it any more."""


class Keep(msgspec.Struct, array_like=True, tag=25):
    """Functions that this submitter wants to be ready in executors before they are called; all of them after a return.

    Answered by a `Kept` for each, when that is so or fails. What no submitter keeps and no graph needs is forgotten
    everywhere; about those in `dropped`, which this submitter kept earlier, it is told then (`Forgot`).
    """

    functions: list[int]
    dropped: list[int] = []
    #: What it kept before, and is not dropped here, is kept as it was; else these are all.
    more: bool = False


# --- executor -> dispatcher -------------------------------------------------------------------------------------------


class Finished(msgspec.Struct, array_like=True, gc=False, tag=30):
    """Results of attempts, numbered per executor; kept there until `Safe` covers the number."""

    serial: int
    results: list[TaskResult]


class Blocked(msgspec.Struct, array_like=True, tag=31):
    """The running task waits for others: its cpu may be given away, and its descendants may be assigned here meanwhile.

    `returned` hands back what this executor had not started.
    """

    task: int
    attempt: int
    returned: list[tuple[int, int]] = []
    #: False: it waits in a thread of its own, the main thread is busy; descendants cannot be run here.
    inline: bool = True


class Resumed(msgspec.Struct, array_like=True, tag=32):
    """The task of the last `Blocked` goes on."""

    task: int
    attempt: int


class Returned(msgspec.Struct, array_like=True, tag=33):
    """Unstarted attempts given back after `Recall`, or on a drain (`leaving`: no more work, please)."""

    attempts: list[tuple[int, int]]
    leaving: bool = False


class LoopLag(msgspec.Struct, array_like=True, tag=34):
    """The async executor's loop did not turn for `lag` seconds while `task` was running (0: it turns again)."""

    task: int
    lag: float


class Prepared(msgspec.Struct, array_like=True, tag=37):
    """The function of a `Prepare` is ready here, or why not."""

    function: int
    #: Seconds that it took.
    seconds: Amount = 0.0
    error: ErrorInfo | None = None


class Hosting(msgspec.Struct, array_like=True, tag=43):
    """After a `Hello` on a later connection: the actor that lives here, with all that it takes to make it again.

    From a dispatcher with attempt 0: an actor of its own, which the one above finds by its name and may make again.
    """

    task: Task
    attempt: int
    function: Function
    inputs: list[bytes | ObjectRef] = []
    checkpoint: bytes | ObjectRef | None = None


class Items(msgspec.Struct, array_like=True, tag=45):
    """What the attempt of a stream yielded, from the item `first` (counted from 0) on; on to its submitter as it is.

    The executor keeps items until they are `Consumed`, or in its result.
    """

    task: int
    attempt: int
    first: Count
    items: list[Item]


class Checkpoint(msgspec.Struct, array_like=True, tag=44):
    """The state of the actor that `task` created, as its user's hook saved it: replaces the one before."""

    task: int
    attempt: int
    payload: bytes | ObjectRef


class Consumed(msgspec.Struct, array_like=True, tag=46):
    """The consumer of a stream has taken its first `count` items; on to the executor as it is.

    `again`: what it has not taken is to be sent again, as a connection was lost.
    """

    task: int
    count: Count
    again: bool = False


# --- dispatcher -> submitter ------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, array_like=True, tag=50):
    """The answer to `Hello`."""

    epoch: int  # incarnation of the dispatcher, a random number
    wire: tuple[int, int] = WIRE_VERSION
    node: str = ""
    cpus: float = 0.0
    #: Data endpoints ("host:port") where a submitter that shares no memory with this engine may put its objects.
    data: list[str] = []


class Refused(msgspec.Struct, array_like=True, tag=51):
    """The peer cannot join, and why. The link is closed after it."""

    reason: str


class Rehello(msgspec.Struct, array_like=True, tag=52):
    """The dispatcher does not know this peer (it was restarted): say `Hello` again, and what you hold."""

    epoch: int


class Results(msgspec.Struct, array_like=True, gc=False, tag=53):
    """Final results of the submitter's tasks, numbered per session; kept by the dispatcher until acknowledged."""

    serial: int
    results: list[TaskResult]


class WatchResults(msgspec.Struct, array_like=True, tag=54):
    """Results for `Watch`. Not acknowledged; `Unwatch` ends the interest."""

    results: list[TaskResult]


class Reply(msgspec.Struct, array_like=True, tag=55):
    """The answer to `Query` `id`: text or JSON."""

    id: int
    body: str


class Kept(msgspec.Struct, array_like=True, tag=58):
    """A function of `Keep` is ready in all executors that are to have it (and in those that come), or why not."""

    function: int
    executors: int = 0
    error: ErrorInfo | None = None


class Forgot(msgspec.Struct, array_like=True, tag=59):
    """Nobody has these functions any more: define them again before the next use."""

    functions: list[int]


# --- dispatcher -> executor -------------------------------------------------------------------------------------------


class Assign(msgspec.Struct, array_like=True, gc=False, tag=70):
    """Attempts to run, in this order."""

    attempts: list[Attempt]


class Revoke(msgspec.Struct, array_like=True, tag=71):
    """Attempts that are not wanted any more: drop them if unstarted, raise `TaskCancelled` in them if running.

    Each is still answered by a result (outcome CANCELLED, or whatever it ended with).
    """

    attempts: list[tuple[int, int]]


class Recall(msgspec.Struct, array_like=True, tag=72):
    """Give back everything that is not started (by `Returned`): another executor is idle."""


class Free(msgspec.Struct, array_like=True, tag=73):
    """Objects of this owner that nobody needs any more: their segments may be recycled once unpinned."""

    objects: list[int]


class Safe(msgspec.Struct, array_like=True, gc=False, tag=74):
    """All `Finished` up to `serial` are safe: forget them."""

    serial: int


class Prepare(msgspec.Struct, array_like=True, tag=78):
    """Make these functions ready to be called, beside what runs: import or unpickle, load, warm up. Then `Prepared`."""

    functions: list[Function]


class Forget(msgspec.Struct, array_like=True, tag=79):
    """These functions are not needed any more: let go of them, and of what they hold."""

    functions: list[int]


class Leave(msgspec.Struct, array_like=True, tag=75):
    """Finish what is running, give back the rest, and exit."""


# --- dispatcher <-> dispatcher ----------------------------------------------------------------------------------------


class Delegate(msgspec.Struct, array_like=True, tag=80):
    """Tasks to run, in this order; answered like an `Assign`, by `Finished` or `Returned`."""

    tasks: list[Delegated]


class Offer(msgspec.Struct, array_like=True, tag=81):
    """What the sender can do for the receiver."""

    #: Of the widest node: a task that asks for more can never run there.
    cpu: Amount
    resources: dict[str, Amount]
    #: What the receiver's tasks may occupy of all nodes together, "cpu" and the rest, with none of them counted.
    room: dict[str, Duration]
    #: Predicted seconds until work that arrives now would begin.
    wait: Amount = 0.0
    #: Gives back what it has not begun, and wants no more.
    leaving: bool = False
    #: To a dispatcher below: some data endpoints of other nodes, which can take its objects when it leaves.
    data: list[str] = []


class Hosted(msgspec.Struct, array_like=True, tag=82):
    """The name of an actor from a dispatcher below (`Hosting` with attempt 0) is its own, or why it must end."""

    task: int
    taken: str = ""


# --- supervisor <-> dispatcher ----------------------------------------------------------------------------------------


class Node(msgspec.Struct, array_like=True, tag=90):
    """What a supervisor's node offers, and its executors alive now: (worker id, role, pid)."""

    name: str
    cpu: Amount
    gpu: Amount = 0.0
    memory: Count = 0
    resources: dict[str, Amount] = {}
    executors: list[tuple[int, str, int]] = []
    #: Executor processes it may start beyond the cpus, for blocked tasks.
    blocked_max: int = 64
    #: Something outside can add nodes like this one: what fits none now waits instead of failing.
    can_grow: bool = False
    #: The node is to end: nothing new, please, and what was not begun goes elsewhere.
    leaving: bool = False
    #: Sync executors that stay although nothing is to be done; at least one per cpu.
    workers: Count = 0
    #: Its executors see only the gpus that `StartExecutor` names.
    binds: bool = False


class ExecutorStarted(msgspec.Struct, array_like=True, tag=91):
    """A process was forked; it will say `Hello` itself."""

    worker: int
    role: str
    pid: int


class ExecutorDied(msgspec.Struct, array_like=True, tag=92):
    """A process ended. `running`: the tasks that were inside a function at that moment, from its shared page."""

    worker: int
    reason: str  # "exit code 3", "signal SIGSEGV", "killed: task timeout", "left"
    running: list[int] = []


class StartExecutor(msgspec.Struct, array_like=True, tag=93):
    """Fork one more executor of this role."""

    role: str
    worker: int
    #: The node's gpus that it is to see, counted from 0.
    devices: list[Count] = []


class KillExecutor(msgspec.Struct, array_like=True, tag=94):
    """End this process with SIGKILL (a task timed out, or does not react)."""

    worker: int
    reason: str


class HandOver(msgspec.Struct, array_like=True, tag=96):
    """The executors of a node that leaves have ended: what is needed of what they left? Answered by `Leavings`."""


class Leavings(msgspec.Struct, array_like=True, tag=97):
    """Objects on the node that are still needed, and data endpoints of other nodes, which can take them."""

    objects: list[ObjectRef]
    to: list[str]


class Moved(msgspec.Struct, array_like=True, tag=98):
    """Objects of a node that leaves lie elsewhere now: (id, data endpoint). Passed on to the dispatcher above."""

    objects: list[tuple[int, str]]


class Interrupt(msgspec.Struct, array_like=True, tag=95):
    """Signal this process, so that it looks at its messages at the next bytecode."""

    worker: int


Message = (
    Define | Hello | Submit | Ack | Cancel | Watch | Unwatch | Release | Query | Logs | Heartbeat | Holding | Keep
    | Farewell | Finished | Blocked | Resumed | Returned | LoopLag | Prepared | Hosting | Checkpoint | Items | Consumed
    | Welcome | Refused | Rehello | Results | WatchResults | Reply | Kept | Forgot | Assign | Revoke | Recall | Free
    | Safe | Prepare | Forget | Leave | Delegate | Offer | Hosted | Node | ExecutorStarted | ExecutorDied
    | StartExecutor | KillExecutor | Interrupt | HandOver | Leavings | Moved
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()


def encode(messages: list[Message]) -> bytes:
    """One frame of these messages, in order."""
    try:
        return _encoder.encode(messages)
    except UnicodeEncodeError:
        # Names of files, say, are texts that are not all Unicode; programs print them and raise them.
        return _encoder.encode(_unicode(messages))


def _unicode(value: Any) -> Any:
    """The same, with whatever is no Unicode in its texts escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list | tuple):
        return type(value)([_unicode(part) for part in value])
    if isinstance(value, dict):
        return {_unicode(key): _unicode(part) for key, part in value.items()}
    if isinstance(value, msgspec.Struct):
        fields = {name: _unicode(getattr(value, name)) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    return value


#: The messages of a frame. Raises `msgspec.MsgspecError` (`ValidationError`, `DecodeError`) for what is no msgpack, or
#: not of these types.
decode: Final[Callable[[bytes | memoryview], list[Message]]] = msgspec.msgpack.Decoder(list[Message]).decode
