"""What a weight push every few seconds does to the latency of a served model.

    python -m loadtests.weight_push --pairs 10 --window 15

A gateway serves one model of a repository in poll mode. Requests are sent at planned times, whatever became of the ones
before, and measured from those times. Windows with pushes (a new version of the weights every five seconds) and
without alternate, in pairs whose order alternates too, so that the machine's drift hits both alike. Said is the ratio
of their p99, with a bootstrap interval over the pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Floats = npt.NDArray[np.float64]

MODEL: Final = "pushed"
POLL_SECONDS: Final = 0.25
#: Seconds that a version may take from its file to its first answer.
LOAD_TIMEOUT: Final = 60.0
#: Seconds between two windows, for what the last one left behind.
PAUSE: Final = 1.0
#: A request that was sent later than this many seconds after its time was sent late: the client's fault.
LATE: Final = 0.005
BOOTSTRAPS: Final = 10_000


@dataclass
class Window:
    """What was measured in one window; seconds, and counts."""

    pushes: int = 0
    requests: int = 0
    failed: int = 0
    late: int = 0
    p50: float = 0.0
    p99: float = 0.0
    worst: float = 0.0
    versions: list[str] = field(default_factory=list)


def weights(width: int, seed: int) -> bytes:
    """A two-layer perceptron with weights of its own, as an ONNX file."""
    rng = np.random.default_rng(seed)
    layers = [
        numpy_helper.from_array(rng.normal(0, width**-0.5, (width, width)).astype(np.float32), name) for name in "ab"
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in "xy")
    made = helper.make_model(
        helper.make_graph(nodes, MODEL, [x], [y], layers), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    onnx.checker.check_model(made)
    content: bytes = made.SerializeToString()
    return content


class Pusher:
    """Puts new versions into the repository, each from one moment to the next, and takes old ones away."""

    def __init__(self, repository: Path, width: int, count: int) -> None:
        self._repository = repository
        self.version = 0
        # Made beforehand: a push is to cost what the gateway does with it, and nothing else.
        for version in range(1, count + 1):
            new = self._staged(version)
            new.mkdir()
            (new / "model.onnx").write_bytes(weights(width, version))

    def _staged(self, version: int) -> Path:
        return self._repository / f".{MODEL}-{version}"

    def push(self) -> None:
        """The next version."""
        self.version += 1
        new = self._staged(self.version)
        target = self._repository / MODEL / str(self.version)
        target.parent.mkdir(exist_ok=True)
        new.rename(target)
        old = self._repository / MODEL / str(self.version - 3)
        if old.is_dir():
            (old / "model.onnx").unlink()
            old.rmdir()


class Load:
    """Sends requests at planned times.

    Args:
        session: With enough connections.
        url: Of the model's `infer`.
        rate: Requests per second.
        width: Numbers in a request.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, rate: float, width: int) -> None:
        self._session = session
        self._url = url
        self._rate = rate
        data = np.ones((1, width), np.float32).tobytes()
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, width], "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        self._body = head + data
        self._headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}

    async def run(self, seconds: float, window: Window) -> Floats:
        """Latencies from the planned times, in seconds."""
        loop = asyncio.get_running_loop()
        latencies: list[float] = []
        start = loop.time() + 0.05
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds * self._rate)):
                planned = start + number / self._rate
                await asyncio.sleep(planned - loop.time())
                window.late += loop.time() - planned > LATE
                group.create_task(self._one(planned, window, latencies))
        return np.array(latencies)

    async def _one(self, planned: float, window: Window, latencies: list[float]) -> None:
        try:
            async with self._session.post(self._url, data=self._body, headers=self._headers) as response:
                body = await response.read()
                window.failed += response.status != 200
                found = re.search(rb'"model_version":"(\d+)"', body)
                if found and found[1].decode() not in window.versions:
                    window.versions.append(found[1].decode())
        except (aiohttp.ClientError, TimeoutError):
            window.failed += 1
        latencies.append(asyncio.get_running_loop().time() - planned)


async def measure(load: Load, pusher: Pusher | None, seconds: float, every: float) -> Window:
    """One window; with pushes if there is somebody to push."""
    window = Window()

    async def push() -> None:
        assert pusher is not None
        while True:
            await asyncio.sleep(every / 2)
            pusher.push()
            window.pushes += 1
            await asyncio.sleep(every / 2)

    pushing = None if pusher is None else asyncio.get_running_loop().create_task(push())
    latencies = await load.run(seconds, window)
    if pushing is not None:
        pushing.cancel()
        await asyncio.wait([pushing])
    window.requests = len(latencies)
    window.p50, window.p99 = (float(np.quantile(latencies, q)) for q in (0.5, 0.99))
    window.worst = float(latencies.max())
    return window


def bootstrap(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of the ratios, and the ends of its 95 % interval over resampled pairs."""
    logs = np.log(ratios)
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (BOOTSTRAPS, len(logs))).mean(axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return float(np.exp(logs.mean())), float(low), float(high)


async def run(options: argparse.Namespace, port: int, pusher: Pusher) -> list[dict[str, Any]]:
    """The pairs of windows."""
    url = f"http://127.0.0.1:{port}/v2/models/{MODEL}"
    connector = aiohttp.TCPConnector(limit=0)
    pairs: list[dict[str, Any]] = []
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(30)) as session:
        async with asyncio.timeout(LOAD_TIMEOUT):
            while (await session.get(f"{url}/ready")).status != 200:  # noqa: ASYNC110  # it is in another process
                await asyncio.sleep(0.05)
        load = Load(session, f"{url}/infer", options.rate, options.width)
        await load.run(min(3.0, options.window), Window())
        for number in range(options.pairs):
            found: dict[str, Window] = {}
            for kind in ("quiet", "pushed") if number % 2 else ("pushed", "quiet"):
                sys.stderr.write(f"\rpair {number + 1} of {options.pairs}: {kind:6} ")
                sys.stderr.flush()
                await asyncio.sleep(PAUSE)
                who = pusher if kind == "pushed" else None
                found[kind] = await measure(load, who, options.window, options.every)
            ratio = found["pushed"].p99 / found["quiet"].p99
            pairs.append({"ratio": ratio, **{kind: asdict(window) for kind, window in found.items()}})
    sys.stderr.write("\r" + " " * 40 + "\r")
    return pairs


def main() -> None:
    """Run it, print a table, and save everything as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="windows with and without pushes")
    parser.add_argument("--window", type=float, default=15.0, help="seconds of each")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between pushes")
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--width", type=int, default=512, help="numbers in a request; the weights are twice its square")
    parser.add_argument("--out", type=Path, default=Path("out/weight_push.json"), help="where to save the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rtml-push-") as place:
        repository = Path(place)
        pusher = Pusher(repository, options.width, 2 + options.pairs * int(1 + options.window / options.every))
        pusher.push()
        command = [sys.executable, "-m", "rtml", "serve", "--model-repository", place, "--model-control", "poll"]
        command += ["--repository-poll-secs", str(POLL_SECONDS), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                port = _port_of(server)
                started = time.perf_counter()
                pairs = asyncio.run(run(options, port, pusher))
                elapsed = time.perf_counter() - started
            finally:
                server.terminate()
                server.communicate()
    report(options, pairs, elapsed)


def _port_of(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.fullmatch(r"serving on http://[^:]+:(\d+)\n", line):
            return int(found[1])
    raise SystemExit("the gateway did not start")


def report(options: argparse.Namespace, pairs: list[dict[str, Any]], elapsed: float) -> None:
    """Print and save what was found."""
    ratio, low, high = bootstrap([pair["ratio"] for pair in pairs])
    print(
        f"{'pair':>4} {'quiet p50':>10} {'p99 ms':>8} {'pushed p50':>10} {'p99 ms':>8} {'ratio':>6}  pushes failed late"
    )
    for number, pair in enumerate(pairs, 1):
        quiet, pushed = pair["quiet"], pair["pushed"]
        failed, late = quiet["failed"] + pushed["failed"], quiet["late"] + pushed["late"]
        print(
            f"{number:4} {quiet['p50'] * 1e3:10.2f} {quiet['p99'] * 1e3:8.2f} {pushed['p50'] * 1e3:10.2f} "
            f"{pushed['p99'] * 1e3:8.2f} {pair['ratio']:6.2f} {pushed['pushes']:7} {failed:6} {late:4}"
        )
    print(f"p99 with pushes / without: {ratio:.3f}, 95 % interval {low:.3f} to {high:.3f}, {len(pairs)} pairs")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = {"settings": settings, "seconds": elapsed, "ratio": ratio, "interval": [low, high], "pairs": pairs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved as {options.out}")


if __name__ == "__main__":
    main()
