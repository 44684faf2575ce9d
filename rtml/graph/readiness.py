"""Which functions executors have ready before anybody calls them, and which are forgotten.

A submitter (a gateway) names the functions that it keeps. Each is made ready in every executor that may run it: first
in one alone, because what does not load, or even ends its process, must not meet the others; then in one executor of
each node at a time, so that the others go on. When all have it, the submitter is told. Executors that come later get
what is kept, too. A dispatcher below this one is asked as a submitter asks, and stands for its executors.

There may be thousands of functions: nothing here looks at all of them but when executors come or go.

A function is forgotten, in every process, when no submitter keeps it, no task of it lives, and no graph lives whose
context names it. So a graph that began with one version of a model finds that version however late it calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil
from typing import Final

from rtml.graph.devices import gpus, sees
from rtml.graph.state import FunctionState, Profile, Session, WorkerState, failure
from rtml.graph.tables import Tables
from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    ASYNC_EXECUTOR,
    DISPATCHER,
    EXECUTOR,
    Define,
    ErrorInfo,
    Forget,
    Forgot,
    Keep,
    Kept,
    Prepare,
    Prepared,
)

#: How an executor ends that somebody killed, which may be the kernel because of the memory that a model takes.
_FROM_OUTSIDE: Final = "signal SIGKILL"
#: What a dispatcher below answers if none of its executors can ever have the function.
_UNFIT: Final = "Unschedulable"
_EXECUTORS: Final = (EXECUTOR, ASYNC_EXECUTOR, ACTOR, ASYNC_ACTOR)


class _Kept:
    """A function that submitters keep."""

    __slots__ = ("below", "closed", "error", "function", "proven", "ready", "sessions", "spared", "trying")

    def __init__(self, function: FunctionState) -> None:
        self.function = function
        self.sessions: dict[int, Session] = {}
        #: executors that are making it ready
        self.trying = 0
        #: some executor has it ready
        self.proven = False
        #: all had it, and the submitters know
        self.ready = False
        #: it failed before it was ready: no executor gets it
        self.error: ErrorInfo | None = None
        #: an executor died of it later: no other one is to
        self.closed = False
        #: an executor was killed from outside while it made it ready: that happens once
        self.spared = False
        #: executors of other nodes that have it ready, by worker id of the node's dispatcher; 0: no executor there can
        self.below: dict[int, int] = {}


class Readiness:
    """Decides what executors prepare and forget."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        #: something changed: `advance` has to look
        self.restless = False
        #: set by the core: has executors started that see the gpus that such calls ask for
        self.on_bound: Callable[[Profile], None]
        self._kept: dict[int, _Kept] = {}
        #: those of a name
        self._named: dict[str, dict[int, _Kept]] = {}
        #: what `advance` has to look at: there may be thousands of others
        self._touched: dict[int, None] = {}
        #: executors came or went: it has to look at all
        self._upset = False
        #: those that executors of this node still lack, oldest first
        self._lacking: dict[int, None] = {}
        #: what dispatchers below were asked for, by worker id
        self._asked: dict[int, set[int]] = {}
        #: those that kept functions for us before, and may not have heard what is dropped
        self._stale: set[int] = set()
        #: submitters that want to know when a function is forgotten
        self._curious: dict[int, dict[int, Session]] = {}

    # --- what submitters want

    def keep(self, session: Session, message: Keep) -> None:
        """The submitter keeps these functions from now on; no others any more, if it says that these are all."""
        self.restless = True
        gone = [number for number in message.dropped if number not in self.tables.functions]
        # What stays is never unpinned in between.
        for number in message.functions:
            self._keep_one(session, number)
        dropped: Iterable[int] = message.dropped
        if not message.more:
            wanted = set(message.functions)
            dropped = [*dropped, *(number for number in self._kept if number not in wanted)]
        for number in dropped:
            kept = self._kept.get(number)
            if kept is not None and session.id in kept.sessions:
                self._drop(kept, session)
        for number in message.dropped:
            function = self.tables.functions.get(number)
            if function is not None:
                function.managed = True  # also if it was kept in the time of another dispatcher
                self._curious.setdefault(number, {})[session.id] = session
                self.forget_unused(function)
        if gone:
            self.tables.tell(session, Forgot(gone))

    def _keep_one(self, session: Session, number: int) -> None:
        kept = self._kept.get(number)
        if kept is None:
            function = self.tables.functions.get(number)
            if function is None:
                # It was forgotten while this was on its way.
                self.tables.tell(session, Forgot([number]))
                return
            kept = self._kept[number] = _Kept(function)
            self._learn(kept)
        self._touched[number] = None
        if session.id not in kept.sessions:
            kept.sessions[session.id] = session
            self.pin(kept.function)
        # It is said (again) to whoever asks (again).
        if kept.ready or kept.error is not None:
            self._tell(kept, [session])

    def _learn(self, kept: _Kept) -> None:
        """Until it has run itself, a new version is taken to be as quick as the one of that name that is kept now."""
        function = kept.function
        others = self._named.setdefault(function.definition.name, {})
        if function.estimate is None:
            for other in others.values():
                if other.function.estimate is not None:
                    function.estimate = other.function.estimate
                    function.cost = other.function.cost.copy()
        others[function.definition.id] = kept

    def _drop(self, kept: _Kept, session: Session) -> None:
        number = kept.function.definition.id
        del kept.sessions[session.id]
        if not kept.sessions:
            del self._kept[number]
            self._lacking.pop(number, None)
            others = self._named[kept.function.definition.name]
            del others[number]
            if not others:
                del self._named[kept.function.definition.name]
        self._curious.setdefault(number, {})[session.id] = session
        self.unpin(kept.function)

    def end_session(self, session: Session) -> None:
        """A submitter will not come back."""
        for kept in list(self._kept.values()):
            if session.id in kept.sessions:
                self._drop(kept, session)
        for number, sessions in list(self._curious.items()):
            sessions.pop(session.id, None)
            if not sessions:
                del self._curious[number]

    # --- what is needed

    def pin(self, function: FunctionState) -> None:
        """One more needs the function, and what it names."""
        function.managed = True
        function.pins += 1
        if function.pins == 1:
            for member in self._members(function):
                self.pin(member)

    def unpin(self, function: FunctionState) -> None:
        """One less does."""
        function.pins -= 1
        if not function.pins:
            for member in self._members(function):
                self.unpin(member)
            self.forget_unused(function)

    def _members(self, function: FunctionState) -> list[FunctionState]:
        known = self.tables.functions
        # A definition that names itself or such that name others would never be let go.
        found = [known[number] for number in function.definition.members if number in known]
        return [member for member in found if not member.definition.members]

    def forget_unused(self, function: FunctionState) -> None:
        """Have a function forgotten if nobody needs it any more."""
        if function.pins or function.users or not function.managed:
            return
        number = function.definition.id
        for worker in self.tables.workers.values():
            asked = number in self._asked.get(worker.id, ())
            if number in worker.functions or number in worker.prepared or worker.preparing == number or asked:
                worker.functions.discard(number)
                worker.prepared.discard(number)
                if worker.session is not None and worker.role != DISPATCHER:
                    self.tables.tell(worker.session, Forget([number]))
                elif worker.session is not None and not worker.upward:
                    self._asked.get(worker.id, set()).discard(number)
                    self.tables.tell(worker.session, Keep([], [number], more=True))
        told = self._curious.pop(number, {})
        for session in told.values():
            self.tables.tell(session, Forgot([number]))
            function.definers.discard(session.id)
        sessions = self.tables.sessions
        # Other submitters may call it without defining it again; executors were just told.
        if not any(one in sessions and sessions[one].role not in _EXECUTORS for one in function.definers):
            self.tables.functions.pop(number, None)

    # --- executors

    def joined(self, worker: WorkerState, again: bool = True) -> None:
        """An executor, or a dispatcher below, said Hello: what it has ready it will say when asked.

        Args:
            worker: it.
            again: this dispatcher has seen it before.
        """
        self._stop(worker)
        worker.prepared.clear()
        if worker.role == DISPATCHER and again:
            self._stale.add(worker.id)
        self.restless = self._upset = True

    def _stop(self, worker: WorkerState) -> _Kept | None:
        """It is not making anything ready any more. Returns what that was, if somebody still keeps it."""
        number, worker.preparing = worker.preparing, 0
        if worker.node.preparing is worker:
            worker.node.preparing = None
        if worker.role == DISPATCHER:
            for other in self._asked.pop(worker.id, ()):
                if other in self._kept:
                    self._kept[other].trying -= 1
            for one in self._kept.values():
                one.below.pop(worker.id, None)
        kept = self._kept.get(number)
        if kept is not None:
            kept.trying -= 1
        return kept

    def prepared(self, worker: WorkerState, message: Prepared) -> None:
        """An executor has made a function ready, or cannot."""
        if worker.preparing != message.function:
            return
        self.restless = True
        self._touched[message.function] = None
        kept = self._stop(worker)
        if kept is None:
            return
        worker.prepared.add(message.function)
        if message.error is None:
            worker.functions.add(message.function)
            kept.proven = True
        else:
            self._failed(kept, message.error)

    def below(self, worker: WorkerState, message: Kept) -> None:
        """A dispatcher below has a function ready in all its executors that are to have it, or cannot."""
        number = message.function
        kept = self._kept.get(number)
        asked = self._asked.get(worker.id, set())
        if kept is None:
            return
        self.restless = True
        self._touched[number] = None
        if number in asked:
            asked.discard(number)
            kept.trying -= 1
        worker.prepared.add(number)
        kept.below[worker.id] = message.executors
        if message.error is None:
            kept.proven = True
        elif message.error.type != _UNFIT:
            self._failed(kept, message.error)

    def forgotten(self, worker: WorkerState, message: Forgot) -> None:
        """A dispatcher below does not know these functions any more."""
        worker.functions.difference_update(message.functions)

    def died(self, worker: WorkerState, reason: str) -> bool:
        """An executor's process ended. True if that was because of what it was making ready, by all appearances."""
        self.restless = self._upset = True
        self._stale.discard(worker.id)
        preparing = worker.preparing
        kept = self._stop(worker)
        if not preparing or reason.startswith(("killed", "left")):
            return False
        if kept is not None and reason == _FROM_OUTSIDE and not kept.spared:
            kept.spared = True
            self._touched[preparing] = None
        elif kept is not None:
            name = kept.function.definition.name
            message = f"the executor died ({reason}) while it made {name!r} ready"
            self._failed(kept, failure("WorkerDied", message))
            kept.closed = True
        return True

    def _failed(self, kept: _Kept, error: ErrorInfo) -> None:
        if kept.ready:
            self._tell(kept, kept.sessions.values(), error)
        elif kept.error is None:
            kept.error = error
            self._tell(kept, kept.sessions.values())

    def upset(self) -> None:
        """What there is to prepare anything in has changed."""
        self.restless = self._upset = True

    def advance(self) -> None:
        """Ask executors for what is missing."""
        self.restless = False
        touched, self._touched = self._touched, {}
        if self._upset:
            self._upset = False
            touched = dict.fromkeys(self._kept)
        if not self._kept and not self._stale:
            return
        workers, below = self._regular(), self._below()
        wanted: dict[int, list[int]] = {worker.id: [] for worker in below if worker.id in self._stale}
        for number in touched:
            kept = self._kept.get(number)
            if kept is not None and self._look(number, kept, workers, below, wanted):
                self._lacking.setdefault(number)
            else:
                self._lacking.pop(number, None)
        # A node has one executor busy with this at a time: those that are idle get what has waited longest.
        nodes = {id(worker.node): worker.node for worker in workers}.values()
        done = []
        for number in self._lacking:
            if all(node.preparing is not None for node in nodes):
                break
            if not self._look(number, self._kept[number], workers, below, wanted):
                done.append(number)
        for number in done:
            del self._lacking[number]
        for worker in below:
            if worker.id in wanted:
                self._ask(worker, wanted[worker.id])

    def _look(
        self,
        number: int,
        kept: _Kept,
        workers: list[WorkerState],
        below: list[WorkerState],
        wanted: dict[int, list[int]],
    ) -> bool:
        """Go on with one function, in executors and (`wanted`) at dispatchers below.

        Returns:
            Whether executors of this node still lack it.
        """
        if kept.error is not None or kept.closed or kept.function.definition.members:
            return False
        profile = kept.function.profile
        shape = profile.shape
        if gpus(shape):
            self.on_bound(profile)
        have = [w for w in workers if w.role == profile.role and w.node.could_fit(shape) and sees(w, shape)]
        if not have and any(node.binds and node.could_fit(shape) for node in self.tables.nodes.values()):
            return False  # they are on their way
        apart = [worker for worker in below if kept.below.get(worker.id, 1)]
        if not have and not apart and self._hopeless(kept):
            return False
        missing = [worker for worker in have if number not in worker.prepared]
        for worker in missing:
            node = worker.node
            if worker.session is None or node.preparing is not None or (kept.trying and not kept.proven):
                continue
            node.preparing = worker
            worker.preparing = number
            kept.trying += 1
            self.tables.tell(worker.session, Prepare([kept.function.definition]))
        lacking = [worker for worker in apart if number not in worker.prepared]
        for worker in lacking:
            asked = self._asked.setdefault(worker.id, set())
            if number not in asked and (kept.proven or not kept.trying):
                asked.add(number)
                kept.trying += 1
                wanted.setdefault(worker.id, []).append(number)
        if (have or apart) and not missing and not lacking and not kept.ready:
            kept.ready = True
            self._tell(kept, kept.sessions.values())
        return bool(missing)

    def _ask(self, worker: WorkerState, numbers: list[int]) -> None:
        """Have a dispatcher below keep these for us, as a submitter asks."""
        assert worker.session is not None
        new = [number for number in numbers if number not in worker.functions]
        if new:
            worker.functions.update(new)
            self.tables.tell(worker.session, Define([self._kept[number].function.definition for number in new]))
        # What it was told to drop while it was away it may not have heard.
        self.tables.tell(worker.session, Keep(numbers, more=worker.id not in self._stale))
        self._stale.discard(worker.id)

    def _below(self) -> list[WorkerState]:
        """Dispatchers below that work for this one."""
        found = []
        for worker in self.tables.remotes.values():
            connected = worker.session is not None and worker.session.peer is not None
            if connected and not worker.upward and not worker.leaving and not worker.dying:
                found.append(worker)
        return found

    def _hopeless(self, kept: _Kept) -> bool:
        """Tell those who keep it if no executor can ever have it."""
        tables, function = self.tables, kept.function
        shape = function.profile.shape
        nodes = tables.nodes.values()
        if not nodes or any(node.can_grow or node.supervisor is None for node in nodes):
            return False
        if any(node.could_fit(shape) for node in nodes) or any(not one.upward for one in tables.remotes.values()):
            return False
        error = failure(_UNFIT, f"{function.definition.name!r} asks for {shape}, which no node has")
        if not tables.remotes:
            self._failed(kept, error)
            return True
        # There is a dispatcher above, which may know where: it is told what is so here, others wait.
        self._tell(kept, [one for one in kept.sessions.values() if one.role == DISPATCHER], error)
        return True

    def _regular(self) -> list[WorkerState]:
        """The executors that stay: those beyond a node's cpus are there for a while only, and load what they need."""
        found: list[WorkerState] = []
        for node in self.tables.nodes.values():
            most = {EXECUTOR: max(1, ceil(node.cpu)), ASYNC_EXECUTOR: len(node.workers)}
            for _, worker in sorted(node.workers.items()):
                if worker.leaving or worker.dying or not (most.get(worker.role) or worker.devices):
                    continue
                if not worker.devices:
                    most[worker.role] -= 1
                if worker.session is not None and worker.session.peer is not None:
                    found.append(worker)
        return found

    def _tell(self, kept: _Kept, sessions: Iterable[Session], error: ErrorInfo | None = None) -> None:
        number = kept.function.definition.id
        workers = self.tables.workers.values()
        executors = sum(number in worker.prepared and worker.role != DISPATCHER for worker in workers)
        executors += sum(kept.below.values())
        for session in sessions:
            self.tables.tell(session, Kept(number, executors, error or kept.error))
