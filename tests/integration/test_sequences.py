"""Stateful models over HTTP with a real engine and onnxruntime: order, batches, ends, deaths, versions."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import rtml
from rtml.serving import App, SequenceSpec
from rtml.serving.engine import ClientEngine
from rtml.serving.gateway import Gateway
from tests.integration.engine import processes
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")

PATIENCE = 60
START, END = {"sequence_start": True}, {"sequence_end": True}


class Served:
    """A gateway with a model that adds up what each sequence sends."""

    def __init__(self, gateway: Gateway, engine: ClientEngine, url: str, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.engine = engine
        self.url = url
        self.session = session

    async def post(self, x: float, sequence: Any = None, model: str = "sum", **parameters: Any) -> tuple[int, Any, Any]:
        if sequence is not None:
            parameters["sequence_id"] = sequence
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [x]}
        body = {"inputs": [tensor], "parameters": parameters}
        async with self.session.post(f"{self.url}/v2/models/{model}/infer", json=body) as response:
            return response.status, await response.json(), response.headers

    async def step(self, x: float, sequence: Any, **parameters: Any) -> float:
        status, answer, _ = await self.post(x, sequence, **parameters)
        assert status == 200, answer
        (output,) = answer["outputs"]
        assert output["name"] == "y"
        value: float = output["data"][0]
        return value

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            return await response.json()

    async def holders(self) -> list[int]:
        """Their processes."""
        await self.gateway._stateful[0].open()
        places = self.gateway._stateful[0]._places
        return [(await place.host.call("attach", "test")).get()["pid"] for place in places]


@asynccontextmanager
async def served(tmp_path: Path, engine: str | None = None, **spec: Any) -> AsyncIterator[Served]:
    file = tmp_path / "sum.onnx"
    file.write_bytes(tiny_onnx.accumulator())
    app = App("sums")
    app.model("sum", rtml.model(file), sequence=SequenceSpec({"s": "t"}, **spec))
    behind = ClientEngine.open(engine, **({} if engine else {"workers": 1}))
    gateway = Gateway(behind, [app], drain_timeout=1)
    try:
        port = await gateway.start("127.0.0.1", 0)
        async with aiohttp.ClientSession() as session:
            yield Served(gateway, behind, f"http://127.0.0.1:{port}", session)
    finally:
        await gateway.stop()
        behind.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(limited())


def test_states_belong_to_their_sequences_and_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as server:
            assert [await server.step(x, 7, **p) for x, p in ((1, START), (2, {}), (3, {}))] == [1, 3, 6]
            assert await server.step(10, "seven", **START) == 10
            assert await server.step(4, 7) == 10
            assert await server.step(5, 7, **START) == 5  # again from the beginning
            assert await server.step(1, 7, **END) == 6
            status, answer, _ = await server.post(1, 7)
            assert (status, answer["type"]) == (400, "UnknownSequence")
            assert "needs sequence_start" in answer["error"]
            assert await server.step(1, "seven") == 11
            status, answer, _ = await server.post(1)
            assert (status, answer["type"]) == (400, "InvalidInput")
            assert "needs the parameter sequence_id" in answer["error"]
            config = await server.get("/v2/models/sum/config")
            assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 30_000_000
            assert [tensor["name"] for tensor in config["input"] + config["output"]] == ["x", "y"]
            assert "sequence" in (await server.get("/v2"))["extensions"]

    run(test)


def test_steps_of_many_sequences_share_runs_and_keep_their_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, batch=16) as server:

            async def sequence(number: int) -> None:
                # Sent without waiting for answers: they must be made in this order all the same.
                steps = [server.step(number, number, **START)]
                steps += [server.step(10**power, number) for power in range(4)]
                found = await asyncio.gather(*steps)
                assert found == [number, number + 1, number + 11, number + 111, number + 1111]

            await asyncio.gather(*(sequence(number) for number in range(1, 17)))
            (statistics,) = (await server.get("/v2/models/sum/stats"))["model_stats"]
            assert statistics["inference_count"] == 80
            assert statistics["execution_count"] < 60
            assert max(row["batch_size"] for row in statistics["batch_stats"]) >= 4

    run(test)


def test_a_wrong_step_leaves_its_sequence_and_those_beside_it_as_they_are(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as server:
            await server.step(1, 1, **START)
            body = {"parameters": {"sequence_id": 1}}
            wide = {"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [1, 2]}
            url = f"{server.url}/v2/models/sum/infer"
            async with server.session.post(url, json={**body, "inputs": [wide]}) as response:
                assert response.status == 400
                assert "has one row" in (await response.json())["error"]
            assert await server.step(2, 1) == 3
            status, answer, _ = await server.post(1, 1, timeout=1)
            assert (status, answer["type"]) == (504, "DeadlineExceeded")
            assert await server.step(2, 1) == 5

    run(test)


def test_a_sequence_ends_when_nothing_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, idle=1.0) as server:
            await server.step(1, 1, **START)
            await server.step(1, 2, **START)
            holder = server.gateway._stateful[0]._places[0].host
            goes_on = 1
            while (await holder.call("has", "", 2)).get()["here"]:
                goes_on += 1
                assert await server.step(1, 1) == goes_on
            assert await server.step(1, 1) == goes_on + 1
            status, answer, _ = await server.post(1, 2)
            assert (status, answer["type"]) == (400, "UnknownSequence")
            assert "no request came for 1 s" in answer["error"]
            assert await server.step(3, 2, **START) == 3

    run(test)


def test_there_are_only_so_many_sequences(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, live_max=4, holders=2) as server:
            for number in (1, 2, 3, 4):  # each of two holders has two
                await server.step(number, number, **START)
            status, answer, headers = await server.post(5, 5, "sum", **START)
            assert (status, answer["type"]) == (503, "Overloaded")
            assert 1 <= int(headers["Retry-After"]) <= 30
            assert await server.step(1, 2, **END) == 3
            assert await server.step(5, 5, **START) == 5
            assert await server.step(1, 3, **START) == 1  # one that is there may begin again
            assert [await server.step(1, number) for number in (1, 3, 4, 5)] == [2, 2, 5, 6]

    run(test)


def test_a_holder_that_is_killed_loses_its_sequences_and_no_others(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, holders=2) as server:
            for number in range(8):
                await server.step(number, f"s{number}", **START)
            victims = await server.holders()
            assert len(victims) == 2
            os.kill(victims[0], signal.SIGKILL)
            lost = 0
            for number in range(8):
                status, answer, _ = await server.post(1, f"s{number}")
                if status == 200:
                    assert answer["outputs"][0]["data"] == [number + 1]
                    continue
                lost += 1
                assert (status, answer["type"]) == (409, "SequenceLost"), answer
                assert "sequence_start" in answer["error"]
                assert await server.step(number, f"s{number}", **START) == number
                assert await server.step(1, f"s{number}") == number + 1
            assert lost == 4

    run(test)


def test_gateways_of_one_engine_share_the_sequences(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, holders=2) as one, served(tmp_path, one.engine.address, holders=2) as other:
            assert await one.holders() == await other.holders()
            for number in range(1, 9):
                first, second = (one, other) if number % 2 else (other, one)
                assert await first.step(number, number, **START) == number
                assert await second.step(1, number) == number + 1
                assert await first.step(1, number, **END) == number + 2
                # Where the first one has seen it is not where it is now.
                for again in range(3):
                    assert await second.step(again, number, **START) == again
                    assert await first.step(1, number) == again + 1
                    assert await second.step(1, number, **(END if again < 2 else {})) == again + 2

    run(test)


def test_a_dispatcher_that_is_killed_takes_no_sequence_along(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as server:
            await server.step(1, 1, **START)
            supervisor = server.engine._client.engine_pid
            assert supervisor is not None
            (dispatcher,) = processes(supervisor)["dispatcher"]
            os.kill(dispatcher, signal.SIGKILL)
            assert [await server.step(1, 1) for _ in range(3)] == [2, 3, 4]

    run(test)
