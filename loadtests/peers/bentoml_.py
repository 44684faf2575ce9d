"""BentoML: two worker processes, adaptive batching. Its batches want one array, so the request is that array."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np

from loadtests.peers.session import BATCH, Session


@bentoml.service(workers=2, traffic={"timeout": 60})
class Served:
    """The model."""

    def __init__(self) -> None:
        self.session = Session(os.environ["LOAD_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=1000, route="/infer")
    def infer(self, x: np.ndarray) -> np.ndarray:
        found: Any = self.session.run(np.asarray(x, np.float32))
        return found  # type: ignore[no-any-return]
