"""Every message survives the wire, whatever is in it; and nothing but messages is accepted."""

from __future__ import annotations

import types
import typing
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtml import messages
from rtml.messages import Message, decode, encode, session_of, task_id

KINDS = typing.get_args(Message)


def strategy(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        base, bounds = arguments
        if base is int:
            return st.integers(bounds.ge, bounds.le)
        return st.floats(bounds.ge, bounds.le)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([strategy(argument) for argument in arguments])
    if origin is list:
        return st.lists(strategy(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(strategy(arguments[0]), strategy(arguments[1]), max_size=3)
    if origin is tuple:
        return st.tuples(*[strategy(argument) for argument in arguments])
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = {field.name: strategy(field.type) for field in msgspec.structs.fields(kind)}
        return st.builds(kind, **fields)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
        type(None): st.none(),
    }
    return plain[kind]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=30)
    @given(st.lists(strategy(kind), min_size=1, max_size=2))
    def survives(sent: list[Message]) -> None:
        assert decode(encode(sent)) == sent

    survives()


@given(st.binary(max_size=200))
def test_garbage_is_refused_in_one_way(frame: bytes) -> None:
    try:
        decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass


@pytest.mark.parametrize("cpu", [-1.0, float("nan"), float("inf")])
def test_amounts_that_would_spoil_the_accounts_are_refused(cpu: float) -> None:
    frame = encode([messages.Define([messages.Function(1, "f", "m:f", options=messages.Options(cpu=cpu))])])
    with pytest.raises(msgspec.ValidationError, match="Expected `float`"):
        decode(frame)


@given(st.lists(strategy(messages.Task), min_size=1, max_size=2), st.data())
def test_a_damaged_frame_is_refused_or_decoded(tasks: list[messages.Task], data: st.DataObject) -> None:
    frame = bytearray(encode([messages.Submit(tasks)]))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(frame))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_newer_peers_may_append_fields(kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=20)
    @given(strategy(kind))
    def accepted(message: Message) -> None:
        array = cast("list[Any]", msgspec.msgpack.decode(encode([message])))
        array[0].append({"a field": "of the future"})
        assert decode(msgspec.msgpack.encode(array)) == [message]

    accepted()


def test_tags_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(tags)


@given(st.integers(0, messages.SESSION_MAX), st.integers(0, 2**32 - 1))
def test_task_ids_name_their_session(session: int, sequence: int) -> None:
    assert session_of(task_id(session, sequence)) == session
    assert task_id(session, sequence) < 2**63
