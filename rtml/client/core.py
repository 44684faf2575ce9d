"""The submitter's side of the protocol as a pure state machine.

Used by clients, by the gateway and by executors (a running task submits too), and by the simulator: no clock, no
socket, no pickle, no lock. The caller holds one lock around every call and sends what `flush` returns, as one frame,
in order.

Theory of operation. The submitter owns its tasks: it keeps every spec until the task's result has arrived, so that a
restarted dispatcher can be told again. The dispatcher keeps every result until the submitter acknowledges it, so that a
broken link loses nothing. Both meet in three rules:

1. Whether a dependency is already resolved here is looked up when a task enters the buffer (`submit`), because from
   then on the dispatcher may have forgotten it; what is resolved travels by value.
2. An acknowledgement covers no result that a still unsent task depends on. Tasks are sent in the order of submission,
   so it is enough to remember, per unsent task with unresolved dependencies, the newest serial at its submission
   (`_holds`).
3. Results are idempotent: the first one for a task counts, later ones are dropped.

At most `WINDOW` unresolved tasks are with the dispatcher; the rest waits here (a million submissions are normal).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final

import msgspec

from rtml.messages import (
    CLIENT,
    Ack,
    Cancel,
    Consumed,
    Define,
    Forgot,
    Function,
    Hello,
    Holding,
    Keep,
    Message,
    ObjectRef,
    Options,
    Query,
    Rehello,
    Release,
    Results,
    Submit,
    Task,
    TaskResult,
    Unwatch,
    Watch,
    WatchResults,
    Welcome,
)

#: Unresolved tasks that may be with the dispatcher at the same time.
WINDOW: Final = 65_536

#: Applied results after which an acknowledgement is worth a frame of its own.
ACK_EVERY: Final = 512

#: Bytes of arguments in one `Submit`, so that a frame stays far below `FRAME_MAX`.
SUBMIT_BYTES_MAX: Final = 4 * 1024 * 1024

#: Orders to end somebody's task that are repeated on a new connection.
_ENDS_MAX: Final = 1024


class ClientCore:
    """What one submitter session has asked for and not yet got.

    Args:
        session: 31 random bits that begin every task id of this process.
        window: most unresolved tasks at the dispatcher.
    """

    def __init__(self, session: int, window: int = WINDOW) -> None:
        self.session = session
        self.window = window
        #: Unresolved, uncancelled tasks by id, in the order of submission.
        self._tasks: dict[int, Task] = {}
        #: Absolute deadlines of those that have one. Keys are a subset of `_tasks`.
        self._deadlines: dict[int, float] = {}
        #: Submitted since the last flush; younger than everything in `_queue`.
        self._buffer: list[Task] = []
        #: Unsent because the window was full.
        self._queue: deque[Task] = deque()
        #: (task, newest applied serial at its submission) of unsent tasks that refer to others, oldest first.
        self._holds: deque[tuple[int, int]] = deque()
        #: Cancelled here, end not yet confirmed by the dispatcher.
        self._cancelled: set[int] = set()
        #: Anybody's tasks that were ended here, and whose end has not been seen.
        self._ends: dict[int, None] = {}
        #: Unresolved tasks that created actors: these go on until the actors end.
        self.lasting: set[int] = set()
        self._functions: dict[int, Function] = {}
        self._define: list[Function] = []
        #: What is to be ready in executors, and what was once and is not forgotten yet.
        self._kept: set[int] = set()
        #: Not kept any more, and not known to be forgotten.
        self._dropped: set[int] = set()
        #: Those of both that the dispatcher is to be told about: there may be thousands of others.
        self._news: set[int] = set()
        #: It is to be told about all.
        self._keep_all = False
        self._watched: set[int] = set()
        #: Those of them without a result.
        self._awaited: set[int] = set()
        self._watch: list[int] = []
        self._unwatch: dict[int, None] = {}
        self._cancel: list[int] = []
        self._release: list[int] = []
        #: Objects of delivered results and items that were not released.
        self.objects: set[int] = set()
        self._queries: list[Query] = []
        #: Those without an answer, sent or not.
        self._asked: dict[int, Query] = {}
        #: Of open streams: items that were taken; and those of them that the dispatcher is to be told about.
        self._taken: dict[int, int] = {}
        self._taken_due: set[int] = set()
        #: The newest `Results.serial` that was applied, and the newest acknowledged; `_acked <= _applied`.
        self._applied = 0
        self._acked = 0
        self._unacked_results = 0
        #: The newest task that was sent (ids of a session grow).
        self._sent = 0
        #: A `Rehello` asks for everything again; answered by the next flush, which is a `resume`: look up the
        #: dependencies of `unresolved_tasks` again before it.
        self.returning = False
        #: Something but submissions and acknowledgements may have to be sent: whoever leaves it here says so.
        self._others = False
        self._hello: Hello | None = None
        self.epoch = 0

    # --- what the program wants ---------------------------------------------------------------------------------------

    def define(self, function: Function) -> None:
        """Make `function` known; it is sent before the next task, once per dispatcher incarnation."""
        if function.id not in self._functions:
            self._functions[function.id] = function
            self._define.append(function)
            self._others = True

    def keep_ready(self, functions: Iterable[int], dropped: Iterable[int] = ()) -> None:
        """Have these functions ready in executors as well, and those dropped no more; they are defined before."""
        self._others = True
        for number in functions:
            self._kept.add(number)
            self._dropped.discard(number)
            self._news.add(number)
        for number in dropped:
            self._kept.discard(number)
            self._dropped.add(number)
            self._news.add(number)

    def forget(self, functions: Iterable[int]) -> None:
        """Nobody knows these functions any more: before their next use they have to be defined again."""
        for number in functions:
            self._functions.pop(number, None)
            self._dropped.discard(number)

    def knows(self, function: int) -> bool:
        """Whether `define` was called for this function id."""
        return function in self._functions

    def name_of(self, task: int) -> str:
        """What people call an unresolved task of this session; "task" of others."""
        spec = self._tasks.get(task)
        function = None if spec is None else self._functions.get(spec.function)
        if spec is None or function is None:
            return "task"
        own = None if spec.options is None else spec.options.name
        return own or function.options.name or function.name

    def parent(self, task: int) -> int:
        """The task in which an unresolved one was submitted, 0 if in none."""
        spec = self._tasks.get(task)
        return 0 if spec is None else spec.parent

    def submit(self, task: Task, deadline: float | None = None) -> None:
        """Record and buffer a task whose function is defined and whose id was never used before.

        Args:
            task: its `deps` carry the payloads of dependencies that are resolved here by now.
            deadline: absolute end of its budget on the caller's clock; `Options.deadline` is filled in by `flush`.
        """
        self._tasks[task.id] = task
        self._buffer.append(task)
        if task.hosts is not None:
            self.lasting.add(task.id)
        if deadline is not None:
            self._deadlines[task.id] = deadline
        if task.deps is not None or task.handles is not None:
            self._holds.append((task.id, self._applied))

    def cancel(self, tasks: Iterable[int]) -> list[int]:
        """Give up these tasks; returns those that were unresolved. Their results will not be delivered any more."""
        known = [task for task in tasks if self._tasks.pop(task, None) is not None]
        for task in known:
            self._deadlines.pop(task, None)
        self._cancelled.update(known)
        self._cancel.extend(known)
        self._others = True
        self.lasting.difference_update(known)
        return known

    def end(self, task: int) -> None:
        """Have anybody's task end as cancelled; if it is one of ours, its result is still waited for."""
        self._cancel.append(task)
        self._others = True
        while len(self._ends) >= _ENDS_MAX:
            del self._ends[next(iter(self._ends))]
        self._ends[task] = None

    def watch(self, task: int) -> None:
        """Ask for the result of a task that somebody else submitted."""
        if task not in self._watched:
            self._watched.add(task)
            self._awaited.add(task)
            self._watch.append(task)
            self._others = True
            # Unwatched and watched again before anything was sent: the order of the messages would end it.
            self._unwatch.pop(task, None)

    def keep(self, task: int) -> bool:
        """A handle of this task came back in a value; False if that is known.

        The dispatcher keeps the task for us until `unwatch`, although it is our own and its result comes anyway.
        """
        known = task in self._watched
        self._watched.add(task)
        self._unwatch.pop(task, None)
        return not known

    def unwatch(self, task: int) -> None:
        """No handle of this foreign (or kept) task is left here."""
        if task in self._watched:
            if task in self.lasting:
                hosts = self._tasks[task].hosts
                assert hosts is not None
                hosts.held = False
            self._watched.discard(task)
            self._awaited.discard(task)
            self._unwatch[task] = None
            self._others = True

    def release(self, objects: Iterable[int]) -> None:
        """These results in shared memory are not needed by this submitter any more."""
        objects = list(objects)
        self._release += objects
        self._others = True
        self.objects.difference_update(objects)

    def taken(self, task: int, count: int) -> None:
        """Of this task's stream so many items have been taken; 0 opens it."""
        self._taken[task] = count
        if count:
            self._taken_due.add(task)
            self._others = True

    def forget_stream(self, task: int) -> None:
        """It has ended."""
        self._taken.pop(task, None)
        self._taken_due.discard(task)

    def received(self, objects: list[int]) -> None:
        """Items of streams that lie in shared memory came."""
        self.objects.update(objects)

    def query(self, number: int, what: str, argument: str = "") -> None:
        """Ask the dispatcher; asked again on a new connection if there is no answer yet."""
        asked = self._asked[number] = Query(number, what, argument)
        self._queries.append(asked)
        self._others = True

    def answered(self, number: int) -> None:
        """A query's answer is there, or not wanted any more."""
        self._asked.pop(number, None)

    # --- what the caller of `flush` wants to know ---------------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """Tasks submitted since the last flush."""
        return len(self._buffer)

    @property
    def unresolved(self) -> int:
        """Tasks without a result, sent or not."""
        return len(self._tasks)

    @property
    def idle(self) -> bool:
        """Nothing is on its way, so nothing can be gained by waiting for more to send."""
        return len(self._buffer) + len(self.lasting) >= len(self._tasks)

    @property
    def urgent(self) -> bool:
        """A flush would send something that somebody may be waiting for."""
        if self._buffer or self._unacked_results >= ACK_EVERY:
            return True
        if self._others and (
            self._cancel
            or self._watch
            or self._queries
            or self._taken_due
            or self._news
            or self._keep_all
            or self.returning
        ):
            return True
        if self._queue:
            return self._room() > 0
        return False

    @property
    def pending_output(self) -> bool:
        """A flush would send anything at all."""
        if self._applied > self._acked and self._ackable() > self._acked:
            return True
        if self._others and (self._unwatch or self._release):
            return True
        return self.urgent

    def unresolved_tasks(self) -> list[Task]:
        """The specs kept here, in the order of submission; only `deps` may be changed."""
        return list(self._tasks.values())

    def sent(self, task: int) -> bool:
        """Whether this task of this session has left the buffer."""
        return task <= self._sent

    # --- what the wire brings and takes -------------------------------------------------------------------------------

    def receive(self, message: Message, now: float) -> list[TaskResult]:
        """Apply a message of the dispatcher; returns the results that are new. Other messages are ignored.

        Args:
            message: as decoded.
            now: unused by the rules of today; the signature is that of all cores.
        """
        if isinstance(message, Results):
            return self._apply(message)
        if isinstance(message, WatchResults):
            # The watch goes on until the handle is dropped here: a value that contains it may still be sent on.
            new = [result for result in message.results if self._awaited_once(result.id)]
            self.objects.update([result.payload.id for result in new if result.payload.__class__ is ObjectRef])
            if len(new) < len(message.results):
                self._drop(new, message.results)
            return new
        if isinstance(message, Welcome):
            self._welcome(message.epoch)
        elif isinstance(message, Rehello):
            self._welcome(message.epoch)
            self.returning = self._others = True
        elif isinstance(message, Forgot):
            again = [number for number in message.functions if number in self._kept]
            if again:  # kept once more while it was being forgotten
                self._others = True
                self._define += [self._functions[number] for number in again]
                self._news.update(again)
            self.forget([number for number in message.functions if number not in self._kept])
        return []

    def settled(self, task: int) -> bool:
        """Whether the dispatcher has no more to say about this task; until then what it refers to may be read."""
        return task not in self._tasks and task not in self._cancelled

    def flush(self, now: float) -> list[Message]:
        """What to send now, in order; to be sent as one frame, or one frame per message if it would be too long."""
        others = self._others
        if others:
            if self.returning:
                self.returning = False
                return ([self._hello] if self._hello is not None else []) + self.resume(now)
            before = self._before()
        out: list[Any] = self._submits(now)
        # The last `Submit` carries the acknowledgement: what was sent before it may have named acknowledged results.
        ack = self._ackable() if self._holds else self._applied
        if ack > self._acked:
            self._acked = ack
            self._unacked_results = 0
            if out:
                out[-1].ack = ack
            else:
                out.append(Ack(ack))
        return [*before, *out, *self._after()] if others else out

    def _before(self) -> list[Message]:
        """What comes before the submissions of this flush, and before any acknowledgement."""
        out: list[Message] = []
        if self._define:
            out.append(Define(self._define))
            self._define = []
        # A handle inside an acknowledged result is only kept alive by our watch.
        if self._watch:
            out.append(Watch(self._watch))
            self._watch = []
        return out

    def _after(self) -> list[Message]:
        """What comes after them; of this, what is kept is told when all submissions are on their way."""
        out: list[Message] = []
        self._others = bool((self._news or self._keep_all) and self._queue)
        if (self._news or self._keep_all) and not self._queue:
            # After the calls of what is dropped, which keep it for as long as they need it.
            told = self._kept | self._dropped if self._keep_all else self._news
            out.append(Keep(sorted(told & self._kept), sorted(told & self._dropped), more=not self._keep_all))
            self._news, self._keep_all = set(), False
        if self._cancel:
            out.append(Cancel(self._cancel))
            self._cancel = []
        if self._unwatch:
            out.append(Unwatch(list(self._unwatch)))
            self._unwatch = {}
        if self._release:
            out.append(Release(self._release))
            self._release = []
        if self._taken_due:
            out += [Consumed(task, self._taken[task]) for task in self._taken_due]
            self._taken_due = set()
        if self._queries:
            out += self._queries
            self._queries = []
        return out

    def hello(self, pid: int = 0, name: str = "", python: str = "", role: str = CLIENT) -> Hello:
        """The first message of a connection of a plain submitter (executors build their own and call `resume`)."""
        self._hello = Hello(role=role, session=self.session, pid=pid, name=name, python=python, epoch=self.epoch)
        return self._hello

    def resume(self, now: float) -> list[Message]:
        """After `Hello` on a new connection: all that the dispatcher may have forgotten, in order.

        First put the payloads of dependencies that were resolved meanwhile into the `deps` of `unresolved_tasks`: a new
        dispatcher never heard of them.
        """
        self._others = True
        self._queries = list(self._asked.values())
        self._define = list(self._functions.values())
        self._keep_all = bool(self._kept or self._dropped)
        self._watch = sorted(self._awaited)
        for task in self._tasks.values():
            if task.id <= self._sent and task.options is not None and task.options.admission:
                # It was let in, or its refusal is on its way: nobody is asked again.
                task.options = msgspec.structs.replace(task.options, admission=False)
        self._queue = deque(self._tasks.values())
        self._buffer = []
        # What was cancelled is not submitted again; telling it again reaches a dispatcher that does remember.
        self._cancel = [*self._cancelled, *self._ends]
        self._acked = 0
        self._sent = 0
        # All unsent again: hold back acknowledgements until those with dependencies have gone out (rule 2).
        self._holds = deque((task.id, 0) for task in self._queue if task.deps or task.handles)
        if not self.epoch:
            return self.flush(now)
        self._taken_due = set()
        streams: list[Message] = [Consumed(task, count, again=True) for task, count in self._taken.items()]
        # Says what `Release` and `Unwatch` would have said, and what the last ones said, which may be lost.
        self._release = []
        self._unwatch = {}
        return [Holding(sorted(self.objects), sorted(self._watched)), *self.flush(now), *streams]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _apply(self, message: Results) -> list[TaskResult]:
        results, pop = message.results, self._tasks.pop
        self._applied = max(self._applied, message.serial)
        self._unacked_results += len(results)
        new: list[TaskResult] = []
        for result in results:
            if pop(result.id, None) is not None:
                new.append(result)
                if result.payload.__class__ is ObjectRef:
                    self.objects.add(result.payload.id)
        if self._ends:
            for result in results:
                self._ends.pop(result.id, None)
        if self.lasting:
            self.lasting.difference_update([result.id for result in new])
        if self._deadlines:
            for result in new:
                self._deadlines.pop(result.id, None)
        if self._cancelled:
            self._cancelled.difference_update([result.id for result in results])
        if len(new) < len(results):
            self._drop(new, results)
        return new

    def _awaited_once(self, task: int) -> bool:
        awaited = task in self._awaited
        self._awaited.discard(task)
        return awaited

    def _drop(self, new: list[TaskResult], results: list[TaskResult]) -> None:
        """Let go of what came again, or when nobody wanted it any more."""
        self._others = True
        wanted = {result.id for result in new}
        for result in results:
            if result.id not in wanted:
                if isinstance(result.payload, ObjectRef) and result.payload.id not in self.objects:
                    self._release.append(result.payload.id)
                self._unwatch.update((handle, None) for handle in result.handles or () if handle not in self._watched)

    def _welcome(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        if self.epoch:
            # Another incarnation numbers its results from one again and knows nothing of our cancelled tasks.
            self._applied = self._acked = 0
            self._holds = deque((task, 0) for task, _ in self._holds)
            self._cancelled.clear()
        self.epoch = epoch
        if self._hello is not None:
            self._hello.epoch = epoch

    def _room(self) -> int:
        with_dispatcher = len(self._tasks) - len(self._queue) - len(self._buffer)
        return self.window - max(0, with_dispatcher)

    def _ackable(self) -> int:
        return min(self._applied, self._holds[0][1]) if self._holds else self._applied

    def _submits(self, now: float) -> list[Submit]:
        tasks = self._buffer
        if not tasks and not self._queue:
            return []
        # As `_room` says, for the usual case in fewer words.
        if not self._queue and len(self._tasks) <= self.window and len(tasks) <= self.window:
            self._buffer = []
            if self._holds:
                self._holds.clear()
        else:
            self._queue.extend(tasks)
            self._buffer = []
            tasks = list(islice(self._queue, max(0, self._room())))
            for _ in tasks:
                self._queue.popleft()
            if not tasks:
                return []
            while self._holds and self._holds[0][0] <= tasks[-1].id:
                self._holds.popleft()
        self._sent = tasks[-1].id
        if self._deadlines:
            self._fill_budgets(tasks, now)
        return [Submit(tasks)] if len(tasks) == 1 else [Submit(part) for part in _parts(tasks)]

    def _fill_budgets(self, tasks: list[Task], now: float) -> None:
        for task in tasks:
            deadline = self._deadlines.get(task.id)
            if deadline is not None:
                # A copy, because the options of one `.options(...)` call are shared by many tasks.
                base = task.options or Options()
                task.options = msgspec.structs.replace(base, deadline=max(0.0, deadline - now))


def _parts(tasks: list[Task]) -> list[list[Task]]:
    """`tasks` cut where the arguments and the given dependencies would exceed `SUBMIT_BYTES_MAX`."""
    parts: list[list[Task]] = [[]]
    size = 0
    for task in tasks:
        weight = len(task.args) if isinstance(task.args, bytes) else 0
        if task.deps is not None:
            weight += sum(len(payload) for _, payload in task.deps if isinstance(payload, bytes))
        if size + weight > SUBMIT_BYTES_MAX and size:
            parts.append([])
            size = 0
        parts[-1].append(task)
        size += weight
    return parts
