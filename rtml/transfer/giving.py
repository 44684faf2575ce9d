"""What happens to a node's objects when it leaves: other nodes take what is still needed."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from typing import Final

from msgspec.structs import replace

from rtml.errors import ObjectLost, ProtocolError
from rtml.exchange import NO_ROOM, Give, Given, Take, Taken, expect, send
from rtml.messages import ObjectRef
from rtml.transfer.copies import Copies
from rtml.transfer.pulling import STALLED, Caller, set_timeouts
from rtml.transfer.uploads import Uploads

#: How often an object is offered again that could not be taken, though there was room.
_REFUSALS_MAX: Final = 2


class Giver:
    """Gives one endpoint's objects to others.

    Args:
        caller: connects to them.
        copies: among which is what was taken over earlier.
        uploads: what clients have put.
    """

    def __init__(self, caller: Caller, copies: Copies, uploads: Uploads) -> None:
        self._caller = caller
        self._copies = copies
        self._uploads = uploads
        #: The node leaves: nothing more is taken.
        self.leaving = False

    def give(self, message: Give) -> Given:
        """Have others take all that is needed."""
        self.leaving = True
        takers = [address for address in message.to if address != self._caller.own]
        items = self._needed(message.refs)
        given = _Giving(self._caller, items, takers, message.seconds)
        given.run()
        of_clients: dict[tuple[int, str], list[int]] = defaultdict(list)
        for session, object_id, address in given.moved:
            if session:
                of_clients[session, address].append(object_id)
        for _, object_id, _ in given.moved:
            self._copies.let_go(object_id)
        for (session, address), objects in of_clients.items():
            self._uploads.given(session, address, objects)
        moved = [(object_id, address) for _, object_id, address in given.moved]
        left = len(items) - len(moved)
        return Given(moved, left, (given.reason or "there is no other node") if left else "")

    def _needed(self, refs: list[ObjectRef]) -> list[tuple[int, ObjectRef]]:
        """(the client's session or 0, reference to the object as it lies here)."""
        here = self._caller.own
        taken = {ref.id: replace(ref, node=here) for ref in self._copies.taken()}
        found = {ref.id: (0, ref) for ref in refs} | {number: (0, ref) for number, ref in taken.items()}
        for session, ref in self._uploads.needed():
            found[ref.id] = session, taken.get(ref.id) or replace(ref, node=here)
        return list(found.values())


class _Giving:
    """One handover: each taker gets the next object that nobody has taken."""

    def __init__(self, caller: Caller, items: list[tuple[int, ObjectRef]], takers: list[str], seconds: float) -> None:
        self._caller = caller
        #: session, object, and how often it was refused
        self._items = deque((session, ref, 0) for session, ref in items)
        self._takers = takers
        self._until = time.monotonic() + seconds
        #: (session, object id, who took it)
        self.moved: list[tuple[int, int, str]] = []
        self.reason = ""

    def run(self) -> None:
        """Until nothing is left, nobody takes anything more, or the time is over."""
        while self._items and self._takers and time.monotonic() < self._until:
            threads = [threading.Thread(target=self._to, args=(one,), daemon=True) for one in list(self._takers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _to(self, address: str) -> None:
        while time.monotonic() < self._until:
            try:
                session, ref, refusals = self._items.popleft()
            except IndexError:
                return
            try:
                problem = self._take(address, session, ref)
            except (OSError, ProtocolError) as error:
                problem = NO_ROOM + f"{type(error).__name__}: {error}"
            if not problem:
                self.moved.append((session, ref.id, address))
                continue
            self.reason = f"{address}: {problem.removeprefix(NO_ROOM)}"
            if problem.startswith(NO_ROOM):
                self._items.append((session, ref, refusals))
                self._takers.remove(address)  # it is gone, or full; others may not be
                return
            if refusals < _REFUSALS_MAX:
                self._items.append((session, ref, refusals + 1))

    def _take(self, address: str, session: int, ref: ObjectRef) -> str:
        while True:
            sock, used = self._caller.connect(address)
            try:
                send(sock, Take(ref, session))
                set_timeouts(sock, max(STALLED, self._until - time.monotonic()))
                answer = expect(sock, Taken)
                set_timeouts(sock, STALLED)
            except OSError:
                sock.close()
                if not used:
                    raise
                continue
            except BaseException:
                sock.close()
                raise
            self._caller.keep(address, sock)
            return answer.error


def take(giver: Giver, copies: Copies, uploads: Uploads, message: Take) -> Taken:
    """Another node leaves: keep one of its objects."""
    if giver.leaving:
        return Taken(NO_ROOM + "this node leaves, too")
    try:
        copies.take(message.ref)
    except ObjectLost as error:
        return Taken(str(error))
    if message.session:
        uploads.take(message.session, message.ref.id)
    return Taken()
