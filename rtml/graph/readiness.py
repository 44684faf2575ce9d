"""Which functions executors have ready before anybody calls them, and which are forgotten.

A submitter (a gateway) names the functions that it keeps. Each is made ready in every executor that may run it: first
in one alone, because what does not load, or even ends its process, must not meet the others; then in one executor of
each node at a time, so that the others go on. When all have it, the submitter is told. Executors that come later get
what is kept, too.

A function is forgotten, in every process, when no submitter keeps it, no task of it lives, and no graph lives whose
context names it. So a graph that began with one version of a model finds that version however late it calls it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Final

from rtml.graph.state import FunctionState, Session, WorkerState, failure
from rtml.graph.tables import Tables
from rtml.messages import (
    ACTOR,
    ASYNC_ACTOR,
    ASYNC_EXECUTOR,
    EXECUTOR,
    ErrorInfo,
    Forget,
    Forgot,
    Keep,
    Kept,
    Prepare,
    Prepared,
)

_EXECUTORS: Final = (EXECUTOR, ASYNC_EXECUTOR, ACTOR, ASYNC_ACTOR)


class _Kept:
    """A function that submitters keep."""

    __slots__ = ("closed", "error", "function", "proven", "ready", "sessions", "trying")

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


class Readiness:
    """Decides what executors prepare and forget."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        #: something changed: `advance` has to look
        self.restless = False
        self._kept: dict[int, _Kept] = {}
        #: submitters that want to know when a function is forgotten
        self._curious: dict[int, dict[int, Session]] = {}

    # --- what submitters want

    def keep(self, session: Session, message: Keep) -> None:
        """The submitter keeps these functions from now on, and no others."""
        self.restless = True
        wanted = set(message.functions)
        gone = [number for number in message.dropped if number not in self.tables.functions]
        # What stays is never unpinned in between.
        for number in message.functions:
            self._keep_one(session, number)
        for number, kept in list(self._kept.items()):
            if session.id in kept.sessions and number not in wanted:
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
            self._learn(function)
        if session.id not in kept.sessions:
            kept.sessions[session.id] = session
            self.pin(kept.function)
        # It is said (again) to whoever asks (again).
        if kept.ready or kept.error is not None:
            self._tell(kept, [session])

    def _learn(self, function: FunctionState) -> None:
        """Until it has run itself, a new version is taken to be as quick as the one of that name that is kept now."""
        if function.estimate is not None:
            return
        for other in self._kept.values():
            if other.function.definition.name == function.definition.name and other.function.estimate is not None:
                function.estimate = other.function.estimate
                function.cost = other.function.cost.copy()

    def _drop(self, kept: _Kept, session: Session) -> None:
        number = kept.function.definition.id
        del kept.sessions[session.id]
        if not kept.sessions:
            del self._kept[number]
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
            if number in worker.functions or number in worker.prepared or worker.preparing == number:
                worker.functions.discard(number)
                worker.prepared.discard(number)
                if worker.session is not None:
                    self.tables.tell(worker.session, Forget([number]))
        told = self._curious.pop(number, {})
        for session in told.values():
            self.tables.tell(session, Forgot([number]))
            function.definers.discard(session.id)
        sessions = self.tables.sessions
        # Other submitters may call it without defining it again; executors were just told.
        if not any(one in sessions and sessions[one].role not in _EXECUTORS for one in function.definers):
            self.tables.functions.pop(number, None)

    # --- executors

    def joined(self, worker: WorkerState) -> None:
        """An executor said Hello (again): what it has ready it will say when asked."""
        self._stop(worker)
        worker.prepared.clear()
        self.restless = True

    def _stop(self, worker: WorkerState) -> _Kept | None:
        """It is not making anything ready any more. Returns what that was, if somebody still keeps it."""
        number, worker.preparing = worker.preparing, 0
        if worker.node.preparing is worker:
            worker.node.preparing = None
        kept = self._kept.get(number)
        if kept is not None:
            kept.trying -= 1
        return kept

    def prepared(self, worker: WorkerState, message: Prepared) -> None:
        """An executor has made a function ready, or cannot."""
        if worker.preparing != message.function:
            return
        self.restless = True
        kept = self._stop(worker)
        if kept is None:
            return
        worker.prepared.add(message.function)
        if message.error is None:
            worker.functions.add(message.function)
            kept.proven = True
        else:
            self._failed(kept, message.error)

    def died(self, worker: WorkerState, reason: str) -> bool:
        """An executor's process ended. True if that was because of what it was making ready, by all appearances."""
        self.restless = True
        preparing = worker.preparing
        kept = self._stop(worker)
        if not preparing or reason.startswith(("killed", "left")):
            return False
        if kept is not None:
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

    def advance(self) -> None:
        """Ask executors for what is missing."""
        self.restless = False
        if not self._kept:
            return
        workers = self._regular()
        for number, kept in self._kept.items():
            if kept.error is not None or kept.closed or kept.function.definition.members:
                continue
            profile = kept.function.profile
            have = [w for w in workers if w.role == profile.role and w.node.could_fit(profile.shape)]
            if not have and (hopeless := self._hopeless(kept.function)):
                self._failed(kept, hopeless)
                continue
            missing = [worker for worker in have if number not in worker.prepared]
            for worker in missing:
                node = worker.node
                if worker.session is None or node.preparing is not None or (kept.trying and not kept.proven):
                    continue
                node.preparing = worker
                worker.preparing = number
                kept.trying += 1
                self.tables.tell(worker.session, Prepare([kept.function.definition]))
            if have and not missing and not kept.ready:
                kept.ready = True
                self._tell(kept, kept.sessions.values())

    def _hopeless(self, function: FunctionState) -> ErrorInfo | None:
        """Why no executor can ever have the function; None if one may."""
        tables, shape = self.tables, function.profile.shape
        nodes = tables.nodes.values()
        if not nodes or tables.remotes or any(node.can_grow or node.supervisor is None for node in nodes):
            return None
        if any(node.could_fit(shape) for node in nodes):
            return None
        return failure("Unschedulable", f"{function.definition.name!r} asks for {shape}, which no node has")

    def _regular(self) -> list[WorkerState]:
        """The executors that stay: those beyond a node's cpus are there for a while only, and load what they need."""
        found: list[WorkerState] = []
        for node in self.tables.nodes.values():
            most = {EXECUTOR: max(1, ceil(node.cpu)), ASYNC_EXECUTOR: len(node.workers)}
            for _, worker in sorted(node.workers.items()):
                # (A dispatcher below this one prepares nothing beforehand: its executors load what they are given.)
                if worker.leaving or worker.dying or not most.get(worker.role):
                    continue
                most[worker.role] -= 1
                if worker.session is not None and worker.session.peer is not None:
                    found.append(worker)
        return found

    def _tell(self, kept: _Kept, sessions: Iterable[Session], error: ErrorInfo | None = None) -> None:
        number = kept.function.definition.id
        executors = sum(number in worker.prepared for worker in self.tables.workers.values())
        for session in sessions:
            self.tables.tell(session, Kept(number, executors, error or kept.error))
