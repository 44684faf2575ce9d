"""The gateway under Triton's load generator: it runs to its end, and reads what it looks for.

How fast it was is not looked at.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import perf_analyzer
from tests.conformance.conftest import Gateway

pytestmark = pytest.mark.slow

#: Requests of each run.
COUNT = 100


@pytest.fixture(scope="module", autouse=True)
def _there() -> None:
    """Without it nothing is left out silently."""
    try:
        perf_analyzer.fetch()
    except perf_analyzer.Missing as missing:
        pytest.fail(str(missing), pytrace=False)


class Load:
    def __init__(self, gateway: Gateway, directory: Path) -> None:
        self.gateway = gateway
        self.directory = directory

    def __call__(self, model: str, *arguments: str) -> perf_analyzer.Report:
        """Some requests to a model, all of which succeed."""
        grpc = "grpc" in arguments
        url = f"127.0.0.1:{self.gateway.grpc_port if grpc else self.gateway.port}"
        counted = rf'rtml_gateway_requests_total\{{[^}}]*code="200",model="[^"]*{model}"[^}}]*\}}'
        before = self.gateway.metric(counted)
        if "--measurement-mode" not in arguments:
            arguments = ("--request-count", str(COUNT), *arguments)
        asked = ("-m", model, "-u", url, *arguments)
        try:
            report = perf_analyzer.run(self.directory, *asked)
        except subprocess.TimeoutExpired:
            # Once in hundreds of runs on a busy machine it waits for ever: it has read the answers to all its requests,
            # its workers have ended or sleep, and its main thread waits for more. No request is left at the gateway.
            assert self.gateway.metric(r"rtml_gateway_requests_in_flight\{[^}]*\}") == 0
            report = perf_analyzer.run(self.directory, *asked)
        assert report.rows, report.text
        for row in report.rows:
            assert float(row["Inferences/Second"]) > 0, report.text
            assert 0 < float(row["p50 latency"]) <= float(row["p99 latency"]), report.text
        assert self.gateway.metric(counted) >= before + COUNT * len(report.rows)
        return report


@pytest.fixture
def load(gateway: Gateway, tmp_path: Path) -> Load:
    return Load(gateway, tmp_path)


FORMS = {
    "binary": (),
    "json": ("--input-tensor-format", "json", "--output-tensor-format", "json"),
    "shared memory": ("--shared-memory", "system", "--output-shared-memory-size", "64"),
    "grpc": ("-i", "grpc"),
    "grpc streams": ("-i", "grpc", "--streaming"),
    "grpc compressed": ("-i", "grpc", "--grpc-compression-algorithm", "gzip"),
    "grpc shared memory": ("-i", "grpc", "--shared-memory", "system", "--output-shared-memory-size", "64"),
}


def test_a_decoupled_model(load: Load) -> None:
    report = load("tokens", "--concurrency-range", "3", *FORMS["grpc streams"])
    assert "Detected decoupled model" in report.text


@pytest.mark.parametrize("form", FORMS)
def test_closed_loop(load: Load, form: str) -> None:
    report = load("double", "--concurrency-range", "3", *FORMS[form])
    assert [row["Concurrency"] for row in report.rows] == ["3"]
    # What the server says of itself: in microseconds, of requests.
    assert float(report.rows[0]["Server Compute Infer"]) > 0, report.text


def test_windows_until_figures_are_stable_at_several_concurrencies(load: Load) -> None:
    stable = ("--stability-percentage", "999", "--max-trials", "3")  # this machine may not be ours alone
    windows = ("--measurement-mode", "count_windows", "--measurement-request-count", str(COUNT), *stable)
    report = load("double", "--concurrency-range", "1:4:3", *windows)
    assert {row["Concurrency"] for row in report.rows} == {"1", "4"}  # by throughput, in the table


def test_batches_and_several_requests_at_a_time(load: Load) -> None:
    report = load("double", "-b", "4", "--async", "--concurrency-range", "8")
    assert "Batch size: 4" in report.text


@pytest.mark.parametrize("distribution", ["constant", "poisson"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_request_rates(load: Load, protocol: str, distribution: str) -> None:
    report = load("double", "-i", protocol, "--request-rate-range", str(COUNT), "--request-distribution", distribution)
    assert [float(row["Request Rate"]) for row in report.rows] == [COUNT]


def test_intervals_from_a_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "intervals").write_text("1000\n5000\n2000\n")
    load("double", "--request-intervals", str(tmp_path / "intervals"))


@pytest.mark.parametrize("version", ["1", "2"])
def test_versions(load: Load, gateway: Gateway, version: str) -> None:
    def runs() -> Any:
        stats = gateway.request("GET", f"/v2/models/double/versions/{version}/stats")[1]
        return stats["model_stats"][0]["inference_count"]

    before = runs()
    load("double", "-x", version)
    assert runs() >= before + COUNT


@pytest.mark.parametrize(
    "how", [("--concurrency-range", "4"), ("--request-rate-range", "100", "--num-of-sequences", "3")]
)
@pytest.mark.parametrize("form", ["binary", "grpc", "grpc streams"])
def test_sequences(load: Load, form: str, how: tuple[str, ...]) -> None:
    report = load("sum", "--sequence-length", "10", *FORMS[form], *how)
    assert "Sequence count" in report.text


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "FP16", "FP64", "BYTES"])
def test_datatypes(load: Load, datatype: str) -> None:
    load(f"same_{datatype}", "--string-length", "10")


def test_metrics_are_collected(load: Load, gateway: Gateway) -> None:
    url = f"127.0.0.1:{gateway.port}/metrics"
    report = load("double", "--collect-metrics", "--metrics-url", url, "--metrics-interval", "50")
    assert "Failed" not in report.text


def test_traces_are_written(load: Load, gateway: Gateway) -> None:
    asked = ("--trace-level", "TIMESTAMPS", "--trace-rate", "10", "--trace-count", "5", "--log-frequency", "1")
    load("double", *asked)
    traces = [json.loads(path.read_text()) for path in gateway.trace_file.parent.glob("trace.json*")]
    assert any(entry.get("model_name") == "double" for trace in traces for entry in trace)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_graph_programs_are_ensembles(load: Load, protocol: str) -> None:
    load("chain", "-i", protocol, "--shape", "x:4")  # its steps are those that were seen
    report = load("chain", "-i", protocol, "--shape", "x:4")
    assert "Composing models" in report.text
    assert "double, version" in report.text
