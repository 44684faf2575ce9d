"""Many futures as one: what `rtml.gather` returns."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from rtml.client.driver import Waiter
from rtml.client.future import PENDING, UNSET, Future, error_of
from rtml.client.waiting import sleep
from rtml.messages import CANCELLED, OK

if TYPE_CHECKING:
    from rtml.client.client import Client


class Gathered(Future[list[Any]]):
    """The results of many futures, as one. Ends with the first error, or when all have values."""

    __slots__ = ("_collector", "_return_exceptions", "members")

    def __init__(self, client: Client, members: Sequence[Future[Any]], return_exceptions: bool) -> None:
        super().__init__(client, 0)
        self.members = members
        self._return_exceptions = return_exceptions
        self._collector: _Collector | None = None

    def start(self) -> None:
        """Begin to listen; called once by `gather`."""
        self._collector = collector = _Collector(self, len(self.members))
        for member in self.members:
            if not member._attach(collector):
                collector.notify(member)

    def running(self) -> bool:
        """Whether any member is."""
        return self._state is PENDING and any(member.running() for member in self.members)

    def cancel(self) -> bool:
        """Cancel all members that have not ended."""
        by_client: dict[Client, list[Future[Any]]] = {}
        for member in self.members:
            if isinstance(member, Gathered):
                member.cancel()
            elif not member.done():
                by_client.setdefault(member._client, []).append(member)
        return self._state is PENDING and bool(sum(len(client.cancel_all(some)) for client, some in by_client.items()))

    def _wait(self, timeout: float | None) -> None:
        clients = self._clients()
        if len(clients) == 1:
            super()._wait(timeout)
            return
        waiter = Waiter()
        if self._attach(waiter) and not sleep(waiter, clients, timeout):
            self._detach(waiter)
            raise TimeoutError(f"{self!r} has not ended within {timeout} s")

    def _clients(self) -> set[Client]:
        """Its own, and those of its members at any depth."""
        return {self._client}.union(
            *(member._clients() if isinstance(member, Gathered) else {member._client} for member in self.members)
        )

    def _is_far(self) -> bool:
        return any(member._is_far() for member in self.members)

    def _bring(self) -> Generator[Any, None, Any]:
        far_ones = [member for member in self.members if member._value is UNSET and member._is_far()]
        kept = []
        for member in far_ones:
            kept.append((yield from member._bring()))  # noqa: PERF401 - a comprehension cannot yield
        return kept

    def _detach_all(self) -> None:
        if self._collector is not None:
            for member in self.members:
                member._detach(self._collector)

    def _decode(self) -> Any:
        if self._return_exceptions:
            value = [member.result() if (error := error_of(member)) is None else error for member in self.members]
        else:
            value = [member.result() for member in self.members]
        with self._client.lock:
            if self._value is UNSET:
                self._value = value
            return self._value


class _Collector(Waiter):
    """Counts the members of a `Gathered`. `notify` may come from several threads, so the count is under the lock."""

    __slots__ = ("gathered",)

    def __init__(self, gathered: Gathered, needed: int) -> None:
        super().__init__(needed)
        self.gathered: Gathered | None = gathered
        if not needed:
            self._finish(None)

    def notify(self, future: Any) -> None:
        gathered = self.gathered
        if gathered is None:
            return
        failed = None if gathered._return_exceptions or future._failure is None else error_of(future)
        with gathered._client.lock:
            self.needed -= 1
            ended = not self.ready and (failed is not None or self.needed == 0)
            self.ready = self.ready or ended
        if ended:
            self._finish(failed)

    def _finish(self, failed: BaseException | None) -> None:
        gathered, self.gathered = self.gathered, None
        assert gathered is not None
        outcome = CANCELLED if isinstance(failed, concurrent.futures.CancelledError) else OK
        with gathered._client.lock:
            told = gathered._settle(None, failed, outcome)
        if told:
            gathered._announce(outcome)
        if failed is not None:
            gathered._detach_all()
