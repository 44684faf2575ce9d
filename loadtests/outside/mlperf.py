"""MLPerf's LoadGen against the gateway, Server scenario: Poisson arrivals, and a bound for the p99.

    python -m loadtests.outside.mlperf [--model mlp] [--rate 100] [--bound-ms 50] [--quick] [--url http://...]

It runs in an environment of its own (`make mlperf`); its verdict and its logs are LoadGen's. LoadGen sends at its own
planned times from this client's threads, and counts from those times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PYTHON: Final = ROOT / ".venv-mlperf" / "bin" / "python"
#: What the summary says that is worth a line.
SAID: Final = (
    "Scenario", "Result is", "Completed samples per second", "Scheduled samples per second",
    "50.00 percentile latency (ns)", "99.00 percentile latency (ns)", "99.90 percentile latency (ns)",
    "Early Stopping Result",
)  # fmt: skip


def inside(options: argparse.Namespace) -> None:
    """In LoadGen's environment: the test itself."""
    import queue
    import threading
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    import mlperf_loadgen as loadgen

    parts = urlsplit(options.url)
    assert parts.hostname is not None
    plain = HTTPConnection(parts.hostname, parts.port, timeout=30)
    plain.request("GET", f"/v2/models/{options.model}")
    described = json.loads(plain.getresponse().read())
    bodies = _bodies(described["inputs"])
    path, headers = f"/v2/models/{options.model}/infer", {"Content-Type": "application/json"}
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    failed = [0]

    def work() -> None:
        connection = HTTPConnection(str(parts.hostname), parts.port, timeout=30)
        while (sample := waiting.get()) is not None:
            connection.request("POST", path, bodies[sample.index], headers)
            response = connection.getresponse()
            response.read()
            failed[0] += response.status != 200
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0)])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(options.threads)]
    for thread in threads:
        thread.start()

    def issue(samples: Any) -> None:
        for sample in samples:
            waiting.put(sample)

    sut = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(len(bodies), len(bodies), lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(sut, library, _settings(loadgen, options), _logs(loadgen, options.out))
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(sut)
    for _ in threads:
        waiting.put(None)
    print(f"requests that failed: {failed[0]}")


def _bodies(inputs: list[dict[str, Any]], count: int = 64) -> list[bytes]:
    import numpy as np

    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        tensors = []
        for one in inputs:
            shape = [1 if size < 0 else size for size in one["shape"]]
            data = rng.normal(0, 1, shape).round(3).ravel().tolist()
            tensors.append({"name": one["name"], "datatype": one["datatype"], "shape": shape, "data": data})
        made.append(json.dumps({"inputs": tensors}).encode())
    return made


def _settings(loadgen: Any, options: argparse.Namespace) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Server
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = options.rate
    settings.server_target_latency_ns = int(options.bound_ms * 1e6)
    settings.server_target_latency_percentile = 0.99
    settings.min_duration_ms = int(options.seconds * 1e3)
    settings.min_query_count = int(options.rate * options.seconds)
    return settings


def _logs(loadgen: Any, out: Path) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    output = loadgen.LogOutputSettings()
    output.outdir = str(out)
    output.copy_summary_to_stdout = False
    logs = loadgen.LogSettings()
    logs.log_output = output
    logs.enable_trace = False
    return logs


def arguments() -> argparse.ArgumentParser:
    """What can be asked."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.outside.mlperf", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default="mlp", help="a model of float inputs (default mlp)")
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--bound-ms", type=float, default=50.0, help="of the p99")
    parser.add_argument("--seconds", type=float, default=60.0, help="at least (LoadGen's rules: 600)")
    parser.add_argument("--threads", type=int, default=32, help="requests under way at most")
    parser.add_argument("--quick", action="store_true", help="ten seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "out/load/mlperf", help="for LoadGen's logs")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Starts the gateway here and LoadGen in its own environment."""
    options = arguments().parse_args()
    if options.quick:
        options.seconds = min(options.seconds, 10.0)
    if options.inside:
        inside(options)
        return 0
    from loadtests.outside.perf_analyzer import served

    if not PYTHON.exists():
        sys.stderr.write("loadtests: LoadGen's environment is missing: make .venv-mlperf/.installed\n")
        return 2
    with served(options.url) as url:
        command = [str(PYTHON), "-m", "loadtests.outside.mlperf", "--inside", "--url", url]
        for name in ("model", "rate", "bound_ms", "seconds", "threads", "out"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    summary = options.out / "mlperf_log_summary.txt"
    if done.returncode or not summary.exists():
        sys.stderr.write(f"loadtests: LoadGen ended with {done.returncode}\n")
        return 2
    for line in summary.read_text().splitlines():
        if line.strip().startswith(SAID):
            print(line)
    print(f"logs in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
