"""Functions that executors keep ready, and graphs that keep the versions they began with, on a real engine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import rtml
from rtml.errors import SubmitError, TaskError, WorkerDied
from rtml.serving.engine import ClientEngine, Prepared
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")

PATIENCE = 60


class Loading:
    """A function that leaves a mark where it is loaded and where it is let go."""

    def __init__(self, place: Path, kind: str = "") -> None:
        self.place = place
        self.kind = kind
        self.__name__ = self.__qualname__ = "loading"

    def __rtml_load__(self) -> None:
        if self.kind == "refuse":
            raise ValueError("no such weights")
        if self.kind == "crash":
            with open(self.place / "crashes", "a") as file:
                file.write("x")
            signal.raise_signal(signal.SIGSEGV)  # in this thread, before it says anything
        (self.place / f"loaded-{os.getpid()}").touch()
        self.pid = os.getpid()

    def __del__(self) -> None:
        if hasattr(self, "pid"):
            (self.place / f"gone-{self.pid}").touch()

    def __call__(self, number: int) -> int:
        assert self.pid == os.getpid()
        return number

    def __reduce__(self) -> Any:
        return Loading, (self.place, self.kind)


@rtml.task
def add_later(name: str, x: list[int], flag: str) -> Any:
    """The model's answers before and after the wait for a file, in a child of the graph's root."""
    return rtml.get(around.submit(name, x, flag))


@rtml.task
async def around(name: str, x: list[int], flag: str) -> Any:
    model = rtml.served(name)
    before = await model.submit(np.array(x))
    Path(flag + ".reached").touch()
    while not os.path.exists(flag):
        await asyncio.sleep(0.01)
    after = await model.options(priority=3).submit(x=np.array(x))
    return [before.tolist(), after.tolist(), model.version]


@rtml.task
def now(name: str, x: list[int]) -> Any:
    return rtml.served(name).submit(np.array(x)).result().tolist()


@rtml.task
def version_of(name: str) -> str:
    return str(rtml.served(name).version)


@asynccontextmanager
async def engine(workers: int = 2) -> AsyncIterator[ClientEngine]:
    opened = ClientEngine.open(None, workers=workers)
    try:
        yield opened
    finally:
        opened.close()


async def until(condition: Callable[[], Any]) -> Any:
    """Files are made by other processes, which tell nobody else."""
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):
            await asyncio.sleep(0.01)
    return found


async def call(engine: ClientEngine, prepared: Prepared, *args: Any) -> Any:
    return await engine.submit(prepared, args, {}, prepared.options)


@pytest.mark.asyncio
async def test_a_kept_function_is_loaded_in_every_executor_before_any_call(tmp_path: Path) -> None:
    async with engine(workers=3) as opened:
        prepared = opened.prepare(rtml.task(Loading(tmp_path)))
        assert await opened.keep(prepared) == 3
        assert len(list(tmp_path.glob("loaded-*"))) == 3
        forgotten = asyncio.Event()
        opened.drop(prepared, forgotten.set)
        async with asyncio.timeout(PATIENCE):
            await forgotten.wait()
        await until(lambda: len(list(tmp_path.glob("gone-*"))) == 3)


@pytest.mark.asyncio
async def test_many_changes_of_the_version_set_are_published_together() -> None:
    made: list[int] = []
    async with engine(workers=1) as opened:
        prepared = opened.prepare(rtml.model(tiny_onnx.adder(1), name="add"))

        def models(number: int) -> dict[str, tuple[str, Prepared]]:
            made.append(number)
            return {f"add{version}": (str(number), prepared) for version in range(500)}

        for number in range(1000):
            opened.publish(lambda number=number: models(number))  # type: ignore[misc]
        assert len(made) < 500
        # Whoever begins a graph has the newest all the same.
        assert await call(opened, opened.prepare(version_of), "add7") == "999"
        assert made[-1] == 999


@pytest.mark.asyncio
async def test_an_executor_that_comes_later_has_it_too(tmp_path: Path) -> None:
    async with engine() as opened:
        prepared = opened.prepare(rtml.task(Loading(tmp_path)))
        await opened.keep(prepared)
        (first, second) = tmp_path.glob("loaded-*")
        os.kill(int(first.name.partition("-")[2]), signal.SIGKILL)
        await until(lambda: len(list(tmp_path.glob("loaded-*"))) == 3)
        assert await call(opened, prepared, 7) == 7
        assert second.exists()


@pytest.mark.asyncio
async def test_what_does_not_load_is_an_error_and_meets_one_executor_only(tmp_path: Path) -> None:
    async with engine() as opened:
        refused = opened.prepare(rtml.task(Loading(tmp_path, "refuse")))
        with pytest.raises(TaskError, match="ValueError: no such weights"):
            await opened.keep(refused)
        crashing = opened.prepare(rtml.task(Loading(tmp_path, "crash")))
        with pytest.raises(WorkerDied, match="signal SIGSEGV"):
            await opened.keep(crashing)
        good = opened.prepare(rtml.task(Loading(tmp_path)))
        assert await opened.keep(good) in (1, 2)  # the one that died may not have been replaced yet
        assert (tmp_path / "crashes").read_text() == "x"


@pytest.mark.asyncio
async def test_a_graph_keeps_its_versions_and_new_graphs_get_the_new_ones(tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    async with engine() as opened:
        versions: dict[str, Prepared] = {}
        for number in (10, 20, 30):
            model = rtml.model(tiny_onnx.adder(number), name="add", batch=8)
            versions[str(number)] = opened.prepare(model)
        await opened.keep(versions["10"])
        opened.publish(lambda: {"add": ("10", versions["10"])})
        later, quick = opened.prepare(add_later), opened.prepare(now)
        old = asyncio.create_task(call(opened, later, "add", [1, 2], flag))
        await until(Path(flag + ".reached").exists)
        gone: list[str] = []
        for before, after in (("10", "20"), ("20", "30")):
            await opened.keep(versions[after])
            opened.publish(lambda after=after: {"add": (after, versions[after])})  # type: ignore[misc]
            opened.drop(versions[before], lambda before=before: gone.append(before))  # type: ignore[misc]
            assert await call(opened, quick, "add", [1, 2]) == [1 + int(after), 2 + int(after)]
        # No graph has the second one any more, one has the first.
        await until(lambda: gone == ["20"])
        Path(flag).touch()
        assert await old == [[11, 12], [11, 12], "10"]
        await until(lambda: gone == ["20", "10"])


@pytest.mark.asyncio
async def test_an_earlier_version_can_come_back(tmp_path: Path) -> None:
    async with engine() as opened:
        first, second = (opened.prepare(rtml.model(tiny_onnx.adder(number), name="add")) for number in (1, 2))
        quick = opened.prepare(now)
        await opened.keep(first)
        for old, new, expected in ((first, second, 2), (second, first, 1), (first, second, 2), (second, first, 1)):
            await opened.keep(new)
            opened.publish(lambda expected=expected, new=new: {"add": (str(expected), new)})  # type: ignore[misc]
            opened.drop(old, lambda: None)
            assert await call(opened, quick, "add", [0]) == [expected]


@pytest.mark.asyncio
async def test_what_is_not_served_is_said_clearly() -> None:
    async with engine() as opened:
        quick = opened.prepare(now)
        with pytest.raises(SubmitError, match=r"known only in graphs that a gateway has started.*rtml.model\(path\)"):
            await call(opened, quick, "add", [1])
        model = opened.prepare(rtml.model(tiny_onnx.adder(1), name="add"))
        opened.publish(lambda: {"add": ("1", model)})
        with pytest.raises(SubmitError, match="no model 'other' ready when this graph began; it had add"):
            await call(opened, quick, "other", [1])
        with pytest.raises(SubmitError, match="known only in graphs"):
            rtml.served("add").submit(np.array([1]))
        with pytest.raises(SubmitError, match="runs in executors"):
            rtml.served("add")(np.array([1]))


@pytest.mark.asyncio
async def test_a_dispatcher_that_comes_back_knows_what_is_kept(tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    async with engine() as opened:
        first, second = (opened.prepare(rtml.model(tiny_onnx.adder(number), name="add")) for number in (1, 2))
        await opened.keep(first)
        opened.publish(lambda: {"add": ("1", first)})
        old = asyncio.create_task(call(opened, opened.prepare(around), "add", [5], flag))
        await until(Path(flag + ".reached").exists)
        os.kill(msgspec.json.decode(await opened.query("status"))["pid"], signal.SIGKILL)
        gone = asyncio.Event()
        await opened.keep(second)
        opened.publish(lambda: {"add": ("2", second)})
        opened.drop(first, gone.set)
        assert await call(opened, opened.prepare(now), "add", [5]) == [7]
        assert not gone.is_set()
        Path(flag).touch()
        assert await old == [[6], [6], "1"]
        async with asyncio.timeout(PATIENCE):
            await gone.wait()
