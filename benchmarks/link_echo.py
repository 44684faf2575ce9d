"""What a link costs by itself: frames echoed by another process, over each transport and over `multiprocessing.Pipe`.

Prints p50 and p99 of a lone round trip, and frames per second with 64 under way. The first figure depends mostly on
where the kernel puts the two processes: `--one-core` pins both to one core, which shows the cost of the code instead of
that of waking another core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from rtml.link import Hub, Link, LinkClosed, connect

#: Frames under way in the throughput part.
WINDOW = 64
FRAME = bytes(100)

Echo = Callable[[int], None]


def serve_hub(address: str, ready: socket.socket) -> None:
    """Echo what any peer sends, until the first one leaves."""
    hub = Hub()
    ready.send(hub.listen(address).encode())
    while True:
        for peer, frame in hub.poll(None):
            if frame is None:
                hub.close()
                return
            hub.send(peer, frame)


def serve_pipe(connection: Connection) -> None:
    """Echo until the other end is closed."""
    try:
        while True:
            connection.send_bytes(connection.recv_bytes())
    except EOFError:
        return


def over_link(link: Link) -> Echo:
    """A function that has so many frames echoed, with at most that many under way."""

    def echo(count: int) -> None:
        for _ in range(count):
            link.send(FRAME)
        while count > 0:
            count -= len(link.recv(None))

    return echo


def over_pipe(connection: Connection) -> Echo:
    """The same over a pipe."""

    def echo(count: int) -> None:
        for _ in range(count):
            connection.send_bytes(FRAME)
        for _ in range(count):
            connection.recv_bytes()

    return echo


def measure(echo: Echo, rounds: int) -> dict[str, float]:
    """The three figures."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        echo(1)
        times.append(time.perf_counter() - start)
    times = sorted(times[rounds // 10 :])
    windows = max(1, rounds // 16)
    start = time.perf_counter()
    for _ in range(windows):
        echo(WINDOW)
    elapsed = time.perf_counter() - start
    return {
        "p50_us": round(times[len(times) // 2] * 1e6, 1),
        "p99_us": round(times[len(times) * 99 // 100] * 1e6, 1),
        "frames_per_s": round(windows * WINDOW / elapsed),
    }


def run_link(address: str, rounds: int) -> dict[str, float]:
    """Measure one transport of ours."""
    mine, theirs = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=serve_hub, args=(address, theirs))
    process.start()
    theirs.close()
    link = connect(mine.recv(1000).decode())
    mine.close()
    try:
        return measure(over_link(link), rounds)
    except LinkClosed:
        raise SystemExit(f"{address}: the echo ended") from None
    finally:
        link.close()
        process.join()


def run_pipe(rounds: int) -> dict[str, float]:
    """Measure the standard library's pipe."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=serve_pipe, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return measure(over_pipe(mine), rounds)
    finally:
        mine.close()
        process.kill()
        process.join()


def main() -> None:
    """Prints a table, or with `--json` one object: transport -> figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--one-core", action="store_true", help="both processes on one core")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    figures = {"pipe": run_pipe(options.rounds)}
    with tempfile.TemporaryDirectory() as directory:
        figures["unix"] = run_link(f"unix:{directory}/s", options.rounds)
        figures["zmq ipc"] = run_link(f"ipc://{directory}/z", options.rounds)
        figures["zmq tcp"] = run_link("tcp://127.0.0.1:0", options.rounds)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{'':8} {'p50 us':>8} {'p99 us':>8} {'frames/s':>10}")
    for name, row in figures.items():
        print(f"{name:8} {row['p50_us']:8.1f} {row['p99_us']:8.1f} {row['frames_per_s']:10,.0f}")


if __name__ == "__main__":
    main()
