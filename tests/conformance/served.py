"""What the gateway of these tests serves beside its model repository."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import rtml
from rtml.serving import App
from rtml.serving.app import TensorSpec

app = App("conformance", title="What clients of others are tried against")


class Chained(msgspec.Struct):
    y: NDArray[np.float32]


@app.endpoint("/v1/chain")
@rtml.task
async def chain(x: NDArray[np.float32]) -> Chained:
    """Twice through a model of the repository: load generators see an ensemble of it."""
    if x.size % 4:
        raise rtml.errors.InvalidInput(f"x has {x.size} elements; rows of 4 are asked for")
    model = rtml.served("double")
    return Chained(await model.submit(await model.submit(np.reshape(x, (-1, 4)))))


@rtml.task
def same(x: Any) -> Any:
    """Bytes of any kind: those of ONNX models are text."""
    return x


app.model("same_RAW", same, inputs=[TensorSpec("x", "BYTES", (-1, 2))], outputs=[TensorSpec("y", "BYTES", (-1, 2))])


@rtml.task
def tokens(x: Any) -> Any:
    """Three answers to a request."""
    for number in range(3):
        yield x + number


app.model("tokens", tokens, inputs=[TensorSpec("x", "INT32", (1,))], outputs=[TensorSpec("y", "INT32", (1,))])
