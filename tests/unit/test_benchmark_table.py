"""The figures of a benchmark run, as they stand in a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table

ROOT = Path(__file__).resolve().parents[2]

RESULT: dict[str, Any] = {
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"python": "3.11.7", "rtml": "0.1.0", "process_pool": "3.11.7"},
    "rows": {
        "sync_p50_us": {"rtml": 100.0, "process_pool": 250.0},
        "async_tasks_per_s": {"rtml": 100_000.0, "process_pool": 10_000.0},
        "nested10_p50_us": {"rtml": 900.0, "process_pool": None},
        "core_us_per_task": {"rtml": 4.0},
    },
    "run": {"date": "2020-02-02T20:20:20+00:00", "commit": "abcdef0", "repetitions": 3},
}


def test_rows_that_readers_know_are_shown_with_ratios() -> None:
    lines = table.render(RESULT).split("\n")
    assert lines[0] == "| | rtml | ProcessPoolExecutor |"
    assert lines[2:5] == [
        "| round trip of a no-op task, median (us) | 100 | 250 (2.5x) |",
        "| 10,000 no-op tasks (tasks/s) | 100,000 | 10,000 (10x) |",
        "| a task that submits 10 and gathers (us) | 900 | - |",
    ]
    assert "2 cores of Some CPU, 2020-02-02, abcdef0" in lines[6]
    assert "medians of 3 runs" in lines[7]


def test_the_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text((ROOT / "README.md").read_text())
    results.write_text(json.dumps(RESULT))
    table.main([str(readme), str(results)])
    once = readme.read_text()
    assert table.render(RESULT) in once
    table.main([str(readme), str(results)])
    assert readme.read_text() == once
    original = (ROOT / "README.md").read_text()
    assert once.partition(table.BEGIN)[0] == original.partition(table.BEGIN)[0]
    assert once.partition(table.END)[2] == original.partition(table.END)[2]


def test_a_document_without_the_block_is_left_alone() -> None:
    with pytest.raises(ValueError, match="no block"):
        table.replace("# Title\n", "figures")
