"""Results of graph programs as HTTP bodies, and what a gateway believes of what executors send."""

import asyncio
import datetime
import pickle
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

import rtml
from rtml import codec
from rtml.errors import DeadlineExceeded, InvalidInput, SerializationError, TaskError
from rtml.messages import ErrorInfo, Function
from rtml.serving.engine import GatewayClient, RemoteError
from rtml.serving.http import kind_of, status_of
from rtml.serving.results import Content, Served, ServedAsync, served, to_content


@dataclass
class Point:
    x: float


class Page(msgspec.Struct):
    lines: list[str]
    scores: Any = None


@rtml.task(name="the page reader", priority=3)
async def read(page: str) -> Page:
    return Page([page])


@rtml.task
def plain(x: int) -> int:
    return x + 1


@pytest.mark.parametrize(
    ("value", "body"),
    [
        (Page(["a"], np.array([[1, 2]], "i1")), b'{"lines":["a"],"scores":[[1,2]]}'),
        (Point(1.5), b'{"x":1.5}'),
        ({"at": datetime.date(2024, 1, 2), "n": np.int64(3)}, b'{"at":"2024-01-02","n":3}'),
        ((1, None), b"[1,null]"),
        (None, b"null"),
        (float("nan"), b"null"),
    ],
)
def test_results_become_json(value: Any, body: bytes) -> None:
    assert to_content(value) == (body, "application/json")


@pytest.mark.parametrize("value", [b"ab", bytearray(b"ab"), memoryview(b"ab")])
def test_bytes_stay_bytes(value: Any) -> None:
    assert to_content(value) == (b"ab", "application/octet-stream")
    assert to_content(Content(value, "image/png")) == (b"ab", "image/png")


def test_what_has_no_json_form_is_named() -> None:
    with pytest.raises(TypeError, match="a result with a complex in it"):
        to_content([1j])
    with pytest.raises(ValueError, match=r"text that is no Unicode \('\\ud800'\)"):
        to_content({"page": ["a\ud800"]})
    own: list[Any] = []
    own.append(own)
    with pytest.raises(ValueError, match="contains itself"):
        to_content(own)


def test_a_served_program_travels_by_import_path_and_keeps_its_options() -> None:
    remote = served(read)
    assert (remote.defaults.name, remote.defaults.priority) == ("the page reader", 3)
    described = codec.describe_function(remote.function, remote.defaults)
    assert described.asynchronous
    assert described.name == "the page reader"
    assert isinstance(described.pickled, bytes)
    assert len(described.pickled) < 300
    loaded = codec.load_function(described, None)
    assert isinstance(loaded, ServedAsync)
    assert loaded.program is read.function
    assert asyncio.run(loaded("x")) == (b'{"lines":["x"],"scores":null}', "application/json")


def test_a_served_closure_travels_with_its_code() -> None:
    secret = 7

    def add(x: int) -> int:
        return x + secret

    remote = served(rtml.task(add))
    described = codec.describe_function(remote.function, remote.defaults)
    loaded = codec.load_function(described, None)
    assert isinstance(loaded, Served)
    assert not described.asynchronous
    assert loaded(1) == (b"8", "application/json")


def test_sync_programs_and_their_names() -> None:
    remote = served(plain)
    assert codec.describe_function(remote.function, remote.defaults).name == "plain"
    assert remote.function(1) == (b"2", "application/json")


def test_a_gateway_makes_plain_data_only() -> None:
    client = GatewayClient.__new__(GatewayClient)  # only its decoding is of interest here
    client.store = None  # type: ignore[assignment]
    value = {"a": [1, 2.5, "x", b"y", None], "t": (1,), "array": np.arange(3), "text": np.array([b"a"], object)}
    decoded = client.decode(encoded(value))
    assert decoded["a"] == value["a"]
    assert decoded["array"].tolist() == [0, 1, 2]
    assert decoded["text"].tolist() == [b"a"]
    for bad in (Page(["x"]), print, pickle.Unpickler, 1):
        with pytest.raises(SerializationError, match="unpickles nothing"):
            client.decode(codec.encode_value(bad, None).payload)


def encoded(value: Any) -> bytes:
    payload = codec.encode_data(value, None).payload
    assert isinstance(payload, bytes)
    return payload


class Bomb(Exception):
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


def test_a_gateway_reads_errors_without_unpickling_them() -> None:
    client = GatewayClient.__new__(GatewayClient)
    error = client.decode_error(ErrorInfo("Bomb", "it went off", "Traceback ...", pickled=pickle.dumps(Bomb())))
    assert isinstance(error, RemoteError)
    assert isinstance(error, TaskError)
    assert (str(error), kind_of(error), status_of(error)) == ("it went off", "Bomb", 500)
    own = client.decode_error(codec.encode_error(InvalidInput("empty page")))
    assert type(own) is InvalidInput
    assert (str(own), status_of(own)) == ("empty page", 400)
    late = client.decode_error(codec.encode_error(DeadlineExceeded("late")))
    assert status_of(late) == 504


def test_functions_are_loaded_by_path_only_from_paths() -> None:
    with pytest.raises(SerializationError):
        codec.load_function(Function(0, "x", "no.such.module:x"), None)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (Content("text", "text/plain"), TypeError, "must be bytes, not str"),  # type: ignore[arg-type]
        (Content(b"", "text/html\r\nX-Own: 1"), ValueError, "must be a media type"),
        (Content(b"", "html"), ValueError, "must be a media type"),
        (Content(b"", None), ValueError, "must be a media type"),  # type: ignore[arg-type]
    ],
)
def test_contents_that_are_no_answer_fail_where_they_are_made(content: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        to_content(content)


def test_media_types_may_have_parameters() -> None:
    for kind in ("image/svg+xml", "text/html; charset=utf-8", "application/vnd.x-1.y", "audio/*", 'a/b;c="d e"'):
        assert to_content(Content(b"x", kind)) == (b"x", kind)
