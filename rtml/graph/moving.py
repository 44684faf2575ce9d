"""Objects of nodes that leave: which of them are needed, where they went, and who is told.

A node that drains keeps its dispatcher and its data endpoint until the end. Its supervisor asks here what is needed
(`HandOver`), has the endpoint give that to others, and says where it went (`Moved`). From then on an object belongs to
the dispatcher of the node that took it, which frees it there; references to its old place are replaced as they come by.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from msgspec.structs import replace

from rtml.graph.locality import Locality
from rtml.graph.state import Session, State, TaskState
from rtml.graph.tables import Tables
from rtml.messages import CLIENT, DISPATCHER, HandOver, Leavings, Moved, ObjectRef

#: Moved objects that are remembered for those who still name their old place.
_MOVED_MAX: Final = 65_536


class Moving:
    """What one dispatcher knows of it."""

    def __init__(self, tables: Tables, locality: Locality) -> None:
        self.tables = tables
        self.locality = locality
        #: Where objects lie that were elsewhere before: data endpoints by id.
        self._places: OrderedDict[int, str] = OrderedDict()
        #: Data endpoints that can take what lies here.
        self.takers: list[str] = []

    def leavings(self, session: Session, message: HandOver, now: float) -> None:
        """The supervisor of this node asks what is needed."""
        here = self.tables.data
        needed = [
            stored.ref
            for stored in self.tables.objects.values()
            if stored.worker.role != DISPATCHER and stored.ref.node == here
        ]
        self.tables.tell(session, Leavings(needed, self.takers))

    def moved(self, session: Session, message: Moved, now: float) -> None:
        """Objects went somewhere else."""
        keepers = {remote.node.data: remote for remote in self.tables.remotes.values() if remote.node.data}
        for object_id, data in message.objects:
            self._places[object_id] = data
            self._places.move_to_end(object_id)
            if len(self._places) > _MOVED_MAX:
                self._places.popitem(last=False)
            self.locality.known(object_id, data)
            stored = self.tables.objects.get(object_id)
            if stored is not None:
                stored.ref = replace(stored.ref, node=data)
                stored.worker = keepers.get(data, stored.worker)
        for task in self.tables.tasks.values():
            self.redirect(task)
        for client in self.tables.sessions.values():
            if client.role == CLIENT and client.peer is not None:
                self.tables.tell(client, message)
        for remote in self.tables.remotes.values():
            if remote.upward and remote.session is not None and remote.session is not session:
                self.tables.tell(remote.session, message)

    def redirect(self, task: TaskState) -> None:
        """Have what the task refers to name the place where it is now."""
        if not self._places:
            return
        if task.result is not None:
            task.result.payload = self.place(task.result.payload)
        if task.state is State.DONE:
            return
        if isinstance(task.spec.args, ObjectRef):
            task.spec.args = self.place(task.spec.args)
        if task.hosted is not None and task.hosted.checkpoint is not None:
            task.hosted.checkpoint = self.place(task.hosted.checkpoint)
        for position, payload in enumerate(task.inputs or ()):
            if isinstance(payload, ObjectRef):
                assert task.inputs is not None
                task.inputs[position] = self.place(payload)

    def place(self, payload: bytes | ObjectRef) -> bytes | ObjectRef:
        """The payload, with the place where it is now."""
        if isinstance(payload, ObjectRef):
            data = self._places.get(payload.id)
            if data is not None and data != payload.node:
                return replace(payload, node=data)
        return payload
