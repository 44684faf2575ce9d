"""An app whose programs take as long as they are told."""

from __future__ import annotations

import asyncio
import time

import numpy as np

import rtml
from rtml.serving import App
from rtml.serving.app import TensorSpec

app = App("deadlines")


@rtml.task
def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@rtml.task(name="step with, comma")
async def never() -> None:
    await asyncio.Event().wait()


@rtml.task
async def double(x: np.ndarray) -> np.ndarray:
    await rtml.anytime([never.submit()], within=0.01, fallback=None)
    return 2 * x


@app.endpoint("/v1/nap")
@rtml.task
async def naps(seconds: float) -> float:
    return await nap.submit(seconds)


@app.endpoint("/v1/some")
@rtml.task
async def some() -> list[float | None]:
    return list(await rtml.anytime([nap.submit(0.001), never.submit()], within=0.1, fallback=None))


VECTOR = (TensorSpec("x", "FP32", (-1,)),)
app.model("double", double, inputs=VECTOR, outputs=(TensorSpec("y", "FP32", (-1,)),))
