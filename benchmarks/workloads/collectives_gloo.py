"""One rank of `torch.distributed` with gloo, for `benchmarks.workloads.collectives`: needs torch and nothing of rtml.

    python collectives_gloo.py RANK RANKS STORE INTERFACE BYTES... REPETITIONS

The store is "host:port" of rank 0. Rank 0 prints {"op bytes": [seconds of the slowest rank, ...]} as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Runs all operations."""
    import torch
    import torch.distributed as dist

    rank, ranks, store, interface = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    sizes, repetitions = [int(text) for text in sys.argv[5:-1]], int(sys.argv[-1])
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{store}", rank=rank, world_size=ranks)
    found: dict[str, list[float]] = {}
    operations = {
        "broadcast": lambda tensor: dist.broadcast(tensor, 0),
        "reduce": lambda tensor: dist.reduce(tensor, 0),
        "allreduce": dist.all_reduce,
    }
    for size in sizes:
        for name, operation in operations.items():
            for repetition in range(repetitions + 1):
                tensor = torch.full((size // 4,), float(rank))
                dist.barrier()
                start = time.perf_counter()
                operation(tensor)
                taken = torch.tensor([time.perf_counter() - start])
                dist.all_reduce(taken, op=dist.ReduceOp.MAX)
                if repetition:  # the first one connects
                    found.setdefault(f"{name} {size}", []).append(taken.item())
                wanted = {"broadcast": 0.0}.get(name, float(sum(range(ranks))))
                if rank == 0 or name != "reduce":
                    assert bool((tensor == wanted).all()), (name, size)
    dist.barrier()
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
