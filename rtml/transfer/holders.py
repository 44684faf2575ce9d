"""The directory of one endpoint's objects: who has or fetches each, and from whom the next one should read it.

Receivers come when they come. Each is assigned the source with the least to send, which may have only a part of the
object so far: then it passes on what arrives. So receivers that come together form a chain, those that come later a
tree, and the home sends little more than one copy. Large objects are read from several idle complete holders at once.

A receiver is only sent to complete copies and to those who asked before it, so nobody waits for someone who waits for
him. Assignments last as long as the receiver's connection: whoever dies gives its source back.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from typing import Final

#: Objects of at least this many bytes are passed on from node to node; smaller ones cost less than asking around.
PASSED_ON_MIN: Final = 64 * 1024
#: Objects of at least this many bytes are read from several holders at once; and from how many.
PARALLEL_MIN: Final = 8 * 1024 * 1024
SOURCES_MAX: Final = 3
#: Objects that are remembered, holders of each, and others that one receiver is told.
_OBJECTS_MAX: Final = 4096
_HOLDERS_MAX: Final = 1024
_SPARE_MAX: Final = 4
#: What the home is called here.
HOME: Final = ""


class _Holder:
    __slots__ = ("complete", "failed")

    def __init__(self) -> None:
        self.complete = False
        #: Somebody could not read from it, or it went away without having all.
        self.failed = False


class _Object:
    __slots__ = ("holders", "load")

    def __init__(self) -> None:
        #: By address, in the order in which they asked.
        self.holders: dict[str, _Holder] = {}
        #: How many receivers read from each address now.
        self.load: Counter[str] = Counter()


class Lease:
    """What one receiver was assigned."""

    __slots__ = ("address", "holder", "object_id", "record", "sources")

    def __init__(self, object_id: int, address: str, record: _Object) -> None:
        self.object_id = object_id
        self.address = address
        self.record = record
        #: The record of this attempt; the same receiver may have begun a later one.
        self.holder = record.holders.get(address)
        self.sources: list[str] = []


class Holders:
    """All objects of one home; for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By object id, least recently asked for first.
        self._objects: OrderedDict[int, _Object] = OrderedDict()

    def join(self, object_id: int, address: str) -> Lease:
        """Somebody is about to fetch an object; `address` is the endpoint that will have a copy, "" if none will."""
        with self._lock:
            record = self._objects.setdefault(object_id, _Object())
            self._objects.move_to_end(object_id)
            if len(self._objects) > _OBJECTS_MAX:
                self._objects.popitem(last=False)
            if address:
                earlier = record.holders.get(address)
                if earlier is not None and earlier.complete:
                    # It had a copy and dropped it. Whoever only lost us keeps its place, as others may read from it.
                    del record.holders[address]
                if address in record.holders or len(record.holders) < _HOLDERS_MAX:
                    record.holders[address] = _Holder()
            return Lease(object_id, address, record)

    def assign(self, lease: Lease, size: int, failed: list[str]) -> tuple[list[str], list[str]]:
        """The sources from which the receiver should read, and others for the case that all fail.

        Args:
            lease: the receiver's.
            size: of the object in bytes.
            failed: addresses from which it could not read.
        """
        with self._lock:
            record = lease.record
            self._release(lease)
            for address in failed:
                if address in record.holders:
                    record.holders[address].failed = True
            found = self._candidates(lease)
            lease.sources = [found[0][-1]]
            if size >= PARALLEL_MIN:
                idle = [address for load, partial, _, _, address in found[1:] if not load and not partial]
                lease.sources += idle[: SOURCES_MAX - 1]
            record.load.update(lease.sources)
            complete = [address for _, partial, _, _, address in found if not partial]
            spare = [address for address in complete if address not in (HOME, *lease.sources)]
            return list(lease.sources), spare[:_SPARE_MAX]

    def _candidates(self, lease: Lease) -> list[tuple[int, bool, bool, int, str]]:
        """(load, partial, is the home, -recency, address), best first."""
        record = lease.record
        found = [(record.load[HOME], False, True, 0, HOME)]
        before = True
        for position, (address, holder) in enumerate(record.holders.items()):
            if address == lease.address:
                before = False
            elif not holder.failed and (holder.complete or before):
                found.append((record.load[address], not holder.complete, False, -position, address))
        return sorted(found)

    def leave(self, lease: Lease, complete: bool) -> None:
        """The receiver has ended; `complete`: it has a copy now."""
        with self._lock:
            self._release(lease)
            holder = lease.holder
            if holder is None or lease.record.holders.get(lease.address) is not holder:
                return
            holder.complete, holder.failed = complete, not complete

    def _release(self, lease: Lease) -> None:
        for address in lease.sources:
            lease.record.load[address] -= 1
            if not lease.record.load[address]:
                del lease.record.load[address]
        lease.sources = []

    def known(self, object_id: int) -> dict[str, bool]:
        """Who has an object, or a part of it (False)."""
        with self._lock:
            record = self._objects.get(object_id)
            return {} if record is None else {one: holder.complete for one, holder in record.holders.items()}
