"""Stateful models behind a gateway: which holder has a sequence, and what becomes of sequences when versions change.

Each version of a stateful model has its holders (`rtml.sequences.Holder`): named actors that all processes of all
gateways of an engine share. A sequence begins at the one with the fewest, and stays there and with its version until
it ends. A process remembers where the sequences are that it has seen; it asks the holders where others are, and never
relies on its memory when a sequence begins, so that processes need not tell each other anything.

The steps of one sequence are submitted in the order in which they came: `Route.lock` is fair.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

from rtml.errors import ActorDied, DeadlineExceeded, InvalidInput, Overloaded, RtmlError, SequenceLost, UnknownSequence
from rtml.messages import Options, Timing
from rtml.models import Model
from rtml.sequences import END, LEASE, START, Holder, Key, Layout, wall
from rtml.serving.hosts import Answer, Host, HostPlan
from rtml.serving.http import HttpError
from rtml.serving.oip import Sequence
from rtml.serving.tensors import Array

_logger = logging.getLogger("rtml.serving")

#: Times within the lease that a process says that it is there.
_RENEWALS: Final = 3
#: Seconds beyond `idle` that a process remembers where a sequence was.
_REMEMBER: Final = 30.0
#: Seconds between two looks whether all sequences of a version have ended.
_LOOK_LEAST: Final = 0.05
_LOOK_MOST: Final = 1.0
#: Seconds that holders have to answer a process that stops.
_GOODBYE: Final = 2.0
#: Steps of one holder that this process waits for; more are refused.
_WAITING_MAX: Final = 4096

#: Makes the handle of a holder.
Hosting = Callable[[HostPlan, str], Host]


class _Progress(Protocol):
    """Of a request, see `rtml.serving.inference.Progress`."""

    timing: Timing | None

    def remaining(self, step: str) -> float | None: ...


class Route:
    """Where a sequence is, as far as this process knows."""

    __slots__ = ("host", "last", "lock", "owner")

    def __init__(self) -> None:
        #: Held from looking for the holder until the step is submitted.
        self.lock = asyncio.Lock()
        self.owner: Stateful | None = None
        self.host: _Place | None = None
        self.last = 0.0


class _Place:
    """A holder, and what is known of its load."""

    def __init__(self, host: Host) -> None:
        self.host = host
        #: Sequences, when it was last asked.
        self.live = 0
        #: Those that began here since.
        self.begun = 0
        #: Steps that have not been answered.
        self.waiting = 0
        #: Somebody has ended it, so that it has to be found or made again.
        self.gone = False

    @property
    def load(self) -> tuple[int, int]:
        return self.live + self.begun, self.waiting

    def submit(self, args: tuple[Any, ...]) -> asyncio.Task[Answer]:
        """Have a step made."""
        if self.waiting >= _WAITING_MAX:
            raise Overloaded(f"{self.waiting} steps of sequences wait for one process already")
        pending = self.host.submit("step", *args)
        self.waiting += 1
        pending.add_done_callback(self._answered)
        return pending

    def _answered(self, pending: asyncio.Task[Answer]) -> None:
        self.waiting -= 1


class Family:
    """The versions of one model, and their sequences."""

    def __init__(self) -> None:
        #: Newest last; also those that are not served any more but still have sequences.
        self.versions: list[Stateful] = []
        #: That whose last step is longest ago comes first.
        self.routes: OrderedDict[Key, Route] = OrderedDict()

    def route(self, key: Key, now: float, idle: float) -> Route:
        """Of a sequence; those that must have ended are forgotten."""
        routes = self.routes
        while routes:
            first = next(iter(routes.values()))
            if now - first.last < idle + _REMEMBER or first.lock.locked():
                break
            routes.popitem(last=False)
        route = routes.get(key)
        if route is None:
            route = routes[key] = Route()
        route.last = now
        routes.move_to_end(key)
        return route

    def forget(self, key: Key, route: Route) -> None:
        """The sequence has ended."""
        if self.routes.get(key) is route and not route.lock.locked():
            del self.routes[key]


class Stateful:
    """The sequences of one version of a model.

    Args:
        model: The model's code.
        layout: How it is run.
        key: What tells this version from all others, also those of other gateways.
        hosting: Makes handles of holders.
        family: The model's versions.
        options: Of the holders: gpu, ...
    """

    def __init__(
        self, model: Model, layout: Layout, key: str, hosting: Hosting, family: Family, options: dict[str, Any]
    ) -> None:
        self.layout = layout
        self._family = family
        #: The `ModelVersion`, for answers.
        self.version: Any = None
        self._user = secrets.token_hex(8)
        # The class's own `batch` is 1: only here is known what the model can do.
        methods = {"step": Options(cpu=0.0, retries=0, batch=max(1, layout.batch))}
        self._places = [
            _Place(hosting(HostPlan(f"sequences:{key}:{index}", Holder, (model, layout), options, methods), self._user))
            for index in range(layout.holders)
        ]
        self._opening: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self.retired = False

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find or start the holders; they have run the model once when this returns.

        Raises:
            RtmlError: they cannot be started, and why.
        """
        if self._opening is None or (self._opening.done() and (self._opening.cancelled() or self._opening.exception())):
            self._opening = asyncio.get_running_loop().create_task(self._open())
        await asyncio.shield(self._opening)

    def open_soon(self) -> None:
        """As `open`, beside what runs; what goes wrong is logged, and tried again with the next request."""

        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                _logger.error("the holders of model %s: %s", self.layout.name, error)

        self._opening = asyncio.get_running_loop().create_task(self._open())
        self._opening.add_done_callback(done)

    async def _open(self) -> None:
        for place in self._places:
            await self._connect(place)
        self._family.versions.append(self)
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def _connect(self, place: _Place) -> None:
        place.live = (await place.host.connect())["live"]
        place.begun = 0
        place.gone = False

    async def _renew(self) -> None:
        """Say that this process is there; a holder that is gone is made again."""
        while True:
            await asyncio.sleep(LEASE / _RENEWALS)
            for place in self._places:
                try:
                    await self._connect(place)
                except RtmlError as error:
                    _logger.warning("a holder of model %s: %s", self.layout.name, error)

    async def leave(self) -> None:
        """This process stops. Sequences stay where they are, for other gateways; holders without any end with us."""
        for task in (self._opening, self._renewing):
            if task is not None:
                task.cancel()
        with contextlib.suppress(RtmlError, RuntimeError, TimeoutError):  # also when the client is closed
            async with asyncio.timeout(_GOODBYE):
                for place in self._places:
                    answer = await place.host.call("detach", self._user)
                    if answer.error is None and not answer.value["live"] and not answer.value["users"]:
                        place.host.stop()

    async def retire(self) -> None:
        """Begin no more sequences. Returns when there are none any more; the holders end with the last process."""
        self.retired = True
        if self._renewing is not None:
            self._renewing.cancel()
        left = list(self._places)
        while left:
            wait = 0.0
            for place in list(left):
                answer = await place.host.call("detach", self._user)
                if answer.error is not None:  # somebody else has ended it, or the engine is gone
                    left.remove(place)
                elif answer.value["live"] or answer.value["users"]:
                    # Other processes may begin sequences until they retire it, too, or are found to be dead.
                    wait = max(wait, answer.value["soonest"])
                else:
                    place.host.stop()
                    left.remove(place)
            if left:
                await asyncio.sleep(min(max(wait, _LOOK_LEAST), _LOOK_MOST))
        if self in self._family.versions:
            self._family.versions.remove(self)

    # --- steps --------------------------------------------------------------------------------------------------------

    async def step(
        self, tenant: str, sequence: Sequence, inputs: dict[str, Array], progress: _Progress
    ) -> tuple[Stateful, dict[str, Array]]:
        """One request of a sequence. Returns who answered (the version that the sequence began with), and the outputs.

        Raises:
            UnknownSequence: it has not begun, or has ended.
            SequenceLost: the process that held it has died.
            DeadlineExceeded: no answer in time; the step may have been made.
            RtmlError, HttpError: another reason.
        """
        try:
            async with asyncio.timeout(progress.remaining(self.layout.name)):
                return await self._step((tenant, sequence.id), sequence, inputs, progress)
        except TimeoutError as error:
            if isinstance(error, RtmlError):
                raise
            message = "the deadline passed before the step of the sequence was answered"
            raise DeadlineExceeded(message, missing=[self.layout.name]) from None

    async def _step(
        self, key: Key, sequence: Sequence, inputs: dict[str, Array], progress: _Progress
    ) -> tuple[Stateful, dict[str, Array]]:
        await self.open()
        sent = wall()
        remaining = progress.remaining(self.layout.name)
        flags = START * sequence.start | END * sequence.end
        args = (*key, flags, sent, 0.0 if remaining is None else sent + remaining, inputs)
        route = self._family.route(key, sent, self.layout.idle)
        for again in (True, False):
            async with route.lock:
                known = route.host is not None and not sequence.start
                if not known:
                    await (self._begin(key, route) if sequence.start else self._find(key, route))
                owner, place = route.owner or self, route.host or self._places[0]
                pending = place.submit(args)
            answer = await asyncio.shield(pending)
            progress.timing = answer.timing
            if not (known and again and isinstance(answer.error, UnknownSequence) and self._elsewhere(place)):
                break
            route.host = None  # it may have begun anew through another process
        if sequence.end or answer.error is not None:
            self._family.forget(key, route)
        return owner, self._value(answer, place, sequence)

    def _elsewhere(self, place: _Place) -> bool:
        """Whether there is another place where a sequence can be."""
        return any(other is not place for one in self._all() for other in one._places)

    def _all(self) -> list[Stateful]:
        """The versions that may have a sequence, newest first."""
        versions = [one for one in reversed(self._family.versions) if one is not self]
        return versions if self.retired and self not in self._family.versions else [self, *versions]

    async def _begin(self, key: Key, route: Route) -> None:
        """A sequence begins: where it is already, else where there are the fewest."""
        if self.retired:
            raise HttpError(
                503, f"model {self.layout.name!r} is being unloaded: it begins no sequences", "ModelNotReady"
            )
        for place in self._places:
            if place.gone:
                await self._connect(place)
        found = await self._look(key) if self._elsewhere(self._places[0]) else None
        if found is not None and found[0] is not self:
            found[1].host.submit("drop", *key)  # it began with another version
            found = None
        place = found[1] if found is not None else min(self._places, key=lambda place: place.load)
        place.begun += found is None
        route.owner, route.host = self, place

    async def _find(self, key: Key, route: Route) -> None:
        """Where a sequence is that this process does not know; if it is nowhere, any holder says so."""
        found = await self._look(key) if self._elsewhere(self._places[0]) else None
        route.owner, route.host = found or (self, self._places[0])

    async def _look(self, key: Key) -> tuple[Stateful, _Place] | None:
        """Ask all holders for a sequence."""
        places = [(one, place) for one in self._all() for place in one._places if not place.gone]
        answers = await asyncio.gather(*(place.host.call("has", *key) for _, place in places))
        found = None
        for (one, place), answer in zip(places, answers):
            if answer.error is not None:
                place.gone = isinstance(answer.error, ActorDied)
                continue
            place.live, place.begun = answer.value["live"], 0
            if answer.value["here"] and found is None:
                found = one, place
        return found

    def _value(self, answer: Answer, place: _Place, sequence: Sequence) -> dict[str, Array]:
        error = answer.error
        if error is None:
            outputs: dict[str, Array] = answer.value
            return outputs
        if isinstance(error, ActorDied):
            place.gone = True
            raise SequenceLost(
                f"the process that held sequence {sequence.id!r} of model {self.layout.name!r} has died, and the state "
                "with it; begin the sequence again with sequence_start"
            ) from error
        raise error


def required(name: str, sequence: Sequence | None) -> Sequence:
    """The sequence of a request to a stateful model.

    Raises:
        InvalidInput: it says none.
    """
    if sequence is None:
        raise InvalidInput(
            f"model {name!r} keeps state: a request needs the parameter sequence_id (a number from 1, or text), and "
            "the first one of a sequence sequence_start: true"
        )
    return sequence
