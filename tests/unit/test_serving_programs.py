"""Graph programs as models: type hints as tensors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from rtml.errors import InvalidInput
from rtml.serving.app import TensorSpec
from rtml.serving.programs import ProgramTensors
from rtml.serving.results import Content


class Order(msgspec.Struct):
    prices: list[float]
    discount: float = 0.0
    tags: dict[str, int] = {}


@dataclass
class Size:
    width: int
    height: int = 1


class Page(TypedDict):
    text: str
    boxes: list[tuple[int, int]]
    score: float | None


def price(order: Order) -> dict[str, float]:
    raise NotImplementedError


def read(image: bytes, language: str = "en", *, deep: bool = False) -> Page:
    raise NotImplementedError


def area(size: Size) -> int:
    raise NotImplementedError


def mix(x: npt.NDArray[np.float32], y: np.ndarray[Any, Any], names: list[str], n: int | None = None) -> Any:
    raise NotImplementedError


def texts(*values: Any) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_what_annotations_mean() -> None:
    assert ProgramTensors(price).inputs == (
        TensorSpec("prices", "FP64", (-1,)),
        TensorSpec("discount", "FP64", (1,), True),
        TensorSpec("tags", "BYTES", (1,), True),
    )
    assert ProgramTensors(price).outputs == (TensorSpec("output", "BYTES", (1,)),)
    assert ProgramTensors(read).inputs == (
        TensorSpec("image", "BYTES", (1,)),
        TensorSpec("language", "BYTES", (1,), True),
        TensorSpec("deep", "BOOL", (1,), True),
    )
    assert ProgramTensors(read).outputs == (
        TensorSpec("text", "BYTES", (1,)),
        TensorSpec("boxes", "BYTES", (1,)),
        TensorSpec("score", "FP64", (-1,)),
    )
    assert ProgramTensors(area).inputs == (
        TensorSpec("width", "INT64", (1,)),
        TensorSpec("height", "INT64", (1,), True),
    )
    assert ProgramTensors(area).outputs == (TensorSpec("output", "INT64", (1,)),)
    assert ProgramTensors(mix).inputs == (
        TensorSpec("x", "FP32", None),
        TensorSpec("y", "UINT8", None),
        TensorSpec("names", "BYTES", (-1,)),
        TensorSpec("n", "INT64", (-1,), True),
    )


def test_tensors_become_arguments() -> None:
    arrays = {"prices": np.array([1.0, 2.5]), "tags": texts(b'{"a": 1}')}
    assert ProgramTensors(price).call(arrays) == ((Order([1.0, 2.5], 0.0, {"a": 1}),), {})
    assert ProgramTensors(read).call({"image": texts(b"\xff")}) == ((), {"image": b"\xff"})
    arrays = {"image": texts(b""), "language": texts("ü".encode()), "deep": np.array([True])}
    assert ProgramTensors(read).call(arrays) == ((), {"image": b"", "language": "ü", "deep": True})
    assert ProgramTensors(area).call({"width": np.array([3])}) == ((Size(3, 1),), {})
    x = np.zeros((2, 3), "f4")
    _, kwargs = ProgramTensors(mix).call(
        {"x": x, "y": np.zeros(2, "u1"), "names": texts(b"a", b"b"), "n": np.array([7])}
    )
    assert kwargs["x"] is x
    assert (kwargs["names"], kwargs["n"]) == (["a", "b"], 7)
    _, kwargs = ProgramTensors(mix).call({"x": x, "y": x, "names": texts(), "n": np.zeros(0, "i8")})
    assert (kwargs["names"], kwargs["n"]) == ([], None)


@pytest.mark.parametrize(
    ("program", "arrays", "message"),
    [
        (area, {"width": np.array([1, 2])}, "'width' is one value, so its tensor must have one element, not 2"),
        (area, {"width": np.zeros(0, "i8")}, "must have one element, not 0"),
        (price, {"prices": np.array([1.0]), "tags": texts(b"{")}, "'tags' is JSON text, but"),
        (price, {"prices": np.array([1.0]), "tags": texts(b"[" * 100_000)}, "'tags' is JSON text, but"),
        (price, {"prices": np.array([1.0]), "tags": texts(b'{"a": "b"}')}, r"Expected `int`, got `str` - at `\$.tags"),
        (read, {"image": texts(b""), "language": texts(b"\xff")}, "'language' is text, but its bytes are not UTF-8"),
    ],
)
def test_tensors_that_do_not_fit(program: Any, arrays: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ProgramTensors(program).call(arrays)


def test_results_become_tensors() -> None:
    found = ProgramTensors(read).results({"text": "ab", "boxes": [[1, 2]], "score": None})
    assert {name: array.tolist() for name, array in found.items()} == {
        "text": ["ab"],
        "boxes": [b"[[1,2]]"],
        "score": [],
    }
    assert ProgramTensors(area).results(6)["output"].tolist() == [6]
    assert ProgramTensors(price).results({"price": 1.5})["output"].tolist() == [b'{"price":1.5}']

    def picture() -> Content:
        raise NotImplementedError

    assert ProgramTensors(picture).results([b"PNG", "image/png"])["output"].tolist() == [b"PNG"]

    def vector() -> npt.NDArray[np.float32]:
        raise NotImplementedError

    array = np.zeros((2, 2), "f4")
    assert ProgramTensors(vector).results(array)["output"] is array
    assert ProgramTensors(vector).outputs == (TensorSpec("output", "FP32", None),)


@pytest.mark.parametrize("value", [float("nan"), "many", None, 1 << 70])
def test_a_result_that_is_not_what_was_declared_is_named(value: Any) -> None:
    def count() -> int:
        raise NotImplementedError

    with pytest.raises(ValueError, match="output 'output' is declared as INT64, but the program returned"):
        ProgramTensors(count).results([value] if value is None else value)


def test_a_generators_outputs_are_those_of_its_items() -> None:
    def strings() -> Iterator[str]:
        yield ""

    async def numbers() -> AsyncGenerator[int | None, None]:
        yield 1

    def rows() -> Generator[list[float], None, None]:
        yield []

    def untyped():  # type: ignore[no-untyped-def]
        yield 1

    def lists() -> list[int]:
        return []

    found = {each: ProgramTensors(each) for each in (strings, numbers, rows, untyped, lists)}
    assert [tensors.stream for tensors in found.values()] == [True, True, True, True, False]
    assert [tensors.outputs for tensors in found.values()] == [
        (TensorSpec("output", datatype, shape),)
        for datatype, shape in (("BYTES", (1,)), ("INT64", (-1,)), ("FP64", (-1,)), ("BYTES", (1,)), ("INT64", (-1,)))
    ]
