"""What `make demo` runs: both applications behind a gateway, sample pages over HTTP, ten seconds of load, figures.

Exits with 1 if any text or face is wrong, with 2 if the gateway does not serve. `--keep` keeps serving until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from examples import show
from examples.faces.pictures import all_pictures, same_faces
from examples.gateway import Gateway, NotServing, ask
from examples.ocr.pages import all_pages, same_text

_APPS = ("examples.ocr.app:app", "examples.faces.app:app")
_OUT = Path("out")


class Sample(NamedTuple):
    """A picture to send, and how to judge the answer."""

    path: str
    name: str
    png: bytes
    right: Callable[[dict[str, Any]], bool]


class Answered(NamedTuple):
    """One request of the load."""

    seconds: float
    right: bool


def page_samples() -> list[Sample]:
    """Every sample page, with its text."""

    def judge(expected: tuple[str, ...]) -> Callable[[dict[str, Any]], bool]:
        return lambda answer: all(same_rows(answer["text"].split("\n"), expected))

    return [Sample("/v1/read", page.name, page.png, judge(page.expected)) for page in all_pages()]


def face_samples() -> list[Sample]:
    """Every sample picture, with its faces."""

    def judge(expected: tuple[Any, ...]) -> Callable[[dict[str, Any]], bool]:
        return lambda answer: same_faces([tuple(face["box"]) for face in answer["faces"]], expected)

    return [Sample("/v1/faces", picture.name, picture.png, judge(picture.expected)) for picture in all_pictures()]


def same_rows(found: list[str], expected: tuple[str, ...]) -> list[bool]:
    """For each row that was read or should have been: whether both are there and equal but for blanks."""
    return [same_text(one, other) for one, other in itertools.zip_longest(found, expected, fillvalue="(nothing)")]


async def read_pages(session: aiohttp.ClientSession, url: str) -> int:
    """Send each sample page, show what was read, save the last one with its boxes. Returns how many rows are wrong."""
    wrong = 0
    for page in all_pages():
        answer, seconds = await ask(session, f"{url}/v1/read", page.png)
        found = answer["text"].split("\n")
        same = same_rows(found, page.expected)
        wrong += same.count(False)
        show.heading(f"{page.name}: {len(found)} rows in {1e3 * seconds:.0f} ms")
        show.side_by_side(found, page.expected, same)
        show.annotate_page(page.png, answer["lines"], _OUT / f"read {page.name}.png".replace(" ", "-"))
    return wrong


async def find_faces(session: aiohttp.ClientSession, url: str) -> int:
    """Send each sample picture, show which faces were found. Returns how many pictures are wrong."""
    wrong = 0
    show.heading("faces (x, y, width, height)")
    for picture in all_pictures():
        answer, seconds = await ask(session, f"{url}/v1/faces", picture.png)
        boxes = sorted(tuple(face["box"]) for face in answer["faces"])
        right = same_faces(boxes, picture.expected)
        wrong += not right
        print(f"  {show.verdict(right)} {picture.name}: {boxes} in {1e3 * seconds:.0f} ms")
        print(f"        expected about {list(picture.expected)}")
        show.annotate_faces(picture.png, answer["faces"], _OUT / f"faces {picture.name}.png".replace(" ", "-"))
    return wrong


async def load(
    session: aiohttp.ClientSession, url: str, samples: list[Sample], seconds: float, clients: int
) -> tuple[list[Answered], float]:
    """Keep `clients` requests in flight for `seconds`; returns the answers and the time they took."""
    answered: list[Answered] = []
    turns = itertools.cycle(samples)
    begin = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            sample = next(turns)
            answer, took = await ask(session, url + sample.path, sample.png)
            answered.append(Answered(took, sample.right(answer)))

    async def draw(progress: show.Progress) -> None:
        while True:
            progress.show(len(answered))
            await asyncio.sleep(0.1)

    with show.Progress(seconds) as progress:
        async with asyncio.TaskGroup() as group:
            drawing = group.create_task(draw(progress))
            async with asyncio.TaskGroup() as clients_group:
                for _ in range(clients):
                    clients_group.create_task(client())
            drawing.cancel()
    return answered, time.perf_counter() - begin


def report(answered: list[Answered], seconds: float) -> None:
    """Throughput and latencies of a load."""
    times = [1e3 * each.seconds for each in answered]
    p50, p99 = show.quantile(times, 0.5), show.quantile(times, 0.99)
    wrong = sum(not each.right for each in answered)
    print(f"  {len(times) / seconds:.1f} requests/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms; {wrong} of {len(times)} wrong")


async def run(arguments: argparse.Namespace, gateway: Gateway) -> int:
    """The demo, against a gateway that was just started. Returns how many answers were wrong."""
    limit = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
        print(f"serving {', '.join(_APPS)}", flush=True)
        print(f"ready after {await gateway.ready(session):.1f} s at {gateway.url}")
        wrong = await read_pages(session, gateway.url)
        wrong += await find_faces(session, gateway.url)
        pages, pictures = page_samples(), face_samples()
        # Once all together, uncounted: every executor loads its models.
        await asyncio.gather(*[ask(session, gateway.url + each.path, each.png) for each in [*pages, *pictures]])
        for samples in (pages, pictures):
            show.heading(f"{samples[0].path}: {arguments.clients} clients for {arguments.seconds / 2:.1f} s")
            before = await gateway.batches(session)
            answered, took = await load(session, gateway.url, samples, arguments.seconds / 2, arguments.clients)
            report(answered, took)
            show.batches(before, await gateway.batches(session))
            wrong += sum(not each.right for each in answered)
        show.heading("where the time went: one page of six lines, nothing else running")
        _, seconds = await ask(session, f"{gateway.url}/v1/read", pages[2].png)
        show.timeline(await gateway.trace(), seconds)
        show.heading("and one picture with three faces")
        _, seconds = await ask(session, f"{gateway.url}/v1/faces", pictures[1].png)
        show.timeline(await gateway.trace(), seconds)
        print(f"\npictures of what was found: {_OUT}/read-*.png, {_OUT}/faces-*.png")
        summary = f"{wrong} answers were wrong" if wrong else "every text and every face is right"
        print(f"{show.verdict(not wrong)} {summary}", flush=True)
    return wrong


def keep(gateway: Gateway) -> None:
    """Serve on until Ctrl-C."""
    for sample in (page_samples()[2], face_samples()[1]):
        file = _OUT / f"{sample.name}.png".replace(" ", "-")
        file.write_bytes(sample.png)
        print(f"  curl --data-binary @{file} -H 'content-type: image/png' {gateway.url}{sample.path}")
    print(f"  curl {gateway.url}/metrics")
    with contextlib.suppress(KeyboardInterrupt):
        print("serving until Ctrl-C", flush=True)
        signal.pause()


def main() -> int:
    """The demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep serving afterwards, and print curl lines to try")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load, in all (default: 10)")
    parser.add_argument("--clients", type=int, default=6, help="requests in flight (default: 6)")
    parser.add_argument("--link", choices=("unix", "zmq"), default="unix", help="between processes (default: unix)")
    arguments = parser.parse_args()
    _OUT.mkdir(exist_ok=True)
    # Whoever ends this program politely wants the gateway ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Gateway(_APPS, _OUT / "gateway.log", ["--link", arguments.link]) as gateway:
            wrong = asyncio.run(run(arguments, gateway))
            if arguments.keep:
                keep(gateway)
            return 1 if wrong else 0
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    except NotServing as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
