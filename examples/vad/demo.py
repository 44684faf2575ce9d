"""What `make demo-vad` runs: many audio streams into one speech detector, beside what its library finds offline.

Exits with 1 if a stream's segments or probabilities differ, with 2 if the gateway does not serve.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np

from examples import show
from examples.gateway import Gateway, NotServing, free_port
from examples.vad import library
from examples.vad.client import PERIOD, Heard, duration, over_grpc, over_http
from examples.vad.sound import Sound, streams

_APP = "examples.vad.app:app"
_OUT = Path("out")
#: Two ways to the same sums: in one run of the whole stream, and step by step beside other streams.
TOLERANCE = 1e-4


def compare(sounds: list[Sound], heard: list[Heard], shown: int) -> int:
    """Print the segments of each stream beside the library's. Returns how many streams differ."""
    wrong = 0
    worst = 0.0
    for number, (sound, one) in enumerate(zip(sounds, heard, strict=True)):
        expected = library.probabilities(sound)
        found = library.segments(one.array, len(sound))
        wanted = library.segments(expected, len(sound))
        off = float(np.abs(one.array - expected).max())
        worst = max(worst, off)
        right = found == wanted and off < TOLERANCE
        wrong += not right
        if number < shown or not right:
            print(f"  {show.verdict(right)} stream {number + 1:3}: {_shown(found)}")
            print(f"               library: {_shown(wanted)}")
    same = len(sounds) - wrong
    print(f"  {same} of {len(sounds)} streams agree with the library; probabilities differ by at most {worst:.1e}")
    return wrong


def _shown(segments: list[tuple[float, float]]) -> str:
    return " ".join(f"{begin:.2f}-{end:.2f}" for begin, end in segments) or "no speech"


def report(sounds: list[Sound], heard: list[Heard], took: float) -> None:
    """Latencies, and how much faster than the sound itself it was."""
    times = [1e3 * seconds for one in heard for seconds in one.seconds]
    total = sum(map(duration, sounds))
    late = sum(time > 1e3 * PERIOD for time in times)
    print(
        f"  {len(times)} chunks, {len(times) / took:.0f}/s; a chunk: p50 {show.quantile(times, 0.5):.1f} ms, "
        f"p99 {show.quantile(times, 0.99):.1f} ms, {late} later than {1e3 * PERIOD:.0f} ms"
    )
    print(f"  {total:.0f} s of sound in {took:.1f} s: real-time factor {took / total:.4f}")


async def batches(session: aiohttp.ClientSession, gateway: Gateway) -> dict[int, float]:
    """How many runs there were of each size, since the start."""
    async with session.get(f"{gateway.url}/v2/models/vad/stats") as answer:
        (statistics,) = (await answer.json())["model_stats"]
    return {row["batch_size"]: row["compute_infer"]["count"] for row in statistics["batch_stats"]}


def show_batches(before: dict[int, float], after: dict[int, float]) -> None:
    """The sizes of the batches in between; steps of one stream among them are made one after the other."""
    runs = {size: count - before.get(size, 0) for size, count in after.items() if count > before.get(size, 0)}
    steps = sum(size * count for size, count in runs.items())
    print(f"  steps handed over together: {steps / max(1, sum(runs.values())):.1f} on average, {max(runs)} at most")


async def run(arguments: argparse.Namespace, gateway: Gateway, grpc_port: int) -> int:
    """The demo, against a gateway that was just started. Returns how many streams differ."""
    limit = aiohttp.ClientTimeout(total=120)
    wrong = 0
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
        print(f"ready after {await gateway.ready(session):.1f} s at {gateway.url}")
        sounds = streams(arguments.streams, arguments.seconds)
        await over_http(session, gateway.url, sounds[0][:4096], 1)  # uncounted
        for title, period in (("as microphones send it", PERIOD), ("each chunk when the last is answered", 0.0)):
            show.heading(f"HTTP, {len(sounds)} streams, {title}")
            before = await batches(session, gateway)
            begin = time.perf_counter()
            heard = await asyncio.gather(
                *(over_http(session, gateway.url, sound, place + 1, period) for place, sound in enumerate(sounds))
            )
            took = time.perf_counter() - begin
            wrong += compare(sounds, heard, arguments.show)
            report(sounds, heard, took)
            show_batches(before, await batches(session, gateway))
        from tritonclient.grpc.aio import InferenceServerClient

        show.heading(f"gRPC, {len(sounds)} streams, without waiting for answers")
        before = await batches(session, gateway)
        async with InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
            begin = time.perf_counter()
            heard = await asyncio.gather(*(over_grpc(client, sound, place + 1) for place, sound in enumerate(sounds)))
            took = time.perf_counter() - begin
        wrong += compare(sounds, heard, 0)
        report(sounds, heard, took)
        show_batches(before, await batches(session, gateway))
    return wrong


def main() -> int:
    """The demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.vad.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32, help="audio streams at a time (default: 32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stream (default: 10)")
    parser.add_argument("--show", type=int, default=4, help="streams whose segments are printed (default: 4)")
    arguments = parser.parse_args()
    _OUT.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    grpc_port = free_port()
    try:
        with Gateway([_APP], _OUT / "vad.log", ["--workers", "1", "--grpc-port", str(grpc_port)]) as gateway:
            wrong = asyncio.run(run(arguments, gateway, grpc_port))
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    except NotServing as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{show.verdict(not wrong)} {f'{wrong} streams differ' if wrong else 'every stream agrees with the library'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
