"""Actors beyond their own dispatcher: what others keep of them, so that they survive their node and are found by name.

An actor that has a name, is detached or may be restarted is told to the dispatcher above where it belongs (`Hosting`
with attempt 0), by that one to the next, up to the root. Each of them keeps what it takes to make the actor again, with
its last checkpoint. When the dispatcher that told it is gone, the actor is made again here, if it may be and somebody
has a handle of it (or it is detached); calls from here and from other nodes go on with that.

Names belong to the root: an actor with a name begins once the dispatcher above has said that the name is its own
(`Hosted`). Whoever is asked for a name that he does not know asks the dispatcher above.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from rtml.graph.actorstate import describe, name_taken, reachable
from rtml.graph.lifecycle import Lifecycle
from rtml.graph.state import Session, State, TaskState, WorkerState, failure
from rtml.graph.tables import Tables
from rtml.messages import Checkpoint, Hosted, Hosting, Query, Reply, Task, Unwatch


class _Found(msgspec.Struct):
    """What is needed here of the answer to a question for a name."""

    id: int


class Ward(msgspec.Struct, eq=False):
    """An actor that belongs to a dispatcher below."""

    home: WorkerState
    told: Hosting

    @property
    def name(self) -> str:
        """By which it is found; "" if it has none."""
        hosts = self.told.task.hosts
        return "" if hosts is None else hosts.name


class Abroad:
    """What dispatchers tell each other of actors."""

    def __init__(self, tables: Tables, lifecycle: Lifecycle) -> None:
        self.tables = tables
        self.lifecycle = lifecycle
        self.actors = lifecycle.actors
        self.keeping = lifecycle.keeping
        self.wards: dict[int, Ward] = {}
        #: actors of ours that the dispatcher above keeps
        self._told: set[int] = set()
        #: questions that the dispatcher above is to answer, by our number: who asked, and what
        self._asked: dict[int, tuple[Session, Query]] = {}
        #: set by `Remote`: a task of another dispatcher is known here by its handle; and a proxy becomes a task of ours
        self.adopt: Any
        self.inherit: Any
        self.actors.on_ready = self.tell
        self.actors.on_ended = self._ended

    def above(self) -> WorkerState | None:
        """The dispatcher above, as far as it was ever met."""
        return next((worker for worker in self.tables.remotes.values() if worker.upward), None)

    # --- of ours

    def tell(self, task: TaskState) -> None:
        """An actor of ours is about to begin (again): the dispatcher above keeps what it takes."""
        actor, above = task.hosted, self.above()
        if actor is None or above is None or above.session is None or task.session is above.session:
            return
        options = replace(self.lifecycle.placement.spreading.options(task, 0.0), deadline=None)
        if not (actor.options.name or options.detached or options.retries):
            return
        spec = task.spec
        deps = None if not task.inputs else [(0, payload) for payload in task.inputs]
        creation = Task(
            spec.id, spec.function, spec.args, 0, deps, None, options, actor=spec.id,
            hosts=replace(actor.options, held=False),
        )  # fmt: skip
        self._told.add(task.id)
        inputs = [payload for payload in task.inputs or () if payload is not None]
        hosting = Hosting(creation, 0, task.function.definition, inputs, actor.checkpoint)
        self.tables.tell(above.session, hosting)

    def _ended(self, number: int) -> None:
        """An actor of ours has ended."""
        if number in self._told:
            self._told.discard(number)
            self._tell_end(number)

    def _tell_end(self, number: int) -> None:
        above = self.above()
        if above is not None and above.session is not None:
            self.tables.tell(above.session, Unwatch([number]))

    def checkpoint(self, session: Session, message: Checkpoint) -> None:
        """The state of an actor that lives here, or at a dispatcher that says so: kept, and passed on to its owner."""
        worker, number, payload = session.worker, message.task, message.payload
        ward = self.wards.get(number)
        if ward is not None and ward.home is worker:
            ward.told.checkpoint = payload
        else:
            task = self.tables.tasks.get(number)
            if worker is None or task is None or task.worker is not worker or task.attempt != message.attempt:
                return
            self.keeping.checkpoint(task, worker, payload)
            attempt = task.session.delegations.get(number)
            if attempt is not None:
                self.tables.tell(task.session, Checkpoint(number, attempt, payload))
                return
            if number not in self._told:
                return
        above = self.above()
        if above is not None and above.session is not None:
            self.tables.tell(above.session, Checkpoint(number, 0, payload))

    def hosted(self, session: Session, message: Hosted, now: float) -> None:
        """The dispatcher above says whose a name is."""
        ward = self.wards.get(message.task)
        if ward is not None:
            if message.taken:
                self._forget(message.task)
            if ward.home.session is not None:
                self.tables.tell(ward.home.session, message)
            return
        task = self.tables.tasks.get(message.task)
        if task is None or task.hosted is None or task.home is not None or task.state is State.DONE:
            return
        if message.taken:
            self._told.discard(message.task)
            self.lifecycle.fail(task, failure("SubmitError", message.taken, task))
            self.lifecycle.drain(now)
        else:
            self.actors.claimed(task.hosted)

    # --- of dispatchers below

    def told(self, worker: WorkerState, message: Hosting) -> None:
        """A dispatcher below has an actor."""
        number, session = message.task.id, worker.session
        assert session is not None
        ward = Ward(worker, message)
        known = self.tables.tasks.get(number)
        if known is not None and known.home is not worker:
            if known.session is not session:
                self.tables.tell(session, Hosted(number, "the actor was made again while its node was out of reach"))
            return
        if ward.name:
            other = self.actors.by_name.get(ward.name)
            if other is not None or self.actors.names.get(ward.name, number) != number:
                self.tables.tell(session, Hosted(number, name_taken(ward.name)))
                return
            self.actors.names[ward.name] = number
        self.wards[number] = ward
        above = self.above()
        if above is not None and above.session is not None:
            self.tables.tell(above.session, message)
        elif ward.name and not self.tables.uplink:
            self.tables.tell(session, Hosted(number))

    def over(self, worker: WorkerState, numbers: list[int]) -> None:
        """A dispatcher below does not have these any more."""
        for number in numbers:
            ward = self.wards.get(number)
            if ward is not None and ward.home is worker:
                self._forget(number)
                self._tell_end(number)

    def _forget(self, number: int) -> None:
        ward = self.wards.pop(number)
        if ward.name and self.actors.names.get(ward.name) == number:
            del self.actors.names[ward.name]

    # --- connections

    def again(self, worker: WorkerState) -> None:
        """A connection to another dispatcher has begun: each says what it has."""
        session = worker.session
        assert session is not None
        for task in [task for task in session.children.values() if task.hosted is not None]:
            actor, attempt = task.hosted, session.delegations.get(task.id)
            if actor is not None and attempt is not None:
                inputs = [payload for payload in task.inputs or () if payload is not None]
                self.tables.tell(
                    session, Hosting(task.spec, attempt, task.function.definition, inputs, actor.checkpoint)
                )
        if not worker.upward:
            # It tells anew what it has.
            self.over(worker, [number for number, ward in self.wards.items() if ward.home is worker])
            return
        for task in self.tables.tasks.values():
            here = task.hosted is not None and task.home is None and task.worker is not worker
            if here and task.state in (State.READY, State.ASSIGNED):
                self.tell(task)
        for ward in self.wards.values():
            self.tables.tell(session, ward.told)
        for number, (_, query) in self._asked.items():
            self.tables.tell(session, Query(number, query.what, query.argument))

    def left(self, worker: WorkerState, now: float) -> None:
        """A dispatcher is given up: its actors that may be are made again here."""
        if worker.upward:
            self._told.clear()
            for session, query in self._asked.values():
                self.tables.tell(session, Reply(query.id, "null" if query.what == "actor" else "nobody else knows it"))
            self._asked.clear()
            return
        for number, ward in list(self.wards.items()):
            if ward.home is worker:
                self._forget(number)
                self._tell_end(number)
                self._make_again(ward, now)

    def _make_again(self, ward: Ward, now: float) -> None:
        spec, proxy = ward.told.task, self.tables.tasks.get(ward.told.task.id)
        options = spec.options
        assert options is not None
        if proxy is not None and (proxy.home is not ward.home or proxy.result is not None):
            return
        if (proxy is None and not options.detached) or not options.retries:
            return
        if proxy is not None:
            del self.tables.tasks[spec.id]
        self.tables.define(ward.told.function)
        self.lifecycle.submission.submit(
            self.tables.detached, [replace(spec, options=replace(options, retries=options.retries - 1))], now
        )
        task = self.tables.tasks.get(spec.id)
        if task is None or task.hosted is None:
            if proxy is not None:
                self.tables.tasks[spec.id] = proxy
            return
        task.hosted.checkpoint = reachable(ward.told.checkpoint, ward.home)
        if proxy is not None:
            self.inherit(proxy, task)

    # --- names

    def find(self, session: Session, query: Query) -> None:
        """Somebody asks for an actor by its name."""
        found = self.actors.find(query.argument)
        number = self.actors.names.get(query.argument)
        if found is None and number is not None:
            ward = self.wards[number]
            hosts = ward.told.task.hosts
            assert hosts is not None
            self._give(session, number, ward.home)
            name = ward.told.function.name
            found = describe(number, name, hosts.methods, hosts.concurrency > 1)
        if found is None and self._ask_above(session, query):
            return
        self.tables.tell(session, Reply(query.id, msgspec.json.encode(found).decode()))

    def rebuild(self, session: Session, query: Query, now: float) -> None:
        """Somebody cannot have an object: it is made again by the dispatcher that knows how."""
        number = query.argument.partition(" ")[0]
        stored = self.tables.objects.get(int(number)) if number.isdigit() else None
        foreign = stored is None or (stored.worker.upward and stored.lineage is None)
        if foreign and number.isdigit() and self._ask_above(session, query):
            return
        self.tables.tell(session, Reply(query.id, self.lifecycle.lineages.ask(query.argument, now)))

    def _ask_above(self, session: Session, query: Query) -> bool:
        """Whether the dispatcher above is asked, because there is one and it is not who asks."""
        above = self.above()
        if not self.tables.uplink or (above is not None and session is above.session):
            return False
        question = self.tables.next_sequence()
        self._asked[question] = (session, query)
        if above is not None and above.session is not None:
            self.tables.tell(above.session, Query(question, query.what, query.argument))
        return True

    def answered(self, session: Session, message: Reply, now: float) -> None:
        """The dispatcher above says who has a name, or what becomes of an object."""
        asker, query = self._asked.pop(message.id, (None, None))
        if asker is None or query is None or session.worker is None:
            return
        if query.what == "rebuild":
            kind, _, number = message.body.partition(" ")
            if kind == "task" and number.isdigit():
                self._give(asker, int(number), session.worker)
            self.tables.tell(asker, Reply(query.id, message.body))
            return
        found = msgspec.json.decode(message.body, type=_Found | None)
        if found is not None:
            self._give(asker, found.id, session.worker)
        self.tables.tell(asker, Reply(query.id, message.body))

    def _give(self, session: Session, number: int, home: WorkerState) -> None:
        """The session is about to have a handle of an actor of another dispatcher."""
        self.adopt([number], home)
        if self.tables.sessions.get(session.id) is session:
            self.keeping.hold(session, [number])
