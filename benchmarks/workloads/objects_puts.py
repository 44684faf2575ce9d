"""Many puts of mixed size through the public face, in a bounded store: does anything grow, is anything left?

python -m benchmarks.workloads.objects_puts COUNT      prints one JSON object
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks import processes

MIB = 1 << 20
#: Shared memory of all processes together, and values that are held at a time.
BOUND = 256 * MIB
HELD = 64


def sizes(count: int) -> list[int]:
    """Most are small, few are large: from 1 KiB to 8 MiB, evenly over the magnitudes; 0.9 MiB on average."""
    chance = random.Random(5)
    return [int(1024 * 2 ** chance.uniform(0, 13)) for _ in range(count)]


def used(directory: str) -> int:
    """Bytes that the objects of an engine occupy."""
    total = 0
    for path in Path(directory).glob("*-*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def own_mib(mark: str) -> float:
    """Memory of all processes beside the shared one."""
    kib = 0
    for pid in processes.tree(mark):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return kib / 1024


def main(count: int) -> None:
    """Put, hold the last ones, look at one in a thousand, measure memory after a tenth and at the end."""
    mark = processes.mark()
    import numpy as np

    import rtml

    held: deque[Any] = deque(maxlen=HELD)
    source = np.arange(8 * MIB, dtype=np.uint8)
    found: dict[str, float] = {}
    most = 0
    with rtml.connect(workers=1, object_memory=BOUND) as client:
        directory = client.store.directory
        start = time.perf_counter()
        for number, size in enumerate(sizes(count)):
            held.append(client.put(source[:size]))
            if number % 1000 == 0:
                assert held[0].result().sum(dtype=np.int64) == source[: held[0].result().size].sum(dtype=np.int64)
                most = max(most, used(directory))
            if number == count // 10:
                found["early_mib"] = own_mib(mark)
                print(f"running {directory}", file=sys.stderr, flush=True)
        found["seconds"] = time.perf_counter() - start
        found["late_mib"] = own_mib(mark)
        found["shared_most_mib"] = most / MIB
        held.clear()
    found["left"] = float(Path(directory).exists())
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
