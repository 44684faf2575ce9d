"""`/metrics` as Prometheus' own tools see it; skipped visibly where they are not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_processes import DATA
from tests.integration.test_serve import APP, running, wait_for

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

INFER = {
    "inputs": [{"name": name, "datatype": "FP32", "shape": [4], "data": [1, 2, 3, 4]} for name in ("a", "b")],
    "parameters": {"timeout": 5_000_000},
}


def work(server: Any, rounds: int = 8) -> None:
    for _ in range(rounds):
        assert server.post("/v2/models/scale/infer", INFER)[0] == 200
        assert server.post("/v1/reverse", DATA, Content_Type="application/octet-stream")[0] == 200
    assert server.post("/v2/models/scale/infer", {"inputs": []})[0] == 400


@needs_promtool
@pytest.mark.parametrize("processes", ["1", "2"])
def test_promtool_has_nothing_to_say(processes: str) -> None:
    with running("serve", APP, "--processes", processes) as server:
        work(server)
        text = server.request("GET", "/metrics")[1]
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_names_of_triton_are_there_if_wanted() -> None:
    with running("serve", APP, "--processes", "2", "--triton-metrics") as server:
        work(server)
        of = r'\{model="scale",version="1"\}'
        # What another process counted is as old as its last look.
        wait_for(lambda: server.metric("nv_inference_request_success" + of) == 8)
        text = server.request("GET", "/metrics")[1].decode()
        assert "# TYPE nv_inference_request_success counter\n" in text
        assert server.metric(r'nv_inference_request_failure\{model="scale",version="1",reason="OTHER"\}') == 1
        assert server.metric("nv_inference_count" + of) == 8
        assert 1 <= server.metric("nv_inference_exec_count" + of) <= 8
        assert server.metric("nv_inference_pending_request_count" + of) == 0
        parts = [server.metric(f"nv_inference_{part}_duration_us" + of) for part in ("queue", "compute_infer")]
        assert 0 < sum(parts) < server.metric("nv_inference_request_duration_us" + of)
    with running("serve", APP) as server:
        work(server, 1)
        assert "nv_inference" not in server.request("GET", "/metrics")[1].decode()


@pytest.mark.slow
@needs_prometheus
def test_prometheus_scrapes_all_processes_as_one(tmp_path: Path) -> None:
    with running("serve", APP, "--processes", "2", "--triton-metrics") as server:
        work(server)
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            f"scrape_configs: [{{job_name: rtml, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}]\n"
        )
        checked = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, timeout=30)
        assert checked.returncode == 0, checked.stdout
        port = free_port()
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        prometheus = subprocess.Popen(command)
        try:

            def value(query: str) -> float:
                url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
                try:
                    with urllib.request.urlopen(url, timeout=5) as response:
                        found = json.load(response)["data"]["result"]
                except OSError:
                    return -1
                return float(found[0]["value"][1]) if found else -1

            wait_for(lambda: value("up") == 1)
            wait_for(lambda: value("sum(rtml_gateway_requests_total)") == 17)
            assert value('sum(rtml_gateway_deadlines_total{model="scale",outcome="met"})') == 8
            assert value('rtml_gateway_processes{state="serving"}') == 2
            p99 = 'histogram_quantile(0.99, sum by (le) (rtml_gateway_request_seconds_bucket{model="scale"}))'
            assert 0 < value(p99) < 30
            assert value('nv_inference_count{model="scale"}') == 8
            assert value("sum(rtml_gateway_cpu_seconds_total)") > 0
            assert value("count(rtml_task_seconds_bucket)") > 0
        finally:
            prometheus.terminate()
            prometheus.wait(30)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])
