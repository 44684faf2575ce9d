"""Runs on workers: a reduction, which follows its inputs' arrival and has them folded where they lie.

One coroutine holds the plan (`rtml.graph.collectives`) and carries it out. What is folded on its own node is done in
threads of its process; what is to be folded on other nodes are tasks of its graph, bound to their node. So the death of
its process, a cancellation or a deadline mean for a reduction what they mean for any task that has children.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from rtml.client.context import current_client
from rtml.client.driver import Waiter
from rtml.client.folding import MisguessedError, Operation, UnlikeError
from rtml.client.following import EndpointGoneError
from rtml.client.functions import task
from rtml.client.future import Future, error_of
from rtml.client.merging import Made, Merge, UnreadableError, folded_here, hold_here, merge_here, merge_on, merge_values
from rtml.codec import EncodedValue, encode_call, encode_value
from rtml.codec.arrays import array_facts
from rtml.errors import ObjectLost, RtmlError, Unschedulable
from rtml.exchange import node_label
from rtml.graph.collectives import BANDWIDTH, Again, Command, End, Fail, Plan, Start, Step, Stop
from rtml.graph.lineage import STILL_THERE
from rtml.messages import INLINE_MAX, Folded, ObjectRef

#: Seconds within which a step on another node must have begun; and where something went wrong already.
_BEGINS: Final = 15.0
_BEGINS_AGAIN: Final = 2.0
#: Seconds between two questions about a lost input.
_PAUSES: Final = (0.1, 0.3, 1.0, 3.0)


@task(name="rtml.reduce")
async def reduce_here(
    futures: list[Future[Any]],
    operation: Operation,
    wanted: int,
    everywhere: bool = False,
    values: list[Any] | None = None,
) -> Any:
    """A reduction; `everywhere`: all nodes that gave inputs have the result when it ends.

    With `values` it makes again what was lost with its node: these are those that it was made of.
    """
    if values is not None:
        return await asyncio.to_thread(folded_here, operation, values)
    return await _Reduction(futures, operation, wanted, everywhere).run()


@task(name="rtml.keep")
async def keep_here(value: object) -> None:
    """Whoever runs it has had the value brought to its node."""


@task(name="rtml.broadcast")
async def broadcast_here(future: Future[Any], nodes: list[str]) -> list[str]:
    """Have a value on these nodes; returns those that have it."""
    client = current_client()
    assert client is not None, "this runs in an executor"
    await _ended(future)
    bound = [keep_here.options(resources={node_label(node): 1.0}) for node in nodes]
    copies = [one.submit_to(client, (future,), {}) for one in bound]
    await asyncio.gather(*map(_ended, copies), return_exceptions=True)
    return [node for node, copy in zip(nodes, copies) if error_of(copy) is None]


class _Arrivals(Waiter):
    """Wakes the reduction when a future has ended, from any thread."""

    __slots__ = ("ended", "loop", "wake_up")

    def __init__(self, loop: asyncio.AbstractEventLoop, wake_up: Callable[[], None]) -> None:
        super().__init__()
        self.ended: deque[Future[Any]] = deque()
        self.loop = loop
        self.wake_up = wake_up

    def notify(self, future: Any) -> None:
        """One has."""
        self.ended.append(future)
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.wake_up)


class _Reduction:
    """See `reduce_here`."""

    def __init__(self, futures: list[Future[Any]], operation: Operation, wanted: int, everywhere: bool) -> None:
        client = current_client()
        assert client is not None, "this runs in an executor"
        self._client = client
        self._operation = operation
        self._everywhere = everywhere
        self._futures = dict(enumerate(futures))
        self._home = client.store.place.data
        seen = client.store.asker.bandwidth if self._home else 0.0
        self._plan = Plan(len(futures), wanted, self._home, bandwidth=seen or BANDWIDTH)
        self._news = asyncio.Event()
        self._arrivals = _Arrivals(asyncio.get_running_loop(), self._news.set)
        #: Which inputs a future is.
        self._positions: dict[Future[Any], list[int]] = {}
        #: Where the inputs lie.
        self._payloads: dict[int, bytes | ObjectRef] = {}
        #: Blocks of arrays are folded, not whole values.
        self._blocks = operation.elementwise
        #: Results are begun as if all arrays were of one dtype and shape.
        self._eager = True
        #: What runs for each step, and what can be read of it.
        self._running: dict[int, asyncio.Task[None]] = {}
        self._made: dict[int, asyncio.Future[Any]] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        #: Why something had to be done again, last time.
        self._reason: BaseException | None = None

    async def run(self) -> EncodedValue:
        """To its end."""
        for position, future in self._futures.items():
            self._attend(position, future)
        self._client.driver.awaiting(self._arrivals.loop)
        try:
            while True:
                self._look()
                while commands := self._plan.advance():
                    for command in commands:
                        if isinstance(command, End):
                            return await self._result(command)
                        self._obey(command)
                if self._error is not None:
                    raise self._error
                await self._news.wait()
                self._news.clear()
        finally:
            for future in self._positions:
                future._detach(self._arrivals)
            ending = [*self._running.values(), *self._others]
            for one in ending:
                one.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            # At once, not when somebody looks for garbage: inputs are large.
            for held in (ending, self._running, self._made, self._others, self._futures, self._positions):
                held.clear()

    def _attend(self, position: int, future: Future[Any]) -> None:
        self._futures[position] = future
        positions = self._positions.setdefault(future, [])
        positions.append(position)
        if (len(positions) == 1 and not future._attach(self._arrivals)) or future.done():
            self._arrivals.ended.append(future)

    def _look(self) -> None:
        ended = self._arrivals.ended
        while ended:
            future = ended.popleft()
            for position in self._positions.get(future, ()):
                payload = future._payload
                if future._failure is not None or payload is None:
                    self._plan.failed(position)
                elif position not in self._payloads:
                    self._arrived(position, payload)

    def _arrived(self, position: int, payload: bytes | ObjectRef) -> None:
        self._payloads[position] = payload
        if isinstance(payload, ObjectRef):
            self._plan.arrived(position, payload.node or self._home, payload.size)
        else:
            self._plan.arrived(position, self._home, len(payload))

    # --- commands

    def _obey(self, command: Command) -> None:
        if isinstance(command, Start):
            step = command.step
            self._made[step.number] = asyncio.get_running_loop().create_future()
            self._running[step.number] = asyncio.create_task(self._run_step(step))
        elif isinstance(command, Stop):
            running = self._running.pop(command.number, None)
            self._made.pop(command.number, None)
            if running is not None:
                running.cancel()
                self._keep(running)
        elif isinstance(command, Again):
            self._payloads.pop(command.position, None)
            self._keep(asyncio.create_task(self._make_again(command.position)))
        elif isinstance(command, Fail):
            raise self._failure(command.position)

    def _keep(self, running: asyncio.Task[None]) -> None:
        self._others.add(running)
        running.add_done_callback(self._others.discard)

    def _failure(self, position: int) -> BaseException:
        error = self._error
        if position >= 0:
            error = error or error_of(self._futures[position])
        return error or self._reason or ObjectLost(f"input {position} of the reduction is lost")

    async def _run_step(self, step: Step) -> None:
        """Carry out one step, and tell the plan what became of it."""
        try:
            await (self._step_here(step) if step.node == self._home else self._step_there(step))
        except UnreadableError as error:
            self._reason = error
            self._plan.broken(step.number, [step.sources[error.place]])
        except EndpointGoneError as error:
            self._reason = error
            self._plan.broken(step.number)
        except MisguessedError:
            if self._eager:
                self._eager = False
                self._plan.restart()
        except UnlikeError:
            if self._blocks:
                self._blocks = False
                self._plan.restart()
        except (TimeoutError, RtmlError, OSError) as error:
            if step.node == self._home:
                self._error = error
            else:
                self._reason = error
                self._plan.broken(step.number, gone=isinstance(error, Unschedulable))
        except Exception as error:  # noqa: BLE001 - of the user's function, or numpy's of what cannot be folded
            self._error = error
        finally:
            self._news.set()

    async def _sources(self, step: Step) -> list[Any]:
        """What the step reads, as soon as it can be read."""
        return [
            await self._made[source.number] if source.made else self._payloads[source.number]
            for source in step.sources
        ]  # fmt: skip

    async def _step_here(self, step: Step) -> None:
        sources = await self._sources(step)
        count = len(step.covers)
        if self._blocks:
            mean = self._operation.name == "mean" and self._operation.function is None
            name = self._client.store.new_id() if step.final and self._everywhere else 0
            merge = Merge(self._operation, sources, count if mean and step.final else 0, name, self._eager)
            await (self._run_everywhere(merge, name) if name else merge.run())
            self._made[step.number].set_result(merge if step.final else merge.array)
            self._plan.finished(step.number)
            if not step.final:
                await self._until_stopped(merge.free)
        else:
            values = [await self._value(place, source) for place, source in enumerate(sources)]
            value = await asyncio.to_thread(self._operation.fold, values)
            if step.final:
                value = self._operation.finish(value, count)
            self._made[step.number].set_result(_Value(value))
            self._plan.finished(step.number)

    async def _run_everywhere(self, merge: Merge, name: int) -> None:
        """Run the last step, while the nodes that gave inputs fetch what it makes."""
        copies: list[Future[bool]] = []
        try:
            if self._home:
                nodes = {payload.node for payload in self._payloads.values() if isinstance(payload, ObjectRef)}
                for node in nodes - {"", self._home}:
                    there = hold_here.options(resources={node_label(node): 1.0})
                    copies.append(there.submit_to(self._client, (Made(self._home, name, _BEGINS),), {}))
            await merge.run()
            if merge.ref is not None:
                await asyncio.gather(*map(_ended, copies), return_exceptions=True)  # who is gone needs no copy
        finally:
            for copy in copies:
                copy.cancel()

    async def _value(self, place: int, source: Any) -> Any:
        if isinstance(source, _Value):
            return source.value
        try:
            if isinstance(source, Future):
                return await source
            if self._client.store.is_far(source):
                return await asyncio.to_thread(self._client.decode, source)
            return self._client.decode(source)
        except ObjectLost as error:
            raise UnreadableError(place, str(error)) from None

    async def _step_there(self, step: Step) -> None:
        bound = {"resources": {node_label(step.node): 1.0}}
        sources = await self._sources(step)
        if not self._blocks:
            inputs = [source if isinstance(source, Future) else self._futures[one.number]
                      for one, source in zip(step.sources, sources)]  # fmt: skip
            future = merge_values.options(**bound).submit_to(self._client, (self._operation, inputs), {})
            self._made[step.number].set_result(future)
            try:
                await _ended(future)
            finally:
                future.cancel()
            self._plan.finished(step.number)
            return
        doubtful = self._plan.is_doubtful(step.node)
        made = Made(step.node, self._client.store.new_id(), _BEGINS_AGAIN if doubtful else _BEGINS)
        given = (self._operation, sources, made.name, self._eager)
        self._made[step.number].set_result(made)
        if step.between:
            future = merge_on.options(**bound).submit_to(self._client, given, {})
            try:
                await _ended(future)
            finally:
                future.cancel()
            return
        stream = merge_here.options(**bound).stream_to(self._client, given, {})
        try:
            await stream.__anext__()
            self._plan.finished(step.number)
            self._news.set()
            await stream.__anext__()
        finally:
            stream.close()

    async def _until_stopped(self, then: Callable[[], None]) -> None:
        self._news.set()
        try:
            await asyncio.Event().wait()
        finally:
            then()

    # --- ends

    async def _make_again(self, position: int) -> None:
        """Have a lost input made again, or brought from a node that has a copy."""
        payload = self._futures[position]._payload
        kind = where = answer = ""
        if isinstance(payload, ObjectRef):
            for pause in _PAUSES:
                with contextlib.suppress(RtmlError, TimeoutError):
                    answer = await asyncio.to_thread(self._client.query, "rebuild", f"{payload.id} {payload.node}")
                kind, _, where = answer.partition(" ")
                if kind in ("at", "task"):
                    break
                await asyncio.sleep(pause)  # its node may be gone without anybody having noticed
        if kind == "at" and isinstance(payload, ObjectRef):
            self._arrived(position, msgspec.structs.replace(payload, node=where))
        elif kind == "task" and where.isdigit():
            self._attend(position, self._client.handle(int(where)))
            self._client.driver.awaiting(self._arrivals.loop)
        elif answer == STILL_THERE and payload is not None:
            self._arrived(position, payload)
        else:
            self._reason = ObjectLost(f"input {position} of the reduction is lost and cannot be replaced: {answer}")
            self._plan.failed(position)
        self._news.set()

    async def _result(self, end: End) -> EncodedValue:
        made = self._made[end.step].result()
        if isinstance(made, _Value):
            encoded = encode_value(made.value, self._client.store, Future, leaving=True)
        elif made.ref is None:
            encoded = encode_value(made.array, None)
        else:
            encoded = EncodedValue(made.ref, (), *array_facts(made.array))
        folded = Folded(end.contributors)
        if isinstance(encoded.payload, ObjectRef):
            self._describe(folded)
        return msgspec.structs.replace(encoded, folded=folded)

    def _describe(self, folded: Folded) -> None:
        """Say how the value can be made again if it is lost with this node: of the same inputs, in one task."""
        used = [self._futures[position] for position in folded.used]
        payloads = {id(self._futures[position]): self._payloads[position] for position in folded.used}
        call = encode_call(([], self._operation, len(used), False, used), {}, None, Future)
        inputs = [payloads[id(future)] for future in call.deps]
        inline = sum(len(payload) for payload in inputs if isinstance(payload, bytes))
        if isinstance(call.payload, bytes) and len(call.payload) + inline <= INLINE_MAX * 4:
            folded.args = call.payload
            folded.inputs = [
                msgspec.structs.replace(payload, node=payload.node or self._home)
                if isinstance(payload, ObjectRef) else payload
                for payload in inputs
            ]  # fmt: skip


class _Value(msgspec.Struct):
    """A value of any kind, folded here."""

    value: Any


async def _ended(future: Future[Any]) -> None:
    """Wait for the end, not for the value.

    Raises:
        Exception: the future's error.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    waiter = _Arrivals(loop, ended.set)
    if future._attach(waiter):
        future._client.driver.awaiting(loop)
        try:
            await ended.wait()
        finally:
            future._detach(waiter)
    error = error_of(future)
    if error is not None:
        raise error
