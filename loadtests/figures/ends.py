"""What a client that goes away costs, and what the steps of a graph are told of its budget."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import uuid
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from loadtests import servers
from loadtests.figures.verdict import verdict
from loadtests.statistics import quantile

#: Seconds of a call in the chain of which the client sees only some.
CALL: Final = 0.005
LENGTH: Final = 10
WASTED_MOST: Final = 1
#: The graph of five steps: its budget, and how far the steps may differ about its end.
BUDGET_MS: Final = 50
SPREAD_MOST: Final = 1e-3


def disconnects(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Clients go away in the midst of a chain; calls that ran on after that are counted. About 10 s, quick 5."""
    import numpy as np

    count = 20 if quick else 100
    rng = np.random.default_rng(1)
    folder = servers.ROOT / "out/load" / f"notes-{uuid.uuid4().hex[:8]}"
    wasted: list[int] = []
    with servers.gateway("loadtests.app:app", environment={"RTML_LOAD_NOTES": str(folder)}) as server:
        parts = urlsplit(server.url)
        assert parts.hostname is not None
        assert parts.port is not None
        _whole(parts.hostname, parts.port, folder)
        for number in range(1, count + 1):
            body = json.dumps({"run": number, "length": LENGTH, "seconds": CALL}).encode()
            head = f"POST /v1/chain HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            with socket.create_connection((parts.hostname, parts.port)) as connection:
                connection.sendall(head.encode() + body)
                time.sleep(float(rng.uniform(0.2, 0.8)) * CALL * LENGTH)
            gone = time.monotonic()
            # Longer than the whole chain: if it went on, it has ended.
            time.sleep(CALL * (LENGTH + 4))
            wasted.append(sum(end > gone for _, end in _notes(folder / str(number))))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    most = max(wasted)
    more = sum(number > WASTED_MOST for number in wasted)
    text = (
        f"disconnects: of {count} clients that went away, calls that ended after that: {most} (at most {WASTED_MOST})"
    )
    lines = [verdict(most <= WASTED_MOST, text), f"{more} of them had more, {sum(wasted) / count:.2f} on average"]
    return lines, {"wasted": wasted}


def _whole(host: str, port: int, folder: Path) -> None:
    """One chain to its end, and that it noted what it should."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chain", json.dumps({"run": 0, "length": LENGTH, "seconds": CALL}))
        response = connection.getresponse()
        if response.status != 200 or len(_notes(folder / "0")) != LENGTH:
            raise RuntimeError(f"/v1/chain answers {response.status}: {response.read()[:200]!r}")


def _notes(file: Path) -> list[tuple[float, float]]:
    if not file.exists():
        return []
    return [(float(start), float(end)) for start, end in (line.split() for line in file.read_text().splitlines())]


def budgets(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Where each of five steps sees the end of a budget of 50 ms. About 10 s, quick 5."""
    count = 50 if quick else 300
    spreads: list[float] = []
    ways: list[float] = []
    expired = 0
    with servers.gateway("loadtests.app:app") as server:
        parts = urlsplit(server.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        with contextlib.closing(connection):
            for _ in range(count):
                sent = time.monotonic()
                headers = {"x-rtml-deadline-ms": str(BUDGET_MS), "Content-Type": "application/json"}
                connection.request("POST", "/v1/budget", b'{"steps":5,"seconds":0.004}', headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200:
                    expired += 1
                    continue
                ends = [end - sent - BUDGET_MS / 1e3 for end in answer]
                spreads.append(max(ends) - min(ends))
                ways.append(max(abs(end) for end in ends))
    if not spreads:
        raise RuntimeError(f"none of {count} requests was answered in time")
    shown = f"p50 {(quantile_of(spreads, 0.5)) * 1e6:.0f} us, p99 {quantile_of(spreads, 0.99) * 1e6:.0f} us"
    most = f"at most {SPREAD_MOST * 1e6:,.0f} us"
    way = f"p50 {quantile_of(ways, 0.5) * 1e6:.0f} us, p99 {quantile_of(ways, 0.99) * 1e6:.0f} us"
    return [
        verdict(
            quantile_of(spreads, 0.99) <= SPREAD_MOST, f"budgets: five steps differ about their end by {shown} ({most})"
        ),
        f"from the client's they differ by {way}; {expired} of {count} had no answer in time",
    ], {"spread_s": spreads, "from_client_s": ways, "expired": expired}


def quantile_of(values: list[float], q: float) -> float:
    """Of at least one value."""
    import numpy as np

    found = quantile(np.array(values), q)
    assert found is not None
    return found
