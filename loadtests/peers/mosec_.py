"""Mosec: two workers, batches of what comes within a millisecond."""

from __future__ import annotations

import os
import sys
from typing import Any

import mosec

from loadtests.peers.session import BATCH, Session, arguments, decoded, encoded


class Inference(mosec.Worker):
    """The model."""

    def __init__(self) -> None:
        self.session = Session(os.environ["LOAD_MODEL"])

    def forward(self, data: list[Any]) -> list[Any]:
        return [encoded(y) for y in self.session.run_all([decoded(document) for document in data])]


if __name__ == "__main__":
    options = arguments()
    os.environ["LOAD_MODEL"] = options.model
    # It reads the command line itself.
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(options.port), "--log-level", "error"]
    server = mosec.Server()
    server.append_worker(Inference, num=2, max_batch_size=BATCH, max_wait_time=1)
    server.run()
