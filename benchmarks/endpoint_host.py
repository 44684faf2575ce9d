"""One host of `benchmarks.objects`: a data endpoint and a process that uses it, told what to do on stdin.

    python -m benchmarks.endpoint_host DIRECTORY HOST [--naive]

Lines of JSON in and out: ["address"] -> where it listens; ["put", size] -> ref; ["get", ref] -> seconds and a checksum;
["drop", id]; ["cpu"] -> seconds of CPU time so far. `--naive` assigns every receiver to the home, as systems without a
directory of copies do.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import zlib
from typing import Any

import msgspec

from rtml.exchange import Place
from rtml.messages import ObjectRef
from rtml.store import Store
from rtml.transfer import holders
from rtml.transfer.endpoint import Endpoint, EndpointSettings, listen_inside, listen_outside


class Naive(holders.Holders):
    """Everybody reads from the home."""

    def assign(self, lease: holders.Lease, size: int, failed: list[str]) -> tuple[list[str], list[str]]:
        """The home."""
        return [holders.HOME], []


def content(size: int) -> bytearray:
    """Bytes that do not repeat soon."""
    data = bytearray(size)
    view = memoryview(data).cast("B")
    for at in range(0, size - 8, 4096):
        view[at : at + 8] = at.to_bytes(8, "little")
    return data


def main(directory: str, host: str, naive: bool) -> None:
    """Serve stdin until it ends."""
    Store.make(directory)
    outside = listen_outside(host, 0)
    address = f"{host}:{outside.getsockname()[1]}"
    socket_path = f"{directory}/.data.sock"
    Place(address, socket_path, 0, "").write(directory)
    endpoint = Endpoint(EndpointSettings(directory, address, b"s" * 40, 1, 2), outside, listen_inside(socket_path))
    if naive:
        endpoint.holders = Naive()
    threading.Thread(target=endpoint.run, daemon=True).start()
    store = Store(directory, 3)
    try:
        for line in sys.stdin:
            what, *rest = json.loads(line)
            answer: Any = None
            if what == "address":
                answer = address
            elif what == "put":
                ref = store.put([memoryview(content(rest[0]))])
                answer = msgspec.to_builtins(ref)
            elif what == "get":
                ref = msgspec.convert(rest[0], ObjectRef)
                start = time.perf_counter()
                (view,) = store.get(ref)
                seconds = time.perf_counter() - start
                answer = [seconds, zlib.crc32(view)]
                del view
            elif what == "drop":
                store.free(rest[0])
                endpoint.copies._evict(0)
            elif what == "cpu":
                answer = time.process_time()
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--naive" in sys.argv[3:])
