r"""Calls and values as payloads: inline bytes up to `INLINE_MAX`, else an object in the store.

The first byte says what a payload is:

    N      None
    \x80   a pickle, protocol 5, of plain Python (every such pickle begins with this byte)
    T      one numeric numpy array: dtype, shape, data; readable in any language
    X      a pickle with items kept out of its stream (`rtml.codec.pickling`): an envelope, the stream, the buffers
    F      of a call: its one argument is its one dependency
    D      data without a pickle, for those who unpickle nothing (`rtml.codec.data`): msgpack

In the store the first part is as above, and what follows inline (array data, buffers) are parts of their own. Arrays
out of the store are read-only views of the shared memory; arrays that came inline are copies, and writable.

A call's payload is the pair (args, kwargs); that of a call with nothing but one array is the array's. Futures among the
arguments, at any depth of exactly list, tuple and dict, are dependencies: their values take their place when the call
is decoded. Futures anywhere else stay futures.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, cast

import msgspec

from rtml.codec import data, explain
from rtml.codec.arrays import ALIGNMENT, TENSOR, array_facts, decode_tensor, encode_tensor, is_tensor
from rtml.codec.pickling import PROTOCOL, SCALARS, Pickled, dump, load, out_of_band, unpicklable
from rtml.errors import RtmlError, SerializationError
from rtml.messages import INLINE_MAX, Folded, ObjectRef
from rtml.parts import Buffer
from rtml.store import Store

_NONE: Final = b"N"
_PICKLE: Final = b"\x80"
_ENVELOPE: Final = b"X"
_FUTURE: Final = b"F"

_CONTAINERS: Final = frozenset({list, tuple, dict})
_LENGTH: Final = struct.Struct("<I")

#: Tags of what `decode_data` takes; the empty one of an empty payload, for the better message.
_WITHOUT_PICKLES: Final = (_NONE, TENSOR, data.DATA, b"")

MakeHandle = Callable[[int], Any]


class EncodedValue(msgspec.Struct, frozen=True):
    """A value ready to be sent, and its declared facts (see `rtml.messages.TaskResult`)."""

    payload: bytes | ObjectRef
    #: Ids of the futures contained in it.
    handles: Sequence[int] = ()
    batch_key: str = ""
    items: int = 1
    #: See `TaskResult`.
    folded: Folded | None = None


class EncodedCall(msgspec.Struct, frozen=True):
    """A call's arguments ready to be sent, and their declared facts (see `rtml.messages.Task`)."""

    payload: bytes | ObjectRef
    #: The futures to be replaced by their values, each once, in the order that `decode_call` expects their values.
    deps: Sequence[Any] = ()
    #: The futures that stay futures.
    handles: Sequence[Any] = ()
    #: For each argument: "" for a plain one, "dtype(shape without the first dimension)" for an array, "?" for a
    #: dependency (whose own key takes that place); joined by "|", keywords sorted, as "name=key". "" if all are plain.
    batch_key: str = ""
    items: int = 1


class _Envelope(msgspec.Struct, array_like=True):
    stream: int
    slots: list[int]
    handles: list[int]
    #: Of the buffers, inline only.
    sizes: list[int]


_encode_envelope = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(_Envelope).decode

_NO_ARGUMENTS: Final = EncodedCall(pickle.dumps(((), {}), PROTOCOL))
_ENCODED_NONE: Final = EncodedValue(_NONE)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], store: Store | None, future_type: type | None = None
) -> EncodedCall:
    """Encode the arguments of a call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        store: takes what is larger than `INLINE_MAX`; None keeps everything inline.
        future_type: instances of it have an integer `id` and are dependencies or handles.

    Raises:
        SerializationError: an argument cannot be pickled; the message names it.
        LimitExceeded: the store is full.
    """
    if len(args) == 1 and not kwargs:
        only = args[0]
        simple = type(only) in SCALARS or _is_simple(args)
        if not simple and future_type is not None and isinstance(only, future_type):
            return EncodedCall(_FUTURE, args, (), "?")
        if not simple and is_tensor(only) and only.flags.c_contiguous:
            batch_key, items = array_facts(only)
            return EncodedCall(encode_tensor(only, store), (), (), batch_key, items or 1)
    else:
        simple = _is_simple(args) and (not kwargs or _is_simple(kwargs.values()))
    if simple:
        if not args and not kwargs:
            return _NO_ARGUMENTS
        payload = pickle.dumps((args, kwargs), PROTOCOL)
        if len(payload) <= INLINE_MAX or store is None:
            return EncodedCall(payload)
        return EncodedCall(store.put([payload]))
    walk = _Walk(future_type)
    try:
        replaced = (
            tuple([walk.replace(value) for value in args]),
            {name: walk.replace(value) for name, value in kwargs.items()},
        )
    except RecursionError:
        raise SerializationError("the arguments are nested too deeply") from None
    if walk.cyclic and walk.deps:
        raise SerializationError("a container that contains itself cannot contain futures: pass them apart from it")
    pickled = walk.pickled
    try:
        if walk.plain:
            stream = pickle.dumps(replaced, PROTOCOL, buffer_callback=pickled)
        else:
            stream = dump(replaced, pickled, future_type)
    except Exception as error:
        raise _name_argument(args, kwargs, error, future_type) from error
    batch_key, items = _call_facts(args, kwargs, future_type) if walk.deps or walk.tensors else ("", 1)
    return EncodedCall(_place(stream, pickled, store), walk.deps, pickled.handles, batch_key, items)


def encode_value(
    value: Any,
    store: Store | None,
    future_type: type | None = None,
    what: str = "the result",
    *,
    leaving: bool = False,
) -> EncodedValue:
    """Encode one value: a result, or what is put.

    Args:
        value: anything that can be pickled, or what this function returned for it.
        store: takes what is larger than `INLINE_MAX`; None keeps everything inline.
        future_type: its instances travel as handles.
        what: how an error message calls the value.
        leaving: the futures in it that have ended are not kept alive here: they take their values along.

    Raises:
        SerializationError: the value cannot be pickled; the message names the part.
        LimitExceeded: the store is full.
    """
    if value is None:
        return _ENCODED_NONE
    if type(value) in SCALARS or _is_simple((value,)):
        payload = pickle.dumps(value, PROTOCOL)
        if len(payload) <= INLINE_MAX or store is None:
            return EncodedValue(payload)
        return EncodedValue(store.put([payload]))
    if is_tensor(value):
        batch_key, items = array_facts(value)
        return EncodedValue(encode_tensor(value, store), (), batch_key, items)
    if isinstance(value, EncodedValue):
        return value  # by the function itself
    pickled = Pickled(leaving=leaving)
    try:
        stream = dump(value, pickled, future_type)
    except Exception as error:
        raise explain.cannot_pickle(what, value, error, future_type) from error
    return EncodedValue(_place(stream, pickled, store), [future.id for future in pickled.handles])


def encode_data(value: Any, store: Store | None, what: str = "the result") -> EncodedValue:
    """Encode one value for a reader that unpickles nothing (`decode_data`).

    Args:
        value: arrays, numbers, text, bytes, dates, in lists, tuples, dicts, sets, structs and dataclasses.
        store: takes what is larger than `INLINE_MAX`; None keeps everything inline.
        what: how an error message calls the value.

    Raises:
        SerializationError: the value contains anything else; the message names the part.
        LimitExceeded: the store is full.
    """
    if value is None:
        return _ENCODED_NONE
    if is_tensor(value):
        batch_key, items = array_facts(value)
        return EncodedValue(encode_tensor(value, store), (), batch_key, items)
    if isinstance(value, EncodedValue):
        return value
    try:
        return EncodedValue(data.place(value, store))
    except RtmlError:
        raise
    except Exception as error:  # noqa: BLE001 - properties of user classes raise anything
        raise explain.no_data(what, value, error) from None


class _Walk:
    """Looks through the arguments' containers for futures, and puts markers in their places, in copies."""

    __slots__ = ("_future_type", "_known", "_markers", "cyclic", "deps", "pickled", "plain", "tensors")

    def __init__(self, future_type: type | None) -> None:
        self._future_type = future_type
        self._markers: dict[int, pickle.PickleBuffer] = {}
        # What became of each container; None while it is being looked through. Keeps shared containers shared.
        self._known: dict[int, Any] = {}
        self.pickled = Pickled()
        self.deps: list[Any] = []
        #: Nothing but containers, scalars and numeric arrays so far: no need for a pickler of our own.
        self.plain = True
        self.tensors = False
        self.cyclic = False

    def replace(self, value: Any) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind in _CONTAINERS:
            return self._replace_in(kind, value)
        if self._future_type is not None and issubclass(kind, self._future_type):
            return self._dependency(value)
        if is_tensor(value):
            self.tensors = True
            # numpy pickles what is not contiguous through two more copies (crops of images are of this kind).
            flags = value.flags
            return value if flags.c_contiguous or flags.f_contiguous else value.copy(order="C")
        self.plain = False
        return value

    def _replace_in(self, kind: type, value: Any) -> Any:
        children = value.values() if kind is dict else value
        if not self._concerns(set(map(type, children))):
            if kind is dict and self.plain and not SCALARS.issuperset(map(type, value)):
                self.plain = False
            return value
        key = id(value)
        if key in self._known:
            if self._known[key] is None:
                self.cyclic = True
                return value
            return self._known[key]
        self._known[key] = None
        if kind is dict:
            if not SCALARS.issuperset(map(type, value)):
                self.plain = False
            result: Any = {name: self.replace(child) for name, child in value.items()}
            changed = any(result[name] is not child for name, child in value.items())
        else:
            result = kind([self.replace(child) for child in value])
            changed = any(new is not old for new, old in zip(result, value))
        result = result if changed else value
        self._known[key] = result
        return result

    def _concerns(self, kinds: set[type]) -> bool:
        """Whether children of these types must be looked at one by one."""
        if SCALARS.issuperset(kinds):
            return False
        if not _CONTAINERS.isdisjoint(kinds):
            return True
        future_type = self._future_type
        if future_type is not None and any(issubclass(kind, future_type) for kind in kinds):
            return True
        # Arrays may be numeric, which only their values tell; anything else is not plain.
        numpy = sys.modules.get("numpy")
        if numpy is not None and numpy.ndarray in kinds:
            return True
        self.plain = False
        return False

    def _dependency(self, future: Any) -> pickle.PickleBuffer:
        marker = self._markers.get(id(future))
        if marker is None:
            self.deps.append(future)
            marker = self._markers[id(future)] = self.pickled.marker(len(self.deps))
        return marker


def _is_simple(values: Iterable[Any]) -> bool:
    """Whether these are scalars and flat containers of scalars, which the plain pickler does at once."""
    for value in values:
        kind = type(value)
        if kind in SCALARS:
            continue
        if kind is list or kind is tuple:
            if not SCALARS.issuperset(map(type, value)):
                return False
        elif kind is not dict or not (
            SCALARS.issuperset(map(type, value)) and SCALARS.issuperset(map(type, value.values()))
        ):
            return False
    return True


def _place(stream: bytes, pickled: Pickled, store: Store | None) -> bytes | ObjectRef:
    """The payload of a stream and what was kept out of it, inline or in the store."""
    buffers = pickled.buffers
    size = len(stream) + sum([buffer.nbytes for buffer in buffers])
    inline = size <= INLINE_MAX or store is None
    if not pickled.slots:
        return stream if inline else cast(Store, store).put([stream])
    sizes = [buffer.nbytes for buffer in buffers] if inline else []
    handles = [future.id for future in pickled.handles]
    envelope = _encode_envelope(_Envelope(len(stream), pickled.slots, handles, sizes))
    head = _ENVELOPE + _LENGTH.pack(len(envelope)) + envelope + stream
    if not inline:
        return cast(Store, store).put([head, *buffers])
    parts: list[Buffer] = [head]
    at = len(head)
    for buffer in buffers:
        gap = -at % ALIGNMENT
        parts += (bytes(gap), buffer)
        at += gap + buffer.nbytes
    return b"".join(parts)


def _name_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, future_type: type | None
) -> SerializationError:
    named = [(f"argument {index}", value) for index, value in enumerate(args, 1)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for what, value in named:
        found = explain.failure(value, future_type)
        if found is not None:
            return explain.cannot_pickle(what, value, found, future_type)
    return SerializationError(f"the arguments cannot be pickled together: {error}")


# --- arrays -----------------------------------------------------------------------------------------------------------


def _call_facts(args: tuple[Any, ...], kwargs: dict[str, Any], future_type: type | None) -> tuple[str, int]:
    items = 0
    known = False
    keys = []
    for name, value in (*(("", value) for value in args), *sorted(kwargs.items())):
        key = ""
        if is_tensor(value):
            key, count = array_facts(value)
            items = items or count
            known = True
        elif future_type is not None and isinstance(value, future_type):
            key = "?"
            known = True
        keys.append(f"{name}={key}" if name else key)
    return ("|".join(keys), items or 1) if known else ("", 1)


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_call(
    payload: bytes | ObjectRef, deps: Sequence[Any], store: Store | None, make_handle: MakeHandle | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call.

    Args:
        payload: from `encode_call`.
        deps: the values of its `deps`, in their order.
        store: where an `ObjectRef` is looked up.
        make_handle: makes a future of an id, for those that stay futures.

    Raises:
        SerializationError: something cannot be unpickled here.
        ObjectLost: the object is gone.
    """
    if payload == _NO_ARGUMENTS.payload:
        return (), {}
    if payload == _FUTURE:
        return (deps[0],), {}
    if type(payload) is bytes:
        tag = payload[:1]
        if tag == _PICKLE:
            try:
                call: tuple[tuple[Any, ...], dict[str, Any]] = pickle.loads(payload)
            except Exception as error:
                raise unpicklable(error) from error
            return call
        if tag == TENSOR:
            return (_inline_tensor(payload),), {}
    found = _decode(payload, deps, store, make_handle)
    # Not a pair but one array: the only argument.
    return found if type(found) is tuple else ((found,), {})


def decode_value(payload: bytes | ObjectRef, store: Store | None, make_handle: MakeHandle | None = None) -> Any:
    """The value of a payload of `encode_value`; arrays out of the store are read-only views. Else as `decode_call`.

    Raises:
        SerializationError: something cannot be unpickled here.
        ObjectLost: the object is gone.
    """
    if payload == _NONE:
        return None
    if type(payload) is bytes and payload[:1] == _PICKLE:
        try:
            return pickle.loads(payload)
        except Exception as error:
            raise unpicklable(error) from error
    return _decode(payload, (), store, make_handle)


def decode_data(payload: bytes | ObjectRef, store: Store | None) -> Any:
    """The value of a payload of `encode_data`: nothing is unpickled, no code of the sender can run.

    Tuples and sets have become lists, structs and dataclasses dicts, dates without a time zone text.

    Raises:
        SerializationError: the payload was encoded in another way, or is damaged.
        ObjectLost: the object is gone.
    """
    if type(payload) is bytes and payload[:1] == TENSOR:
        return _inline_tensor(payload)
    head, shared, inline = _open(payload, store)
    if head[:1] not in _WITHOUT_PICKLES:
        raise SerializationError("the value is a pickle, and this process unpickles nothing")
    return _decode_plain(head, shared, inline)


def _inline_tensor(payload: bytes) -> Any:
    try:
        return decode_tensor(payload, None)
    except (struct.error, IndexError, TypeError, ValueError) as error:
        raise _damaged(error) from error


def _open(payload: bytes | ObjectRef, store: Store | None) -> tuple[bytes | memoryview, list[memoryview], bool]:
    """The first part of a payload, the parts behind it, and whether all of it is in the first."""
    if not isinstance(payload, ObjectRef):
        return payload, [], True
    if store is None:
        raise SerializationError("the value lies in shared memory, which this process has no access to")
    head, *shared = store.get(payload)
    return head, shared, False


def _decode(
    payload: bytes | ObjectRef, deps: Sequence[Any], store: Store | None, make_handle: MakeHandle | None
) -> Any:
    head, shared, inline = _open(payload, store)
    tag = head[:1]
    if tag == _PICKLE:
        return load(head, iter(()))
    if tag != _ENVELOPE:
        return _decode_plain(head, shared, inline)
    try:
        stream, items = _open_envelope(memoryview(head), shared, inline, deps, make_handle)
    except (struct.error, msgspec.DecodeError, IndexError, TypeError, ValueError) as error:
        raise _damaged(error) from error
    return load(stream, items)


def _decode_plain(head: bytes | memoryview, shared: list[memoryview], inline: bool) -> Any:
    """The value of a payload without a pickle."""
    tag = head[:1]
    try:
        if tag == TENSOR:
            return decode_tensor(head, None if inline else shared[0])
        if tag == data.DATA:
            return data.unpack(memoryview(head)[1:], shared)
    except (struct.error, msgspec.MsgspecError, IndexError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(error) from error
    if head == _NONE:
        return None
    raise SerializationError(f"no payload of this version of rtml: it begins with {bytes(head[:4])!r}")


def _damaged(error: BaseException) -> SerializationError:
    return SerializationError(f"a damaged payload: {error}")


def _open_envelope(
    head: memoryview, shared: list[memoryview], inline: bool, deps: Sequence[Any], make_handle: MakeHandle | None
) -> tuple[memoryview, Iterator[Any]]:
    start = 1 + _LENGTH.size
    (length,) = _LENGTH.unpack_from(head, 1)
    envelope = _decode_envelope(head[start : start + length])
    start += length
    stream = head[start : start + envelope.stream]
    buffers: list[Any] = list(shared)
    if inline:
        at = start + envelope.stream
        for size in envelope.sizes:
            at += -at % ALIGNMENT
            buffers.append(bytearray(head[at : at + size]))
            at += size
    return stream, out_of_band(envelope.slots, iter(buffers), deps, envelope.handles, make_handle)
