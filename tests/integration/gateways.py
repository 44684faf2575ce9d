"""A gateway with an engine that runs calls inline, and what it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import rtml
from rtml.errors import ConnectionLost, InvalidInput, TaskCancelled, Unschedulable
from rtml.messages import ErrorInfo, Options, Timing
from rtml.serving import App
from rtml.serving.app import TensorSpec
from rtml.serving.engine import Prepared, RemoteError
from rtml.serving.gateway import Gateway
from rtml.serving.hosts import Host, HostPlan
from rtml.serving.results import Content, LargeBody


class InlineCall:
    """A call that starts when it is awaited, in the loop's own thread."""

    timing: Timing | None = None

    def __init__(self, engine: InlineEngine, function: Any, args: Any, kwargs: Any) -> None:
        self._engine = engine
        self._function = function
        self._args = args
        self._kwargs = kwargs

    def __await__(self) -> Generator[Any, None, Any]:
        return self._run().__await__()

    async def _run(self) -> Any:
        try:
            value = self._function(*self._args, **self._kwargs)
            if asyncio.iscoroutine(value):
                value = await value
        except asyncio.CancelledError:
            self._engine.cancelled.set()
            raise
        self.timing = Timing(0.0, 0.001, 0.0002, 0.003)
        return value


class Named:
    """A function as the engine knows it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.call = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class InlineEngine:
    """Runs what the gateway submits, and remembers with what options."""

    def __init__(self) -> None:
        self.ready = True
        self.options: list[Options] = []
        self.kept: list[Any] = []
        self.published: dict[str, str] = {}
        #: Bytes of the largest body that came to be read by a program.
        self.largest = 0
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.calls: str | Exception = "{}"
        self.metrics: str | Exception = "# TYPE rtml_tasks counter\nrtml_tasks_total 3.0\n"

    def prepare(self, function: rtml.RemoteFunction[..., Any]) -> Prepared:
        return Prepared(Named(function.function), function.overrides or Options())

    def submit(self, prepared: Prepared, args: Any, kwargs: Any, options: Options) -> InlineCall:
        self.options.append(options)
        self.largest = max([self.largest, *(len(arg.body) for arg in args if isinstance(arg, LargeBody))])
        self.started.set()
        return InlineCall(self, prepared.function, args, kwargs)

    async def stream(
        self, prepared: Prepared, args: Any, kwargs: Any, options: Options, timed: Callable[[Timing | None], None]
    ) -> AsyncGenerator[Any, None]:
        self.options.append(options)
        self.started.set()
        items = prepared.function(*args, **kwargs)
        try:
            if hasattr(items, "__anext__"):
                async for item in items:
                    yield item
            else:
                for item in items:
                    yield item
            timed(Timing(0.0, 0.001, 0.0002, 0.003))
        finally:
            self.cancelled.set()

    async def keep(self, prepared: Prepared) -> int:
        self.kept.append(prepared.function)
        return 1

    def drop(self, prepared: Prepared, forgotten: Callable[[], None]) -> None:
        self.kept.remove(prepared.function)
        forgotten()

    def publish(self, models: Callable[[], Mapping[str, tuple[str, Prepared]]]) -> None:
        self.published = {name: version for name, (version, _) in models().items()}

    def host(self, plan: HostPlan, user: str) -> Host:
        raise AssertionError("no model here keeps state")

    async def query(self, what: str) -> str:
        answer = {"metrics": self.metrics, "calls": self.calls}[what]
        if isinstance(answer, Exception):
            raise answer
        return answer


# --- what is served ---------------------------------------------------------------------------------------------------


class Line(msgspec.Struct):
    text: str
    box: tuple[int, int] = (0, 0)


class Question(msgspec.Struct):
    words: list[str]
    limit: int = 10


app = App("demo", title="A demonstration")


@app.endpoint("/v1/read")
@rtml.task
async def read(image: bytes, language: str = "en") -> list[Line]:
    return [Line(f"{len(image)} bytes in {language}", (1, 2))]


@app.endpoint("/v1/answer")
async def answer(question: Question) -> dict[str, Any]:
    return {"words": question.words[: question.limit], "vector": np.array([[1.5, 2]]), "mean": np.float32(1.5)}


@app.endpoint("/v1/echo")
@rtml.task
def echo(data: bytes) -> bytes:
    return data


@app.endpoint("/v1/picture")
@rtml.task
def picture() -> Content:
    return Content(b"\x89PNG", "image/png")


@app.endpoint("/v1/wait", deadline=30)
@rtml.task
async def wait() -> None:
    await asyncio.Event().wait()


@app.endpoint("/v1/fail")
@rtml.task
def fail(how: str) -> Any:
    if how == "input":
        raise InvalidInput("the page is empty")
    if how == "user":
        info = ErrorInfo("ValueError", "wrong page", "Traceback: /secret/place.py")
        raise RemoteError(info)
    if how == "own":
        raise ZeroDivisionError("division by zero")
    if how == "lost":
        raise ConnectionLost("the dispatcher is gone")
    if how == "cancelled":
        raise TaskCancelled("cancelled by an operator")
    if how == "inner":
        raise Unschedulable("no worker has a gpu")
    return object()


@rtml.task
def double(x: Any) -> Any:
    return x * 2


@rtml.task
def join(a: Any, b: Any) -> Any:
    return {"sum": a + b.astype("f4"), "text": np.array([b"a", b"\xff"], object)}


app.model("double", double, inputs=[TensorSpec("x", "FP32", (-1, 2))], outputs=[TensorSpec("y", "FP32", (-1, 2))])
app.model(
    "join",
    join,
    inputs=[TensorSpec("a", "FP32", (2,)), TensorSpec("b", "INT64", (2,))],
    outputs=[TensorSpec("sum", "FP32", (2,)), TensorSpec("text", "BYTES", (2,))],
    version="7",
)


# --- running it -------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, engine: InlineEngine, gateway: Gateway, port: int, session: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.gateway = gateway
        self.port = port
        self.session = session

    async def get(self, path: str, method: str = "GET", **more: Any) -> tuple[int, Any, Any]:
        async with self.session.request(method, f"http://127.0.0.1:{self.port}{path}", **more) as response:
            body = await response.read()
            if (
                response.content_type == "application/json"
                and "Inference-Header-Content-Length" not in response.headers
            ):
                return response.status, json.loads(body or b"null"), response.headers
            return response.status, body, response.headers

    async def post(self, path: str, data: Any = None, content_type: str = "", **headers: str) -> tuple[int, Any, Any]:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if content_type or isinstance(data, bytes):
            headers["Content-Type"] = content_type or "application/octet-stream"
            return await self.get(path, "POST", data=data, headers=headers)
        return await self.get(path, "POST", json=data, headers=headers)

    async def metrics(self) -> dict[str, float]:
        _, text, _ = await self.get("/metrics")
        return {
            sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }


@asynccontextmanager
async def serving(*apps: App, grpc_port: int | None = None, **settings: Any) -> AsyncIterator[Server]:
    engine = InlineEngine()
    gateway = Gateway(engine, apps or (app,), **settings)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as session:
        try:
            yield Server(engine, gateway, await gateway.start("127.0.0.1", 0, grpc_port), session)
        finally:
            await gateway.stop()
