"""Actors: tasks that go on until their actor ends, each in a process of its own, and the calls on them.

An actor *is* the task that created it: its id, its owner and its submitter are that task's, its restarts are that
task's further attempts, and its end is that task's result. So ownership, dependencies, cancellation, and the way back
after a restart of the dispatcher are those of any task. What is added here:

    PENDING      the task waits for arguments, resources or a process     (waiting, ready; attempt 0)
    ALIVE        a process has it; calls are handed to that process       (assigned)
    RESTARTING   its process died and its restarts are not used up        (ready; attempt > 0)
    DEAD         it has its result; calls end with `ActorDied`            (done)

Rules:

* A call is a task that only its actor's process can run. The calls of one submitter wait in a queue in the order of
  their submission, with those whose arguments are not there yet: of an ordered actor (`concurrency` 1) none overtakes
  another. Submitters take turns.
* As calls cannot run anywhere else, they are handed over ahead of time, up to `AHEAD_MAX`; but those that may still be
  joined to a batch, may be superseded or are timed leave only when nothing is before them.
* When the process dies, the calls that it may have begun are charged with it: they run again if their `retries` say so,
  else they end with `ActorDied`. Calls that it certainly had not begun wait for the restart. (Who a dead process had
  begun to work for is known to one dispatcher only: when both die together such a call may be begun again.)
* An actor that nobody has a handle of, and that is not detached, ends when its calls have.
* An actor of another dispatcher is known by the proxy of its task (`rtml.graph.remote`), and calls on it go to where
  that came from, in their order, through any number of dispatchers. Only its own one decides what becomes of it.
* What an actor asks for (`gpu`, `memory`, labels; `cpu` is 0 unless given) is its own for life; calls take nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from rtml.graph.actorstate import ActorState, describe, name_taken, reachable, reason
from rtml.graph.devices import suits
from rtml.graph.placement import Placement
from rtml.graph.pools import Pools
from rtml.graph.queues import ReadyQueue
from rtml.graph.state import Session, State, TaskState, WorkerState, failure
from rtml.graph.tables import Tables
from rtml.graph.workforce import Workforce
from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    DISPATCHER,
    STOP,
    ActorOptions,
    ErrorInfo,
    ExecutorDied,
    Leave,
    ObjectRef,
    Revoke,
    Task,
    Unwatch,
    Watch,
    session_of,
)

#: Calls that an ordered actor's process may have before it needs them.
AHEAD_MAX: Final = 256

#: More calls than there can be.
_ALL: Final = 1 << 62

#: Ended actors whose reason is remembered for late calls.
_ENDED_KEPT: Final = 4096


class Actors:
    """Decides what becomes of actors and calls on them."""

    def __init__(self, tables: Tables, workforce: Workforce, placement: Placement, pools: Pools) -> None:
        self.tables = tables
        self.workforce = workforce
        self.placement = placement
        self.pools = pools
        self.by_name: dict[str, ActorState] = {}
        #: names of actors that belong to dispatchers below
        self.names: dict[str, int] = {}
        #: set by `Lifecycle`: ends a task with an error, at its next drain
        self.fail: Callable[[TaskState, ErrorInfo], None]
        #: set by `Keeping`'s owner: an object is needed no more
        self.unneeded: Callable[[int, int], None]
        #: one handle of a task less
        self.unhold: Callable[[int], None]
        #: set by `Abroad`: an actor of ours is about to begin, and has ended
        self.on_ready: Callable[[TaskState], None]
        self.on_ended: Callable[[int], None]
        #: to be looked at in this wake-up
        self.touched: dict[int, ActorState] = {}
        #: without a process, in the order in which they became ready
        self.pending: dict[int, ActorState] = {}
        #: processes without an actor
        self._idle_processes = workforce.idle[ACTOR], workforce.idle[ASYNC_ACTOR]
        #: why actors ended
        self._ended: dict[int, ErrorInfo] = {}

    # --- submission

    def refusal(self, spec: Task) -> ErrorInfo | None:
        """Why this task, which creates an actor or is a call on one, cannot be accepted."""
        if spec.hosts is not None:
            name = spec.hosts.name
            if not name or (name not in self.by_name and self.names.get(name, spec.id) == spec.id):
                return None
            error = failure("SubmitError", name_taken(name))
            self._remember(spec.id, failure("ActorDied", error.message))
            return error
        task = self.tables.tasks.get(spec.actor)
        actor = None if task is None else task.hosted
        if actor is None and task is not None and task.home is not None:
            return None if task.result is None else reason("it", task.result)
        if actor is None:
            gone = "the actor is not known (any more): it has ended, or its creator is gone"
            return self._ended.get(spec.actor) or failure("ActorDied", gone)
        if actor.killed:
            return self._ended.get(spec.actor)
        if actor.stopping:
            return failure("ActorDied", f"actor {actor.name!r} was stopped")
        return None

    def admit(self, task: TaskState, session: Session) -> None:
        """A task that was accepted creates an actor, or is a call on one."""
        spec = task.spec
        if spec.hosts is not None:
            actor = task.hosted = ActorState(task, spec.hosts)
            if spec.hosts.name:
                self.by_name[spec.hosts.name] = actor
                from_above = session.worker is not None and session.worker.upward
                actor.claims = bool(self.tables.uplink) and not from_above
            if spec.hosts.held and session.id in self.tables.sessions:
                session.held.add(task.id)
                task.holds += 1
            self.touched[task.id] = actor
            return
        creation = self.tables.tasks[spec.actor]
        hosted = creation.hosted
        if hosted is None:  # only its own dispatcher knows more of it
            several = task.function.definition.asynchronous
            hosted = creation.hosted = ActorState(creation, ActorOptions(concurrency=2 if several else 1))
        task.actor = hosted
        hosted.calls[task.id] = task
        creation.holds += 1
        if task.function.definition.method == STOP:
            hosted.stopping = True
        if hosted.ordered:
            self._enqueue(hosted, task)

    def ready(self, task: TaskState) -> ErrorInfo | None:
        """The arguments are there; an error if no node can ever hold the actor."""
        actor = task.actor
        if actor is not None:
            if actor.task.result is not None:
                return reason("it", actor.task.result)
            actor.retried = actor.retried or task.failures > 0
            actor.awaited.discard(task.id)
            if not task.entry:
                self._enqueue(actor, task)
            self.touched[actor.task.id] = actor
            return None
        hosted = task.hosted
        assert hosted is not None
        error = self.pools.infeasible(task)
        if error is None:
            self.pending[task.id] = hosted
            self.on_ready(task)
        return error

    def claimed(self, actor: ActorState) -> None:
        """The actor's name is its own everywhere."""
        actor.claims = False
        self.touched[actor.task.id] = actor

    def recheck(self) -> None:
        """What the nodes offer has changed: those without a process that fit none of them any more are doomed."""
        for actor in self.pending.values():
            error = self.pools.infeasible(actor.task)
            if error is not None:
                self.pools.doomed.append((actor.task, error))

    def taken(self, task: TaskState) -> None:
        """A waiting or ready task turns out to be with a process."""
        task.entry = 0
        self.pending.pop(task.id, None)

    def adopted(self, task: TaskState, worker: WorkerState) -> None:
        """This process holds the actor since before this dispatcher."""
        if worker.role == DISPATCHER:
            self.unheld(task)
        else:
            worker.actor = task.hosted
            self.touch(worker)

    def _enqueue(self, actor: ActorState, task: TaskState) -> None:
        submitter = session_of(task.id)
        queue = actor.queues.get(submitter)
        if queue is None:
            queue = actor.queues[submitter] = ReadyQueue()
        task.entry = self.tables.next_sequence()
        queue.push((task.id, 0, 0, task.entry, task))

    def touch(self, worker: WorkerState) -> None:
        """Something came from this actor's process."""
        if worker.actor is not None:
            self.touched[worker.actor.task.id] = worker.actor

    def unheld(self, task: TaskState) -> None:
        """Nobody has a handle of this actor any more."""
        if task.hosted is not None:
            self.touched[task.id] = task.hosted

    # --- the pass over all actors, once per wake-up

    def schedule(self, now: float) -> None:
        """Give actors processes, and processes calls."""
        sync, asynchronous = self._idle_processes
        if self.pending or sync or asynchronous:
            self._find_processes(now)
        if self.touched:
            touched, self.touched = self.touched, {}
            for actor in touched.values():
                task = actor.task
                # Most are touched by the end of their only call, and go on.
                if task.state is not State.DONE and (actor.calls or actor.stopping or not task.holds):
                    self._serve(actor, now)

    def _find_processes(self, now: float) -> None:
        wanted: dict[str, int] = {}
        for actor in list(self.pending.values()):
            task = actor.task
            if actor.claims:
                continue
            remote = self.placement.spreading.host(task) if self.tables.remotes else None
            if remote is not None:
                del self.pending[task.id]
                self.placement.spreading.delegate(remote, task, now)
                self.touched[task.id] = actor
                continue
            worker = self._idle(actor)
            if worker is None:
                wanted[actor.role] = wanted.get(actor.role, 0) + 1
                error = self.pools.start_actor(task, actor.role, wanted[actor.role], now)
                if error is not None:
                    self.fail(task, error)
                continue
            del self.pending[task.id]
            worker.actor = actor
            self.placement.assign(worker, [task], now)
            attempt = worker.outgoing[-1]
            attempt.creates, attempt.checkpoint = task.spec, actor.checkpoint
            self.touched[task.id] = actor
        for role in (ACTOR, ASYNC_ACTOR):
            for worker in list(self.workforce.idle[role].values()):
                if worker.ready and role not in wanted and worker.session is not None:
                    # Its actor has ended, or was not waited for so long. Processes are not used again.
                    del self.workforce.idle[role][worker.id]
                    worker.leaving = True
                    self.tables.tell(worker.session, Leave())

    def _idle(self, actor: ActorState) -> WorkerState | None:
        for worker in self.workforce.idle[actor.role].values():
            # One that came back without the actor that was sent to it is as good as new.
            free = worker.actor is None or worker.actor.task.worker is not worker
            shape = actor.task.profile.shape
            if worker.ready and free and worker.node.fits(shape) and suits(worker, shape):
                return worker
        return None

    def _serve(self, actor: ActorState, now: float) -> None:
        """Hand over calls, or end an actor that is not wanted any more."""
        task = actor.task
        worker = task.worker or task.home
        if worker is not None and worker.role == DISPATCHER and task.state is State.ASSIGNED:
            self._serve_there(actor, worker, now)
            return
        if not task.holds and not task.profile.detached:
            actor.stopping = True
        if worker is None or task.state is not State.ASSIGNED:
            if actor.stopping and not actor.calls and task.state is not State.DONE:
                self.fail(task, failure("ActorDied", f"nobody has a handle of actor {actor.name!r} any more", task))
            return
        if not worker.ready:
            if actor.calls or actor.stopping:
                self.touched[task.id] = actor  # it has to be looked at when it is back
            return
        if actor.stopping and not actor.calls and not actor.leaving and worker.session is not None:
            actor.leaving = True
            self.tables.tell(worker.session, Leave())
        most = AHEAD_MAX if actor.role == ACTOR else max(1, actor.options.concurrency)
        while actor.queues:
            calls = self._next_calls(actor, most - len(worker.queue) + 1, len(worker.queue) == 1, now)
            if not calls:
                return
            self.placement.assign(worker, calls, now)

    def _serve_there(self, actor: ActorState, worker: WorkerState, now: float) -> None:
        """The actor lives at another dispatcher, which keeps the queues: calls go there in their order."""
        task, session = actor.task, worker.session
        if session is None or session.peer is None or worker.unclaimed:
            self.touched[task.id] = actor  # it has to be looked at when it is back
            return
        while actor.queues:
            calls = self._next_calls(actor, _ALL, True, now)
            if not calls:
                break
            for call in calls:
                if call.session is session:
                    self.placement.spreading.give_back(call)  # it came from where the actor lives by now
                else:
                    self.placement.spreading.delegate(worker, call, now)
        if task.home is None and not (actor.calls or task.holds or task.profile.detached or actor.leaving):
            actor.leaving = True
            self.tables.tell(session, Unwatch([task.id]))

    def held_again(self, task: TaskState, worker: WorkerState) -> None:
        """A handle came back from the dispatcher where the actor lives; it may believe that nobody here has any."""
        actor = task.hosted
        if actor is not None and task.worker is worker and actor.leaving and not actor.killed:
            actor.leaving = False
            assert worker.session is not None
            self.tables.tell(worker.session, Watch([task.id]))

    def _next_calls(self, actor: ActorState, room: int, idle: bool, now: float) -> list[TaskState]:
        """Calls to be handed over together: a batch, or some that run one after the other; at most `room`."""
        calls: list[TaskState] = []
        for session in list(actor.queues):
            if actor.awaited and actor.ordered and session in map(session_of, actor.awaited):
                continue
            while len(calls) < room:
                task = self._head(actor, session)
                if task is None or task.state is not State.READY:
                    break
                if task.function.definition.method == STOP and len(actor.calls) > 1:
                    break
                if _waits(task):
                    if actor.ordered and (calls or not idle):
                        break
                    return self._apart(actor, session, task, room)
                self._pop(actor, session)
                calls.append(task)
            if len(actor.queues) > 1 and session in actor.queues:
                actor.queues[session] = actor.queues.pop(session)  # its turn is over
            if len(calls) >= room:
                break
        return calls

    def _apart(self, actor: ActorState, session: int, first: TaskState, room: int) -> list[TaskState]:
        """The head of this queue, with all that can be joined to it if it is of a batch method."""
        if room <= 0:
            return []
        most = first.profile.batch
        if not most:
            return [self._pop(actor, session)]
        calls: list[TaskState] = []
        items = 0
        for key in [session, *(other for other in actor.queues if other != session)]:
            while (task := self._head(actor, key)) is not None and task.state is State.READY:
                same = task.function is first.function and task.batch_key == first.batch_key
                if not same or task.profile.batch != most or (calls and items + task.spec.items > most):
                    break
                items += task.spec.items
                calls.append(self._pop(actor, key))
        return calls

    def _head(self, actor: ActorState, session: int) -> TaskState | None:
        entry = actor.queues[session].head()
        if entry is None:
            del actor.queues[session]
            return None
        return entry[4]

    def _pop(self, actor: ActorState, session: int) -> TaskState:
        task = actor.queues[session].pop()
        assert task is not None
        task.entry = 0
        return task

    # --- ends

    def kill(self, task: TaskState) -> None:
        """Somebody wants this actor's process to end. The actor has ended when the process has."""
        actor = task.hosted
        assert actor is not None
        assert task.worker is not None
        actor.stopping = actor.leaving = actor.killed = True
        self._forget_name(actor)
        info = failure("ActorDied", f"actor {actor.name!r} was killed")
        self._remember(task.id, info)
        for call in list(actor.calls.values()):
            self.fail(call, info)
        self._end_process(task, revoke=False)

    def _end_process(self, task: TaskState, revoke: bool) -> None:
        worker = task.worker
        assert worker is not None
        if worker.role != DISPATCHER:
            self.pools.kill(worker, "its actor was ended")
        if (revoke or worker.role == DISPATCHER) and worker.session is not None:
            self.tables.tell(worker.session, Revoke([(task.id, task.attempt)]))

    def _remember(self, number: int, info: ErrorInfo) -> None:
        """Why calls on this actor fail from now on."""
        if len(self._ended) >= _ENDED_KEPT:
            del self._ended[next(iter(self._ended))]
        self._ended[number] = info

    def _forget_name(self, actor: ActorState) -> None:
        name = actor.options.name
        if name and self.by_name.get(name) is actor:
            del self.by_name[name]

    def ended(self, task: TaskState) -> None:
        """A call, or the task that created an actor, has its result (`Lifecycle.end` says so)."""
        task.entry = 0
        actor = task.actor
        if actor is not None:
            actor.calls.pop(task.id, None)
            actor.awaited.discard(task.id)
            self.touched[actor.task.id] = actor
            self.unhold(actor.task.id)
            return
        hosted = task.hosted
        assert hosted is not None
        self.pending.pop(task.id, None)
        self.touched.pop(task.id, None)
        self._forget_name(hosted)
        if isinstance(hosted.checkpoint, ObjectRef):
            self.unneeded(hosted.checkpoint.id, task.id)
        assert task.result is not None
        info = reason(f"actor {hosted.name!r}", task.result)
        self._remember(task.id, info)
        self.on_ended(task.id)
        for call in list(hosted.calls.values()):
            self.fail(call, info)
        if task.worker is not None and task.receipt is None:
            self._end_process(task, revoke=True)  # the supervisor may be away
        task.hosted = None

    def ended_there(self, proxy: TaskState) -> None:
        """An actor of another dispatcher, that was called from here, has ended."""
        actor, proxy.hosted = proxy.hosted, None
        assert actor is not None
        assert proxy.result is not None
        self.touched.pop(proxy.id, None)
        info = reason("it", proxy.result)
        self._remember(proxy.id, info)
        for call in actor.calls.values():
            if call.state is not State.ASSIGNED:  # how the others end they are told over there
                self.fail(call, info)

    def moved_here(self, proxy: TaskState, task: TaskState) -> None:
        """An actor that was called from here is to live here now: its calls, and those that are out, are its own."""
        before, actor = proxy.hosted, task.hosted
        if before is None or actor is None:
            return
        self.touched.pop(proxy.id, None)
        actor.calls, actor.queues, actor.stopping = before.calls, before.queues, before.stopping
        for call in actor.calls.values():
            call.actor = actor
            if call.state is State.ASSIGNED:
                actor.awaited.add(call.id)
        self.touched[task.id] = actor

    def has_ended(self, number: int) -> bool:
        """Whether an actor is known to have ended: its process may not have heard of it."""
        return number in self._ended

    def died(self, worker: WorkerState, lost: list[TaskState], message: ExecutorDied) -> list[TaskState]:
        """An actor's process ended. Returns the tasks that are to be made ready again; others have failed."""
        actor = worker.actor
        assert actor is not None
        task = actor.task
        if task.state is State.DONE or task not in lost:
            return []
        task.failures += 1
        what = f"the process of actor {actor.name!r} died ({message.reason})"
        if actor.killed:
            what = f"actor {actor.name!r} was killed"
        if actor.leaving or task.failures > task.profile.retries:
            times = f", {task.failures} times in all" if task.failures > 1 else ""
            self.fail(task, failure("ActorDied", what + times, task))
            return []
        again = [task]
        calls = [call for call in lost if call is not task and call.state is not State.DONE]
        begun = _begun(calls, message.running) if actor.role == ACTOR else len(calls)
        for position, call in enumerate(calls):
            if position < begun:
                call.failures += 1
                if call.failures > call.profile.retries:
                    text = f"{what} before the call of {call.profile.name!r} had ended; the actor is being restarted"
                    self.fail(call, failure("ActorDied", text, call))
                    continue
            again.append(call)
        return again

    def lost(self, tasks: list[TaskState], worker: WorkerState, why: str) -> list[TaskState]:
        """A dispatcher with actors of ours is gone. Returns the tasks of actors that are to be made ready again."""
        again = []
        for task in tasks:
            if task.state is State.DONE or (task.hosted is None and task.actor is None):
                continue
            actor = task.hosted
            if actor is not None:
                actor.leaving = False
                before, actor.checkpoint = actor.checkpoint, reachable(actor.checkpoint, worker)
                if isinstance(before, ObjectRef) and actor.checkpoint is None:
                    self.unneeded(before.id, task.id)
            task.failures += 1
            if task.failures > task.profile.retries:
                what = "actor" if task.hosted is not None else "the actor of"
                message = f"{what} {task.profile.name!r} was lost: its node is gone ({why})"
                self.fail(task, failure("ActorDied", message, task))
            else:
                again.append(task)
        return again

    # --- what others ask

    def find(self, name: str) -> dict[str, Any] | None:
        """What makes a handle of the actor of this name."""
        actor = self.by_name.get(name)
        if actor is None or actor.claims:
            return None
        return describe(actor.task.id, actor.name, actor.options.methods, actor.options.concurrency > 1)

    def snapshot(self) -> list[dict[str, Any]]:
        """For `rtml status`."""
        found = []
        for task in self.tables.tasks.values():
            actor = task.hosted
            if actor is not None:
                alive = task.state is State.ASSIGNED
                state = "alive" if alive else "restarting" if task.attempt else "pending"
                found.append(
                    {
                        "id": task.id,
                        "class": actor.name,
                        "name": actor.options.name,
                        "state": "stopping" if actor.stopping else state,
                        "calls": len(actor.calls),
                        "restarts": max(0, task.attempt - 1),
                        "executor": task.worker.id if alive and task.worker is not None else None,
                    }
                )
        return found


def _waits(task: TaskState) -> bool:
    """Whether the call is handed over only when nothing is before it."""
    return bool(task.profile.batch) or task.profile.timeout is not None or task.profile.prompt


def _begun(calls: list[TaskState], running: list[int]) -> int:
    """How many of the calls, which the process had in this order, it may have begun.

    It runs them one after the other and shows the last one that it began until the next. If that one is not among
    them, its result has come, and with it all before. If nothing is shown, nobody saw how it died.
    """
    if not running:
        return len(calls)
    for position in range(len(calls) - 1, -1, -1):
        if calls[position].id in running:
            return position + 1
    return 0
