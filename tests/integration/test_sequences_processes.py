"""Sequences behind several gateway processes: no process has what another needs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration import docs
from tests.integration.test_processes import processes_of
from tests.integration.test_serve import Server, wait_for
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")

APP = """
import rtml
from rtml.serving import App, SequenceSpec

app = App("sums")
app.model("sum", rtml.model("sum.onnx"), sequence=SequenceSpec({"s": "t"}, holders=2))
"""


def step(server: Server, x: float, number: int, **parameters: bool) -> tuple[float, str]:
    """The sum, and which process said it."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [x]}
    body: dict[str, Any] = {"inputs": [tensor], "parameters": {"sequence_id": number, **parameters}}
    status, answer, headers = server.request("POST", "/v2/models/sum/infer", body)  # on a connection of its own
    assert status == 200, answer
    return answer["outputs"][0]["data"][0], headers["x-request-id"].partition("-")[0]


@pytest.mark.slow
def test_any_process_goes_on_with_any_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.py").write_text(APP)
    (tmp_path / "sum.onnx").write_bytes(tiny_onnx.accumulator())
    monkeypatch.setenv("PYTHONPATH", str(docs.ROOT))
    monkeypatch.chdir(tmp_path)
    server = Server("serve", "sums:app", "--processes", "2", "--linger", "0")
    try:
        said = set()
        for number in range(1, 9):
            assert step(server, number, number, sequence_start=True)[0] == number
        for more in range(1, 9):
            for number in range(1, 9):
                total, process = step(server, 1, number)
                assert total == number + more
                said.add(process)
        assert len(said) == 2
        # A gateway process that dies takes no sequence along.
        before = processes_of(server)
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: len(processes_of(server)) == 2 and before[0] not in processes_of(server))
        for number in range(1, 9):
            assert step(server, 1, number, sequence_end=True)[0] == number + 9
    finally:
        server.stop()
