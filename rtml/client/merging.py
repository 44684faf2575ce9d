"""Runs on workers: one step of a reduction, many arrays or values into one.

An array is made block by block in shared memory, as far as its sources are there, and can be read by the next step
from its first block on: so a chain of nodes takes little longer than the transfer between two of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import msgspec

from rtml.client.context import current_client
from rtml.client.folding import Feed, Operation, UnlikeError, Whole, alike, fold_into
from rtml.client.following import Following, Growing
from rtml.client.functions import task
from rtml.codec.arrays import grow_tensor
from rtml.errors import ObjectLost, RtmlError
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.store import Store

#: Bytes of small arrays that are folded without a thread.
_QUICK: Final = 512 * 1024
#: Bytes of a result after which others are told of more.
_TOLD: Final = 64 * 1024


class Made(msgspec.Struct, frozen=True):
    """A source that another step makes: it may not be complete."""

    ref: ObjectRef


class UnreadableError(RtmlError):
    """A source of a step cannot be had.

    Args:
        place: its place among the sources.
        reason: why.
    """

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(place, reason)
        self.place = place


class Merge:
    """Many arrays into one.

    Args:
        operation: elementwise.
        sources: arrays, payloads of arrays, or what other steps make.
        divide: by what to divide the result; 0: by nothing.
    """

    def __init__(self, operation: Operation, sources: Sequence[Any], divide: int = 0) -> None:
        client = current_client()
        assert client is not None, "this runs in an executor"
        self._client = client
        self._store: Store = client.store
        self._operation = operation
        self._sources = sources
        self._divide = divide
        self._following: list[Following] = []
        #: The array that is made; and what the store has of it, if it is large.
        self.array: Any = None
        self.ref: ObjectRef | None = None
        self._over = self._unwanted = False
        #: Others can read it, complete or not; or it will never be there.
        self.shown = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Until all of it is there.

        Raises:
            UnlikeError: they are no arrays of one shape.
            UnreadableError: one cannot be had.
            LimitExceeded: the store is full.
        """
        try:
            if self._is_quick():
                self._merge()
            else:
                await in_thread(self._run)
        except asyncio.CancelledError:
            self._unwanted = True
            for following in list(self._following):
                following.stop()
            if self._over:
                self.free()
            raise
        finally:
            self.shown.set()

    def _run(self) -> None:
        try:
            self._merge()
        finally:
            self._over = True
            if self._unwanted:
                self.free()

    def _is_quick(self) -> bool:
        """Whether a thread would take longer."""
        small = sum(len(one) if isinstance(one, bytes) else _QUICK for one in self._sources) < _QUICK
        return small and self._operation.function is None

    def _merge(self) -> None:
        feeds: list[Feed] = []
        try:
            for place, source in enumerate(self._sources):
                try:
                    feeds.append(self._feed(source))
                except ObjectLost as error:
                    raise UnreadableError(place, str(error)) from None
            arrays = [feed.array for feed in feeds]
            alike(arrays)
            like = _Like(self._operation.partial([array.dtype for array in arrays]), arrays[0].shape)
            if like.nbytes <= INLINE_MAX:
                self.array = like.empty()
                self._fold(feeds, None)
            else:
                self._grow(feeds, like)
        finally:
            for following in self._following:
                following.close()
            self._following.clear()

    def _feed(self, source: Any) -> Feed:
        if isinstance(source, Made) or self._store.is_far(source):
            following = Following(self._store, source.ref if isinstance(source, Made) else source, keep=False)
            self._following.append(following)
            if self._unwanted:
                raise ObjectLost("nobody wants it any more")
            return following
        if isinstance(source, bytes | ObjectRef):
            source = self._client.decode(source)
        return Whole(source)

    def _grow(self, feeds: list[Feed], like: _Like) -> None:
        incoming, self.array, start = grow_tensor(like, self._store)
        growing = None
        try:
            growing = Growing(self._store, incoming, start)
            if growing.shown:
                self.ref = growing.ref
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                    self._loop.call_soon_threadsafe(self.shown.set)
            itemsize, size, told = self.array.itemsize, incoming.size, start

            def progress(done: int) -> None:
                nonlocal told
                upto = start + done * itemsize
                if upto - told >= _TOLD and upto < size:
                    told = upto
                    growing.grown(upto)

            self._fold(feeds, progress)
            growing.grown(size)
        except BaseException:
            self.ref = None
            if growing is not None:
                growing.stop()
            self._store.abandon(incoming)
            raise
        growing.stop()
        self._store.publish(incoming)
        self.ref = growing.ref

    def _fold(self, feeds: list[Feed], progress: Callable[[int], None] | None) -> None:
        try:
            fold_into(self.array.reshape(-1), feeds, self._operation, self._divide, progress)
        except ObjectLost as error:
            lost = [place for place, feed in enumerate(feeds) if isinstance(feed, Following) and feed.lost]
            raise UnreadableError(lost[0] if lost else 0, str(error)) from None

    def free(self) -> None:
        """Nobody needs what was made."""
        if self.ref is not None:
            self._store.free(self.ref.id)


class _Like:
    """What there is to know of an array before it is made."""

    def __init__(self, dtype: Any, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.ndim = len(shape)
        self.nbytes = int(dtype.itemsize)
        for length in shape:
            self.nbytes *= length

    def empty(self) -> Any:
        import numpy

        return numpy.empty(self.shape, self.dtype)


async def in_thread(body: Callable[[], None]) -> None:
    """Run it in a thread of its own, not of a pool: what it waits for may need a thread, too.

    Raises:
        BaseException: what it raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            body()
        except BaseException as caught:  # noqa: BLE001 - of the user's function, too
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="rtml-merge", daemon=True).start()
    await done


@task(name="rtml.merge", retries=0)
async def merge_here(operation: Operation, sources: list[Any]) -> AsyncIterator[ObjectRef | None]:
    """A step on another node than the reduction's.

    It yields where its array lies, as soon as that can be read, and None when it is complete; it keeps that until the
    stream is closed.
    """
    merge = Merge(operation, sources)
    running = asyncio.create_task(merge.run())
    try:
        await merge.shown.wait()
        if merge.ref is None:
            await running
            raise UnlikeError  # so small that it is with the reduction already
        yield merge.ref
        await running
        yield None
        await asyncio.Event().wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        merge.free()


@task(name="rtml.merge", retries=0)
async def merge_values(operation: Operation, values: list[Any]) -> Any:
    """The same for values of any kind: returns what they have become."""
    return await asyncio.to_thread(operation.fold, values)


@task(name="rtml.hold", retries=0)
async def hold_here(source: Made) -> bool:
    """Have a copy of an array on this node, while it is still being made elsewhere."""
    client = current_client()
    assert client is not None, "this runs in an executor"
    followings: list[Following] = []

    def follow() -> None:
        following = Following(client.store, source.ref)
        followings.append(following)
        following.wait(following.flat.size - 1)
        following.close()

    try:
        await in_thread(follow)
    finally:
        for following in followings:
            following.stop()
    return True
