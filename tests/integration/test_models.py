"""Models and other batch functions on a real engine: what shares a run, what does not, what fails alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import rtml
from rtml.errors import InvalidInput
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")

PATIENCE = 60


@pytest.fixture(scope="module")
def engine() -> Iterator[rtml.Client]:
    with rtml.connect(workers=2) as client:
        yield client


@rtml.task
def array(rows: int, columns: int) -> Any:
    return np.ones((rows, columns), np.float32)


@rtml.task(batch=16)
def shapes(arrays: list[Any], others: list[Any]) -> list[list[tuple[int, ...]]]:
    """To every call: which shapes were in its batch."""
    seen = sorted({(*one.shape[1:], *other.shape[1:]) for one, other in zip(arrays, others)})
    return [seen] * len(arrays)


@pytest.mark.usefixtures("engine")
def test_only_calls_of_one_shape_share_a_batch() -> None:
    given = [(n % 3 + 1, n % 2 + 1) for n in range(60)]
    values = [np.ones((1, size), np.float32) for size in range(5)]
    from_futures = [shapes.submit(array.submit(1, one), array.submit(1, other)) for one, other in given]
    from_values = [shapes.submit(values[one], values[other]) for one, other in given]
    mixed = [shapes.submit(array.submit(1, one), values[other]) for one, other in given]
    for futures in (from_futures, from_values, mixed):
        assert [future.result(PATIENCE) for future in futures] == [[pair] for pair in given]


@pytest.mark.usefixtures("engine")
def test_a_model_takes_futures_and_answers_each_call() -> None:
    twice = rtml.model(tiny_onnx.doubler(("N", "M")), batch=32, name="twice")
    futures = [twice.submit(array.submit(rows, columns)) for rows in (1, 2, 3) for columns in (1, 2, 3, 4)]
    shapes = [(rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3, 4)]
    for future, shape in zip(futures, shapes, strict=True):
        assert np.array_equal(future.result(PATIENCE), np.full(shape, 2, np.float32))


@pytest.mark.usefixtures("engine")
def test_named_inputs_and_outputs() -> None:
    both = rtml.model(tiny_onnx.sum_and_product(), batch=4, name="both")
    result = both.submit(a=array.submit(2, 2), b=np.full((2, 2), 3, np.float32)).result(PATIENCE)
    assert {name: value.tolist() for name, value in result.items()} == {
        "sum": [[4, 4], [4, 4]],
        "product": [[3, 3], [3, 3]],
    }


@pytest.mark.usefixtures("engine")
def test_one_bad_call_fails_alone() -> None:
    pick = rtml.model(tiny_onnx.picker(), batch=8, name="pick")
    futures = [pick.submit(np.array([index])) for index in (0, 1, 7, 2, 0, -9)]
    results = [future.exception(PATIENCE) or future.result().tolist() for future in futures]
    assert [result for result in results if isinstance(result, list)] == [[10], [20], [30], [10]]
    for bad in (results[2], results[5]):
        assert isinstance(bad, RuntimeError)
        assert "model 'pick' failed" in str(bad)


@pytest.mark.usefixtures("engine")
def test_wrong_input_is_the_callers_fault() -> None:
    twice = rtml.model(tiny_onnx.doubler(), name="twice")
    with pytest.raises(InvalidInput, match=r"has the shape \[any, 3\], not \[1, 4\]"):
        twice.submit(np.ones((1, 4), np.float32)).result(PATIENCE)


@pytest.mark.usefixtures("engine")
def test_a_model_that_cannot_be_opened() -> None:
    garbage = rtml.model(b"garbage", name="garbage")
    with pytest.raises(RuntimeError, match="cannot open <Model 'garbage'"):
        garbage.submit(np.ones(1)).result(PATIENCE)


@pytest.mark.usefixtures("engine")
def test_large_arrays_travel_through_shared_memory() -> None:
    twice = rtml.model(tiny_onnx.doubler(("N", "M")), name="twice")
    big = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
    future = twice.submit(twice.submit(twice.submit(big)))
    assert np.array_equal(future.result(PATIENCE), big * 8)
