"""Stateful models: actors that hold the states of many sequences, and run one step of many of them at once.

A sequence is a row of calls that belong together: the chunks of one audio stream, the observations of one player. The
model takes its state as inputs and gives the next one as outputs; here the state of each sequence stays with the actor
(`Holder`) and only the rest travels. Steps of different sequences that wait at the same time share one run: their
states are joined along the axis that the model's file says is the batch's, and taken apart again. Steps of one sequence
never share a run and never change places.

A step changes the state when its run has succeeded, and not at all otherwise. What a sequence may do wrong is an error
of its own call (`UnknownSequence`, `SequenceLost`, `Overloaded`); those that share its run do not notice.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rtml.client.actors import method
from rtml.client.context import current_task
from rtml.errors import DeadlineExceeded, InvalidInput, Overloaded, RtmlError, SequenceLost, UnknownSequence
from rtml.models import Model

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

#: A client's name for a sequence.
Id = int | str
#: What tells sequences apart: those of one tenant are nothing to another.
Key = tuple[str, Id]

#: Bits of a step's flags.
START: Final = 1
END: Final = 2

#: Sequences that ended for want of steps, of which that is remembered.
_EXPIRED_KEPT: Final = 4096
#: States that grow with each step must stop somewhere, too.
STATE_BYTES_MAX: Final = 64 << 20
#: Seconds after which a gateway that says nothing any more is taken for dead.
LEASE: Final = 60.0
_BILLION: Final = 1e9


class State(NamedTuple):
    """A tensor that a model gives to its own next step."""

    input: str
    output: str
    dtype: str
    #: Of one sequence; 1 at `axis`.
    shape: tuple[int, ...]
    #: Along which the states of several sequences are joined; None: they are not.
    axis: int | None
    #: Of a sequence that begins; None: zeros.
    initial: Any = None

    def fresh(self) -> Array:
        """The state before the first step."""
        import numpy as np

        if self.initial is None:
            return np.full(self.shape, "", object) if self.dtype == "object" else np.zeros(self.shape, self.dtype)
        return np.array(self.initial, self.dtype).reshape(self.shape)


class Control(NamedTuple):
    """An input that tells the model where in its sequence a step is."""

    input: str
    #: "start", "end", "ready", or "corrid": the sequence's number.
    kind: str
    dtype: str
    #: What stands for no and for yes.
    values: tuple[float, float] = (0, 1)
    #: The input's shape for one sequence.
    shape: tuple[int, ...] = (1,)


class Layout(NamedTuple):
    """How a stateful model is run."""

    name: str
    states: tuple[State, ...]
    #: Inputs of each call whose first dimension is the batch; the others must be equal for steps that share a run.
    batched: tuple[str, ...]
    #: Outputs of each call.
    outputs: tuple[str, ...]
    controls: tuple[Control, ...] = ()
    #: Inputs that are the same in every call.
    constants: Mapping[str, Any] = {}
    #: Most sequences in one run.
    batch: int = 1
    #: Seconds without a step after which a sequence ends.
    idle: float = 30.0
    #: Most sequences at a time in one holder.
    live_max: int = 1024
    #: Holders.
    holders: int = 1


class Live:
    """A sequence that has begun and has not ended."""

    __slots__ = ("last", "states")

    def __init__(self, states: dict[str, Array], last: float) -> None:
        self.states = states
        #: When its last step was made.
        self.last = last


class Table:
    """The sequences of a holder; time is an argument.

    Args:
        layout: Says how many there may be, and how long they last.
        restarted: Others were here before, and are lost.
    """

    def __init__(self, layout: Layout, restarted: bool = False) -> None:
        self._layout = layout
        self._restarted = restarted
        #: That whose last step is longest ago comes first.
        self._live: OrderedDict[Key, Live] = OrderedDict()
        self._expired: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: Key) -> bool:
        return key in self._live

    def begin(self, key: Key, now: float, beside: int = 0) -> Live:
        """A sequence starts, or starts again. It is there after its first step, see `went`.

        Args:
            key: Its name.
            now: When.
            beside: How many others have begun, and have not made their first step.

        Raises:
            Overloaded: there are too many.
        """
        most = self._layout.live_max
        self._live.pop(key, None)
        if len(self._live) + beside >= most:
            wait = max(1.0, self.soonest(now))
            raise Overloaded(
                f"model {self._layout.name!r} has {most} sequences already, as many as it may have; "
                "end one, or come back when one has ended",
                retry_after=min(wait, 60.0),
            )
        self._expired.pop(key, None)
        return Live({state.input: state.fresh() for state in self._layout.states}, now)

    def find(self, key: Key, sent: float) -> Live:
        """A sequence that goes on with a step which was sent at `sent`.

        Raises:
            SequenceLost: it may have been here before this process was started.
            UnknownSequence: it has not begun, or has ended.
        """
        live = self._live.get(key)
        if live is not None and sent - live.last > self._layout.idle:
            self._expire(key)
            live = None
        if live is not None:
            return live
        where = f"sequence {key[1]!r} of model {self._layout.name!r}"
        if key in self._expired:
            raise UnknownSequence(
                f"{where} has ended: no request came for {self._layout.idle:g} s; begin it again with sequence_start"
            )
        if self._restarted:
            raise SequenceLost(f"{where} is not known: the process that held it has died; begin it with sequence_start")
        raise UnknownSequence(f"{where} has not begun, or has ended; its first request needs sequence_start: true")

    def went(self, key: Key, live: Live, states: dict[str, Array], now: float) -> None:
        """A step of it was made."""
        live.states = states
        live.last = now
        self._live[key] = live
        self._live.move_to_end(key)

    def end(self, key: Key) -> None:
        """It is over, if it is there."""
        self._live.pop(key, None)

    def sweep(self, until: float) -> None:
        """Those end whose last step was longer than `idle` before `until`."""
        while self._live:
            key, live = next(iter(self._live.items()))
            if until - live.last <= self._layout.idle:
                return
            self._expire(key)

    def _expire(self, key: Key) -> None:
        del self._live[key]
        self._expired[key] = None
        if len(self._expired) > _EXPIRED_KEPT:
            self._expired.popitem(last=False)

    def soonest(self, now: float) -> float:
        """Seconds until one may end by itself."""
        first = next(iter(self._live.values()), None)
        return 0.0 if first is None else max(0.0, first.last + self._layout.idle - now)


class Step(NamedTuple):
    """One call of a batch, admitted."""

    #: In the batch.
    place: int
    key: Key
    flags: int
    live: Live
    inputs: dict[str, Array]


class Holder:
    """An actor with the states of many sequences of one model.

    Args:
        model: To be run.
        layout: How.
    """

    def __init__(self, model: Model, layout: Layout) -> None:
        task = current_task()
        self._model = model
        self._layout = layout
        self._table = Table(layout, restarted=task is not None and task.attempt > 1)
        #: The gateways that use it, and when they last said so.
        self._users: dict[str, float] = {}
        model.__rtml_load__()

    @method(batch=1)
    def step(
        self,
        tenants: list[str],
        numbers: list[Id],
        flags: list[int],
        sent: list[float],
        until: list[float],
        inputs: list[dict[str, Array]],
    ) -> list[Any]:
        """One step of each of several sequences, or several of one. Every argument has one entry per call.

        Args:
            tenants: Whose sequence it is.
            numbers: Which one.
            flags: `START`, `END`.
            sent: When the client's request came, in seconds since 1970 (gateways may be on other machines).
            until: When nobody wants it any more, likewise; 0: never.
            inputs: The request's tensors.

        Returns:
            For each its outputs by name, or its error.
        """
        now = wall()
        # What waits behind these must not be taken for idle because this process is slow.
        self._table.sweep(min(now, *sent))
        results: list[Any] = [None] * len(numbers)
        left = list(range(len(numbers)))
        while left:
            later: list[int] = []
            steps: dict[Key, Step] = {}
            begun = 0
            for place in left:
                key = tenants[place], numbers[place]
                if key in steps or len(steps) >= max(1, self._layout.batch):
                    later.append(place)
                    continue
                try:
                    if until[place] and wall() >= until[place]:
                        message = "the deadline passed before the step began; the sequence is as it was"
                        raise DeadlineExceeded(message, missing=[self._layout.name])
                    if flags[place] & START:
                        live = self._table.begin(key, now, begun)
                        begun += 1
                    else:
                        live = self._table.find(key, sent[place])
                except RtmlError as error:
                    results[place] = error
                    continue
                steps[key] = Step(place, key, flags[place], live, inputs[place])
            self._round(list(steps.values()), results)
            left = later
        return results

    def attach(self, user: str) -> dict[str, int]:
        """A gateway uses this holder, and goes on to. Returns how many sequences there are, and in which process."""
        self._sweep()
        self._users[user] = wall()
        return {"live": len(self._table), "pid": os.getpid()}

    def detach(self, user: str) -> dict[str, float]:
        """A gateway begins no more sequences here. Says who else does, and when the last sequence may have ended."""
        self._sweep()
        self._users.pop(user, None)
        return {"live": len(self._table), "users": len(self._users), "soonest": self._table.soonest(wall())}

    def has(self, tenant: str, number: Id) -> dict[str, int]:
        """Whether a sequence is here, and how many are."""
        self._sweep()
        return {"here": int((tenant, number) in self._table), "live": len(self._table)}

    def drop(self, tenant: str, number: Id) -> None:
        """End a sequence."""
        self._table.end((tenant, number))

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = wall()
        self._table.sweep(now)
        self._users = {user: seen for user, seen in self._users.items() if now - seen < LEASE}

    def _round(self, steps: list[Step], results: list[Any]) -> None:
        """Steps of different sequences; those that fit together share a run."""
        groups: dict[Any, list[Step]] = {}
        for step in steps:
            try:
                groups.setdefault(self._key(step), []).append(step)
            except InvalidInput as error:
                self._failed(step, error, results)
        for group in groups.values():
            self._run(group, results)

    def _key(self, step: Step) -> Any:
        """What steps have in common that can share a run."""
        layout = self._layout
        parts: list[Any] = []
        for control in layout.controls:
            self._said(control, step)
        for name, array in step.inputs.items():
            if name not in layout.batched:
                parts.append((name, array.shape, array.tobytes() if array.dtype != object else tuple(array.flat)))
            elif array.ndim == 0 or array.shape[0] != 1:
                raise InvalidInput(
                    f"input {name!r} has shape {list(array.shape)}: a step of a sequence has one row, [1, ...]"
                )
            else:
                parts.append((name, array.shape))
        parts += [step.live.states[state.input].shape for state in layout.states]
        return tuple(parts) if layout.batch > 1 else step.key

    def _run(self, group: list[Step], results: list[Any]) -> None:
        outputs = self._model.run_feed(self._feed(group))
        if isinstance(outputs, Exception):
            if len(group) > 1:  # one of them may be to blame
                for step in group:
                    self._run([step], results)
            else:
                self._failed(group[0], outputs, results)
            return
        now = wall()
        for index, step in enumerate(group):
            try:
                states = self._next_states(outputs, index, len(group))
                result = {name: _row(name, outputs[name], index, len(group)) for name in self._layout.outputs}
            except (InvalidInput, ValueError, IndexError) as error:
                self._failed(step, error, results)
                continue
            if step.flags & END:
                self._table.end(step.key)
            else:
                self._table.went(step.key, step.live, states, now)
            results[step.place] = result

    def _failed(self, step: Step, error: Exception, results: list[Any]) -> None:
        if step.flags & END:
            self._table.end(step.key)
        results[step.place] = error

    def _feed(self, group: Sequence[Step]) -> dict[str, Array]:
        import numpy as np

        layout = self._layout
        feed: dict[str, Array] = {name: np.asarray(value) for name, value in layout.constants.items()}
        for name, array in group[0].inputs.items():
            joined = name in layout.batched and len(group) > 1
            feed[name] = np.concatenate([step.inputs[name] for step in group]) if joined else array
        for state in layout.states:
            parts = [step.live.states[state.input] for step in group]
            feed[state.input] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=state.axis or 0)
        for control in layout.controls:
            values = [self._said(control, step) for step in group]
            parts = [np.full(control.shape, value, control.dtype) for value in values]
            feed[control.input] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return feed

    def _said(self, control: Control, step: Step) -> Any:
        if control.kind == "corrid":
            number = step.key[1]
            if control.dtype == "object":
                return str(number)
            if isinstance(number, str):
                raise InvalidInput(f"model {self._layout.name!r} takes whole numbers as sequence_id, not text")
            return number
        yes = {"start": step.flags & START, "end": step.flags & END, "ready": 1}[control.kind]
        return control.values[bool(yes)]

    def _next_states(self, outputs: dict[str, Array], index: int, count: int) -> dict[str, Array]:
        """The states of one of the sequences that shared a run."""
        states: dict[str, Array] = {}
        size = 0
        for state in self._layout.states:
            value = outputs[state.output]
            if count > 1:
                axis = state.axis or 0
                if value.ndim <= axis or value.shape[axis] != count:
                    shape = list(value.shape)
                    raise ValueError(f"state {state.output!r} has shape {shape} after a run of {count} sequences")
                # A copy: a view would keep the states of all others alive.
                value = value[(slice(None),) * axis + (slice(index, index + 1),)].copy()
            size += value.nbytes
            states[state.input] = value
        if size > STATE_BYTES_MAX:
            raise InvalidInput(f"the state has grown to {size} bytes; a sequence may have {STATE_BYTES_MAX}")
        return states


def _row(name: str, value: Array, index: int, count: int) -> Array:
    """The part of an output that belongs to one of the sequences that shared a run."""
    if count == 1:
        return value
    if not value.ndim or len(value) != count:
        raise ValueError(f"output {name!r} has shape {list(value.shape)} after a run of {count} sequences")
    return value[index : index + 1]


def wall() -> float:
    """Seconds since 1970: idle times are compared between machines, and a second more or less does not matter."""
    return time.time_ns() / _BILLION
