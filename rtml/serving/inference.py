"""Inference without a protocol: a decoded request and a model in, the reply out. REST and gRPC both call it.

Here is what is the same for every way that a request can come: the budget (the tightest of the model's own, the
header's and the parameter `timeout`), the priority, the call of the engine, the model's statistics. Errors are raised
as `RtmlError` or `HttpError`; each protocol says them in its own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec
import numpy as np

from rtml.errors import DeadlineExceeded, InvalidInput, RtmlError, SerializationError
from rtml.messages import Options, Timing
from rtml.metrics import deadline_outcome
from rtml.serving import oip
from rtml.serving.engine import Engine, Prepared
from rtml.serving.http import HttpError
from rtml.serving.registry import ModelVersion
from rtml.serving.requesttraces import RequestTraces
from rtml.serving.sequences import Stateful, required
from rtml.serving.tensors import Array
from rtml.serving.visits import VISIT

#: Seconds that the engine may be late with its own answer to a deadline, which knows more about it than the gateway.
_GRACE: Final = 0.005
_MILLION: Final = 1_000_000


class Progress:
    """One request on its way.

    Args:
        request_id: Its name in answers and logs.
        budget: Seconds from then in which the answer is wanted; None: no deadline.
        started: When it came, on `time.perf_counter`'s clock; None: now.
    """

    __slots__ = ("budget", "id", "model", "started", "timing")

    def __init__(self, request_id: str, budget: float | None, started: float | None = None) -> None:
        self.id = request_id
        self.started = time.perf_counter() if started is None else started
        #: Seconds from `started` in which the answer is wanted.
        self.budget = budget
        #: Of the graph's root, once that has ended.
        self.timing: Timing | None = None
        #: That it is for, if it is for one.
        self.model: ModelVersion | None = None

    def timed(self, timing: Timing | None) -> None:
        """The graph's root has ended."""
        self.timing = timing

    def elapsed(self) -> float:
        """Seconds since it came."""
        return time.perf_counter() - self.started

    @property
    def missing(self) -> list[str]:
        """Names of steps that the graph ended without."""
        return (self.timing.missing if self.timing is not None else None) or []

    def tighten(self, budget: float | None) -> None:
        """It has no more than `budget` seconds (from its start)."""
        if budget is not None and (self.budget is None or budget < self.budget):
            self.budget = budget

    def remaining(self, step: str) -> float | None:
        """Seconds left.

        Args:
            step: What is to be done with them.

        Raises:
            DeadlineExceeded: none.
        """
        if self.budget is None:
            return None
        left = self.budget - (time.perf_counter() - self.started)
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read", missing=[step])
        return left


class Inference:
    """Runs models.

    Args:
        engine: Runs their functions.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: Takes traces of requests; None: nobody does.
        self.traces: RequestTraces | None = None

    async def run(self, model: ModelVersion, request: oip.Request, progress: Progress) -> oip.Reply:
        """The model's answer, within the request's budget; counted in the model's statistics.

        Args:
            model: What to run.
            request: Checked against the model's inputs.
            progress: Of the request; gets its timing.

        Raises:
            DeadlineExceeded: the answer is not there in time.
            HttpError: the request wants what this model cannot do.
            RtmlError: it ended in another way.
        """
        progress.model = model
        try:
            if model.decoupled:
                raise HttpError(400, _several(model), "Decoupled")
            if model.stateful is None:
                priority = self._check(model, request, progress)
                args, kwargs = _arguments(model, request)
                outputs = _results(model, await self.call(model.prepared, args, kwargs, progress, priority))
            else:
                model, outputs = await self._step(model, model.stateful, request, progress)
        except BaseException:  # also when the client has gone: it had no answer
            model.statistics.failed(progress.elapsed())
            raise
        at = time.time_ns() // _MILLION
        model.statistics.succeeded(progress.elapsed(), rows_of(model, request.inputs), progress.timing, at)
        if self.traces is not None:
            self.traces.record(
                (model.name, model.version), request.id or progress.id, progress.started, progress.timing
            )
        told = None if progress.budget is None and not progress.missing else _outcome(progress)
        return oip.Reply(model.name, model.version, outputs, model.outputs, told, labels=model.labels)

    async def stream(
        self, model: ModelVersion, request: oip.Request, progress: Progress
    ) -> AsyncGenerator[oip.Reply, None]:
        """The model's answers, one after the other: a function that returns its result has one, a generator any number.

        Raises:
            RtmlError, HttpError: as `run`; after the first answer, too.
        """
        if not model.decoupled:
            reply = await self.run(model, request, progress)
            model.statistics.responded(0, progress.elapsed(), ok=True)
            yield reply
            return
        progress.model = model
        try:
            priority = self._check(model, request, progress)
            args, kwargs = _arguments(model, request)
        except Exception:
            model.statistics.failed(progress.elapsed())
            raise
        items = self.stream_program(model, model.prepared, args, kwargs, progress, priority)
        async with contextlib.aclosing(items):
            async for item in items:
                yield oip.Reply(model.name, model.version, _results(model, item), model.outputs, labels=model.labels)

    async def _step(
        self, model: ModelVersion, stateful: Stateful, request: oip.Request, progress: Progress
    ) -> tuple[ModelVersion, dict[str, Array]]:
        """One step of a sequence, and the version that has made it: the one which the sequence began with."""
        sequence = required(model.name, request.sequence)
        progress.tighten(oip.budget_of(request.parameters))
        visit = VISIT.get()
        tenant = "" if visit is None else visit.tenant
        owner, outputs = await stateful.step(tenant, sequence, request.inputs, progress)
        return owner.version or model, outputs

    def _check(self, model: ModelVersion, request: oip.Request, progress: Progress) -> int | None:
        """Let the request's parameters take effect; returns its priority."""
        if not request.wishes:
            return None
        if request.sequence is not None:
            message = f"model {model.name!r} keeps no state: it takes no sequence_id; send the request without it"
            raise HttpError(501, message, "NotSupported")
        progress.tighten(oip.budget_of(request.parameters))
        return oip.priority_of(request.parameters)

    async def run_program(
        self, model: ModelVersion, prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], progress: Progress
    ) -> Any:
        """What a graph program returns, within the request's budget; counted in its statistics as a model.

        Args:
            model: The program.
            prepared: What to call in its place.
            args: Of the call.
            kwargs: Likewise.
            progress: Of the request.

        Raises:
            RtmlError: as `call`.
        """
        try:
            value = await self.call(prepared, args, kwargs, progress)
        except BaseException:
            model.statistics.failed(progress.elapsed())
            raise
        model.statistics.succeeded(progress.elapsed(), 1, progress.timing, time.time_ns() // _MILLION)
        return value

    async def stream_program(  # as `call`
        self,
        model: ModelVersion,
        prepared: Prepared,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        progress: Progress,
        priority: int | None = None,
    ) -> AsyncGenerator[Any, None]:
        """What a generator yields, within the request's budget; counted in its statistics as a model.

        Args and Raises: as `run_program` and `call`, after the first item, too.
        """
        before = 0.0
        try:
            options = _options(prepared, progress.remaining(prepared.name), priority)
            stream = self._engine.stream(prepared, args, kwargs, options, progress.timed)
            async with contextlib.aclosing(stream) as items:
                index = 0
                async for item in items:
                    model.statistics.responded(index, progress.elapsed() - before, ok=True)
                    before = progress.elapsed()
                    index += 1
                    yield item
        except BaseException:
            model.statistics.failed(progress.elapsed())
            raise
        model.statistics.succeeded(progress.elapsed(), 1, progress.timing, time.time_ns() // _MILLION)

    async def call(
        self,
        prepared: Prepared,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        progress: Progress,
        priority: int | None = None,
    ) -> Any:
        """The value of a graph, within the request's budget.

        Args:
            prepared: The function that opens it.
            args: Of the call.
            kwargs: Likewise.
            progress: Of the request.
            priority: In the engine's order: higher is more urgent; None as the function says.

        Raises:
            DeadlineExceeded: it is not there in time.
            RtmlError: it ended in another way.
        """
        remaining = progress.remaining(prepared.name)
        options = _options(prepared, remaining, priority)
        try:
            pending = self._engine.submit(prepared, args, kwargs, options)
        except SerializationError as error:
            # They were made from plain data a moment ago, so it is the data: JSON that is nested too deeply.
            raise InvalidInput(str(error)) from None
        try:
            if remaining is None:
                return await pending
            async with asyncio.timeout(remaining + _GRACE):
                return await pending
        except TimeoutError as error:
            if isinstance(error, RtmlError):
                raise
            raise DeadlineExceeded("the deadline passed before the graph ended", missing=[prepared.name]) from None
        finally:
            progress.timing = pending.timing


def _options(prepared: Prepared, remaining: float | None, priority: int | None) -> Options:
    """What a call asks for, with what the request adds to it."""
    if remaining is None and priority is None:
        return prepared.options
    wanted: dict[str, Any] = {} if remaining is None else {"deadline": remaining}
    if priority is not None:
        wanted["priority"] = priority
    return msgspec.structs.replace(prepared.options, **wanted)


def _several(model: ModelVersion) -> str:
    """Why a decoupled model has no single answer, and how to ask for all of them."""
    return (
        f"model {model.name!r} has any number of answers to a request (it is decoupled); ask for them as a stream: "
        f"POST /v2/models/{model.name}/generate_stream (server-sent events), or gRPC's ModelStreamInfer"
    )


def _arguments(model: ModelVersion, request: oip.Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model's function is called for a request."""
    arrays = request.inputs
    if model.program is not None:
        return model.program.call(arrays)
    return ((), arrays) if len(arrays) != 1 else (tuple(arrays.values()), {})


def _results(model: ModelVersion, value: Any) -> dict[str, Array]:
    """What a model's function gave, as tensors."""
    return _named(model, value) if model.program is None else model.program.results(value)


def _outcome(progress: Progress) -> oip.Parameters | None:
    """What the reply says of the deadline, and of steps that are missing."""
    told: oip.Parameters = {}
    missing = progress.missing
    if progress.budget is not None:
        told["deadline_outcome"] = deadline_outcome(200, progress.elapsed(), progress.budget, bool(missing))
    if missing:
        told["missing_steps"] = ",".join(missing)
    return told or None


def rows_of(model: ModelVersion, inputs: dict[str, Array]) -> int:
    """How many inferences a request is: the rows of its first input, if the model has batches."""
    if model.batch_max:
        for array in inputs.values():
            return int(array.shape[0]) if array.ndim else 1
    return 1


def _named(model: ModelVersion, value: Any) -> dict[str, Array]:
    """A model's result as arrays by name."""
    if isinstance(value, dict):
        return {name: np.asarray(array) for name, array in value.items()}
    if len(model.outputs) != 1:
        kind = type(value).__name__
        raise TypeError(f"model {model.name!r} returned one {kind}, not {len(model.outputs)} arrays")
    return {model.outputs[0].name: np.asarray(value)}
