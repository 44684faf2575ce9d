"""LitServe: two workers, batches of what is there."""

import os
from typing import Any

import litserve
from fastapi import Request

from loadtests.peers.session import BATCH, Session, arguments, decoded, encoded


class Api(litserve.LitAPI):
    """The model; LitServe calls these in this order."""

    def setup(self, device: str) -> None:
        self.session = Session(os.environ["LOAD_MODEL"])

    def decode_request(self, request: Request) -> Any:
        # It is told of a Request here, and gives its JSON.
        return decoded(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: list[Any]) -> list[Any]:
        return self.session.run_all(inputs)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return encoded(output)


if __name__ == "__main__":
    options = arguments()
    os.environ["LOAD_MODEL"] = options.model  # its workers are new processes
    # With batch_timeout=0 it would not batch at all.
    api = Api(max_batch_size=BATCH, batch_timeout=0.001, api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=2, track_requests=False)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="error")
