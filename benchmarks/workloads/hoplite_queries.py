"""Asks the ensemble of `hoplite_served`, one query after the other, both ways in turn.

    python -m benchmarks.workloads.hoplite_queries PORT WARMUP QUERIES

Prints {"shared": [seconds, ...], "naive": [...]} as JSON. Standard library and numpy only.
"""

from __future__ import annotations

import http.client
import json
import sys
import time

import numpy as np

SHAPE = (1, 3, 224, 224)
#: Queries one way before the other way has its turn.
TURN = 10
HEADERS = {"Content-Type": "application/octet-stream"}


def wait_until_ready(port: int, seconds: float = 120.0) -> None:
    """Raises TimeoutError."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise TimeoutError(f"the gateway was not ready after {seconds:g} s")


def main() -> None:
    """Measures."""
    port, warmup, queries = map(int, sys.argv[1:])
    wait_until_ready(port)
    image = np.random.default_rng(3).standard_normal(SHAPE, np.float32).tobytes()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
    answers = set()

    def ask(name: str) -> float:
        start = time.perf_counter()
        connection.request("POST", f"/{name}", image, HEADERS)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"/{name} answered {response.status}: {body.decode(errors='replace')}")
        answers.add(body)
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"shared": [], "naive": []}
    for name, taken in found.items():
        for _ in range(warmup):
            ask(name)
        taken.clear()
    while len(found["naive"]) < queries:
        for name, taken in found.items():
            taken += [ask(name) for _ in range(TURN)]
            print(f"{name}: {taken[-1] * 1e3:.0f} ms", file=sys.stderr, flush=True)
    connection.close()
    assert len(answers) == 1, "every query has the same answer"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
