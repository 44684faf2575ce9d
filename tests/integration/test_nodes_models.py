"""Models on other nodes: a gateway's models are loaded there before anybody calls them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import rtml
from rtml.serving.engine import ClientEngine
from tests.integration import docs
from tests.integration.test_nodes import Cluster, cluster
from tests.integration.test_serve import Server, wait_for
from tests.integration.test_versions import Loading, until
from tests.unit import tiny_onnx

pytest.importorskip("onnxruntime")


@pytest.mark.asyncio
async def test_nodes_load_what_is_kept_and_those_that_join_do_so_too(tmp_path: Path) -> None:
    def marks(kind: str) -> set[str]:
        return {path.name.removeprefix(f"{kind}-") for path in tmp_path.glob(f"{kind}-*")}

    with cluster(1) as nodes:
        engine = ClientEngine.open(nodes.address)
        try:
            model = engine.prepare(rtml.task(Loading(tmp_path)))
            assert await engine.keep(model) == 1  # the dispatcher itself has no executors
            first = marks("loaded")
            assert len(first) == 1
            nodes.add("late")
            await until(lambda: len(marks("loaded")) == 2)
            gone = asyncio.Event()
            engine.drop(model, gone.set)
            await asyncio.wait_for(gone.wait(), 20)
            await until(lambda: marks("gone") == marks("loaded"))
        finally:
            engine.close()


@contextlib.contextmanager
def gateway(nodes: Cluster, *arguments: str) -> Iterator[Server]:
    server = Server("gateway", "--address", nodes.address, *arguments)
    try:
        yield server
    finally:
        server.stop()


def test_an_apps_model_is_loaded_before_its_first_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loading_app.py").write_text(
        "from pathlib import Path\n"
        "import rtml\n"
        "from rtml.serving import App\n"
        "from rtml.serving.app import TensorSpec\n"
        "from tests.integration.test_versions import Loading\n"
        "app = App('loads')\n"
        "spec = [TensorSpec('x', 'INT64', (1,))]\n"
        f"app.model('loading', rtml.task(Loading(Path({str(tmp_path)!r}))), inputs=spec, outputs=spec)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{docs.ROOT}")
    server = Server("serve", "loading_app:app")
    try:
        wait_for(lambda: len(list(tmp_path.glob("loaded-*"))) == 2)
        assert server.process.poll() is None
    finally:
        server.stop()


def test_a_repository_is_served_by_nodes_alone(tmp_path: Path) -> None:
    version = tmp_path / "add" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(tiny_onnx.adder(5))
    request = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [1]}]}
    with cluster(2) as nodes, gateway(nodes, "--model-repository", str(tmp_path)) as server:
        wait_for(lambda: server.request("GET", "/v2/models/add/ready")[0] == 200)
        status, body, _ = server.post("/v2/models/add/infer", request)
        assert (status, body["outputs"][0]["data"]) == (200, [6])
    assert any("model add, version 1, is ready in 2 executors" in line for line in server.rest())
