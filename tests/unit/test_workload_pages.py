"""Pages of benchmarks/workloads: ratios, verdicts, plots, from measurements made up here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.workloads import hotos_page, ray_page, ray_recovery, report
from benchmarks.workloads.hotos_page import BSP, IDEAL, ONE, SPARK, WAIT, Cell

MACHINE = {
    "time": "-", "commit": "-", "cpus": 2, "processor": "-", "python": "3.11", "load": 0.1, "nice": 0,
}  # fmt: skip


def cells() -> dict[str, Cell]:
    rounds = {ONE: [0.1, 0.2], BSP: [0.05, 0.1], WAIT: [0.055, 0.11], SPARK[0]: [0.9, 0.9], SPARK[1]: [0.3, 0.3]}
    row = {name: Cell(list(seconds), cpu_s=[0.1, 0.1]) for name, seconds in rounds.items()}
    row[ONE].policy = [0.002, 0.002]
    for name in SPARK:
        row[name].policy = [0.1, 0.1]
    hotos_page.idealise(row)
    return row


def test_ratios_are_those_of_repetitions() -> None:
    row = cells()
    found = hotos_page.speedups(row)
    assert found[BSP] == pytest.approx(2.0)
    assert found[WAIT] == pytest.approx(1.82, abs=0.01)
    assert found[SPARK[0]] == pytest.approx((0.1 / 0.9 + 0.2 / 0.9) / 2)
    assert row[IDEAL].rounds == pytest.approx([0.801, 0.801]), "its policy is charged half of one thread's time"
    assert [one["met"] for one in hotos_page.bars({7.0: row})] == [True] * 4
    row[BSP].rounds = [0.1, 0.2]
    assert [one["met"] for one in hotos_page.bars({7.0: row})] == [False, True, True, True]


@pytest.mark.parametrize("spark", [True, False])
def test_the_page_of_hotos(spark: bool) -> None:
    found = {ms: cells() for ms in (1.0, 7.0)}
    systems: dict[str, Any] = {"spark": {"empty_job_s": 0.05}}
    if not spark:
        systems = {}
        found = {ms: {name: row[name] for name in (ONE, BSP, WAIT)} for ms, row in found.items()}
    results = {
        "machine": MACHINE,
        "systems": systems,
        "fingerprints": {"7 ms": "abc"},
        "bars": hotos_page.bars(found),
    }
    page = hotos_page.page(results, found, "A remark.")
    assert "| 7 | 1.00 | 2.00 | 1.82 |" in page
    assert "A remark." in page
    assert ("An empty job takes 50 ms." in page) == spark
    assert "Other programs were running" not in page
    assert "Other programs were running" in report.conditions(MACHINE | {"load": 3.0}, "")


def ray_results() -> dict[str, Any]:
    def place(seconds: float, moved: int) -> dict[str, Any]:
        return {"mean_s": seconds, "moved": moved, "tasks": 4}

    def row(microseconds: float) -> dict[str, Any]:
        parts = {"root_us": 0.5, "nodes_us": microseconds, "client_us": 0.1, "us": microseconds + 0.6}
        return {"tasks": 100, "tasks_per_s": 1e6 / microseconds, "cpus": 1.9, **parts}

    def killed(again: int) -> dict[str, Any]:
        rates = {"n1": [4, 4, 8], "n2": [4, 0, 0]}
        return {"executed": 400 + again, "again": again, "calls": 40, "seconds": 1.0, "rates": rates, "failed": 3}

    return {
        "machine": MACHINE,
        "locality": {"near": {10_000_000: place(0.01, 0)}, "blind": {10_000_000: place(0.8, 20_000_000)}},
        "throughput": {"born on nodes": {1: row(20), 4: row(24)}, "through the root": {1: row(40), 4: row(44)}},
        "recovery": {
            ray_page.KILLED: {**killed(30), "kill_at": 4.0, "join_at": 9.0},
            ray_page.WITHOUT: killed(500),
            ray_page.WITH: killed(20),
        },
    }


def test_the_page_of_ray() -> None:
    results = ray_results()
    results["bars"] = ray_page.bars(results)
    assert [one["met"] for one in results["bars"]] == [True] * 4
    page = ray_page.page(results, "")
    assert "| 10 | 4 | 10.0 | 800.0 | 80.0 | 0.0 | 20.0 |" in page
    assert "| born on nodes | 4 | 41,667 |" in page
    assert f"| {ray_page.WITH} | 420 | 20 | 3 | 1.0 |" in page


def test_bars_can_be_missed() -> None:
    results = ray_results()
    results["recovery"][ray_page.WITH]["again"] = 41
    results["locality"]["blind"][10_000_000]["mean_s"] = 0.05
    results["throughput"]["born on nodes"][4]["root_us"] = 9.0
    assert [one["met"] for one in ray_page.bars(results)] == [False, False, True, False]


def test_a_part_alone_has_a_page_too() -> None:
    results = {name: found for name, found in ray_results().items() if name in ("machine", "throughput")}
    results["bars"] = ray_page.bars(results)
    assert "## Recovery" not in ray_page.page(results, "")


def test_the_results_of_chains_are_known() -> None:
    value = 3
    for number in range(ray_recovery.LENGTH):
        value = ray_recovery.following(value, number)
    assert ray_recovery.expected(3) == value != ray_recovery.expected(4)


def draw(directory: Path) -> None:
    """Plots of all of it."""
    hotos_page.plot({ms: cells() for ms in (1.0, 7.0)}, directory / "hotos.png")
    ray_page.plot(ray_results(), directory / "ray.png")
    ray_page.plot({"throughput": ray_results()["throughput"]}, directory / "part.png")


def test_plots(tmp_path: Path) -> None:
    # In a process of its own: matplotlib keeps files of fonts open.
    program = "import sys, pathlib; from tests.unit import test_workload_pages as t; t.draw(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=report.ROOT)
    for name in ("hotos", "ray", "part"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
