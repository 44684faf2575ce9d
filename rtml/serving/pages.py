"""Counters that outlive the process that counts: metrics in memory that the gateway's supervisor sees, too.

A gateway of several processes has one `/metrics`. Each process counts in a page of its own (`Page`), one writer without
locks; the supervisor is told what is where (`Series`) and adds the pages up (`Ledger`). When a process is killed its
page is still there: what it counted up to its last instruction stays in the sums, which never go backwards.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from rtml.metrics import Alias, Buckets, Cell, Family, GatewayMetrics, Gauge, Histogram

#: Bytes of a page. Memory that nothing was counted in is not there; what has no room is counted in private.
_BYTES: Final = 16 * 1024 * 1024


class Series(msgspec.Struct, array_like=True):
    """Where the numbers of one metric under one set of labels are."""

    name: str
    labels: tuple[str, ...]
    #: Of the first number.
    offset: int


class SharedCell(Cell):
    """A cell in a page."""

    __slots__ = ("_numbers",)

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    @property
    def value(self) -> float:
        """The number."""
        return float(self._numbers[0])

    @value.setter
    def value(self, value: float) -> None:
        self._numbers[0] = value


class SharedBuckets(Buckets):
    """A histogram in a page: its counts, then the total."""

    __slots__ = ("_numbers",)

    def __init__(self, bounds: Sequence[float], numbers: Any) -> None:
        self.bounds = bounds
        self._numbers = numbers
        self.counts = numbers[:-1]  # can be added to in place, like the list

    @property
    def total(self) -> float:
        """The sum of what was observed."""
        return float(self._numbers[-1])

    @total.setter
    def total(self, value: float) -> None:
        self._numbers[-1] = value


def make_page() -> int:
    """Memory for a page: a descriptor to give to a process."""
    descriptor = os.memfd_create("rtml-metrics")
    os.truncate(descriptor, _BYTES)
    return descriptor


class Page:
    """The page of this process.

    Args:
        descriptor: Of its memory.
        announce: Tells the supervisor of a series.
    """

    def __init__(self, descriptor: int, announce: Callable[[Series], None]) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, _BYTES)).cast("d")
        self._announce = announce
        self._used = 0

    def share(self, metrics: GatewayMetrics) -> None:
        """Let `metrics` count here, before anything is counted in it."""
        for family in vars(metrics).values():
            if isinstance(family, Family):
                family.make_child = self._make

    def _make(self, family: Family[Any], labels: tuple[str, ...]) -> Cell | Buckets | None:
        """A child of a family in the page; None: there is no room."""
        bounds = family.bounds if isinstance(family, Histogram) else ()
        length = len(bounds) + 2 if bounds else 1
        if (self._used + length) * 8 > _BYTES:
            return None
        offset, self._used = self._used, self._used + length
        self._announce(Series(family.name, labels, offset))
        numbers = self._numbers[offset : offset + length]
        return SharedBuckets(bounds, numbers) if bounds else SharedCell(numbers)


class Account:
    """What the supervisor sees of one process's page.

    Args:
        descriptor: Of its memory.
    """

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, _BYTES, prot=mmap.PROT_READ)
        self._numbers = memoryview(self._map).cast("d")
        self.series: list[Series] = []

    def close(self) -> None:
        """Give the memory back."""
        self._numbers.release()
        self._map.close()

    def add_to(self, metrics: GatewayMetrics, gauges: bool = True) -> None:
        """Add everything to `metrics`; without `gauges` only what never goes down."""
        families = families_of(metrics)
        for one in self.series:
            family = families.get(one.name)
            if family is None or (is_gauge(family) and not gauges):
                continue
            child = family.labels(*one.labels)
            if isinstance(child, Buckets):
                length = len(child.counts)
                numbers = self._numbers[one.offset : one.offset + length + 1]
                _add(child, numbers[:-1], numbers[-1])
            elif family is metrics.dispatcher_up:
                child.value = max(child.value, self._numbers[one.offset])
            else:
                child.value += self._numbers[one.offset]


class Ledger:
    """The sums over all processes, those that have ended included."""

    def __init__(self) -> None:
        self._past = GatewayMetrics()

    def close_account(self, account: Account) -> None:
        """A process has ended: what it counted stays."""
        account.add_to(self._past, gauges=False)
        account.close()

    def total(self, accounts: Iterable[Account]) -> GatewayMetrics:
        """Everything that was counted, by those that live and those that do not."""
        total = GatewayMetrics()
        families = families_of(total)
        for family in families_of(self._past).values():
            for labels, child in family.children.items():
                ours = families[family.name].labels(*labels)
                if isinstance(child, Buckets):
                    _add(ours, child.counts, child.total)
                else:
                    ours.value += child.value
        for account in accounts:
            account.add_to(total)
        return total


def is_gauge(family: Family[Any]) -> bool:
    """Whether its values end with their process."""
    return isinstance(family, Gauge) or (isinstance(family, Alias) and family.kind == "gauge")


def families_of(metrics: GatewayMetrics) -> dict[str, Family[Any]]:
    """The metrics by name."""
    return {family.name: family for family in vars(metrics).values() if isinstance(family, Family)}


def _add(buckets: Buckets, counts: Iterable[float], total: float) -> None:
    for number, count in enumerate(counts):
        buckets.counts[number] += int(count)
    buckets.total += total
