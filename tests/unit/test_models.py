"""rtml.models: ONNX models as remote functions. Called directly they run here, and that is how they are tested."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtml import codec
from rtml.errors import InvalidInput, SubmitError
from rtml.messages import Options
from rtml.models import Model, model
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def test_one_output_is_an_array() -> None:
    result = model(tiny_onnx.doubler())(ones(2, 3))
    assert result.dtype == np.float32
    assert result.tolist() == [[2, 2, 2], [2, 2, 2]]


def test_several_inputs_and_outputs_go_by_name() -> None:
    run = model(tiny_onnx.sum_and_product())
    expected = {"sum": [[3, 3]], "product": [[2, 2]]}
    for result in (
        run(a=ones(1, 2), b=2 * ones(1, 2)),
        run(ones(1, 2), b=2 * ones(1, 2)),
        run(ones(1, 2), 2 * ones(1, 2)),
    ):
        assert {name: array.tolist() for name, array in result.items()} == expected


def test_chosen_outputs() -> None:
    run = model(tiny_onnx.sum_and_product(), outputs=["product"])
    assert run(ones(1, 2), ones(1, 2)).tolist() == [[1, 1]]
    assert [output.name for output in run.metadata().outputs] == ["product"]


def test_unknown_output() -> None:
    with pytest.raises(RuntimeError, match=r"has no outputs \['ratio'\]; it has \['product', 'sum'\]"):
        model(tiny_onnx.sum_and_product(), outputs=["ratio"])(ones(1, 2), ones(1, 2))


def test_wider_default_types_are_narrowed() -> None:
    assert model(tiny_onnx.doubler())([[1, 2, 3]]).tolist() == [[2, 4, 6]]
    assert model(tiny_onnx.doubler())(np.array([[0.5, 1, 2]])).dtype == np.float32


@pytest.mark.parametrize(
    ("args", "inputs", "message"),
    [
        ([ones(1, 2)], {}, "takes the inputs a, b: b missing"),
        ([ones(1, 2)] * 3, {}, r"takes 2 inputs \['a', 'b'\], not 3"),
        ([ones(1, 2)], {"a": ones(1, 2), "c": ones(1, 2)}, "a given twice, b missing, c unknown"),
        ([ones(1, 2), ones(1, 3)], {}, r"input 'b' of model 'pair' has the shape \[any, 2\], not \[1, 3\]"),
        ([ones(1, 2), ones(2)], {}, r"has the shape \[any, 2\], not \[2\]"),
        ([ones(1, 2), np.array([["a", "b"]])], {}, "takes float32, not <U1"),
    ],
)
def test_wrong_inputs(args: list[Any], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        model(tiny_onnx.sum_and_product(), name="pair")(*args, **inputs)


def test_fractions_are_no_whole_numbers() -> None:
    with pytest.raises(InvalidInput, match="takes int64, not float64"):
        model(tiny_onnx.picker())(np.array([1.5]))


def test_an_error_at_run_time_can_be_pickled() -> None:
    with pytest.raises(RuntimeError, match=r"model 'picker' failed on x \[1\]") as caught:
        model(tiny_onnx.picker(), name="picker")(np.array([7]))
    assert type(pickle.loads(pickle.dumps(caught.value))) is RuntimeError


def test_a_batch_runs_once_and_is_split() -> None:
    runs: list[int] = []

    def count(value: Any) -> Any:
        runs.append(len(value))
        return value

    run = model(tiny_onnx.doubler(), batch=8, after=count)
    results = run([ones(1, 3), 2 * ones(2, 3), 3 * ones(1, 3)])
    assert runs == [4]
    assert [result.tolist() for result in results] == [[[2, 2, 2]], [[4, 4, 4], [4, 4, 4]], [[6, 6, 6]]]


def test_a_batch_of_named_inputs_and_several_outputs() -> None:
    run = model(tiny_onnx.sum_and_product(), batch=8)
    results = run([ones(1, 2), ones(2, 2)], b=[3 * ones(1, 2), 4 * ones(2, 2)])
    assert [result["sum"].tolist() for result in results] == [[[4, 4]], [[5, 5], [5, 5]]]


def test_one_bad_call_fails_alone() -> None:
    run = model(tiny_onnx.picker(), batch=8)
    first, bad, wrong, last = run([np.array([0, 1]), np.array([7]), np.array([[1]]), np.array([2])])
    assert (first.tolist(), last.tolist()) == ([10, 20], [30])
    assert isinstance(bad, RuntimeError)
    assert isinstance(wrong, InvalidInput)


@pytest.mark.parametrize(
    "bad", [[[1], [1, 2]], None, "abc", [[object()] * 3]], ids=["ragged", "none", "text", "object"]
)
def test_a_call_that_is_no_array_fails_alone(bad: Any) -> None:
    """Numpy refuses ragged lists in a way of its own."""
    run = model(tiny_onnx.doubler(), batch=8, name="d")
    first, second, third = run([ones(1, 3), bad, [[1, 2, 3]]])
    assert first.tolist() == [[2, 2, 2]]
    assert isinstance(second, InvalidInput)
    assert str(second).startswith("input 'x' of model 'd' takes ")
    assert third.tolist() == [[2, 4, 6]]


def test_numbers_too_large_become_infinite() -> None:
    assert model(tiny_onnx.doubler())([[1e300, 1, 2]]).tolist() == [[np.inf, 2, 4]]


def test_calls_that_do_not_fit_together_run_apart() -> None:
    shape = ("N", "M")
    run = model(tiny_onnx.doubler(shape), batch=8)
    results = run([ones(1, 2), ones(1, 5), ones(2, 2)])
    assert [result.shape for result in results] == [(1, 2), (1, 5), (2, 2)]


def test_a_fixed_first_dimension_is_never_joined() -> None:
    run = model(tiny_onnx.doubler((1, 3)), batch=8)
    assert [result.tolist() for result in run([ones(1, 3), 2 * ones(1, 3)])] == [[[2, 2, 2]], [[4, 4, 4]]]


def test_outputs_that_cannot_be_split_are_computed_apart() -> None:
    run = model(tiny_onnx.total(), batch=8)
    assert [result.tolist() for result in run([ones(3), ones(2)])] == [[3], [2]]


def test_after_may_give_a_list_per_row() -> None:
    run = model(tiny_onnx.doubler(), batch=8, after=lambda rows: [f"{row.sum():.0f}" for row in rows])
    assert run([ones(1, 3), ones(2, 3)]) == [["6"], ["6", "6"]]


def test_an_error_in_after_belongs_to_its_call() -> None:
    def positive(rows: Any) -> Any:
        if (rows < 0).any():
            raise ValueError("negative")
        return rows

    good, bad = model(tiny_onnx.doubler(), batch=8, after=positive)([ones(1, 3), -ones(1, 3)])
    assert good.tolist() == [[2, 2, 2]]
    assert isinstance(bad, ValueError)


def test_only_path_and_settings_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twice.onnx").write_bytes(tiny_onnx.doubler())
    monkeypatch.chdir(tmp_path)
    run = model("twice.onnx")
    run(ones(1, 3))
    monkeypatch.chdir("..")
    data = pickle.dumps(run.function)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert isinstance(copy, Model)
    assert copy(ones(1, 3)).tolist() == [[2, 2, 2]]
    assert copy.__name__ == "twice"


def test_metadata_does_not_load() -> None:
    run = model(tiny_onnx.doubler())
    assert run.metadata().inputs[0].shape == (-1, 3)
    assert run.options(deadline=0.1).metadata() is run.metadata()


def test_options() -> None:
    run = model(tiny_onnx.doubler(), batch=4, batch_delay=0.01, name="twice", cpu=2, retries=0)
    assert (run.defaults.batch, run.defaults.batch_delay, run.defaults.name) == (4, 0.01, "twice")
    assert (run.defaults.cpu, run.defaults.retries) == (2, 0)
    with pytest.raises(SubmitError, match="unknown option 'colour'"):
        model(tiny_onnx.doubler(), colour=1)
    with pytest.raises(ValueError, match="must be"):
        model(tiny_onnx.doubler(), batch=-1)
    with pytest.raises(ValueError, match="must be"):
        model(tiny_onnx.doubler(), threads=0)


def test_definitions_say_that_rows_are_counted() -> None:
    run = model(tiny_onnx.doubler(), batch=4)
    assert codec.describe_function(run.function, run.defaults).rows
    assert not codec.describe_function(ones, Options(batch=4)).rows


def test_warm_up_shapes() -> None:
    any_size = tiny_onnx.doubler(("N", "M"))
    assert model(any_size, warmup=(2, 5))(ones(1, 2)).tolist() == [[2, 2]]
    assert model(any_size, warmup={"x": (2, 5)})(ones(1, 2)).tolist() == [[2, 2]]
    with pytest.raises(RuntimeError, match="does not run on its warm-up shape"):
        model(tiny_onnx.doubler(), warmup=(1, 4))(ones(1, 3))
    with pytest.raises(ValueError, match="give warm-up shapes by name"):
        model(tiny_onnx.sum_and_product(), warmup=(1, 2))


def test_a_guessed_warm_up_may_fail() -> None:
    """A dimension that the file leaves open is tried with 1, which not every model takes."""
    reshaped = tiny_onnx.model(
        [tiny_onnx.node("Reshape", ["x", "shape"], ["y"])],
        [tiny_onnx.tensor("x", tiny_onnx.FLOAT, ("N",))],
        [tiny_onnx.tensor("y", tiny_onnx.FLOAT, (2, "M"))],
        weights=[tiny_onnx.weight("shape", [2, -1 & (1 << 64) - 1])],
    )
    assert model(reshaped)(ones(4)).shape == (2, 2)


def test_errors_at_loading(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"this is no model")
    with pytest.raises(RuntimeError, match=r"cannot open <Model 'garbage' of .*garbage\.onnx>"):
        model(tmp_path / "garbage.onnx")(ones(1))
    with pytest.raises(RuntimeError, match="cannot open"):
        model(tmp_path / "none.onnx")(ones(1))


def test_text_may_come_as_bytes() -> None:
    """Over HTTP it always does."""
    content = tiny_onnx.model(
        [tiny_onnx.node("Identity", ["s"], ["t"])],
        [tiny_onnx.tensor("s", tiny_onnx.STRING, ("N",))],
        [tiny_onnx.tensor("t", tiny_onnx.STRING, ("N",))],
    )
    run = model(content)
    assert run(np.array([b"a", "b", "ü".encode()], object)).tolist() == ["a", "b", "ü"]
    with pytest.raises(InvalidInput, match="not UTF-8"):
        run(np.array([b"\xff"], object))
    for other in (np.array(["a", None], object), np.array([1]), np.array([1.5, "a"], object)):
        with pytest.raises(InvalidInput, match=r"takes text, not (NoneType|int|float)"):
            run(other)


def test_a_provider_that_is_not_there_is_an_error_and_no_cpu() -> None:
    with pytest.raises(ValueError, match=r"asks for NoSuchProvider, but onnxruntime offers .*CPUExecutionProvider"):
        model(tiny_onnx.doubler(), providers=["NoSuchProvider"])(ones(2, 3))
