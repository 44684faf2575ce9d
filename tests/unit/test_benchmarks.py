"""benchmarks.run, benchmarks.bars, benchmarks.measure: medians, tables and verdicts, and one adapter for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import measure, microbench
from benchmarks.bars import BARS, Table, advantage, verdicts
from benchmarks.run import median, merge, table
from benchmarks.suite import timing

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("values", "middle"), [([3.0], 3.0), ([9.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 2.0, 3.0], 2.5)])
def test_median(values: list[float], middle: float) -> None:
    assert median(values) == middle


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_percentile(share: float, value: int) -> None:
    assert measure.percentile(range(100, 0, -1), share) == value


def test_merge_takes_medians_and_keeps_what_a_system_cannot_do() -> None:
    results = [
        {"system": "rtml", "rows": {"sync_p50_us": value, "nested10_p50_us": 5.0}} for value in (100.0, 300.0, 200.0)
    ]
    results.append({"system": "process_pool", "rows": {"sync_p50_us": 250.0, "nested10_p50_us": None}})
    assert merge(results) == {
        "sync_p50_us": {"rtml": 200.0, "process_pool": 250.0},
        "nested10_p50_us": {"rtml": 5.0, "process_pool": None},
    }


def test_advantage_knows_which_way_is_better() -> None:
    assert advantage("sync_p50_us", 100, 250) == 2.5
    assert advantage("async_tasks_per_s", 100, 250) == 0.4
    assert advantage("nested10_p50_us", 100, None) is None


def test_verdicts_cover_what_was_measured() -> None:
    rows: Table = {"sync_p50_us": {"rtml": 100.0, "process_pool": 200.0, "ray": 300.0}, "submit_us": {"rtml": 11.0}}
    lines = verdicts(rows)
    assert [line.split()[0] for line in lines] == ["reached", "MISSED", "MISSED"]
    assert len({(bar.row, bar.peer) for bar in BARS}) == len(BARS)


def test_the_suite_of_ray_names_rows_that_are_not_far_enough_ahead() -> None:
    rows: Table = {
        "tasks sync /s": {"rtml": 4_000.0, "ray": 700.0},
        "actor calls async /s": {"rtml": 4_000.0, "ray": 1_000.0},
        "put gigabytes /s": {"rtml": 3.0, "ray": 2.0},
        "client: put gigabytes /s": {"ray": 0.1},
    }
    assert [line.split(":")[0].split()[0] for line in microbench.missed(rows)] == ["MISSED", "only"]
    assert "actor calls async /s: 4x" in microbench.missed(rows)[0]


def test_both_sides_of_the_suite_have_the_same_rows() -> None:
    """Ray is not installed here, so its side is read."""
    pattern = re.compile(r'Row\(\s*f?"([^"]+)"')
    texts = [(ROOT / f"benchmarks/suite/{name}.py").read_text() for name in ("rtml_", "ray_")]
    ours, theirs = (pattern.findall(text) for text in texts)
    assert sorted(ours) == sorted(theirs)
    assert len(ours) == len(set(ours)) > 20


def test_a_row_of_the_suite_is_what_was_done_in_a_second() -> None:
    plan = timing.Plan(warm_s=0.0, window_s=0.01, windows=1)
    value = timing.rate(timing.Row("sleeps /s", lambda: time.sleep(0.001), 5), plan)
    assert 0 < value <= 5_000


def test_table_is_aligned() -> None:
    rows: Table = {"sync_p50_us": {"rtml": 100.0, "process_pool": 2000.0}, "nested10_p50_us": {"rtml": 5.0}}
    lines = table(rows, ["rtml", "process_pool"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["sync_p50_us", "100", "2,000", "20.00x"]
    assert lines[2].split() == ["nested10_p50_us", "5", "-", "-"]


def test_an_adapter_prints_one_object() -> None:
    command = [sys.executable, "-m", "benchmarks.systems.process_pool", "--quick", "--only", "calls"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert report["system"] == "process_pool"
    assert set(report["rows"]) == {"cold_start_s", "submit_us", "submit_lone_us", "get_ready_us"}
    assert all(value > 0 for value in report["rows"].values())
