"""What the gateway and the engine add to a request, at one request at a time.

In turn, several rounds: a bare aiohttp no-op server with the same body and answer; the engine's round trip of a no-op
task from a program; the model `four` through the gateway; a graph program with one call of it.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, Final

import numpy as np

from loadtests import generators, messages, servers
from loadtests.figures.verdict import verdict
from loadtests.sender import Message, Target
from loadtests.statistics import quantile

#: Requests under way where throughput is measured.
CONCURRENCY: Final = 64
#: The figure: at most so many engine round trips above the no-op server.
MODEL_LIMIT: Final = 1.5
GRAPH_LIMIT: Final = 3.0


def nothing() -> None:
    """A task without work."""


def body() -> bytes:
    """A request of four numbers, binary; and of its own JSON length."""
    data = np.ones(4, np.float32).tobytes()
    return HEAD + data


HEAD: Final = (
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"parameters":{"binary_data_size":16}}],'
    b'"parameters":{"binary_data_output":true}}'
)


def target(url: str, path: str) -> Target:
    """The same body to any of the servers."""
    site = messages.Site(url)
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(HEAD))}
    made: list[Message] = [messages.message(site, path, body(), headers)]
    status, answer = site.post(made[0], path)
    if status != 200:
        raise RuntimeError(f"{url}{path} answers {status}: {answer[:200]!r}")
    return Target(site.host, site.port, [made])


def _p50(target: Target, seconds: float) -> float:
    found = generators.keep(target, 1, seconds)
    good = found.status == 200
    if not good.all():
        raise RuntimeError(f"{int((~good).sum())} of {len(good)} requests failed")
    return float(quantile(found.done - found.sent, 0.5) or 0.0)


def _sync(task: Any, seconds: float) -> float:
    """p50 of submit and result from a program."""
    taken = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        task.submit().result()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def throughput(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Requests a second of the smallest model with 64 under way. Takes about 25 s, quick or 10 s."""
    rounds, seconds = (1, 2.0) if quick else (5, 3.0)
    rates, p99 = [], []
    with servers.gateway("loadtests.app:app") as gateway:
        to = target(gateway.url, "/v2/models/four/infer")
        generators.keep(to, CONCURRENCY, 1.0)
        for _ in range(rounds):
            found = generators.keep(to, CONCURRENCY, seconds)
            good = found.status == 200
            rates.append(float(good.sum()) / seconds)
            p99.append(float(quantile((found.done - found.sent)[good], 0.99) or 0.0))
    shown = f"{statistics.median(rates):,.0f} requests/s, p99 {statistics.median(p99) * 1e3:.1f} ms"
    line = (
        f"reported: model of four numbers, {CONCURRENCY} under way: {shown} (beside other servers: make serving-peers)"
    )
    return [line], {"per_s": rates, "p99_s": p99}


def measure(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about 15 s, quick or 60 s."""
    import rtml

    rounds, seconds = (3, 0.7) if quick else (10, 1.5)
    noop_command = [sys.executable, "-m", "loadtests.figures.noop"]
    found: dict[str, list[float]] = {"noop": [], "sync": [], "model": [], "graph": []}
    log = servers.ROOT / "out/load/noop.log"
    with (
        servers.started(noop_command, log, ready=r"serving on (http://\S+)") as noop,
        servers.gateway("loadtests.app:app") as gateway,
        rtml.connect(workers=2),
    ):
        task = rtml.task(nothing)
        targets = {
            "noop": target(noop.url, "/infer"),
            "model": target(gateway.url, "/v2/models/four/infer"),
            "graph": target(gateway.url, "/v2/models/one/infer"),
        }
        _sync(task, 0.5)
        for to in targets.values():
            _p50(to, 0.5)
        for _ in range(rounds):
            for name, samples in found.items():
                samples.append(_sync(task, seconds) if name == "sync" else _p50(targets[name], seconds))
    middle = {name: statistics.median(samples) for name, samples in found.items()}
    lines = [f"{name:6} p50 {value * 1e6:7.0f} us" for name, value in middle.items()]
    for name, limit in (("model", MODEL_LIMIT), ("graph", GRAPH_LIMIT)):
        factor = (middle[name] - middle["noop"]) / middle["sync"]
        text = f"overhead of a {name}: no-op server plus {factor:.2f} engine round trips (at most {limit:g})"
        lines.append(verdict(factor <= limit, text))
    return lines, {"p50_s": middle, "rounds": found}
