"""What the scenarios of this folder load: models of several sizes, two of them with batches, and graph programs.

`rtml serve loadtests.app:app` serves it; the model files are written to `out/load/models` at the first start.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np

import rtml
from loadtests import onnxmodels
from rtml.serving import App
from rtml.serving.app import TensorSpec

FOLDER = Path(os.environ.get("RTML_LOAD_MODELS", "out/load/models")).absolute()
#: Where `/v1/chain` notes when its calls ran.
NOTES = Path(os.environ.get("RTML_LOAD_NOTES", "out/load/notes")).absolute()
NOTES.mkdir(parents=True, exist_ok=True)
#: Most rows of a batch of `wide`; what other sizes give is asked by `python -m loadtests.figures batching`.
BATCH = int(os.environ.get("RTML_LOAD_BATCH", "16"))

app = App("load", title="Load tests")

four = rtml.model(str(onnxmodels.file("four", FOLDER)), name="four")
mlp = rtml.model(str(onnxmodels.file("mlp", FOLDER)), name="mlp", batch=16)
wide = rtml.model(str(onnxmodels.file("wide", FOLDER)), name="wide", batch=BATCH)
single = rtml.model(str(onnxmodels.file("heavy", FOLDER)), name="single")
for model, name in ((four, "four"), (mlp, "mlp"), (wide, "wide"), (single, "single")):
    app.model(name, model)


@rtml.task
async def one(x: np.ndarray) -> np.ndarray:
    """A graph program with one call of a model."""
    return await four.submit(x)  # type: ignore[no-any-return]


app.model("one", one, inputs=(TensorSpec("x", "FP32", (-1, 4)),), outputs=(TensorSpec("y", "FP32", (-1, 4)),))


@rtml.task
def classify(rows: list[list[float]]) -> int:
    """Which of the digits most rows look like; stands for what comes after a model."""
    return int(np.bincount(np.argmax(rows, axis=1)).argmax())


@app.endpoint("/v1/ask")
@rtml.task
async def ask(seed: int, width: int = 3) -> dict[str, int]:
    """A graph whose width the request says: so many models beside each other, then one function of their results."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(0, 1, (width, 1, 64)).astype(np.float32)
    found = await rtml.gather(*[mlp.submit(x) for x in inputs])
    return {"digit": await classify.submit([answer[0].tolist() for answer in found])}


@rtml.task
def noted(run: int, seconds: float) -> None:
    """Is busy for so long, and then notes from when to when."""
    start = time.monotonic()
    while (end := time.monotonic()) < start + seconds:
        pass
    with (NOTES / str(run)).open("a") as notes:
        notes.write(f"{start} {end}\n")


@app.endpoint("/v1/chain")
@rtml.task
async def chain(run: int, length: int = 10, seconds: float = 0.005) -> int:
    """Calls one after the other, each noted in the file `run` of `NOTES`."""
    for _ in range(length):
        await noted.submit(run, seconds)
    return length


@rtml.task
def step(seen: list[float], seconds: float) -> list[float]:
    """Notes when the graph's deadline is, as this step is told."""
    task = rtml.current_task()
    deadline = task.deadline if task else None
    time.sleep(seconds)
    return [*seen, -1.0 if deadline is None else deadline]


def _maybe_slow(seconds: float) -> float:
    """One of a hundred calls takes twenty times as long, for reasons of its own."""
    taken = seconds * (20.0 if random.random() < 0.01 else 1.0)
    time.sleep(taken)
    return taken


@app.endpoint("/v1/straggling")
@rtml.task
def straggling(seconds: float = 0.005) -> float:
    """Without a second attempt."""
    return _maybe_slow(seconds)


@app.endpoint("/v1/hedged")
@rtml.task(hedge=0.95)
def hedged(seconds: float = 0.005) -> float:
    """With a second attempt beside those that take long."""
    return _maybe_slow(seconds)


@app.endpoint("/v1/budget")
@rtml.task
async def budget(steps: int = 5, seconds: float = 0.004) -> list[float]:
    """Where each of so many steps sees the deadline, on the machine's monotonic clock; -1: it sees none."""
    seen: list[float] = []
    for _ in range(steps):
        seen = await step.submit(seen, seconds)
    return seen
