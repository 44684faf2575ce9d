"""The pure half of an executor: which attempts it holds, what it owes the dispatcher, what it may start next.

No clock, socket or pickle here: the shells (`executor`, `async_executor`, and the simulator) pass messages and `now`
in and take messages out. Rules that this file keeps:

* An attempt is in exactly one place: `queue` (unstarted), `running`, or among the results. It leaves `queue` through
  `take` (it is started here) or by being answered: returned unstarted, or cancelled by a result.
* Messages leave in the order in which they were caused. Only neighbouring results are joined into one `Finished`,
  which is why everything else goes through `relay`.
* A result is kept until `Safe` covers its serial, and sent again after a reconnect.
* While the innermost unfinished task is blocked, only its own descendants may run here, on top of it. An unrelated task
  there could wait for something that only the blocked task can give, for ever. So whatever else was assigned in
  that moment is returned at once.
* Deadlines arrive as remaining budgets and are made absolute on arrival; `take` answers what is late instead of
  starting it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from rtml.messages import (
    CANCELLED,
    EXECUTOR,
    EXPIRED,
    Assign,
    Attempt,
    Blocked,
    Checkpoint,
    Consumed,
    Define,
    ErrorInfo,
    Finished,
    Forget,
    Free,
    Function,
    Hello,
    Hosting,
    Leave,
    Message,
    ObjectRef,
    Prepare,
    Recall,
    Rehello,
    Results,
    Resumed,
    Returned,
    Revoke,
    Safe,
    TaskResult,
    Welcome,
)
from rtml.workers.outlets import Outlet

#: (task id, attempt number): one try at a task.
Key = tuple[int, int]

#: Most calls that one batch may have; a longer group is cut. The dispatcher's own limit is far below.
BATCH_MAX = 4096


class WorkerCore:
    """What one executor holds and owes.

    Args:
        worker: the id that the supervisor gave the process.
        session: the process's submitter session, for its `Hello`.
        role: one of `messages.EXECUTORS`.
        pid: process id for the `Hello`.
    """

    def __init__(self, worker: int, session: int, role: str = EXECUTOR, pid: int = 0) -> None:
        self.worker = worker
        self.session = session
        self.role = role
        self.pid = pid
        #: Incarnation of the dispatcher we last heard from; 0 before the first `Welcome`.
        self.epoch = 0
        #: No new work is accepted; the process ends once `running` is empty.
        self.leaving = False
        #: Definitions by function id, until the dispatcher says `Forget`; it sends each once per connection.
        self.functions: dict[int, Function] = {}
        #: Functions to be made ready, and to let go of. The shell empties both.
        self.wanted: list[Function] = []
        self.forgotten: list[int] = []
        #: Unstarted attempts in the order to start them. Members of a batch are neighbours.
        self.queue: deque[Attempt] = deque()
        #: Started and unfinished attempts, oldest first; in a sync executor a stack (batch-mates are one level).
        self.running: dict[Key, Attempt] = {}
        #: Running attempts that the dispatcher wants to end. The shell interrupts them.
        self.revoked: set[Key] = set()
        #: Blocked attempts, outermost first, and whether descendants may run on top of each.
        self._blocked: list[tuple[Key, bool]] = []
        #: Absolute end of the budget of queued and running attempts that have one.
        self._deadlines: dict[Key, float] = {}
        #: Results not yet put into a `Finished`.
        self.results: list[TaskResult] = []
        #: Messages to send, in order; logically before `_results`.
        self._outbox: list[Message] = []
        #: Sent `Finished` that no `Safe` has covered, by rising serial.
        self._unsafe: deque[Finished] = deque()
        self._serial = 0
        #: The attempt that created the actor which lives here, its inputs as they were, and its last state.
        #: gpus of the node that this process sees
        self.devices: list[int] = []
        self.hosted: Attempt | None = None
        self.checkpoint: Checkpoint | None = None
        #: Streams of running attempts, by task.
        self.outlets: dict[int, Outlet] = {}
        #: Objects to hand to the store's `free`; the shell empties it.
        self.freed: list[int] = []

    # --- messages in ------------------------------------------------------------------------------------------------

    def receive(self, message: Message, now: float) -> bool:
        """Applies one message. Returns False if it is (also) for the client on the same link."""
        if message.__class__ is Assign:  # the usual one: `case` costs three times as much
            self._assign(message.attempts, now)
            return True
        if message.__class__ is Results:
            return False
        if message.__class__ is Safe:
            while self._unsafe and self._unsafe[0].serial <= message.serial:
                self._unsafe.popleft()
            return True
        match message:
            case Define():
                for function in message.functions:
                    self.functions[function.id] = function
                    if function.id in self.forgotten:
                        self.forgotten.remove(function.id)
            case Prepare():
                for function in message.functions:
                    self.functions[function.id] = function
                    if function.id in self.forgotten:
                        self.forgotten.remove(function.id)
                self.wanted.extend(message.functions)
            case Forget():
                for number in message.functions:
                    self.functions.pop(number, None)
                self.wanted = [function for function in self.wanted if function.id not in message.functions]
                self.forgotten.extend(message.functions)
            case Recall():
                # Always answered, also with nothing: until then the dispatcher gives this executor no work.
                keys = self._keys(list(self.queue))
                self.queue.clear()
                self.relay([Returned(attempts=keys, leaving=self.leaving)])
            case Revoke():
                self._revoke(message.attempts)
            case Free():
                for number in message.objects:
                    if not any(outlet.keeps(number) for outlet in self.outlets.values()):
                        self.freed.append(number)
            case Consumed():
                self._consumed(message)
            case Leave():
                self.leave()
            case Welcome():
                self.epoch = message.epoch
                return False
            case _:
                return False
        return True

    def leave(self) -> None:
        """Accept nothing more and give back what is not started; the process ends when nothing runs any more."""
        if not self.leaving:
            self.leaving = True
            self._return_queue()

    def give_back(self) -> None:
        """Return everything that is not started."""
        if self.queue:
            self._return_queue()

    def _assign(self, attempts: list[Attempt], now: float) -> None:
        for attempt in attempts:
            if attempt.budget is not None:
                self._deadlines[attempt.id, attempt.attempt] = now + attempt.budget
        if self._blocked and not self.leaving:
            self._give_back([attempt for attempt in attempts if not self._may_run_inline(attempt)])
            self.queue.extend(attempt for attempt in attempts if self._may_run_inline(attempt))
            return
        self.queue.extend(attempts)
        if self.leaving:
            self._return_queue()

    def _may_run_inline(self, attempt: Attempt) -> bool:
        """Whether the dispatcher chose it to run on top of the innermost blocked task."""
        (task, _), inline = self._blocked[-1]
        return inline and attempt.under == task

    def _revoke(self, keys: Iterable[Key]) -> None:
        wanted = set(keys)
        self.revoked.update(key for key in wanted if key in self.running)
        kept = []
        for attempt in self.queue:
            if (attempt.id, attempt.attempt) in wanted:
                self._answer(attempt, CANCELLED, "TaskCancelled", "the task was cancelled before it started")
            else:
                kept.append(attempt)
        if len(kept) < len(self.queue):
            self.queue = deque(kept)

    def _answer(self, attempt: Attempt, outcome: int, error: str, text: str) -> None:
        """The result of an attempt that is not started."""
        self._deadlines.pop((attempt.id, attempt.attempt), None)
        info = ErrorInfo(type=error, message=text, chain=list(attempt.chain or ()))
        self.results.append(TaskResult(id=attempt.id, attempt=attempt.attempt, outcome=outcome, error=info))

    def _return_queue(self) -> None:
        attempts = list(self.queue)
        self.queue.clear()
        self._give_back(attempts)

    def _give_back(self, attempts: list[Attempt]) -> None:
        if attempts or self.leaving:
            self.relay([Returned(attempts=self._keys(attempts), leaving=self.leaving)])

    def _keys(self, attempts: list[Attempt]) -> list[Key]:
        keys = [(attempt.id, attempt.attempt) for attempt in attempts]
        if self._deadlines:
            for key in keys:
                self._deadlines.pop(key, None)
        return keys

    # --- running ----------------------------------------------------------------------------------------------------

    def take(self, now: float) -> list[Attempt]:
        """Starts the next call: one attempt, or all queued members of its batch. Empty if there is nothing to start."""
        queue = self.queue
        while queue:
            first = queue.popleft()
            if self._deadlines and self._late(first, now):
                continue
            self.running[first.id, first.attempt] = first
            if not first.batch:
                return [first]
            return self._take_batch(first, now)
        return []

    def _take_batch(self, first: Attempt, now: float) -> list[Attempt]:
        group = [first]
        while self.queue and self.queue[0].batch == first.batch and len(group) < BATCH_MAX:
            attempt = self.queue.popleft()
            if attempt.function != first.function:
                self.queue.appendleft(attempt)
                break
            if not self._late(attempt, now):
                self.running[attempt.id, attempt.attempt] = attempt
                group.append(attempt)
        return group

    def _late(self, attempt: Attempt, now: float) -> bool:
        deadline = self._deadlines.get((attempt.id, attempt.attempt))
        if deadline is None or now < deadline:
            return False
        self._answer(attempt, EXPIRED, "DeadlineExceeded", "the deadline passed before the task started")
        return True

    def host(self, attempt: Attempt) -> None:
        """The actor that this running attempt was to create lives."""
        self.hosted = attempt

    def save(self, payload: bytes | ObjectRef) -> None:
        """The actor's state after everything that has finished so far."""
        assert self.hosted is not None, "an actor was created"
        self.checkpoint = Checkpoint(self.hosted.id, self.hosted.attempt, payload)
        self.relay([self.checkpoint])

    @property
    def dismissed(self) -> bool:
        """Whether the actor that lives here is not wanted any more."""
        hosted = self.hosted
        return hosted is not None and (self.leaving or (hosted.id, hosted.attempt) in self.revoked)

    def open(self, attempt: Attempt) -> Outlet:
        """A running attempt is a stream."""
        outlet = self.outlets[attempt.id] = Outlet(attempt)
        return outlet

    def _consumed(self, message: Consumed) -> None:
        outlet = self.outlets.get(message.task)
        if outlet is not None:
            self.freed += outlet.taken(message.count)
            if message.again:
                self.relay(outlet.again())

    def close(self, outlet: Outlet, result: TaskResult) -> None:
        """The stream has ended: what was not taken goes along with its result."""
        self.outlets.pop(outlet.attempt.id, None)
        result.made = outlet.made
        if result.outcome == CANCELLED:
            self.freed += outlet.unsent_objects()
        else:
            result.tail = list(outlet.waiting) or None

    def deadline(self, attempt: Attempt) -> float | None:
        """Absolute end of the attempt's budget on the caller's clock, or None. Only while it is queued or running."""
        return self._deadlines.get((attempt.id, attempt.attempt)) if self._deadlines else None

    def finish(self, result: TaskResult) -> None:
        """A running attempt ended. A second result of the same attempt is dropped."""
        key = (result.id, result.attempt)
        if self.running.pop(key, None) is None:
            return
        self.results.append(result)
        if self.revoked:
            self.revoked.discard(key)
        if self._deadlines:
            self._deadlines.pop(key, None)
        if self._blocked and self._blocked[-1][0] == key:  # a thread that the task left behind still waits
            self._blocked.pop()

    def block(self, attempt: Attempt, *, inline: bool = True) -> None:
        """The innermost running attempt begins to wait for other tasks: what is unstarted goes back.

        Args:
            attempt: the waiting one.
            inline: descendants may be run on top of it.
        """
        key = (attempt.id, attempt.attempt)
        self._blocked.append((key, inline))
        returned = self._keys(list(self.queue))
        self.queue.clear()
        self.relay([Blocked(task=attempt.id, attempt=attempt.attempt, returned=returned, inline=inline)])

    def resume(self, attempt: Attempt) -> None:
        """The wait of the last `block` is over. Descendants that were not started here meanwhile go back."""
        if not self._blocked or self._blocked[-1][0] != (attempt.id, attempt.attempt):
            return  # the task has ended meanwhile
        self._blocked.pop()
        self.relay([Resumed(task=attempt.id, attempt=attempt.attempt)])
        if self.queue:
            self._return_queue()

    @property
    def blocked(self) -> bool:
        """Whether some running attempt waits."""
        return bool(self._blocked)

    # --- messages out -----------------------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """How many results wait for the next `flush`."""
        return len(self.results)

    @property
    def dirty(self) -> bool:
        """Whether `flush` would return anything."""
        return bool(self.results or self._outbox)

    def relay(self, messages: Iterable[Message]) -> None:
        """Puts messages behind everything that happened so far."""
        if self.results:
            self._seal()
        self._outbox.extend(messages)

    def _seal(self) -> None:
        self._serial += 1
        finished = Finished(self._serial, self.results)
        self.results = []
        self._unsafe.append(finished)
        self._outbox.append(finished)

    def flush(self) -> list[Message]:
        """What is to be sent now, in order."""
        if self.results:
            self._seal()
        outbox = self._outbox
        self._outbox = []
        return outbox

    # --- connections ------------------------------------------------------------------------------------------------

    def hello(self, python: str = "", name: str = "") -> Hello:
        """The first message of a connection, and the answer to `Rehello`. What was unsent belongs to the old one."""
        holds = list(self.running)
        holds.extend((attempt.id, attempt.attempt) for attempt in self.queue)
        return Hello(
            role=self.role,
            session=self.session,
            pid=self.pid,
            name=name,
            python=python,
            worker=self.worker,
            holds=holds,
            epoch=self.epoch,
            devices=self.devices,
        )

    def rehello(self, message: Rehello) -> None:
        """The dispatcher is a new one."""
        self.epoch = message.epoch

    def resume_link(self) -> list[Message]:
        """What follows `hello` on a new connection: results that are not safe, and who waits at the moment.

        Messages that were waiting to be sent are in there or, like `Returned` and `Resumed`, expressed by the `Hello`.
        """
        if self.results:
            self._seal()
        self._outbox = []
        again: list[Message] = []
        hosted = self.hosted
        if hosted is not None and hosted.creates is not None:
            state = self.checkpoint.payload if self.checkpoint is not None else hosted.checkpoint
            function = self.functions[hosted.function]
            again.append(Hosting(hosted.creates, hosted.attempt, function, hosted.deps or [], state))
        again += self._unsafe
        for outlet in self.outlets.values():
            again += outlet.again()
        again.extend(Blocked(task=task, attempt=number, inline=inline) for (task, number), inline in self._blocked)
        if self.leaving:
            again.append(Returned(attempts=[], leaving=True))
        return again
