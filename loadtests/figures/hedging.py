"""Second attempts beside stragglers: the tail with and without them, in turn, and how much more is done."""

from __future__ import annotations

import re
import urllib.request
from typing import Any, Final

import numpy as np

from loadtests import generators, messages, report, servers
from loadtests.figures.verdict import verdict
from loadtests.sender import Target
from loadtests.statistics import quantile

#: At most so many of a function's attempts have a second one, as a portion (the engine's `hedge_share`).
SHARE: Final = 0.05
#: Requests that must have been there for the share to mean something.
ENOUGH: Final = 500
PATHS: Final = {"without": "/v1/straggling", "with": "/v1/hedged"}


def _target(url: str, path: str) -> Target:
    site = messages.Site(url)
    return Target(site.host, site.port, [[messages.message(site, path, b"{}", {"Content-Type": "application/json"})]])


def _spares(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    return sum(float(count) for count in re.findall(r'^rtml_hedge_total\{outcome="(?:won|lost)"\} (\S+)$', text, re.M))


def measure(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about 50 s, quick or 15 s."""
    rounds, seconds = (2, 2.0) if quick else (5, 4.0)
    taken: dict[str, list[float]] = {name: [] for name in PATHS}
    with servers.gateway("loadtests.app:app") as server:
        targets = {name: _target(server.url, path) for name, path in PATHS.items()}
        for target in targets.values():
            generators.keep(target, 1, 0.5)
        before, count = _spares(server.url), 0
        for _ in range(rounds):
            for name, target in targets.items():
                found = generators.keep(target, 1, seconds)
                good = found.status == 200
                taken[name] += (found.done - found.sent)[good].tolist()
                count += len(good) if name == "with" else 0
        spares = _spares(server.url) - before
    tails = {
        name: {q: quantile(np.array(values), q) or 0.0 for q in (0.5, 0.99, 0.999)} for name, values in taken.items()
    }
    rows = [["second attempts", "p50 ms", "p99 ms", "p99.9 ms"]]
    rows += [[name, *[report.milliseconds(value) for value in tail.values()]] for name, tail in tails.items()]
    ratio, share = tails["with"][0.999] / tails["without"][0.999], spares / max(ENOUGH, count)
    text = (
        f"hedging: p99.9 with second attempts {ratio:.2f} of that without (below 1), {share:.1%} of the calls had one "
        f"(at most {SHARE:.0%})"
    )
    return [report.table(rows), "", verdict(ratio < 1.0 and share <= SHARE, text)], {"taken_s": taken, "share": share}
