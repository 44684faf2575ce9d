"""What all peers share: the model in onnxruntime with one thread, as rtml runs it, and the protocol's JSON.

Runs in the peers' environments: standard library, numpy, onnxruntime.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Most rows of a batch, where a server batches; for every server the same.
BATCH = 16


class Session:
    """A model file, opened at the first use (after a server has forked or pickled what holds it)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._session: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Session, (self._path,)

    def run(self, x: Any) -> Any:
        """Rows in, rows out."""
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        return self._session.run(None, {"x": x})[0]

    def run_all(self, arrays: Sequence[Any]) -> list[Any]:
        """Several requests' rows in one run."""
        if len(arrays) == 1:
            return [self.run(arrays[0])]
        ends = np.cumsum([len(array) for array in arrays])[:-1]
        return list(np.split(self.run(np.concatenate(arrays)), ends))


def decoded(document: Any) -> Any:
    """The array of a request of the Open Inference Protocol."""
    tensor = document["inputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def encoded(y: Any) -> dict[str, Any]:
    """An answer of the Open Inference Protocol."""
    tensor = {"name": "y", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}
    return {"model_name": "model", "outputs": [tensor]}


def arguments() -> argparse.Namespace:
    """`--port` and `--model` (a file)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    return parser.parse_args()
