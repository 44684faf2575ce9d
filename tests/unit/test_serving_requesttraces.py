"""Traces of requests, and the settings of the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rtml.errors import InvalidInput
from rtml.messages import Timing
from rtml.serving.logsettings import LogSettings
from rtml.serving.requesttraces import RequestTraces

TIMING = Timing(0.001, 0.002, 0.0005, 0.004)


def record(traces: RequestTraces, model: str = "m", times: int = 1) -> None:
    for number in range(times):
        traces.record((model, "1"), f"r{number}", 1.0, TIMING)


def test_nothing_is_traced_before_somebody_asks(tmp_path: Path) -> None:
    traces = RequestTraces(str(tmp_path / "t.json"))
    record(traces)
    traces.close()
    assert not list(tmp_path.iterdir())
    assert traces.settings(None) == {
        "trace_file": str(tmp_path / "t.json"),
        "trace_mode": "triton",
        "trace_level": ["OFF"],
        "trace_rate": "1000",
        "trace_count": "-1",
        "log_frequency": "0",
    }


def test_every_second_request_of_one_model_until_there_are_enough(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    traces = RequestTraces(str(file))
    traces.change("m", {"trace_level": ["TIMESTAMPS"], "trace_rate": "2", "trace_count": 3})
    record(traces, "other")
    record(traces, times=20)
    traces.close()
    found = json.loads(file.read_bytes())
    assert [(trace["model_name"], trace["request_id"]) for trace in found] == [("m", "r1"), ("m", "r3"), ("m", "r5")]
    names = [stamp["name"] for stamp in found[0]["timestamps"]]
    assert (names[0], names[-1]) == ("REQUEST_START", "REQUEST_END")
    times = {stamp["name"]: stamp["ns"] for stamp in found[0]["timestamps"]}
    assert times["COMPUTE_START"] - times["QUEUE_START"] == pytest.approx(3e6, abs=2)
    assert times["COMPUTE_OUTPUT_START"] - times["COMPUTE_INPUT_END"] == pytest.approx(4e6, abs=2)


def test_files_of_so_many_traces_each_and_the_rest_at_the_end(tmp_path: Path) -> None:
    traces = RequestTraces(str(tmp_path / "t.json"))
    traces.change(None, {"trace_level": "TIMESTAMPS", "trace_rate": 1, "log_frequency": 2})
    record(traces, times=5)
    traces.close()
    sizes = {path.name: len(json.loads(path.read_bytes())) for path in tmp_path.iterdir()}
    assert sizes == {"t.json.0": 2, "t.json.1": 2, "t.json": 1}


def test_settings_of_a_model_can_be_taken_back(tmp_path: Path) -> None:
    traces = RequestTraces("t.json")
    traces.change("m", {"trace_rate": 5})
    traces.change(None, {"trace_rate": "7", "trace_file": "t.json", "trace_mode": "triton"})
    assert (traces.settings("m")["trace_rate"], traces.settings(None)["trace_rate"]) == ("5", "7")
    traces.change("m", {"trace_rate": None})
    traces.change(None, {"trace_level": ["TIMESTAMPS"]})
    traces.change(None, {"trace_level": None})
    assert (traces.settings("m")["trace_rate"], traces.settings("m")["trace_level"]) == ("7", ["OFF"])
    traces.close()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"trace_file": "/etc/passwd"}, "trace_file cannot be changed by clients"),
        ({"trace_level": ["TENSORS"]}, "trace_level must be OFF or TIMESTAMPS"),
        ({"trace_level": []}, "trace_level must be"),
        ({"trace_rate": 0}, "trace_rate must be a whole number from 1 on"),
        ({"trace_rate": "1.5"}, "trace_rate must be a whole number"),
        ({"trace_count": -2}, "trace_count must be a whole number from -1 on"),
        ({"log_frequency": True}, "log_frequency must be"),
        ({"speed": 3}, "there is no trace setting 'speed'"),
    ],
)
def test_settings_that_are_refused(wanted: dict[str, Any], message: str) -> None:
    traces = RequestTraces("t.json")
    with pytest.raises(InvalidInput, match=message):
        traces.change(None, {"trace_count": 5, **wanted})
    assert traces.settings(None)["trace_count"] == "-1"


def test_a_file_that_cannot_be_written_is_said_and_nothing_else(caplog: Any, tmp_path: Path) -> None:
    traces = RequestTraces(str(tmp_path / "none" / "t.json"))
    traces.change(None, {"trace_level": "TIMESTAMPS", "trace_rate": 1})
    record(traces)
    traces.close()
    assert "cannot write 1 traces" in caplog.text


def test_the_log_is_filtered_and_left_as_it_was() -> None:
    shown: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    handler = Handler()
    root, logger = logging.getLogger(), logging.getLogger("rtml.serving")
    root.addHandler(handler)
    level, before = logging.getLogger("rtml").level, root.level
    root.setLevel(logging.INFO)
    log = LogSettings()
    log.open()
    try:
        log.change({"log_info": False})
        logger.info("info")
        logger.warning("warning")
        log.change({"log_warning": False, "log_verbose_level": 1, "log_format": "ISO8601"})
        logger.warning("second warning")
        logger.debug("debug")
        logger.error("error")
        for wanted in ({"log_info": 1}, {"log_file": "x"}, {"log_format": "own"}, {"log_verbose_level": -1}, {"a": 1}):
            with pytest.raises(InvalidInput):
                log.change(wanted)
        assert log.settings() == {
            "log_file": "",
            "log_info": False,
            "log_warning": False,
            "log_error": True,
            "log_verbose_level": 1,
            "log_format": "ISO8601",
        }
    finally:
        log.close()
        root.setLevel(before)
        root.removeHandler(handler)
    assert shown == ["warning", "debug", "error"]
    assert logging.getLogger("rtml").level == level
    assert not handler.filters
