"""The states of sequences: begin, go on, end, expire; steps that share a run; what makes a model stateful."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtml import onnxfile
from rtml.errors import DeadlineExceeded, InvalidInput, Overloaded, SequenceLost, UnknownSequence
from rtml.models import Model, Settings
from rtml.onnxfile import ModelInfo, TensorInfo
from rtml.sequences import END, START, Holder, Layout, State, Table, wall
from rtml.serving import modelconfig
from rtml.serving.modelconfig import ConfigError
from rtml.serving.sequencespec import SequenceSpec, described, hidden_inputs, layout_of
from tests.unit import tiny_onnx

SUM = Layout("sum", (State("s", "t", "float32", (1, 1), 0),), ("x",), ("y",), batch=8, idle=10.0, live_max=3)
ONE, TWO, THREE, FOUR = (("", number) for number in (1, 2, 3, 4))


def begun(table: Table, *keys: tuple[str, int], at: float = 0.0) -> Table:
    for key in keys:
        live = table.begin(key, at)
        table.went(key, live, live.states, at)
    return table


def test_a_sequence_is_there_from_its_first_step_to_its_end() -> None:
    table = Table(SUM)
    with pytest.raises(UnknownSequence, match="needs sequence_start"):
        table.find(ONE, 0.0)
    assert begun(table, ONE).find(ONE, 1.0).states["s"].tolist() == [[0.0]]
    assert table.soonest(4.0) == 6.0
    table.end(ONE)
    with pytest.raises(UnknownSequence, match="has not begun, or has ended"):
        table.find(ONE, 1.0)
    assert table.soonest(4.0) == 0.0


def test_what_is_idle_ends_by_when_requests_were_sent_not_by_when_they_are_seen() -> None:
    table = begun(begun(Table(SUM), ONE, at=0.0), TWO, at=5.0)
    table.sweep(10.0)
    assert len(table) == 2
    table.find(ONE, 10.0)  # sent in time, however late it is
    table.sweep(10.1)
    assert (ONE in table, TWO in table) == (False, True)
    with pytest.raises(UnknownSequence, match="no request came for 10 s"):
        table.find(ONE, 10.1)
    with pytest.raises(UnknownSequence, match="no request came for 10 s"):
        table.find(TWO, 15.1)  # nobody swept
    begun(table, ONE, at=20.0)
    table.find(ONE, 21.0)


def test_there_are_at_most_so_many_and_the_refusal_says_when_to_come_back() -> None:
    table = begun(Table(SUM), ONE, TWO, THREE, at=0.0)
    with pytest.raises(Overloaded) as refused:
        table.begin(FOUR, 4.0)
    assert refused.value.retry_after == 6.0
    begun(table, TWO, at=4.0)  # takes its own place
    table.end(ONE)
    with pytest.raises(Overloaded):
        table.begin(FOUR, 4.0, beside=1)
    table.begin(FOUR, 4.0)


def test_a_holder_that_was_restarted_says_that_sequences_may_be_lost() -> None:
    table = Table(SUM, restarted=True)
    with pytest.raises(SequenceLost, match="has died"):
        table.find(ONE, 0.0)
    begun(table, ONE).find(ONE, 0.0)


def test_tenants_do_not_meet() -> None:
    table = begun(Table(SUM), ("one", 1))
    with pytest.raises(UnknownSequence):
        table.find(("other", 1), 0.0)


# --- runs -------------------------------------------------------------------------------------------------------------


class Counting(Model):
    """Counts its runs, by their rows."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content, Settings("sum"))
        self.runs: list[int] = []

    def run_feed(self, feed: dict[str, Any]) -> Any:
        self.runs.append(len(next(iter(feed.values()))))
        return super().run_feed(feed)


class Steps:
    """A holder, called here."""

    def __init__(self, layout: Layout = SUM, content: bytes = b"") -> None:
        pytest.importorskip("onnxruntime")
        self.model = Counting(content or tiny_onnx.accumulator())
        self.holder = Holder(self.model, layout)
        self.model.runs.clear()

    def __call__(self, *calls: tuple[Any, int, float], until: float = 0.0) -> list[Any]:
        inputs = [{"x": np.array([[x]], np.float32)} for *_, x in calls]
        return self.batch([(number, flags, given) for (number, flags, _), given in zip(calls, inputs)], until)

    def batch(self, calls: list[tuple[Any, int, dict[str, Any]]], until: float = 0.0) -> list[Any]:
        now = wall()
        count = len(calls)
        numbers: list[Any] = [call[0] for call in calls]
        flags, inputs = [call[1] for call in calls], [call[2] for call in calls]
        values = self.holder.step([""] * count, numbers, flags, [now] * count, [until] * count, inputs)
        return [value["y"][0, 0] if isinstance(value, dict) and "y" in value else value for value in values]


def test_steps_of_different_sequences_share_a_run_and_those_of_one_do_not() -> None:
    step = Steps()
    assert step((1, START, 1), (2, START, 10), (1, 0, 2), (3, START, 100), (1, END, 3)) == [1, 10, 3, 100, 6]
    assert step.model.runs == [3, 1, 1]
    (gone, *_), more = step((1, 0, 1)), step((2, 0, 1), (3, 0, 1))
    assert isinstance(gone, UnknownSequence)
    assert more == [11, 101]


def test_runs_have_at_most_as_many_sequences_as_the_batch() -> None:
    step = Steps(SUM._replace(batch=2, live_max=10))
    assert step(*((number, START, number) for number in range(5))) == [0, 1, 2, 3, 4]
    assert step.model.runs == [2, 2, 1]


def test_the_error_of_one_is_not_that_of_the_others_and_changes_nothing() -> None:
    step = Steps()
    step((1, START, 1), (2, START, 2))
    wide = {"x": np.ones((2, 1), np.float32)}
    error, good = step.batch([(1, 0, wide), (2, 0, {"x": np.ones((1, 1), np.float32)})])
    assert isinstance(error, InvalidInput)
    assert good == 3
    # What onnxruntime refuses in a joint run is found out one by one.
    error, good = step.batch([(1, 0, {"x": np.ones((1, 1), np.int64)}), (2, 0, {"x": np.ones((1, 1), np.float32)})])
    assert isinstance(error, Exception)
    assert good == 4
    (late,) = step((1, 0, 5), until=wall() - 1)
    assert isinstance(late, DeadlineExceeded)
    assert step((1, 0, 1)) == [2]


def test_a_start_that_fails_begins_nothing() -> None:
    step = Steps()
    (error,) = step.batch([(1, START, {"x": np.ones((1, 1), np.int64)})])
    assert isinstance(error, Exception)
    assert isinstance(step((1, 0, 1))[0], UnknownSequence)


def test_limits_hold_within_a_batch() -> None:
    results = Steps()(*((number, START, number) for number in range(5)))
    assert results[:3] == [0, 1, 2]
    assert [type(result) for result in results[3:]] == [Overloaded, Overloaded]


def test_users_come_and_go() -> None:
    holder = Steps().holder
    assert holder.attach("a")["live"] == 0
    holder.attach("b")
    assert holder.detach("a") == {"live": 0, "users": 1, "soonest": 0.0}
    assert holder.detach("b")["users"] == 0


def test_control_inputs_tell_where_in_its_sequence_a_step_is() -> None:
    pytest.importorskip("onnxruntime")
    content = tiny_onnx.controlled()
    controls = {"start": "start", "end": "end", "ready": "ready", "corrid": "corrid"}
    states = {"x": "ox"}
    layout = layout_of("told", SequenceSpec(states, controls=controls, batch=1), onnxfile.describe(content))
    holder = Holder(Model(content, Settings("told")), layout)
    now = wall()
    found = []
    for flags in (START, 0, END):
        (result,) = holder.step([""], [77], [flags], [now], [0.0], [{}])
        found.append([result[name].item() for name in ("ostart", "oend", "oready", "ocorrid")])
    assert found == [[1, 0, 1, 77], [0, 0, 1, 77], [0, 1, 1, 77]]
    (error,) = holder.step([""], ["text"], [START], [now], [0.0], [{}])
    assert isinstance(error, InvalidInput)
    assert "whole numbers" in str(error)


# --- what makes a model stateful --------------------------------------------------------------------------------------


def info(*, state: tuple[int, ...] | None = (2, -1, 128), x: tuple[int, ...] = (-1, 576)) -> ModelInfo:
    inputs = (
        TensorInfo("input", "float32", x),
        TensorInfo("state", "float32", state),
        TensorInfo("sr", "int64", ()),
    )
    outputs = (TensorInfo("output", "float32", (-1, 1)), TensorInfo("stateN", "float32", None))
    return ModelInfo(inputs, outputs, {})


def test_the_file_says_shapes_types_and_the_axis_of_the_batch() -> None:
    layout = layout_of("vad", SequenceSpec({"state": "stateN"}, constants={"sr": 16000}, holders=3), info())
    assert layout.states == (State("state", "stateN", "float32", (2, 1, 128), 1),)
    assert (layout.batched, layout.outputs, layout.live_max) == (("input",), ("output",), 342)
    assert hidden_inputs(layout) == {"state", "sr"}
    assert layout.constants["sr"].dtype == np.int64
    assert described(layout)["state"][0]["dims"] == [2, 128]


def test_what_states_begin_with() -> None:
    first = np.arange(256, dtype=np.float32).reshape(2, 1, 128)
    layout = layout_of("vad", SequenceSpec({"state": "stateN"}, initial={"state": first}), info())
    assert layout.states[0].fresh().tolist() == first.tolist()
    assert layout.states[0].axis == 1


@pytest.mark.parametrize(
    ("spec", "file", "message"),
    [
        (SequenceSpec({}), info(), "it has no states"),
        (SequenceSpec({"stat": "stateN"}), info(), "no input 'stat'; it has input, state, sr"),
        (SequenceSpec({"state": "stateM"}), info(), "no output 'stateM'"),
        (SequenceSpec({"state": "stateN"}, controls={"sr": "begin"}), info(), "a control is one of"),
        (SequenceSpec({"state": "stateN"}, initial={"sr": 1}), info(), "which is no state"),
        (SequenceSpec({"state": "stateN"}, initial={"state": np.zeros((2, 2, 128))}), info(), "1 along the batch's"),
        (SequenceSpec({"state": "stateN"}, initial={"state": np.zeros(3)}), info(), "has shape"),
        (SequenceSpec({"state": "stateN"}, constants={"sr": [1, 2]}), info(), "constant 'sr' has shape"),
        (SequenceSpec({"state": "stateN"}, constants={"sr": "x"}), info(), "constant 'sr' is int64"),
        (SequenceSpec({"state": "stateN"}, idle=0), info(), "idle is a positive number"),
        (SequenceSpec({"state": "stateN"}, holders=0), info(), "holders is 1 or more"),
        (SequenceSpec({"state": "stateN"}), info(state=(2, 1, 128)), "no axis is open"),
        (SequenceSpec({"state": "stateN"}), info(state=(2, -1, -1)), "more than one dimension is open"),
        (SequenceSpec({"state": "stateN"}), info(state=None), "does not say the shape"),
        (SequenceSpec({"state": "stateN"}), info(x=(1, 576)), "no input has an open first dimension"),
    ],
)
def test_what_contradicts_the_file_is_refused(spec: SequenceSpec, file: ModelInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of("vad", spec, file)


CONFIG = """{"max_batch_size": 16, "sequence_batching": {
  "state": [{"input_name": "state", "output_name": "stateN", "dims": [2, 128]}], %s},
  "parameters": {"constant.sr": {"string_value": "16000"}}}"""


def planned(more: str, file: ModelInfo | None = None, text: str = CONFIG) -> modelconfig.Plan:
    config, unused = modelconfig.read(text % more, "json")
    assert not unused
    return modelconfig.plan("vad", config, file or info())


def test_triton_s_configuration_says_the_same() -> None:
    plan = planned('"oldest": {"max_candidate_sequences": 100}')
    layout = plan.layout
    assert layout is not None
    assert (layout.idle, layout.live_max, layout.batch, layout.holders) == (1.0, 100, 16, 1)
    assert layout.states[0][:5] == ("state", "stateN", "float32", (2, 1, 128), 1)
    assert layout.constants["sr"] == 16000
    assert [spec.name for spec in (*plan.inputs, *plan.outputs)] == ["input", "output"]
    assert plan.config["sequence_batching"]["oldest"]["max_candidate_sequences"] == 100
    direct = planned('"direct": {}, "max_sequence_idle_microseconds": 5000000').layout
    assert direct is not None
    assert (direct.idle, direct.live_max) == (5.0, 1024)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('"state": [{"input_name": "state", "output_name": "stateN", "dims": [2, 64]}]', r"not \[2, 64\] and a batch"),
        ('"control_input": [{"name": "START", "control": [{"kind": "CONTROL_SEQUENCE_START"}]}]', "no input 'START'"),
        ('"control_input": [{"name": "sr", "control": []}]', "has 0 controls"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(more)


def test_a_model_has_one_kind_of_batching() -> None:
    text = CONFIG.replace('{"max', '{"dynamic_batching": {}, "max')
    with pytest.raises(ConfigError, match="not both"):
        planned('"direct": {}', text=text)


def test_only_onnx_models_keep_state(tmp_path: Path) -> None:
    import rtml
    from rtml.serving.app import TensorSpec
    from rtml.serving.gateway import Gateway
    from tests.integration.gateways import InlineEngine

    app = rtml.serving.App("plain")
    tensor = TensorSpec("x", "FP32", (1,))
    app.model("plain", lambda x: x, inputs=[tensor], outputs=[tensor], sequence=SequenceSpec({"x": "x"}))
    with pytest.raises(ValueError, match=r"only models made by rtml\.model keep state"):
        Gateway(InlineEngine(), [app]).routes()
