"""The counters of the statistics extension."""

from __future__ import annotations

from rtml.messages import Timing
from rtml.serving.statistics import STEPS, ModelStatistics


def timing(batch: int = 1, run: float = 0.004) -> Timing:
    return Timing(0.001, 0.002, 0.0005, run, batch)


def test_nothing_happened_yet_but_everything_is_named() -> None:
    found = ModelStatistics().describe("m", "1")
    assert found["name"] == "m"
    assert found["last_inference"] == found["inference_count"] == found["execution_count"] == 0
    assert found["inference_stats"] == {step: {"count": 0, "ns": 0} for step in STEPS}
    assert found["batch_stats"] == found["memory_usage"] == []
    assert found["response_stats"] == {}


def test_a_request_counts_its_rows_and_where_its_time_went() -> None:
    statistics = ModelStatistics()
    statistics.succeeded(0.01, 3, timing(), at=1234)
    statistics.failed(0.5)
    found = statistics.describe("m", "1")
    assert (found["last_inference"], found["inference_count"], found["execution_count"]) == (1234, 3, 1)
    stats = found["inference_stats"]
    assert stats["success"] == {"count": 1, "ns": 10_000_000}
    assert stats["fail"] == {"count": 1, "ns": 500_000_000}
    assert stats["queue"] == {"count": 1, "ns": 3_000_000}
    assert stats["compute_input"] == {"count": 1, "ns": 500_000}
    assert stats["compute_infer"] == {"count": 1, "ns": 4_000_000}
    assert stats["compute_output"] == {"count": 1, "ns": 0}
    (batch,) = found["batch_stats"]
    assert batch["batch_size"] == 3
    assert batch["compute_infer"] == {"count": 1, "ns": 4_000_000}


def test_calls_that_shared_a_run_are_one_execution() -> None:
    statistics = ModelStatistics()
    for _ in range(3):
        statistics.succeeded(0.01, 1, timing(batch=3), at=1)
    statistics.succeeded(0.01, 1, timing(), at=2)
    found = statistics.describe("m", "1")
    assert (found["inference_count"], found["execution_count"]) == (4, 2)
    # Each of the four waited for its whole run; there were two runs.
    assert found["inference_stats"]["compute_infer"] == {"count": 4, "ns": 16_000_000}
    assert [(batch["batch_size"], batch["compute_infer"]) for batch in found["batch_stats"]] == [
        (1, {"count": 1, "ns": 4_000_000}),
        (3, {"count": 1, "ns": 4_000_000}),
    ]


def test_an_engine_that_says_no_times_still_counts() -> None:
    statistics = ModelStatistics()
    statistics.succeeded(0.01, 2, None, at=1)
    found = statistics.describe("m", "1")
    assert (found["inference_count"], found["execution_count"], found["batch_stats"]) == (2, 1, [])


def test_counts_of_several_processes_add_up() -> None:
    one, other = ModelStatistics(), ModelStatistics()
    one.succeeded(0.01, 1, timing(batch=2), at=5)
    other.succeeded(0.03, 1, timing(batch=2), at=4)
    other.failed(0.1)
    other.responded(0, 0.2, ok=True)
    other.responded(1, 0.1, ok=False)
    one.merge(other)
    found = one.describe("m", "1")
    assert (found["last_inference"], found["inference_count"], found["execution_count"]) == (5, 2, 1)
    assert found["inference_stats"]["success"] == {"count": 2, "ns": 40_000_000}
    assert found["inference_stats"]["fail"]["count"] == 1
    assert found["batch_stats"][0]["compute_infer"]["count"] == 1
    assert found["response_stats"] == {
        "0": {"success": {"count": 1, "ns": 200_000_000}, "fail": {"count": 0, "ns": 0}},
        "1": {"success": {"count": 0, "ns": 0}, "fail": {"count": 1, "ns": 100_000_000}},
    }


def test_what_was_described_can_be_counted_again() -> None:
    statistics = ModelStatistics()
    statistics.succeeded(0.01, 2, timing(), at=5)
    statistics.failed(0.1)
    statistics.responded(0, 0.2, ok=True)
    row = statistics.describe("m", "1")
    assert ModelStatistics.of(row).describe("m", "1") == row


def test_the_sizes_that_are_remembered_are_bounded() -> None:
    statistics = ModelStatistics()
    for rows in range(1, 5000):
        statistics.succeeded(0.01, rows, timing(), at=1)
    found = statistics.describe("m", "1")
    assert len(found["batch_stats"]) == 4096
    assert sum(batch["compute_infer"]["count"] for batch in found["batch_stats"]) == 4999
