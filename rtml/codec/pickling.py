"""Pickling with everything that is not plain data kept out of the stream: large buffers, dependencies, handles.

All three travel as protocol 5 *out-of-band buffers*. For a dependency (a future that becomes its value) or a handle (a
future that stays one) the stream has a marker, an empty buffer; when the stream is loaded, the iterator of buffers
yields the value or the new handle in the marker's place. `Pickled.slots` says what each position in that iteration is.
So the unpickler needs no context beside its own arguments, and no subclass.

Functions and classes that other processes cannot import (of `__main__`, local ones, lambdas) are pickled by value, by
cloudpickle, which is imported only when something is not plain data.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from rtml.codec.byvalue import reduction, with_slots
from rtml.errors import SerializationError

PROTOCOL: Final = 5

#: Smaller buffers stay inside the stream, in bytes: a copy of them is cheaper than a part of their own.
BUFFER_MIN: Final = 8 * 1024

#: Types that cannot contain anything, and that every process unpickles to the same.
SCALARS: Final = frozenset({int, float, str, bytes, bool, type(None), complex})

#: A slot that is the next buffer; n > 0 is dependency n - 1, n < 0 is handle -n - 1.
BUFFER: Final = 0


def same(value: Any) -> Any:
    """Its argument: what the reduction of a handle calls with the marker's replacement."""
    return value


class Pickled:
    """One pickle in the making, and what was kept out of its stream. Called with each buffer by the pickler."""

    __slots__ = ("_markers", "_numbers", "buffers", "handles", "leaving", "slots")

    def __init__(self, *, leaving: bool = False) -> None:
        #: The value outlives whoever holds it here: nothing in it may depend on this process.
        self.leaving = leaving
        #: The kind of each out-of-band item, in the order of the stream.
        self.slots: list[int] = []
        self.buffers: list[memoryview] = []
        #: Future objects that stay futures.
        self.handles: list[Any] = []
        # By id() of the marker; the list keeps them alive, so that no id is used twice.
        self._numbers: dict[int, int] = {}
        self._markers: list[pickle.PickleBuffer] = []

    def marker(self, number: int) -> pickle.PickleBuffer:
        """An object to pickle in the place of dependency or handle `number` (see `BUFFER`)."""
        marker = pickle.PickleBuffer(bytearray())
        self._markers.append(marker)
        self._numbers[id(marker)] = number
        return marker

    def handle(self, future: Any) -> pickle.PickleBuffer:
        """A marker for a future that stays one."""
        self.handles.append(future)
        return self.marker(-len(self.handles))

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer stays in the stream."""
        number = self._numbers.get(id(buffer))
        if number is not None:
            self.slots.append(number)
            return False
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: the pickler says so
            return True
        if raw.nbytes < BUFFER_MIN:
            return True
        self.slots.append(BUFFER)
        self.buffers.append(raw)
        return False


@functools.cache
def pickler_type() -> Any:
    """The pickler for anything: cloudpickle's, which also turns futures into handles."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc,unused-ignore]
        def __init__(self, file: io.BytesIO, pickled: Pickled, future_type: type | None) -> None:
            super().__init__(file, protocol=PROTOCOL, buffer_callback=pickled)
            self._pickled = pickled
            self._future_type = future_type

        def reducer_override(self, value: Any) -> Any:
            if self._future_type is not None and isinstance(value, self._future_type):
                # The dispatcher may have forgotten a future that has ended: its handle carries the end along.
                reduce_ended = getattr(value, "reduce_ended", None)
                ended = reduce_ended(self._pickled.leaving) if reduce_ended is not None else None
                if ended is not None and self._pickled.leaving:
                    return ended
                marker = self._pickled.handle(value)
                return ended or (same, (marker,))
            if isinstance(value, type):
                return with_slots(value, super().reducer_override(value))
            return reduction(value) or super().reducer_override(value)

    return Pickler


def dump(value: Any, pickled: Pickled, future_type: type | None = None) -> bytes:
    """The stream of any value; what is kept out of it goes to `pickled`. Raises whatever the value's classes raise."""
    file = io.BytesIO()
    pickler_type()(file, pickled, future_type).dump(value)
    return file.getvalue()


def load(stream: bytes | memoryview, items: Iterator[Any]) -> Any:
    """The value of a stream; `items` gives what was kept out of it.

    Raises:
        SerializationError: something in it cannot be made in this process.
    """
    try:
        return pickle.loads(stream, buffers=items)
    except SerializationError:
        raise
    except Exception as error:
        raise unpicklable(error) from error


def unpicklable(error: Exception) -> SerializationError:
    """The error for a value that this process cannot make."""
    return SerializationError(f"a value could not be unpickled in this process: {type(error).__name__}: {error}")


def out_of_band(
    slots: Sequence[int],
    buffers: Iterator[Any],
    deps: Sequence[Any],
    handles: Sequence[int],
    make_handle: Callable[[int], Any] | None,
) -> Iterator[Any]:
    """What the unpickler asks for, slot by slot. One handle is made only once, so that identities are kept."""
    made: dict[int, Any] = {}
    for slot in slots:
        if slot == BUFFER:
            yield next(buffers)
        elif slot > 0:
            yield deps[slot - 1]
        else:
            future = handles[-slot - 1]
            if future not in made:
                if make_handle is None:
                    raise SerializationError("the value contains futures, which cannot be handled here")
                made[future] = make_handle(future)
            yield made[future]
