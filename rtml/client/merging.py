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
from rtml.client.folding import Feed, MisguessedError, Operation, UnlikeError, Whole, alike, fold_into
from rtml.client.following import Following, Growing
from rtml.client.functions import task
from rtml.codec.arrays import grow_tensor
from rtml.errors import ObjectLost, RtmlError
from rtml.messages import INLINE_MAX, ObjectRef
from rtml.store import Store
from rtml.transfer.pulling import portion

#: Bytes of small arrays that are folded without a thread.
_QUICK: Final = 512 * 1024


class Made(msgspec.Struct, frozen=True):
    """A source that another step makes under a name: it may not be complete, or not even begun.

    Args:
        node: the data endpoint of the node where it is made.
        name: what it is called there.
        seconds: within which it must have begun.
    """

    node: str
    name: int
    seconds: float


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
        name: what others call the result, who wait for it already; 0: nobody does.
        eager: begin the result before the sources are seen that come from elsewhere, as if they were like those here.
    """

    def __init__(
        self, operation: Operation, sources: Sequence[Any], divide: int = 0, name: int = 0, eager: bool = True
    ) -> None:
        client = current_client()
        assert client is not None, "this runs in an executor"
        self._client = client
        self._store: Store = client.store
        self._operation = operation
        self._sources = sources
        self._divide = divide
        self._name = name
        self._eager = eager
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
        feeds = [self._here(place) for place in range(len(self._sources))]
        growth = None
        try:
            guessed = self._guess(feeds) if self._eager else None
            if guessed is not None and guessed.nbytes > INLINE_MAX:
                growth = self._begin(guessed)
            there = [feed or self._follow(place) for place, feed in enumerate(feeds)]
            arrays = [feed.array for feed in there]
            alike(arrays)
            like = _Like(self._operation.partial([array.dtype for array in arrays]), arrays[0].shape)
            if guessed is not None and (like.dtype, like.shape) != (guessed.dtype, guessed.shape):
                raise MisguessedError
            if like.nbytes <= INLINE_MAX:
                self.array = like.empty()
                self._fold(there, None)
            else:
                growth = growth or self._begin(like)
                self._fold(there, growth.progress)
                growth.end()
                self.ref = growth.ref
        except BaseException:
            self.ref = None
            if growth is not None:
                growth.abandon()
            raise
        finally:
            for following in self._following:
                following.close()
            self._following.clear()

    def _here(self, place: int) -> Feed | None:
        """The source, if it is on this node and complete."""
        source = self._sources[place]
        if isinstance(source, Made) or self._store.is_far(source):
            return None
        try:
            return Whole(self._client.decode(source) if isinstance(source, bytes | ObjectRef) else source)
        except ObjectLost as error:
            raise UnreadableError(place, str(error)) from None

    def _guess(self, feeds: Sequence[Feed | None]) -> _Like | None:
        """The result, if the sources that were not seen yet are like those that are here."""
        arrays = [feed.array for feed in feeds if feed is not None]
        if not arrays:
            return None
        alike(arrays)
        dtypes = [array.dtype for array in arrays]
        folded = self._operation.partial([dtypes[0], dtypes[0]])
        for feed, source in zip(feeds, self._sources):
            if feed is None:
                dtypes.append(folded if isinstance(source, Made) else dtypes[0])
        return _Like(self._operation.partial(dtypes), arrays[0].shape)

    def _follow(self, place: int) -> Feed:
        source = self._sources[place]
        name, seconds, ref = 0, 0.0, source
        if isinstance(source, Made):
            name, seconds, ref = source.name, source.seconds, ObjectRef(0, 0, "", source.node)
        try:
            if self._unwanted:
                raise ObjectLost("nobody wants it any more")
            return Following(self._store, ref, False, name, seconds, began=self._following.append)
        except ObjectLost as error:
            raise UnreadableError(place, str(error)) from None

    def _begin(self, like: _Like) -> _Growth:
        growth = _Growth(self._store, like, self._name)
        self.array = growth.array
        if growth.shown:
            self.ref = growth.ref
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                self._loop.call_soon_threadsafe(self.shown.set)
        return growth

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


def folded_here(operation: Operation, values: list[Any]) -> Any:
    """The result of a reduction of values that are all here, as its steps would have made it."""
    count = len(values)
    if operation.elementwise:
        with contextlib.suppress(UnlikeError):
            alike(values)
            out = _Like(operation.partial([array.dtype for array in values]), values[0].shape).empty()
            divide = count if operation.name == "mean" and operation.function is None else 0
            fold_into(out.reshape(-1), [Whole(array) for array in values], operation, divide)
            return out
    return operation.finish(operation.fold(values), count)


class _Growth:
    """The result, in the store, while it is made."""

    def __init__(self, store: Store, like: _Like, name: int) -> None:
        self._store = store
        self._incoming, self.array, self._start = grow_tensor(like, store)
        try:
            self._growing = Growing(store, self._incoming, self._start, name)
        except BaseException:
            store.abandon(self._incoming)
            raise
        self.ref = self._growing.ref
        #: Others can read it.
        self.shown = self._growing.shown
        self._told = self._start
        #: Bytes after which others are told of more: each portion of a source is one of the result.
        self._least = portion(self._incoming.size) // 2

    def progress(self, done: int) -> None:
        """So many elements are there."""
        upto = self._start + done * int(self.array.itemsize)
        if upto - self._told >= self._least and upto < self._incoming.size:
            self._told = upto
            self._growing.grown(upto)

    def end(self) -> None:
        """All of it is."""
        self._growing.grown(self._incoming.size)
        self._growing.stop()
        self._store.publish(self._incoming)

    def abandon(self) -> None:
        """It will not be."""
        self._growing.stop()
        self._store.abandon(self._incoming)


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
async def merge_here(operation: Operation, sources: list[Any], name: int, eager: bool) -> AsyncIterator[None]:
    """A step on another node than the reduction's, of what lies there: yields when it is complete.

    It keeps that until the stream is closed.
    """
    merge = Merge(operation, sources, name=name, eager=eager)
    try:
        await _kept(merge)
        yield
        await asyncio.Event().wait()
    finally:
        merge.free()


@task(name="rtml.merge", retries=0)
async def merge_on(operation: Operation, sources: list[Any], name: int, eager: bool) -> None:
    """The same for a step that is part of a plan between nodes: nobody waits for its end, only for its errors."""
    merge = Merge(operation, sources, name=name, eager=eager)
    try:
        await _kept(merge)
        await asyncio.Event().wait()
    finally:
        merge.free()


async def _kept(merge: Merge) -> None:
    await merge.run()
    if merge.ref is None:
        raise UnlikeError  # so small that it is with the reduction already


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
        ref = ObjectRef(0, 0, "", source.node)
        following = Following(client.store, ref, True, source.name, source.seconds, began=followings.append)
        following.wait(following.flat.size - 1)
        following.close()

    try:
        await in_thread(follow)
    finally:
        for following in followings:
            following.stop()
    return True
