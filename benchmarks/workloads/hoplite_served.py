"""An ensemble behind HTTP: one image goes to a model on each of eight hosts, the sum of their logits is the answer.

`/shared` stores the image once, and the hosts pass it on; `/naive` gives each model an image of its own, which all of
them fetch from host 0. The models are those light ones of the onnx package whose work is small beside the network's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import rtml
from benchmarks.workloads.collectives_rtml import at
from rtml.serving import App

#: How many of them; they are on hosts 1, 2, ...
COUNT = int(os.environ.get("RTML_ENSEMBLE", "8"))
SHAPE = (1, 3, 224, 224)

_LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
_NAMES = ("squeezenet", "shufflenet")

MODELS: list[Any] = [
    rtml.model(_LIGHT / f"light_{_NAMES[number % 2]}.onnx", name=f"model{number}", resources=at(number))
    for number in range(1, COUNT + 1)
]

app = App("ensemble")


async def answer(images: list[Any]) -> dict[str, Any]:
    """The class with the largest sum, and that sum."""
    logits = await rtml.gather(*[model.submit(image) for model, image in zip(MODELS, images, strict=True)])
    total = np.sum([np.ravel(found) for found in logits], axis=0)
    return {"class": int(total.argmax()), "sum": float(total.max())}


@app.endpoint("/shared", deadline=60.0)
@rtml.task(resources=at(0))
async def shared(image: bytes) -> dict[str, Any]:
    """One object."""
    array = np.frombuffer(image, np.float32).reshape(SHAPE)
    return await answer([rtml.put(array)] * COUNT)


@app.endpoint("/naive", deadline=60.0)
@rtml.task(resources=at(0))
async def naive(image: bytes) -> dict[str, Any]:
    """An object for each."""
    array = np.frombuffer(image, np.float32).reshape(SHAPE)
    return await answer([rtml.put(array) for _ in range(COUNT)])
