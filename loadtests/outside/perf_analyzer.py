"""Triton's perf_analyzer against the gateway: closed loop at 1, 8 and 64, then Poisson rates.

    python -m loadtests.outside.perf_analyzer [--model mlp] [--quick] [--url http://...] [-- OPTIONS OF ITS OWN]

The program is `perf_analyzer` on PATH, or the one that the conformance tests fetch. Beside its closed-loop figures
stand those of this folder's own generator for the same model and time.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loadtests import generators, messages, report, servers
from loadtests.scenario import Poisson, Request, Scenario
from loadtests.statistics import quantile

CONCURRENCIES: Final = (1, 8, 64)
#: Parts of the throughput at 64 that the open loop asks for.
RATES: Final = (0.3, 0.6)
_TIMEOUT: Final = 180.0


def program() -> tuple[str, dict[str, str]]:
    """The program, and what its environment needs.

    Raises:
        RuntimeError: there is none.
    """
    if found := shutil.which("perf_analyzer"):
        return found, {}
    try:
        fetched = importlib.import_module("tests.conformance.perf_analyzer").fetch()
    except Exception as error:  # noqa: BLE001  # whatever it is, there is no program, and it says why
        raise RuntimeError(f"there is no perf_analyzer on PATH, and it could not be fetched: {error}") from None
    return str(fetched / "perf_analyzer"), {"LD_LIBRARY_PATH": str(fetched)}


def run(url: str, model: str, options: Sequence[str]) -> list[dict[str, str]]:
    """The rows of its table: a load and what it found.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    command, environment = program()
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.csv"
        done = subprocess.run(
            [command, "-m", model, "-u", url.removeprefix("http://"), "-i", "http", "-f", str(table), *options],
            capture_output=True,
            text=True,
            check=False,
            cwd=place,
            timeout=_TIMEOUT,
            env={**os.environ, **environment},
        )
        # Without a stable window it ends with 2, but has measured.
        if not table.exists():
            raise RuntimeError(f"perf_analyzer ended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
        return list(csv.DictReader(table.read_text().partition("\n\n")[0].splitlines()))


def cells(rows: list[dict[str, str]], load: str, name: str) -> list[list[str]]:
    """Of its table what matters: inferences a second, p50 and p99 in milliseconds."""
    return [
        [f"{name} {float(row[load]):g}", f"{float(row['Inferences/Second']):.1f}", *[
            f"{float(row[f'p{q} latency']) / 1e3:.2f}" for q in (50, 99)
        ]]
        for row in sorted(rows, key=lambda row: float(row[load]))
    ]  # fmt: skip


@contextmanager
def served(url: str | None) -> Iterator[str]:
    """The given server, or one of our own."""
    if url:
        yield url
    else:
        with servers.gateway("loadtests.app:app") as process:
            messages.Site(process.url).wait()
            yield process.url


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.outside.perf_analyzer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default="mlp", help="its inputs have fixed sizes behind the first (default mlp)")
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--quick", action="store_true", help="windows of half a second instead of three")
    parser.add_argument("options", nargs="*", help="further options of perf_analyzer, behind --")
    options = parser.parse_args()
    seconds = 0.5 if options.quick else 3.0
    # Three windows, and whatever spread: the machine may be shared.
    common = ["-p", str(int(seconds * 1e3)), "-r", "3", "-s", "999", *options.options]
    lines = [["", "requests/s", "p50 ms", "p99 ms"]]
    try:
        with served(options.url) as url:
            for concurrency in CONCURRENCIES:
                found = run(url, options.model, [*common, "--concurrency-range", str(concurrency)])
                lines += cells(found, "Concurrency", "perf_analyzer, concurrency")
            top = float(lines[-1][1])
            for part in RATES:
                rate = ["--request-rate-range", str(max(1, int(part * top))), "--request-distribution", "poisson"]
                found = run(url, options.model, [*common, *rate])
                lines += cells(found, "Request Rate", "perf_analyzer, Poisson")
            kind = Request(options.model, model=options.model)
            target = messages.target(messages.Site(url), Scenario("own", [Poisson(1, 1)], [kind]))
            for concurrency in CONCURRENCIES:
                own = generators.keep(target, concurrency, 3 * seconds)
                taken = (own.done - own.sent)[own.status == 200]
                quantiles = [f"{(quantile(taken, q) or 0.0) * 1e3:.2f}" for q in (0.5, 0.99)]
                lines.append([f"loadtests, concurrency {concurrency}", f"{len(taken) / (3 * seconds):.1f}", *quantiles])
    except (RuntimeError, ConnectionError, ValueError) as error:
        report.say(f"loadtests: {error}")
        return 2
    print(report.table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
