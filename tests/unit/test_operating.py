"""What `rtml status` and `rtml trace` make of an engine's answers."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rtml import operating


def task(number: int, parent: int, function: str, *times: float | None, **more: Any) -> dict[str, Any]:
    submitted, ready, assigned, finished = times
    return {
        "id": number, "parent": parent, "function": function, "outcome": "ok", "attempts": 1, "submitted": submitted,
        "ready": ready, "assigned": assigned, "finished": finished, "run": 0.004, "worker": 1, "batch": 1, **more,
    }  # fmt: skip


def test_a_trace_shows_where_each_task_waited_and_ran() -> None:
    tasks = [
        task(1, 0, "read", 0.0, 0.0, 0.0, 0.010),
        task(2, 1, "detect", 0.0, 0.0, 0.002, 0.005, batch=3, attempts=2),
        task(3, 1, "recognise", 0.0, 0.005, 0.005, 0.010, outcome="error"),
        task(4, 1, "never", 0.0, None, None, 0.010, outcome="cancelled"),
    ]
    lines = operating.describe_trace(json.dumps({"graph": "77", "tasks": tasks})).splitlines()
    assert lines[0].startswith("graph 77: 4 tasks, 10.000 ms")
    assert lines[1].startswith("read        |" + "#" * 50)
    assert lines[2].startswith("  detect    |" + "-" * 10 + "#" * 16 + " ")
    assert lines[2].endswith("5.000 ms, run 4.000, batch of 3, attempt 2")
    assert lines[3].startswith("  recognise |" + "." * 25 + "#" * 25)
    assert lines[3].endswith(", error")
    assert lines[4].startswith("  never     |" + "." * 50)


def test_a_trace_of_nothing() -> None:
    assert operating.describe_trace('{"graph": "7", "tasks": []}') == "nothing is remembered of graph 7"
    assert operating.describe_trace('{"graph": "", "tasks": []}') == "no graph has ended yet"


def test_status_in_a_few_lines() -> None:
    executors = [
        {"id": n, "role": role, "queued": n, "blocked": 0, "lagging": n == 2}
        for n, role in enumerate(["executor", "executor", "async"])
    ]
    status = {
        "tasks": {"waiting": 1, "ready": 2}, "sessions": 3, "peers": {"client": 1}, "functions": 4, "objects": 5,
        "nodes": [{"name": "", "cpu": 2.0, "free_cpu": 1.5, "executors": executors}],
    }  # fmt: skip
    lines = operating.describe_status(json.dumps(status)).splitlines()
    assert lines == [
        "tasks       1 waiting, 2 ready",
        "peers       client 1",
        "known       functions 4, objects 5",
        "node        (this one): 1.5 of 2 cpus free; executors: 1 async, 2 executor; 2 with work",
        "            executor 2: its event loop is blocked",
    ]


def test_the_only_engine_of_this_machine_needs_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="there are 0 engines"):
        operating.find_address("")
    sockets = []
    for name in ("rtml-a", "rtml-b"):
        (tmp_path / name).mkdir()
        sockets.append(listener := socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / name / "dispatcher.sock"))
        if len(sockets) == 1:
            assert operating.find_address("") == f"unix:{tmp_path}/rtml-a/dispatcher.sock"
    with pytest.raises(ValueError, match=r"2 engines.*--address: unix:.*rtml-a.*, unix:.*rtml-b"):
        operating.find_address("")
    assert operating.find_address("tcp://a:1") == "tcp://a:1"
    for listener in sockets:
        listener.close()
