"""What an `App` records and refuses, and that an application's import stays light."""

import subprocess
import sys
from typing import Any

import pytest

import rtml
from rtml.serving import App
from rtml.serving.app import Endpoint, TensorSpec


@rtml.task
async def read(image: bytes) -> str:
    return ""


def test_it_records_models_and_endpoints() -> None:
    app = App("ocr", title="Page reader", version="3")
    spec = TensorSpec("x", "FP32", (-1,))
    assert app.model("detector", read, inputs=[spec], outputs=[spec], deadline=1.5) is read
    assert app.endpoint("/v1/read", deadline=2, model="reader")(read) is read
    assert app.models["detector"].inputs == (spec,)
    assert (app.models["detector"].version, app.models["detector"].deadline) == ("1", 1.5)
    assert app.endpoints["/v1/read"] == Endpoint("/v1/read", read, 2, "reader")


def test_a_plain_function_becomes_a_remote_one() -> None:
    app = App("x")

    @app.endpoint("/v1/double")
    def double(x: int) -> int:
        return 2 * x

    assert isinstance(double, rtml.RemoteFunction)
    assert double(2) == 4


@pytest.mark.parametrize("path", ["", "/", "v1/read", "/v1/", "/v1//read", "/v1/{name}", "/v1/a b", "/v1/ä"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        App("x").endpoint(path)


@pytest.mark.parametrize("path", ["/v2", "/v2/models/x/infer", "/metrics", "/healthz", "/readyz"])
def test_paths_of_the_gateway(path: str) -> None:
    with pytest.raises(ValueError, match="gateway's own"):
        App("x").endpoint(path)
    App("x").endpoint("/v22/read")


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "ä"])
def test_model_names_that_cannot_stand_in_a_path(name: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        App("x").model(name, read)


def test_what_is_taken_or_makes_no_sense() -> None:
    app = App("x")
    app.model("m", read)
    app.endpoint("/v1/read")(read)
    with pytest.raises(ValueError, match="has a model 'm' already"):
        app.model("m", read)
    with pytest.raises(ValueError, match="has an endpoint '/v1/read' already"):
        app.endpoint("/v1/read")
    with pytest.raises(ValueError, match="positive"):
        app.endpoint("/v1/other", deadline=0)
    with pytest.raises(ValueError, match="positive"):
        app.model("n", read, deadline=-1)
    wrong: Any = 3
    with pytest.raises(TypeError, match="neither a remote function"):
        app.model("n", wrong)


def test_importing_an_app_imports_no_web_server() -> None:
    code = "import sys, rtml.serving; print(sorted({'aiohttp', 'uvloop', 'numpy', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
