"""`rtml.anytime`: an answer from what is there in time.

    boxes = await rtml.anytime([model.submit(image) for model in models], k=2, within=0.05, fallback=None)

It ends when `k` of the futures have values, when none can come any more, or when the time is up, whichever is first.
What has not ended then is cancelled. If fewer than `k` are there, the names of the others are noted: they are in
`Anytime.missing`, in the timing of the graph, and in what a gateway answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final

from rtml.client import context
from rtml.client.future import PENDING, Future, error_of, remaining
from rtml.client.gathered import Gathered
from rtml.client.waiting import Bridge, Enough
from rtml.errors import DeadlineExceeded, RtmlError

if TYPE_CHECKING:
    from rtml.client.client import Client

#: No fallback was given.
NOTHING: Final = object()

#: Names of missing steps that are kept.
MISSING_MAX: Final = 16

#: Of what is left of the graph's budget, what is kept for going on with the values: seconds, and a portion.
_RESERVE_S: Final = 0.003
_RESERVE: Final = 0.05
#: But never more than this portion.
_RESERVE_MAX: Final = 0.25


class Anytime:
    """What `anytime` returns: await it, or call `result()`. It is no future: pass its value on, not itself.

    Args:
        members: the futures by name.
        shape: makes the value from the values that are there, in the order given, by position.
        k: values that are enough.
        least: fewer than these are an error.
        deadline: on `time.monotonic`; None: no limit.
    """

    def __init__(
        self,
        members: list[tuple[str, Future[Any]]],
        shape: Callable[[dict[int, Any]], Any],
        k: int,
        least: int,
        deadline: float | None,
    ) -> None:
        self._members = members
        self._shape = shape
        self._k = k
        self._least = least
        self._deadline = deadline
        #: Names of the members without a value, if fewer than `k` have one; [] until it has ended.
        self.missing: list[str] = []
        self._ended = False
        self._value: Any = None
        self._error: BaseException | None = None
        there = sum(future._state is not PENDING and future._failure is None for _, future in members)
        pending = [future for _, future in members if future._state is PENDING]
        self._waiter = Enough(k - there, len(pending))
        for future in pending:
            if not future._attach(self._waiter):
                self._waiter.notify(future)

    @property
    def complete(self) -> bool:
        """Whether it has ended with as many values as were wanted."""
        return self._ended and not self.missing and self._error is None

    def result(self) -> Any:
        """The value; waits for it.

        Raises:
            DeadlineExceeded: the time is up, and too little is there.
            Exception: too little can be there any more; what the first that failed raised.
        """
        if not self._ended and not self._waiter.ready and self._members:
            clients = self._clients()
            for client in clients[1:]:
                client.driver.flush()
                client.driver.expect()
            clients[0].driver.wait(self._waiter, remaining(self._deadline))
        return self._conclude()

    def __await__(self) -> Generator[Any, None, Any]:
        if not self._ended and not self._waiter.ready and self._members:
            yield from self._suspend()
        return self._conclude()

    def cancel(self) -> None:
        """Nobody wants the value any more."""
        self._cancel([future for _, future in self._members if future._state is PENDING])

    def _suspend(self) -> Generator[Any, None, None]:
        import asyncio

        loop = asyncio.get_running_loop()
        bridge = Bridge(loop)
        if not self._waiter.resume(bridge):
            return
        left = remaining(self._deadline)
        timer = None if left is None else loop.call_later(left, bridge.notify, None)
        for client in self._clients():
            client.driver.awaiting(loop)
        try:
            yield from bridge.future.__await__()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _clients(self) -> list[Client]:
        return list({future._client: None for _, future in self._members})

    def _cancel(self, losers: list[Future[Any]]) -> None:
        for client in {future._client: None for future in losers}:
            client.cancel_all([future for future in losers if future._client is client])

    def _conclude(self) -> Any:
        """End it, once: what is there is the value, what is not is cancelled."""
        if not self._ended:
            self._ended = True
            members = [future for _, future in self._members]
            losers = [future for future in members if future._state is PENDING]
            there = [
                place for place, future in enumerate(members) if future._state is not PENDING and not future._failure
            ]
            for future in losers:
                future._detach(self._waiter)
            self._cancel(losers)
            if len(there) < self._k:
                gone = [name for place, (name, _) in enumerate(self._members) if place not in there]
                self.missing = list(dict.fromkeys(gone))[:MISSING_MAX]
            try:
                self._value = self._made(there, bool(losers))
            except Exception as error:  # noqa: BLE001 - of a task, of decoding its value, of the caller's `best`
                self._error = error
            else:
                context.note_missing(self.missing)
        if self._error is not None:
            raise self._error
        return self._value

    def _made(self, there: list[int], late: bool) -> Any:
        if len(there) < self._least:
            if late:
                message = f"{len(there)} of {len(self._members)} values are there in time, {self._least} are needed"
                raise DeadlineExceeded(message, missing=self.missing)
            failed = next((future for _, future in self._members if future._failure is not None), None)
            if failed is None:
                raise RtmlError(f"{self._least} values are needed, of {len(self._members)} futures")
            error = error_of(failed)
            assert error is not None
            raise error
        return self._shape({place: self._members[place][1].result() for place in there[: self._k]})


def anytime(
    futures: Any,
    *,
    k: int | None = None,
    within: float | None = None,
    fallback: Any = NOTHING,
    best: Callable[[list[Any]], Any] | None = None,
    least: int = 1,
) -> Anytime:
    """An answer from what is there in time, to be awaited or asked for its `result()`; what is late is cancelled.

    Args:
        futures: a list of futures (or `rtml.gather(...)`): the value is the list of the values that are there, in this
            order. A dict of futures by name: a dict of them. A single future: its value.
        k: how many values are enough; by default all.
        within: seconds until it ends with what is there. Inside of a graph with a deadline it ends shortly before that
            in any case; else, without `within`, it waits for `k` values.
        fallback: stands in for values that are missing: for each of the futures if all were wanted, else up to `k`.
            Without it they are left out.
        best: makes the value of the list of values that are there (`max`, say, or `lambda values: values[-1]`); with
            none there the value is `fallback`.
        least: with fewer values than these it is an error, unless there is a fallback.

    Raises:
        ValueError: `k` or `least` do not fit the number of futures.
        TypeError: these are no futures, no numbers, or `best` cannot be called.
    """
    members, keys = _members(futures)
    count = len(members)
    k = count if k is None else k
    _check(k, least, within, best)
    if not 0 <= k <= count or not 0 <= least <= max(1, k):
        raise ValueError(
            f"k={k} and least={least} of {count} futures: k is from 0 to {count}, "
            f"least from 0 to {max(1, min(k, count))}"
        )
    given = fallback is not NOTHING
    whole = k == count

    def shape(values: dict[int, Any]) -> Any:
        if best is not None:
            return best(list(values.values())) if values else fallback
        if keys is None:
            return values.get(0, fallback)
        places = range(count) if given and whole else values
        found = {place: values.get(place, fallback) for place in places}
        if isinstance(keys, list):
            return list(found.values()) + [fallback] * (k - len(found) if given else 0)
        names = list(keys)
        return {names[place]: value for place, value in found.items()}

    return Anytime(members, shape, k, 0 if given else min(least, k), _deadline(within))


def _check(k: Any, least: Any, within: Any, best: Any) -> None:
    """Types of arguments, which would be noticed only deep inside."""
    for name, value in (("k", k), ("least", least)):
        if type(value) is bool or not isinstance(value, Integral):
            raise TypeError(f"{name} is a whole number of values, not {value!r}")
    if within is not None and (type(within) is bool or not isinstance(within, Real) or math.isnan(within)):
        raise TypeError(f"within is a number of seconds (or less than none: the time is up), not {within!r}")
    if best is not None and not callable(best):
        raise TypeError(f"best makes the value of a list of values, like max; {best!r} cannot be called")


def _members(futures: Any) -> tuple[list[tuple[str, Future[Any]]], Any]:
    """The futures with names for them; and what the value is shaped like: None for a single future."""
    if isinstance(futures, Gathered):
        futures = list(futures.members)
    if isinstance(futures, Future):
        return _named([futures]), None
    if isinstance(futures, Mapping):
        members = [(str(name), _checked(future)) for name, future in futures.items()]
        return members, futures
    if not isinstance(futures, Iterable):
        raise TypeError(f"anytime takes futures, not {type(futures).__name__}")
    return _named([_checked(future) for future in futures]), []


def _checked(future: Any) -> Future[Any]:
    if not isinstance(future, Future) or isinstance(future, Gathered):
        raise TypeError(f"anytime takes futures of tasks, not {type(future).__name__}")
    return future


def _named(futures: list[Future[Any]]) -> list[tuple[str, Future[Any]]]:
    return [(future._client.core.name_of(future.id), future) for future in futures]


def _deadline(within: float | None) -> float | None:
    """When it is to end, on `time.monotonic`."""
    now = time.monotonic()
    limits = [] if within is None else [now + within]
    task = context.current_task()
    if task is not None and task.deadline is not None:
        left = task.deadline - now
        limits.append(task.deadline - min(_RESERVE_MAX * left, max(_RESERVE_S, _RESERVE * left)))
    return min(limits, default=None)
