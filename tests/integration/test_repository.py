"""A model repository behind a gateway with a real engine: what is loaded, replaced, refused and unloaded, and when."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

import rtml
from rtml.serving import App, http
from rtml.serving.engine import ClientEngine
from rtml.serving.gateway import Gateway
from rtml.serving.http import HttpError
from rtml.serving.repository import RepositorySettings
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")

PATIENCE = 60
#: Seconds between two looks of the repository.
POLL = 0.05

app = App("programs")


@app.endpoint("/v1/twice")
@rtml.task
async def twice(flag: str) -> list[Any]:
    """The model's answers and versions, before and after a wait."""
    model = rtml.served("add")
    before = (await model.submit(np.array([0]))).tolist()
    version = model.version
    while flag and not os.path.exists(flag):
        await asyncio.sleep(0.005)
    after = (await model.submit(np.array([0]))).tolist()
    return [*before, version, *after, model.version]


class Repository:
    """A directory that becomes a repository, and the gateway that serves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gateway: Gateway
        self.url = ""
        self.session: aiohttp.ClientSession

    def put(self, model: str, version: str, content: bytes, name: str = "model.onnx") -> Path:
        """A file that is there from one moment to the next."""
        target = self.path / model / version / name
        target.parent.mkdir(parents=True, exist_ok=True)
        new = self.path / f".{model}-{version}"
        new.write_bytes(content)
        new.rename(target)
        return target

    def config(self, model: str, text: str, name: str = "config.pbtxt") -> None:
        (self.path / model).mkdir(exist_ok=True)
        new = self.path / ".config"
        new.write_text(text)
        new.rename(self.path / model / name)

    async def infer(self, model: str, value: Any = (0,), version: str = "", datatype: str = "INT64") -> Any:
        shape = list(np.shape(value))
        body = {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": np.ravel(value).tolist()}]}
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
        async with self.session.post(f"{self.url}{path}/infer", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                return response.status, answer["error"]
            return answer["model_version"], answer["outputs"][0]["data"]

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    def index(self) -> dict[str, str]:
        rows = self.gateway.registry.index()
        return {f"{row['name']} {row.get('version', '-')}": row["state"] for row in rows}

    def reason(self, model: str, version: str = "") -> str:
        rows = self.gateway.registry.index()
        return next(row["reason"] for row in rows if row["name"] == model and row.get("version", "") == version)

    async def until(self, condition: Callable[[], Any]) -> None:
        """The repository is looked at by a timer; there is nothing to wait for but what it leads to."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(POLL / 5)

    async def until_state(self, which: str, state: str) -> None:
        await self.until(lambda: self.index().get(which) == state)

    async def until_version(self, model: str, version: str) -> None:
        """This version is what a request without one means."""
        await self.until(lambda: version in self.gateway.registry.versions(model)[-1:])

    async def looks(self, times: int = 4) -> None:
        """Whatever is going to be noticed has been: files are looked at several times."""
        repository: Any = self.gateway.registry.repository
        for _ in range(times):
            await self.until(functools.partial(_other, repository, repository._seen))


def _other(repository: Any, seen: Any) -> bool:
    return repository._seen is not seen


@asynccontextmanager
async def serving(path: Path, *apps: App, **settings: Any) -> AsyncIterator[Repository]:
    repository = Repository(path)
    engine = ClientEngine.open(None, workers=2)
    try:
        gateway = repository.gateway = Gateway(engine, apps or (app,))
        settings.setdefault("directories", (path,))
        gateway.open_repository(RepositorySettings(poll_secs=POLL, **settings))
        port = await gateway.start("127.0.0.1", 0)
        repository.url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(PATIENCE):
            await gateway.registry.repository.started.wait()  # type: ignore[union-attr]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as repository.session:
            try:
                yield repository
            finally:
                await gateway.stop()
    finally:
        engine.close()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """To be filled before it is served."""
    path = tmp_path / "models"
    path.mkdir()
    return Repository(path)


@pytest.mark.asyncio
async def test_what_is_there_at_the_start_is_served_with_a_configuration_from_the_file(repository: Repository) -> None:
    repository.put("add", "1", tiny_onnx.adder(10))
    repository.put("add", "2", tiny_onnx.adder(20))
    repository.put("double", "1", tiny_onnx.doubler())
    repository.put("broken", "1", b"this is no model")
    async with serving(repository.path) as served:
        assert await served.infer("add", (1, 2)) == ("2", [21, 22])
        assert await served.infer("double", ((1, 2, 3),), datatype="FP32") == ("1", [2, 4, 6])
        assert await served.infer("broken") == (
            503,
            "model 'broken' is UNAVAILABLE: model.onnx is no ONNX model: a field of unknown kind 4",
        )
        assert served.index() == {"add 2": "READY", "broken 1": "UNAVAILABLE", "double 1": "READY", "twice 1": "READY"}
        status, config = await served.get("/v2/models/double/config")
        assert (status, config["max_batch_size"], config["backend"]) == (200, 32, "onnxruntime")
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
        assert (await served.get("/readyz"))[0] == 200


def running_sum() -> bytes:
    """y = the sum of x so far, of shape [N]: looks like a batch, and is none."""
    tensors = [tiny_onnx.tensor(name, tiny_onnx.INT64, ("N",)) for name in "xy"]
    axis = tiny_onnx.weight("axis", [0])
    return tiny_onnx.model([tiny_onnx.node("CumSum", ["x", "axis"], ["y"])], tensors[:1], tensors[1:], [axis])


@pytest.mark.asyncio
async def test_requests_share_runs_only_if_rows_do_not_depend_on_each_other(repository: Repository) -> None:
    repository.put("sum", "1", running_sum())
    async with serving(repository.path) as served:
        assert (await served.get("/v2/models/sum/config"))[1]["max_batch_size"] == 0
        answers = await asyncio.gather(*[served.infer("sum", (number, 1)) for number in range(100)])
        assert answers == [("1", [number, number + 1]) for number in range(100)]


@pytest.mark.asyncio
async def test_polling_notices_what_is_new_what_changed_and_what_is_gone(repository: Repository) -> None:
    repository.put("add", "1", tiny_onnx.adder(10))
    async with serving(repository.path, control="poll") as served:
        assert await served.infer("add") == ("1", [10])
        served.put("add", "2", tiny_onnx.adder(20))
        await served.until(lambda: served.index()["add 2" if "add 2" in served.index() else "add 1"] == "READY")
        await served.until(lambda: "add 1" not in served.index())
        assert await served.infer("add") == ("2", [20])
        served.put("add", "2", tiny_onnx.adder(21))
        model = served.gateway.registry.find("add")
        await served.until(lambda: served.gateway.registry.find("add") is not model)
        assert await served.infer("add") == ("2", [21])
        served.put("other", "1", tiny_onnx.adder(5))
        await served.until(lambda: served.index().get("other 1") == "READY")
        assert await served.infer("other") == ("1", [5])
        (served.path / "add" / "2" / "model.onnx").rename(served.path / ".gone")
        (served.path / "add" / "2").rmdir()
        await served.until(lambda: served.gateway.registry.find("add").version == "1")
        assert await served.infer("add") == ("1", [10])
        (served.path / "other" / "1" / "model.onnx").unlink()
        (served.path / "other" / "1").rmdir()
        (served.path / "other").rmdir()
        await served.until(lambda: "other 1" not in served.index())
        assert (await served.infer("other"))[0] == 404


BROKEN = {
    "garbage": (b"\x00\x01garbage" * 100, "no ONNX model: a field without a number"),
    "empty": (b"", "it is empty"),
    "truncated": (tiny_onnx.adder(2)[:-20], "no ONNX model|cannot open"),
    "unknown operator": (
        tiny_onnx.model(
            [tiny_onnx.node("Transmogrify", ["x"], ["y"])],
            [tiny_onnx.tensor("x", tiny_onnx.INT64, ("N",))],
            [tiny_onnx.tensor("y", tiny_onnx.INT64, ("N",))],
        ),
        "Transmogrify",
    ),
    "wrong graph": (
        tiny_onnx.model(
            [tiny_onnx.node("Add", ["x", "nowhere"], ["y"])],
            [tiny_onnx.tensor("x", tiny_onnx.INT64, ("N",))],
            [tiny_onnx.tensor("y", tiny_onnx.INT64, ("N",))],
        ),
        "cannot open",
    ),
}


@pytest.mark.asyncio
async def test_a_broken_file_leaves_what_runs(repository: Repository) -> None:
    import re

    repository.put("add", "1", tiny_onnx.adder(10))
    async with serving(repository.path, control="poll") as served:
        for number, (content, reason) in enumerate(BROKEN.values(), 2):
            served.put("add", str(number), content)
            await served.until_state(f"add {number}", "UNAVAILABLE")
            assert re.search(reason, served.reason("add", str(number)))
            assert "/" not in served.reason("add", str(number)), "clients are told no paths"
            assert await served.infer("add") == ("1", [10])
        served.put("add", "9", tiny_onnx.adder(90))
        await served.until(lambda: served.gateway.registry.find("add").version == "9")
        assert await served.infer("add") == ("9", [90])
        # The same number, in place: the copy that is served is not the file.
        (served.path / "add" / "9" / "model.onnx").write_bytes(b"overwritten")
        await served.until(lambda: served.reason("add", "9") != "")
        assert await served.infer("add", (5,)) == ("9", [95])


@pytest.mark.asyncio
async def test_a_file_that_still_grows_is_left_alone_and_a_huge_one_refused(repository: Repository) -> None:
    async with serving(repository.path, control="poll", bytes_max=1 << 20) as served:
        content = tiny_onnx.adder(3)
        path = served.path / "grows" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        with open(path, "wb", buffering=0) as file:
            for byte in range(0, len(content), 10):
                file.write(content[byte : byte + 10])
                await served.looks(1)
                assert "grows 1" not in served.index()
        await served.until(lambda: served.index().get("grows 1") == "READY")
        assert await served.infer("grows") == ("1", [3])
        with open(served.put("huge", "1", b""), "wb") as file:
            file.truncate(1 << 40)
        await served.until(lambda: served.index().get("huge 1") == "UNAVAILABLE")
        assert "more than 1048576 (--model-bytes-max)" in served.reason("huge", "1")


@pytest.mark.asyncio
async def test_a_directory_in_doubt_leaves_what_runs(repository: Repository, tmp_path: Path) -> None:
    repository.put("add", "1", tiny_onnx.adder(10))
    second = tmp_path / "second"
    second.mkdir()
    async with serving(repository.path, control="poll", directories=(repository.path, second)) as served:
        assert await served.infer("add") == ("1", [10])
        (second / "add").mkdir()
        await served.until_state("add -", "UNAVAILABLE")
        await served.looks()
        assert await served.infer("add") == ("1", [10])
        (second / "add").rmdir()
        await served.until(lambda: "add -" not in served.index())
        served.put("add", "2", tiny_onnx.adder(20))
        await served.until_version("add", "2")


@pytest.mark.asyncio
async def test_a_swap_is_atomic_for_a_graph_and_no_request_fails(repository: Repository, tmp_path: Path) -> None:
    repository.put("add", "1", tiny_onnx.adder(1))
    flags = [str(tmp_path / f"flag{number}") for number in range(1, 5)]
    async with serving(repository.path, control="poll") as served:
        answers: list[Any] = []
        stopping = False

        async def load() -> None:
            while not stopping:
                answers.append(await served.infer("add"))
                status, found = await served.post("/v1/twice", {"flag": ""})
                answers.append((status, found))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load())
            held = []
            for number, flag in enumerate(flags, 1):
                held.append(group.create_task(served.post("/v1/twice", {"flag": flag})))
                while (await served.post("/v1/twice", {"flag": ""}))[1][1] != str(number):
                    await asyncio.sleep(0.01)
                served.put("add", str(number + 1), tiny_onnx.adder(number + 1))
                await served.until_version("add", str(number + 1))
                status, fresh = await served.post("/v1/twice", {"flag": ""})
                assert (status, fresh) == (200, [number + 1, str(number + 1)] * 2)
            # The oldest version's directory is gone; a graph still works with it.
            (served.path / "add" / "1" / "model.onnx").unlink()
            for flag in flags:
                Path(flag).touch()
            for number, task in enumerate(held, 1):
                assert await task == (200, [number, str(number)] * 2)
            stopping = True
        for status, found in answers:
            if status == 200:
                assert found[:2] == found[2:]
            else:
                assert found == [int(status)], (status, found)  # of infer: (version, data)


@pytest.mark.asyncio
async def test_executors_killed_during_swaps_cost_no_request(repository: Repository) -> None:
    repository.put("add", "1", tiny_onnx.adder(1))
    async with serving(repository.path, control="poll") as served:
        stopping = False
        answers: list[Any] = []

        async def load() -> None:
            while not stopping:
                answers.append(await served.infer("add"))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load())
            for number in range(2, 5):
                await served.until(lambda: len(_executors(os.getpid())) == 2)
                served.put("add", str(number), tiny_onnx.adder(number))
                # One of those that load it, or are about to.
                os.kill(_executors(os.getpid())[number % 2], signal.SIGKILL)
                await served.until_version("add", str(number))
            stopping = True
        assert {version for version, _ in answers} <= {"1", "2", "3", "4"}
        assert all(data == [int(version)] for version, data in answers)


CONFIG = """
name: "add"  backend: "onnxruntime"  max_batch_size: 4
input [ { name: "x" data_type: TYPE_INT64 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 3 ] label_filename: "names.txt" } ]
dynamic_batching { preferred_batch_size: [ 2 ] max_queue_delay_microseconds: 500 }
version_policy { specific { versions: [ 1, 3 ] } }
instance_group [ { kind: KIND_CPU count: 2 } ]
parameters { key: "deadline_ms" value { string_value: "2000" } }
model_warmup [ {
  name: "full" batch_size: 4
  inputs { key: "x" value { data_type: TYPE_INT64 dims: [ 3 ] zero_data: true } }
} ]
"""


def rows_adder(number: int) -> bytes:
    shape = [tiny_onnx.tensor(name, tiny_onnx.INT64, ("N", 3)) for name in "xy"]
    weights = [tiny_onnx.weight("number", [number])]
    return tiny_onnx.model([tiny_onnx.node("Add", ["x", "number"], ["y"])], shape[:1], shape[1:], weights=weights)


@pytest.mark.asyncio
async def test_a_pbtxt_is_honoured(repository: Repository) -> None:
    for number in (1, 2, 3):
        repository.put("add", str(number), rows_adder(number))
    repository.config("add", CONFIG)
    (repository.path / "add" / "names.txt").write_text("low\nmiddle\nhigh\n")
    async with serving(repository.path) as served:
        registry = served.gateway.registry
        assert registry.versions("add") == ["1", "3"]
        model = registry.find("add")
        assert (model.version, model.batch_max, model.deadline) == ("3", 4, 2.0)
        assert model.labels == {"y": ["low", "middle", "high"]}
        options = model.function.defaults
        assert (options.batch, options.batch_delay) == (2, 0.0005)
        assert await served.infer("add", ((1, 2, 3), (4, 5, 6)), version="1") == ("1", [2, 3, 4, 5, 6, 7])
        _, config = await served.get("/v2/models/add/config")
        assert config["version_policy"] == {"specific": {"versions": [1, 3]}}
        assert config["dynamic_batching"]["preferred_batch_size"] == [2]
        body = {
            "inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 3], "data": [5, 1, 9]}],
            "outputs": [{"name": "y", "parameters": {"classification": 1}}],
        }
        _, answer = await served.post("/v2/models/add/infer", body)
        assert answer["outputs"][0]["data"] == ["12:2:high"] or "high" in str(answer["outputs"])


@pytest.mark.asyncio
async def test_explicit_mode(repository: Repository) -> None:
    repository.put("add", "1", tiny_onnx.adder(1))
    repository.put("other", "1", tiny_onnx.adder(5))
    async with serving(repository.path, control="explicit", load_models=("add", "missing")) as served:
        models: Any = served.gateway.registry.repository
        assert served.index() == {"add 1": "READY", "missing -": "UNAVAILABLE", "twice 1": "READY"}
        await models.load("other", {})
        assert await served.infer("other") == ("1", [5])
        config = json.dumps({"parameters": {"deadline_ms": {"string_value": "1500"}}, "max_batch_size": 0})
        await models.load("other", {"config": config})
        assert served.gateway.registry.find("other").deadline == 1.5
        served.put("other", "2", b"broken")
        with pytest.raises(
            HttpError, match=r"failed to load 'other': version 2: model\.onnx is no ONNX model"
        ) as error:
            await models.load("other", {})
        assert error.value.status == 400
        assert await served.infer("other") == ("1", [5])
        await models.unload("other")
        assert served.index()["other 1"] == "UNAVAILABLE"
        assert (await served.infer("other"))[0] == 503
        for name, call in (("twice", models.unload), ("nothing", models.unload)):
            with pytest.raises(HttpError, match="it is no model of the repository"):
                await call(name)
        with pytest.raises(HttpError, match="it is not in the repository"):
            await models.load("nothing", {})
        encoded = base64.b64encode(tiny_onnx.adder(7)).decode()
        with pytest.raises(HttpError, match="start with --allow-model-upload"):
            await models.load("new", {"config": "{}", "file:1/model.onnx": encoded})


@pytest.mark.asyncio
async def test_uploads_if_allowed(repository: Repository) -> None:
    async with serving(repository.path, control="explicit", uploads=True) as served:
        models: Any = served.gateway.registry.repository
        encoded = base64.b64encode(tiny_onnx.adder(7)).decode()
        await models.load("new", {"config": "{}", "file:3/model.onnx": encoded})
        assert await served.infer("new") == ("3", [7])
        for parameters, reason in (
            ({"file:1/model.onnx": encoded}, "need the parameter 'config'"),
            ({"config": "{}", "file:../../model.onnx": encoded}, "expected a name like"),
            ({"config": "{}", "file:1/model.onnx": "*"}, "no base64"),
            ({"config": "nonsense"}, "no JSON"),
            ({"config": 3}, "is JSON as a string"),
        ):
            with pytest.raises(HttpError, match=reason):
                await models.load("new", parameters)
        assert await served.infer("new") == ("3", [7])


@pytest.mark.asyncio
async def test_requests_do_not_load_in_the_other_modes(repository: Repository) -> None:
    async with serving(repository.path) as served:
        models: Any = served.gateway.registry.repository
        for call in (models.load("add", {}), models.unload("add")):
            with pytest.raises(
                HttpError, match=r"explicit model load / unload is not allowed.*--model-control"
            ) as caught:
                await call
            assert (caught.value.status, http.explain(caught.value).headers) == (503, {})


@pytest.mark.asyncio
async def test_a_model_of_an_app_is_not_taken_over(repository: Repository) -> None:
    apps = App("mine")
    apps.model("add", rtml.model(tiny_onnx.adder(1), name="add"))
    repository.put("add", "5", tiny_onnx.adder(5))
    async with serving(repository.path, apps) as served:
        assert await served.infer("add") == ("1", [1])


@pytest.mark.asyncio
async def test_memory_of_executors_does_not_grow_over_swaps(repository: Repository) -> None:
    """Each version has 8 MB of weights of its own; fifty of them would be 400 MB in each executor."""
    rng = np.random.default_rng(1)

    def weights() -> bytes:
        values = rng.integers(1, 1 << 62, 1_000_000, dtype=np.int64)
        f = tiny_onnx.field
        constant = f(1, len(values)) + f(2, tiny_onnx.INT64) + f(8, "big") + f(9, values.tobytes())
        shape = [tiny_onnx.tensor(name, tiny_onnx.INT64, ("N",)) for name in "xy"]
        node = tiny_onnx.node("Gather", ["big", "x"], ["y"])
        return tiny_onnx.model([node], shape[:1], shape[1:], weights=[constant])

    def memory() -> int:
        return sum(_children(os.getpid()))

    repository.put("big", "1", weights())
    async with serving(repository.path, control="poll") as served:
        for number in range(2, 8):
            await _push(served, number, weights())
        before = memory()
        for number in range(8, 24):
            await _push(served, number, weights())
        await served.looks()
        grown = memory() - before
        assert grown < 2 * 3 * 8 << 20, f"{grown >> 20} MB in all processes"
        assert len([path for path in Path(_cache(served)).iterdir() if path.is_dir()]) <= 2


async def _push(served: Repository, number: int, content: bytes) -> None:
    served.put("big", str(number), content)
    await served.until(lambda: served.gateway.registry.find("big").version == str(number))
    assert (await served.infer("big"))[0] == str(number)


def _cache(served: Repository) -> str:
    repository: Any = served.gateway.registry.repository
    return str(repository._copies._directory)


def _executors(pid: int) -> list[int]:
    """The processes that run sync tasks here, oldest first: those that have a model open map onnxruntime's library."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != pid:
            try:
                if "onnxruntime_pybind" in (entry / "maps").read_text() and _is_below(int(entry.name), pid):
                    found.append(int(entry.name))
            except OSError:
                continue
    return sorted(found)


def _is_below(child: int, pid: int) -> bool:
    while child > 1:
        child = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        if child == pid:
            return True
    return False


def _children(pid: int) -> list[int]:
    """RSS in bytes of all descendants."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            sizes[int(entry.name)] = int(fields[21]) * 4096

    def below(child: int) -> bool:
        while child > 1:
            child = parents.get(child, 0)
            if child == pid:
                return True
        return False

    return [size for child, size in sizes.items() if below(child)]
