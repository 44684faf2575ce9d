"""Figures of what was sent, the reading of answers, and the table of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests import measuring, report, statistics, wire
from loadtests.figures import goodput
from loadtests.figures.verdict import is_verdict
from loadtests.generators import Outcome
from loadtests.peers import table
from loadtests.schedule import Plan
from loadtests.sender import Sent
from loadtests.where import where

ROOT = Path(__file__).resolve().parents[2]


def outcome(rows: Sequence[tuple[float, float, int]], deadline: float = 0.05) -> Outcome:
    """Requests a tenth of a second apart: how late each was sent, how long after its time it ended, its status."""
    times = np.arange(len(rows)) / 10
    late, taken, status = (np.array(column) for column in zip(*rows))
    plan = Plan(times, np.zeros(len(rows), np.int64), np.full(len(rows), deadline), np.ones(len(rows), bool))
    return Outcome(plan, Sent(times + late, times + taken, status.astype(np.int16)))


def test_everything_is_counted_once() -> None:
    rows = [
        (0, 0.01, 200), (0, 0.02, 200), (0, 0.06, 200), (0, 0.001, 503), (0, 0.001, 429), (0, 0.05, 504),
        (0, 0.01, 500), (0, 0.0, wire.BROKEN), (0, 9.0, wire.TIMEOUT), (0.2, 0.21, 200),
    ]  # fmt: skip
    found = statistics.figures(outcome(rows), 1.0)
    counts = (found.good, found.late, found.shed, found.expired, found.errors, found.broken, found.timeouts)
    assert counts == (2, 2, 2, 1, 1, 1, 1)
    assert sum(counts) == found.requests == 10
    assert (found.misses, found.offered, found.goodput, found.fraction) == (1, 10.0, 2.0, 0.2)
    # Of eight that were let in: two late, one expired, one broken, one given up.
    assert found.missed_of_admitted == pytest.approx(5 / 8)
    assert found.worst == pytest.approx(0.21)


def test_a_request_that_was_never_sent_is_a_miss() -> None:
    assert statistics.figures(outcome([(float("nan"), 1.0, wire.TIMEOUT)]), 1.0).misses == 1


def test_latency_is_from_the_planned_time() -> None:
    """A server that stands still for a second delays all that were planned meanwhile, not only the one it had."""
    rows = [(max(0.0, 1 - n / 10), max(0.001, 1 - n / 10), 200) for n in range(20)]
    found = statistics.figures(outcome(rows), 2.0)
    assert found.p50 is not None
    assert found.p90 is not None
    assert found.p90 >= 0.8
    assert found.good == 10


def test_quantiles_are_of_values_that_were_there() -> None:
    values = np.arange(1, 1001) / 1.0
    assert [statistics.quantile(values, q) for q in (0.5, 0.99, 0.999)] == [500, 990, 999]
    assert statistics.quantile(values[:0], 0.5) is None


def test_slices_add_up() -> None:
    found = statistics.over_time(outcome([(0, 0.01, 200)] * 7 + [(0, 0.01, 503)] * 3), 0.5)
    assert found["offered"] == [10, 10]
    assert sum(found["good"]) == 14
    assert sum(found["shed"]) == 6


def test_tables_show_each_kind() -> None:
    one = statistics.figures(outcome([(0, 0.01, 200)]), 1.0)
    text = report.runs({"run": {"all": one, "a": one, "b": one}})
    assert [line.split()[0] for line in text.splitlines()] == ["offered/s", "run", "a", "b"]


PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


@pytest.mark.parametrize("response", [PLAIN, CHUNKED])
def test_responses_are_found_however_they_come(response: bytes) -> None:
    for cut in range(len(response)):
        assert wire.response_end(response[:cut]) is None
    assert wire.response_end(response) == (200, len(response), False)
    assert wire.response_end(response + response) == (200, len(response), False)
    assert wire.body(response) == b"hello"


def test_other_responses() -> None:
    closing = b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    assert wire.response_end(closing) == (503, len(closing), True)
    assert wire.response_end(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN) == (200, 25 + len(PLAIN), False)
    assert wire.response_end(b"HTTP/1.1 204 Nothing\r\n\r\n") == (204, 24, False)
    with pytest.raises(ValueError, match="not an HTTP response"):
        wire.response_end(b"SSH-2.0 hello\r\n\r\n")


DOCUMENT: dict[str, Any] = {
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"rtml": "1", "mosec": "2"},
    "rows": {
        "rtml": {"c64_per_s": 2000.0, "goodput_2x": 0.97, "missed_2x": 0.004},
        "mosec": {"c64_per_s": 3000.0},
    },
    "failed": {"ray": "no environment"},
    "run": {"date": "2020-02-02T20:20:20", "commit": "abcdef0", "model": "four", "deadline_ms": 50.0, "repetitions": 3},
}


def test_a_comparison_as_a_table() -> None:
    lines = table.render(DOCUMENT).split("\n")
    assert lines[0] == "|  | rtml | Mosec |"
    assert lines[2:5] == [
        "| requests/s, 64 at a time | 2,000 | 3,000 |",
        "| at 2.0 x | 97% | - |",
        "| missed, of what was let in, at 2.0 x | 0.4% | - |",
    ]
    assert "rtml 1 (Python), Mosec 2 (Rust)" in lines[6]
    assert lines[7] == "Not measured: ray (no environment)."


def test_the_documents_have_the_blocks() -> None:
    text = (ROOT / "docs" / "loadtests.md").read_text()
    for model in ("four", "wide"):
        assert "figures" in table.replace(text, model, "figures")
    with pytest.raises(ValueError, match="no block"):
        table.replace("# Title\n", "four", "figures")


@pytest.mark.parametrize(("start", "limit"), [(10, 137.0), (1000, 137.0), (137, 137.0), (1, 9.0)])
def test_the_search_comes_close(start: float, limit: float) -> None:
    found = measuring.search(lambda rate, _: 1.0 if rate <= limit else 0.9, start, 16)
    assert limit / 1.06 <= found.rate <= limit


def test_a_search_without_success_says_what_it_tried() -> None:
    found = measuring.search(lambda rate, _: 0.0, 100, 3)
    assert found.rate == 0
    assert [part for _, part in found.probes] == [0, 0, 0]


def overloads(good: int, late: int, capacities: Sequence[tuple[float, float]]) -> list[goodput.Overload]:
    """Runs of a second with so many answers in time and late, and the capacities before and after each."""
    found = statistics.figures(outcome([(0, 0.01, 200)] * good + [(0, 0.06, 200)] * late), 1.0)
    return [goodput.Overload(measuring.Run({"all": found}, 0.1, 0), before, after) for before, after in capacities]


@pytest.mark.parametrize(
    ("good", "late", "capacities", "mark"),
    [
        (95, 0, [(100, 100)] * 3, "passed"),
        (85, 0, [(100, 100)] * 3, "MISSED"),
        (95, 2, [(100, 100)] * 3, "MISSED"),
        # one moment in which the machine was quick, and one in which it was slow
        (95, 0, [(100, 100), (180, 200), (20, 10)], "passed"),
        (95, 0, [(80, 120), (100, 100), (200, 10)], "passed"),
    ],
)
def test_goodput_is_judged_by_the_middle_round_and_the_capacity_around_it(
    good: int, late: int, capacities: list[tuple[float, float]], mark: str
) -> None:
    lines = goodput._lines("goodput", True, {"poisson": overloads(good, late, capacities)}, 100.0, (0.0005, 0.01))
    assert "20.0 times that (asked: 20)" in lines[0]
    assert [line.split()[0] for line in lines if is_verdict(line)] == [mark]


def test_the_gateway_bound_case_is_reported() -> None:
    lines = goodput._lines("tiny", False, {"poisson": overloads(10, 0, [(100, 100)])}, 100.0, (0.0005, 0.0001))
    assert lines[1].startswith("reported: tiny: poisson at 2 x capacity: 10.0%")
    assert not any(is_verdict(line) for line in lines)


def test_a_miss_is_put_down_to_what_took_longer_than_usual() -> None:
    usual = (0.0, 0.02, 200)
    rows = [usual] * 8 + [(0.04, 0.06, 200), (0, 0.06, 200), (0, 0.06, 200), (0, 0.06, 200), (0, 0.05, 504)]
    found = outcome(rows)
    # In the server: all of it, in the queue, running.
    inside = [(0.018, 0.007, 0.01)] * 9 + [(0.02, 0.007, 0.01), (0.058, 0.047, 0.01), (0.058, 0.007, 0.05)]
    found.sent.spent = np.array([*inside, (np.nan,) * 3])
    assert where(found) == {"sent late": 1, "on the way": 1, "queued": 1, "run": 1, "expired": 1}
    found.sent.spent = None
    assert not where(found)


def test_what_the_server_says_of_its_time_is_read() -> None:
    said = b'Server-Timing: queue;dur=1.500, batch;desc="2", transfer;dur=0.1, compute;dur=10.0, total;dur=13'
    assert wire.timing(b"HTTP/1.1 200 OK\r\n" + said) == pytest.approx((0.013, 0.0015, 0.01))
    assert wire.timing(b"HTTP/1.1 504 X\r\nServer-Timing: total;dur=50.000") is None


def test_a_run_beside_busy_programs_says_so() -> None:
    quiet = overloads(95, 0, [(100, 100)])
    busy = overloads(95, 0, [(100, 100)])
    busy[0].others = 0.4
    busy[0].missed = {"run": 3}
    assert "DISTURBED" not in "\n".join(goodput._lines("goodput", True, {"poisson": quiet}, 100.0, (0.0005, 0.01)))
    lines = goodput._lines("goodput", True, {"poisson": busy}, 100.0, (0.0005, 0.01))
    assert lines[-1].endswith("40% of the machine: DISTURBED")
    assert "poisson: missed because: run 3" in lines
