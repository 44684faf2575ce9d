"""Who has copies of this node's objects: told to those who want one, so that not all of them come here."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

#: Objects of at least this many bytes are passed on from node to node; smaller ones cost less than asking around.
CHAINED_MIN: Final = 1024 * 1024
#: Objects that are remembered, holders of each, and those that one asker is told.
_OBJECTS_MAX: Final = 4096
_HOLDERS_MAX: Final = 1024
_TOLD_MAX: Final = 3


class Holders:
    """For many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By object id; addresses in the order in which they asked.
        self._holders: OrderedDict[int, list[str]] = OrderedDict()

    def joins(self, object_id: int, size: int, asker: str, failed: list[str]) -> list[str]:
        """The endpoints that `asker` should try before this one, best first; it will have a copy itself.

        Args:
            object_id: which object.
            size: in bytes.
            asker: address of its endpoint; "" if it has none.
            failed: those that it tried in vain.
        """
        if size < CHAINED_MIN:
            return []
        with self._lock:
            holders = self._holders.setdefault(object_id, [])
            self._holders.move_to_end(object_id)
            if len(self._holders) > _OBJECTS_MAX:
                self._holders.popitem(last=False)
            for address in failed:
                if address in holders:
                    holders.remove(address)
            # Only who asked earlier: two that waited for each other would wait for ever.
            before = holders[: holders.index(asker)] if asker in holders else list(holders)
            if asker and asker not in holders and len(holders) < _HOLDERS_MAX:
                holders.append(asker)
            return before[: -_TOLD_MAX - 1 : -1]
