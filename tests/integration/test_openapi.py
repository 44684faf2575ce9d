"""The OpenAPI document: valid, whole, and true, which schemathesis finds out by asking for everything in it."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

import hypothesis
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import requests
import schemathesis
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import rtml
from rtml.serving import App
from rtml.serving.app import TensorSpec
from rtml.serving.results import Content
from tests.integration.gateways import serving

#: Requests of each kind.
EXAMPLES, EXAMPLES_WHOLE = 3, 20
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
CHECKS = (status_code_conformance, content_type_conformance, response_schema_conformance)
#: Answers that nobody means to give; 501, 503 and 504 are meant.
BREAKDOWNS = (500, 502)

app = App("shop", title="Things to ask for", version="2.1")


class Line(msgspec.Struct):
    text: str
    box: tuple[int, int] = (0, 0)
    weight: float | None = None


class Error(msgspec.Struct, rename="camel"):
    """A name that the protocol's own schemas have, too."""

    lines_of_text: list[Line]
    kind: Literal["small", "large"] = "small"
    made: datetime | None = None


@app.endpoint("/v1/record")
@rtml.task
def record(order: Error) -> Error:
    """Give back what came.

    In full.
    """
    return order


@app.endpoint("/v1/means", deadline=5)
@rtml.task
def means(rows: dict[str, list[float]], scale: float = 1.0) -> dict[str, float]:
    return {name: sum(row) / len(row) * scale if row else math.nan for name, row in rows.items()}


@app.endpoint("/v1/picture")
@rtml.task
def picture(image: npt.NDArray[np.uint8], width: int = 3) -> Content:
    return Content(image.tobytes()[: abs(width)], "image/png")


@app.endpoint("/v1/echo")
@rtml.task
def echo(data: bytes) -> bytes:
    return data


@app.endpoint("/v1/untyped")
@rtml.task
def untyped(value=None):  # type: ignore[no-untyped-def]
    return value


@app.endpoint("/v1/vector")
@rtml.task
def vector(count: Literal[1, 2, 3] = 1) -> npt.NDArray[np.float32]:
    return np.zeros((count, 2), "f4")


@rtml.task
def double(x: Any) -> Any:
    return x * 2


@rtml.task
def describe(x: Any, words: Any) -> Any:
    return {"size": np.array([x.size]), "words": words}


app.model("double", double, inputs=[TensorSpec("x", "FP32", (-1, 2))], outputs=[TensorSpec("y", "FP32", (-1, 2))])
app.model(
    "describe",
    describe,
    inputs=[TensorSpec("x", "INT8", None), TensorSpec("words", "BYTES", (2,))],
    outputs=[TensorSpec("size", "INT64", (1,)), TensorSpec("words", "BYTES", (2,))],
    version="7",
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in a thread: schemathesis is synchronous."""
    started: list[Any] = []
    running = threading.Event()

    async def serve() -> None:
        async with serving(app, body_max=100_000) as server:
            stop = asyncio.Event()
            started.extend((server.port, asyncio.get_running_loop(), stop))
            running.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert running.wait(20)
    port, loop, stop = started
    yield f"http://127.0.0.1:{port}"
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return requests.get(f"{url}/openapi.json", timeout=20).json()


def test_the_document_is_valid(document: Any) -> None:
    validate(document)
    assert document["openapi"] == "3.1.0"
    assert document["info"]["title"] == "Things to ask for"
    ids = [operation["operationId"] for path in document["paths"].values() for operation in operations(path)]
    assert len(ids) == len(set(ids))


def operations(path: Any) -> list[Any]:
    return [operation for method, operation in path.items() if method != "parameters"]


def test_programs_are_described_by_their_hints(document: Any) -> None:
    operation = document["paths"]["/v1/record"]["post"]
    assert (operation["summary"], operation["description"]) == ("Give back what came.", "In full.")
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    schemas = document["components"]["schemas"]
    assert schemas[schema["$ref"].rpartition("/")[2]]["properties"]["linesOfText"]["type"] == "array"
    assert schemas["rtml.Error"]["required"] == ["error", "type"]
    assert schemas["Error"]["required"] == ["linesOfText"]
    means = document["paths"]["/v1/means"]["post"]
    assert means["requestBody"]["content"]["application/json"]["schema"]["required"] == ["rows"]
    assert means["responses"]["200"]["content"]["application/json"]["schema"]["additionalProperties"] == {
        "type": ["number", "null"]
    }
    raw = document["paths"]["/v1/picture"]["post"]
    assert set(raw["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert [parameter["name"] for parameter in raw["parameters"] if parameter.get("in") == "query"] == ["width"]
    assert set(raw["responses"]["200"]["content"]) == {"*/*"}
    assert set(document["paths"]["/v1/echo"]["post"]["responses"]["200"]["content"]) == {"application/octet-stream"}
    assert {"400", "408", "413", "415", "500", "503", "504"} <= raw["responses"].keys()


def test_models_are_described_by_their_tensors(document: Any, url: str) -> None:
    paths = document["paths"]
    for name in ("double", "describe", "record", "vector"):
        operation = paths[f"/v2/models/{name}/infer"]["post"]
        assert f"/v2/models/{name}/versions/{{version}}/infer" in paths
        content = operation["requestBody"]["content"]["application/json"]
        answer = requests.post(f"{url}/v2/models/{name}/infer", json=content["example"], timeout=20)
        # A record travels as JSON text, for which there is no example that every record takes.
        assert answer.status_code == (400 if name == "record" else 200), answer.text
    described = paths["/v2/models/describe/infer"]["post"]["requestBody"]["content"]["application/json"]
    inputs = described["schema"]["properties"]["inputs"]
    assert (inputs["minItems"], inputs["maxItems"], len(inputs["items"]["oneOf"])) == (2, 2, 2)
    assert paths["/v2/models/describe/versions/{version}"]["parameters"][0]["schema"]["enum"] == ["7"]


@pytest.mark.asyncio
async def test_everything_that_is_served_is_described() -> None:
    async with serving(app) as server:
        _, described, _ = await server.get("/openapi.json")
        assert server.gateway._routes is not None
        assert set(server.gateway._routes.paths()) <= described["paths"].keys()
        before = len(described["paths"])
        server.gateway.registry.remove("double", "1")
        _, described, _ = await server.get("/openapi.json")
        assert len(described["paths"]) < before


def test_the_page_is_whole_and_asks_nobody_else(url: str) -> None:
    answer = requests.get(f"{url}/docs", timeout=20)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "://" not in answer.text
    assert "innerHTML" not in answer.text


def ask_for_everything(url: str, mode: GenerationMode, examples: int) -> int:
    """Requests of each kind that the document has, right or wrong ones; how many they were.

    Raises:
        AssertionError: answers that the document does not know.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    failures: list[str] = []
    asked = 0
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # the document is valid
        if (
            operation.path.startswith("/v2/models/")
            and "{version}" in operation.path
            and "double" not in operation.path
        ):
            continue  # the same as without a version

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            nonlocal asked
            asked += 1
            response = case.call(timeout=20)
            assert response.status_code not in BREAKDOWNS, f"{response.text}\n{case.as_curl_command()}"
            case.validate_response(response, checks=CHECKS)

        try:
            ask()
        except hypothesis.errors.Unsatisfiable:
            continue  # nothing can be wrong about a question without parameters
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"{operation.method.upper()} {operation.path}: {error}"[:1500])
    assert not failures, "\n\n".join(failures[:10])
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_document_knows(
    request: pytest.FixtureRequest, url: str, mode: GenerationMode
) -> None:
    assert ask_for_everything(url, mode, EXAMPLES_WHOLE if request.config.getoption("--whole") else EXAMPLES) > 100


def test_a_gateway_with_tokens_says_so() -> None:
    from rtml.serving.openapi import document as make

    found = make([app], [], "1", secured=True)
    validate(json.loads(json.dumps(found)))
    assert found["security"] == [{"token": []}]
    assert {"401", "403", "429"} <= found["paths"]["/v1/echo"]["post"]["responses"].keys()
