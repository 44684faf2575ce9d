"""The load generator against servers that do what it is told of them, and its commands against a real gateway."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtests import generators
from loadtests.scenario import Constant, Request, Scenario
from loadtests.schedule import plan
from loadtests.sender import Message, Target, closed
from loadtests.statistics import figures

ROOT = Path(__file__).resolve().parents[2]
ANSWER = b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok"


class Server(threading.Thread):
    """Answers with the status and after the milliseconds that a request's body says; `-` and it closes, `+`: never."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.port = 0
        self.budgets: list[float] = []
        self._listening = threading.Event()
        self._answering: set[asyncio.Task[None]] = set()

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._end.wait()
        server.close()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ") for line in head.lower().split(b"\r\n")[1:-2])
                body = await reader.readexactly(int(fields[b"content-length"]))
                if b"x-rtml-deadline-ms" in fields:
                    self.budgets.append(float(fields[b"x-rtml-deadline-ms"]))
                if body == b"-":
                    break
                if body == b"+":
                    await asyncio.sleep(3600)
                status, milliseconds = body.split()
                await asyncio.sleep(float(milliseconds) / 1e3)
                writer.write(ANSWER % int(status))
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has gone
        finally:
            writer.transport.abort()

    def __enter__(self) -> Server:
        self.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self.join(10)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def target(server: Server, *bodies: bytes, timeout: float = 10.0, connections: int = 64) -> Target:
    messages = [[Message(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body), body)] for body in bodies]
    return Target("127.0.0.1", server.port, messages, timeout=timeout, connections=connections)


def scenario(rate: float, seconds: float, kinds: int = 1, deadline_ms: float = 1000.0) -> Scenario:
    requests = [Request(str(number), path="/", deadline_ms=[deadline_ms]) for number in range(kinds)]
    return Scenario("test", [Constant(rate, seconds)], requests, warmup=0.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_that_was_planned_is_sent_and_counted(server: Server, processes: int) -> None:
    bodies = (b"200 0", b"429 0", b"503 0", b"504 0", b"500 0", b"-", b"+")
    made = scenario(200, 1, len(bodies))
    outcome = generators.run(target(server, *bodies, timeout=2.0), plan(made), processes)
    kinds = [figures(outcome, 1.0, kind=kind) for kind in range(len(bodies))]
    assert sum(found.requests for found in kinds) == 200
    assert kinds[0].good + kinds[0].late == kinds[0].requests
    assert [found.shed for found in kinds[1:3]] == [found.requests for found in kinds[1:3]]
    assert kinds[3].expired == kinds[3].requests
    assert kinds[4].errors == kinds[4].requests
    assert kinds[5].broken == kinds[5].requests
    assert kinds[6].timeouts == kinds[6].requests


def test_the_server_is_told_what_is_left(server: Server) -> None:
    generators.run(target(server, b"200 0"), plan(scenario(100, 0.5, deadline_ms=10_000)))
    assert len(server.budgets) == 50
    assert all(0 < budget <= 10_000 for budget in server.budgets)


def test_waiting_for_a_connection_counts(server: Server) -> None:
    """One connection, answers of 50 ms, a request each 10 ms: the last waits for all the others."""
    outcome = generators.run(target(server, b"200 50", connections=1), plan(scenario(100, 0.2)))
    taken = outcome.sent.done - outcome.plan.times
    assert (outcome.sent.status == 200).all()
    assert taken[-1] >= 20 * 0.05 - 0.2
    assert outcome.sent.waited >= 15
    assert figures(outcome, 0.2).misses >= 15


def test_nobody_there_is_an_error() -> None:
    with Server() as gone:
        pass
    with pytest.raises(ConnectionError, match="nothing answers"):
        generators.run(target(gone, b"200 0"), plan(scenario(10, 0.1)))


def test_a_closed_loop_keeps_so_many_under_way(server: Server) -> None:
    found = asyncio.run(closed(target(server, b"200 20"), 4, 0.5))
    assert (found.status == 200).all()
    order = np.argsort(found.sent)
    under_way = [int(((found.sent <= at) & (found.done > at)).sum()) for at in found.sent[order]]
    assert max(under_way) == 4


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )


@pytest.mark.slow
def test_a_scenario_from_a_file_on_a_gateway_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "name: own\nwarmup: 0.2\nphases: [{kind: poisson, rate: 50, seconds: 1}]\nrequests:\n"
        "- {name: four, model: four, binary: false, deadline_ms: [5000]}\n"
        "- {name: mlp, model: mlp, rows: 3, deadline_ms: [5000]}\n"
        "- {name: ask, path: /v1/ask, json: {seed: 1}, deadline_ms: [5000]}\n"
    )
    done = run("loadtests", "run", str(path), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "own.json").read_text())
    kinds = saved["run"]["kinds"]
    assert set(kinds) == {"all", "four", "mlp", "ask"}
    assert kinds["all"]["good"] == kinds["all"]["requests"] > 0, done.stdout
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_used_is_one_line() -> None:
    for arguments in (["nothing"], ["poisson", "--url", "ftp://x"], ["poisson", "--url", "http://127.0.0.1:1"]):
        done = run("loadtests", "run", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("loadtests: ")
        assert len(done.stderr.splitlines()) == 1
