"""How a task comes to be: what it belongs to, by when it is due, whether it is let in.

One that is known already is not accepted again: submitters send again what they have no answer of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from rtml.graph.actors import Actors
from rtml.graph.admission import Admission
from rtml.graph.readiness import Readiness
from rtml.graph.state import FunctionState, Graph, Profile, Session, State, TaskState, failure
from rtml.graph.tables import Tables
from rtml.messages import CANCELLED, ERROR, ErrorInfo, ObjectRef, Options, Task, TaskResult

if TYPE_CHECKING:
    from rtml.graph.lifecycle import Lifecycle


class Submission:
    """Accepts tasks, or answers why not."""

    def __init__(
        self, tables: Tables, lifecycle: Lifecycle, readiness: Readiness, admission: Admission, actors: Actors
    ) -> None:
        self.tables = tables
        self.lifecycle = lifecycle
        self.readiness = readiness
        self.admission = admission
        self.actors = actors

    def submit(self, session: Session, specs: list[Task], now: float) -> None:
        """Accept tasks; one that is known already is answered again if it ended, else left alone."""
        tables = self.tables
        for spec in specs:
            known = tables.tasks.get(spec.id)
            if known is not None:
                if known.session is session and known.result is not None:
                    session.results.append(known.result)
                    tables.dirty[session.id] = session
                elif known.session is tables.detached and known.result is None:
                    self._reclaim(known, session)
                continue
            function = tables.functions.get(spec.function)
            if function is None:
                self._refuse(session, spec, failure("ProtocolError", f"function {spec.function:x} was not defined"))
                continue
            profile = function.profile
            if spec.options is not None:
                usual = function.usual
                if usual is None or usual[0] != spec.options:
                    function.usual = usual = spec.options, tables.profile(function.definition, spec.options)
                profile = usual[1]
            if spec.parent:
                profile = self._inherited(spec, function, profile)
            self.accept(session, spec, function, profile, now)
        if self.lifecycle.ending:
            self.lifecycle.drain(now)

    def accept(
        self, session: Session, spec: Task, function: FunctionState, profile: Profile, now: float
    ) -> TaskState | None:
        """Take in one task whose function is known; None: it was refused, and is answered."""
        tables, lifecycle, options = self.tables, self.lifecycle, spec.options
        owner: Session | TaskState = session
        parent = context = None
        if spec.parent:
            parent = tables.tasks.get(spec.parent)
            if parent is None or parent.state is not State.ASSIGNED:
                self._refuse(session, spec, failure("TaskCancelled", "the task that submitted it has ended"), CANCELLED)
                return None
            owner = parent
            graph = parent.graph
        if spec.actor:
            error = self.actors.refusal(spec)
            if error is not None:
                self._refuse(session, spec, error)
                return None
        if parent is None:
            if spec.context:
                context = tables.functions.get(spec.context)
                if context is None:
                    self._refuse(session, spec, _undefined(spec))
                    return None
            graph = Graph(spec.id, session, tables.next_sequence(), spec.trace, context, session.id)
            if profile.tenant:
                graph.share = (session.id, profile.tenant)
            if profile.admission or (options is not None and options.deadline is not None):
                refused = self.admission.admit(graph, spec, function, profile, now)
                if refused is not None:
                    self._refuse(session, spec, refused)
                    return None
            if context is not None:
                self.readiness.pin(context)
        if spec.args.__class__ is ObjectRef:
            spec.args = lifecycle.moving.place(spec.args)
        task = TaskState(spec.id, spec, function, profile, session, owner, graph, now)
        tables.tasks[spec.id] = task
        children = owner.children
        if children is None:
            children = owner.children = {}
        children[spec.id] = task
        graph.live += 1
        function.users += 1
        if parent is not None:
            task.depth = parent.depth + 1
            if spec.hosts is None:
                task.deadline = parent.deadline  # an actor outlives the call that made it
            task.due = parent.due
            if graph.live > tables.limits.graph_tasks_max or task.depth > tables.limits.depth_max:
                self._over_limit(task)
                return task
        else:
            task.due = now + self.admission.policy.patience
        if options is not None and options.deadline is not None:
            lifecycle.due_at(task, now + options.deadline)
        if spec.handles:
            self._hold(spec)
        if spec.batch_key:
            task.batch_key = spec.batch_key
        if spec.actor:
            self.actors.admit(task, session)
        if profile.prompt:
            lifecycle.freshness.arrived(task, now)
        if spec.deps and (not lifecycle.dependencies.link(task, spec.deps) or task.waiting):
            return task
        lifecycle.make_ready(task, now)
        return task

    def _hold(self, spec: Task) -> None:
        """The task has handles of these. Only what is held now may be let go later."""
        tasks = self.tables.tasks
        spec.handles = [handle for handle in spec.handles or () if handle in tasks]
        for handle in spec.handles:
            tasks[handle].holds += 1

    def _inherited(self, spec: Task, function: FunctionState, profile: Profile) -> Profile:
        """What a child asks for: its parent's priority, unless its call or function names one."""
        parent = self.tables.tasks.get(spec.parent)
        definition, options = function.definition, spec.options or Options()
        if (
            parent is None
            or parent.profile.priority == profile.priority
            or definition.options.priority is not None
            or options.priority is not None
        ):
            return profile
        return self.tables.profile(definition, replace(options, priority=parent.profile.priority))

    def _refuse(self, session: Session, spec: Task, error: ErrorInfo, outcome: int = ERROR) -> None:
        """Answer a task that never came to be."""
        session.results.append(TaskResult(spec.id, 0, outcome, error=error))
        self.tables.dirty[session.id] = session

    def _over_limit(self, task: TaskState) -> None:
        limits = self.tables.limits
        what = (
            f"the graph has more than {limits.graph_tasks_max} live tasks (graph_tasks_max)"
            if task.graph.live > limits.graph_tasks_max
            else f"the graph is nested deeper than {limits.depth_max} tasks (depth_max)"
        )
        error = failure("LimitExceeded", f"{what}; submit fewer at a time, or raise the dispatcher's limit", task)
        self.lifecycle.fail(task, error)
        root = self.tables.tasks.get(task.graph.id)
        if root is not None:
            self.lifecycle.fail(root, error)

    def _reclaim(self, task: TaskState, session: Session) -> None:
        """A detached actor that survived both its submitter's connection and a dispatcher: the submitter is back."""
        self.tables.detached.children.pop(task.id)
        task.session = task.graph.session = task.owner = session
        session.children[task.id] = task
        if task.spec.hosts is not None and task.spec.hosts.held:
            self.lifecycle.keeping.hold(session, [task.id])


def _undefined(spec: Task) -> ErrorInfo:
    return failure("ProtocolError", f"the graph's context {spec.context:x} was not defined")
