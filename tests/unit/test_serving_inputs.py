"""From a program's signature to the arguments of a call."""

import base64
import functools
import json
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from rtml.errors import InvalidInput
from rtml.serving.inputs import ProgramInput

JSON = "application/json"


class Page(msgspec.Struct):
    text: str
    limit: Annotated[int, msgspec.Meta(ge=1)] = 10


@dataclass
class Point:
    x: float
    y: float = 0.0


class Words(TypedDict):
    words: list[str]


class Signal(msgspec.Struct):
    samples: np.ndarray[Any, Any]


async def read(image: bytes, language: str = "en", limit: int = 3) -> str:
    return ""


def take_struct(page: Page) -> None: ...


def take_dataclass(point: Point) -> None: ...


def take_typed_dict(words: Words) -> None: ...


def take_two(page: Page, *, boost: float = 1.0) -> None: ...


def take_list(numbers: list[int]) -> None: ...


def take_array(image: np.ndarray[Any, Any]) -> None: ...


def take_floats(x: npt.NDArray[np.float32], scale: float = 1.0) -> None: ...


def take_signal(signal: Signal) -> None: ...


def take_anything(x, y=2):  # type: ignore[no-untyped-def]
    ...


def take_nothing() -> None: ...


def call(program: Any, body: Any = b"", content_type: str = JSON, **query: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ProgramInput(program).decode(content_type, raw, query)


@pytest.mark.parametrize(
    "content_type", ["image/png", "application/octet-stream", "", "application/x-www-form-urlencoded"]
)
def test_a_body_that_is_not_json_goes_to_the_bytes_parameter(content_type: str) -> None:
    assert call(read, b"\x89PNG", content_type) == ((), {"image": b"\x89PNG"})


def test_other_parameters_come_from_the_query_string_beside_a_raw_body() -> None:
    assert call(read, b"x", "image/png", language="de", limit="7") == (
        (),
        {"image": b"x", "language": "de", "limit": 7},
    )
    with pytest.raises(InvalidInput, match=r"Expected `int`.*limit.*in the query string"):
        call(read, b"x", "image/png", limit="many")
    with pytest.raises(InvalidInput, match="unknown field `colour`"):
        call(read, b"x", "image/png", colour="red")


@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=utf-8", "application/vnd.x+json"])
def test_bytes_in_json_are_base64(content_type: str) -> None:
    body = {"image": base64.b64encode(b"\x00\xff").decode(), "limit": 4}
    assert call(read, body, content_type) == ((), {"image": b"\x00\xff", "limit": 4})


def test_a_single_record_is_the_whole_body() -> None:
    assert call(take_struct, {"text": "a"}) == ((Page("a"),), {})
    assert call(take_dataclass, {"x": 1}) == ((Point(1.0),), {})
    assert call(take_typed_dict, {"words": ["a"]}) == (({"words": ["a"]},), {})


def test_several_parameters_are_fields_of_the_body() -> None:
    assert call(take_two, {"page": {"text": "a"}, "boost": 2}) == ((), {"page": Page("a"), "boost": 2.0})
    assert call(take_list, {"numbers": [1, 2]}) == ((), {"numbers": [1, 2]})
    assert call(take_anything, {"x": {"any": None}}) == ((), {"x": {"any": None}})
    assert call(take_nothing) == ((), {})


def test_programs_without_a_raw_parameter_read_json_whatever_the_type_says() -> None:
    assert call(take_list, {"numbers": [1]}, "text/plain") == ((), {"numbers": [1]})


@pytest.mark.parametrize(
    ("program", "body", "message"),
    [
        (take_struct, {"text": 1}, "Expected `str`, got `int` - at `\\$.text`"),
        (take_struct, {"text": "a", "limit": 0}, "Expected `int` >= 1 - at `\\$.limit`"),
        (take_struct, [], "Expected `object`"),
        (take_struct, b"{", "no JSON"),
        (take_struct, b'{"text": "\xff"}', "no JSON|UTF-8|utf-8"),
        (take_list, b"[" * 100_000, "Expected `object`|no JSON"),
        (take_anything, b'{"x":' + b"[" * 100_000, "no JSON"),
        (take_list, {}, "missing required field `numbers`"),
        (take_list, {"numbers": [1], "more": 1}, "unknown field `more`"),
        (take_two, {"page": {"text": "a"}, "boost": "x"}, "Expected `float`, got `str` - at `\\$.boost`"),
        (read, {"image": "no base64!"}, "base64"),
        (take_floats, {"x": [[1], [1, 2]]}, "not an array of numbers.* - at `\\$.x`"),
        (take_floats, {"x": ["a"]}, "not an array of numbers"),
        (take_array, {"image": ["a"]}, "not an array of numbers"),
        (take_signal, {"samples": ["a"]}, "not an array of numbers"),
    ],
)
def test_bodies_that_do_not_fit(program: Any, body: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(program, body)


def test_arrays() -> None:
    _, found = call(take_floats, {"x": [[1, 2]], "scale": 2})
    assert found["x"].dtype == np.float32
    assert found["x"].tolist() == [[1, 2]]
    assert found["scale"] == 2
    _, found = call(take_floats, np.array([1, 2], "f4").tobytes(), "application/octet-stream", scale="3")
    assert found["x"].tolist() == [1, 2]
    assert found["scale"] == 3
    _, found = call(take_array, b"\x89PNG", "image/png")
    assert found["image"].tolist() == list(b"\x89PNG")
    assert found["image"].dtype == np.uint8
    with pytest.raises(InvalidInput, match="5 bytes are no whole number of float32"):
        call(take_floats, b"12345", "application/octet-stream")
    (signal,), _ = call(take_signal, {"samples": [1.5]})
    assert signal.samples.tolist() == [1.5]


def test_decorated_programs_show_their_own_signature() -> None:
    @functools.wraps(take_struct)
    def wrapped(*args: Any, **kwargs: Any) -> None: ...

    assert call(wrapped, {"text": "a"}) == ((Page("a"),), {})


def positional(x: int, /) -> None: ...


def variadic(*xs: int) -> None: ...


def unresolved(x: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("program", [positional, variadic, unresolved])
def test_signatures_that_cannot_be_served(program: Any) -> None:
    with pytest.raises(TypeError, match="cannot"):
        ProgramInput(program)


def test_two_raw_parameters_take_json_only() -> None:
    def compare(left: bytes, right: bytes) -> None: ...

    with pytest.raises(InvalidInput):
        call(compare, b"\x89PNG", "image/png")
    assert call(compare, {"left": "AA==", "right": "AQ=="}) == ((), {"left": b"\0", "right": b"\1"})
