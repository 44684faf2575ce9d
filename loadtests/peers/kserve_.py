"""KServe's model server, without Kubernetes: two worker processes. It has no batches of its own (its agent has)."""

from __future__ import annotations

from typing import Any

import kserve

from loadtests.peers.session import Session, arguments


class Served(kserve.Model):
    """The model."""

    def __init__(self, path: str) -> None:
        super().__init__("model")
        self.session = Session(path)
        self.ready = True

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        y = self.session.run(payload.inputs[0].as_numpy())
        output = kserve.InferOutput("y", list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=False)
        return kserve.InferResponse(payload.id or "", "model", [output])


if __name__ == "__main__":
    options = arguments()
    server = kserve.ModelServer(
        http_port=options.port, workers=2, enable_grpc=False, access_log_format=None, enable_latency_logging=False
    )
    server.start([Served(options.model)])
