"""MLServer: two inference workers, adaptive batching."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from loadtests.peers.session import BATCH, Session, arguments


class Served(MLModel):
    """The model."""

    async def load(self) -> bool:
        assert self.settings.parameters is not None
        self.session = Session(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        y = self.session.run(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    options = arguments()
    folder = Path(tempfile.mkdtemp(prefix="mlserver-"))
    ports = {"http_port": options.port, "grpc_port": free_port(), "metrics_port": free_port()}
    settings = {"host": "127.0.0.1", "parallel_workers": 2, "debug": False, "use_structured_logging": False, **ports}
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {
        "name": "model",
        "implementation": "loadtests.peers.mlserver_.Served",
        "max_batch_size": BATCH,
        "max_batch_time": 0.001,
        "parameters": {"uri": options.model},
    }
    (folder / "model-settings.json").write_text(json.dumps(model))
    command = str(Path(sys.executable).parent / "mlserver")
    os.execv(command, [command, "start", str(folder)])
