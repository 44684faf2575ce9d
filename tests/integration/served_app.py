"""An application for tests of `rtml serve`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import rtml
from rtml.serving import App
from rtml.serving.app import TensorSpec

app = App("served", title="An application for tests")


class Sum(msgspec.Struct):
    numbers: list[int]


class Answer(msgspec.Struct):
    total: int
    squares: Any
    pids: list[int]


@rtml.task
def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


@app.endpoint("/v1/sum")
@rtml.task
async def sum_squares(request: Sum) -> Answer:
    found = await rtml.gather(*[square.submit(number) for number in request.numbers])
    squares = [value for value, _ in found]
    return Answer(sum(squares), np.array(squares), sorted({pid for _, pid in found}))


@app.endpoint("/v1/count")
@rtml.task
def count(to: int, pause: float = 0.0, gone: str = "") -> Iterator[dict[str, int]]:
    try:
        for number in range(to):
            time.sleep(pause)
            yield {"number": number}
        if gone == "fail":
            raise LookupError("as asked")
    except GeneratorExit:
        Path(gone).touch()
        raise


@app.endpoint("/v1/words")
@rtml.task
async def words(text: str) -> AsyncIterator[str]:
    for word in text.split():
        yield word


@app.endpoint("/v1/reverse")
@rtml.task
def reverse(data: bytes) -> bytes:
    return data[::-1]


@app.endpoint("/v1/nap")
@rtml.task
async def nap(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@rtml.task(retries=3)
def slow_square(number: int) -> int:
    time.sleep(0.02)
    return number * number


@app.endpoint("/v1/hold")
@rtml.task
async def hold(tasks: int, number: int) -> int:
    """Opens a graph that needs executors for a while."""
    return sum(await rtml.gather(*[slow_square.submit(number) for _ in range(tasks)]))


class Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


@app.endpoint("/v1/fail")
@rtml.task
def fail(how: str) -> Any:
    if how == "raise":
        raise LookupError("no such page")
    if how == "exit":
        os._exit(3)
    return Unpicklable()


@rtml.task
def scale(a: Any, b: Any) -> Any:
    return {"product": a * b, "sum": a + b}


@rtml.task
def evil(x: Any) -> Any:
    """Whoever unpickles its result dies."""
    return Unpicklable()


@rtml.task
def spell(numbers: Any) -> Any:
    """Text of any length, and as many numbers."""
    return {"words": np.array([f"word {int(number)}" for number in numbers], object), "numbers": numbers}


app.model(
    "spell",
    spell,
    inputs=[TensorSpec("numbers", "INT64", (-1,))],
    outputs=[TensorSpec("words", "BYTES", (-1,)), TensorSpec("numbers", "INT64", (-1,))],
)

_VECTOR = [TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "FP32", (-1,))]
app.model(
    "scale", scale, inputs=_VECTOR, outputs=[TensorSpec("product", "FP32", (-1,)), TensorSpec("sum", "FP32", (-1,))]
)
app.model("evil", evil, inputs=[TensorSpec("x", "FP32", (1,))], outputs=[TensorSpec("y", "FP32", (1,))])
