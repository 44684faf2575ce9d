"""Streams: items on their way from a generator to its one consumer.

The dispatcher only passes them on. What makes them arrive once and in order lies at the ends: the executor keeps items
until the consumer has taken them (at most a window of them), and the consumer counts what it has. After a lost
connection, or a new dispatcher, the consumer says how far it is and gets the rest again; a new attempt leaves out what
was taken of an earlier one. The task's result repeats the items that were not taken yet, so it is complete by itself.
"""

from __future__ import annotations

from rtml.graph.keeping import Keeping
from rtml.graph.state import Session, State, TaskState, WorkerState
from rtml.graph.tables import Tables
from rtml.messages import DISPATCHER, Consumed, Items, ObjectRef


class Streams:
    """Decides where items go."""

    def __init__(self, tables: Tables, keeping: Keeping) -> None:
        self.tables = tables
        self.keeping = keeping

    def items(self, worker: WorkerState, message: Items) -> None:
        """A generator yielded."""
        task = self.tables.tasks.get(message.task)
        # Another dispatcher counts its attempts by itself.
        stale = worker.role != DISPATCHER and task is not None and task.attempt != message.attempt
        if task is None or task.state is not State.ASSIGNED or task.worker is not worker or stale:
            for item in message.items:
                if isinstance(item.payload, ObjectRef):
                    self.keeping.discard_object(worker, item.payload)
            return
        session = task.session
        self.keeping.give_items(task, worker, message.items)
        if session.peer is not None:
            self.tables.tell(session, message)

    def consumed(self, session: Session, message: Consumed) -> None:
        """A consumer took items."""
        task = self.tables.tasks.get(message.task)
        if task is None or task.session is not session:
            return
        task.consumed = max(task.consumed, message.count)
        if task.state is State.ASSIGNED:
            self.tell(task, message.again)

    def tell(self, task: TaskState, again: bool) -> None:
        """The executor hears how far the consumer is."""
        worker = task.worker
        if worker is not None and worker.session is not None:
            self.tables.tell(worker.session, Consumed(task.id, task.consumed, again))
