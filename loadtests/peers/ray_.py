"""Ray Serve: two replicas, batches of what is there."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import ray
from ray import serve

from loadtests.peers.session import BATCH, Session, arguments, decoded, encoded


@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5})
class Served:
    """The model."""

    def __init__(self, path: str) -> None:
        self.session = Session(path)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
    async def run(self, arrays: list[Any]) -> list[Any]:
        return self.session.run_all(arrays)

    async def __call__(self, request: Any) -> dict[str, Any]:
        return encoded(await self.run(decoded(await request.json())))


if __name__ == "__main__":
    options = arguments()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": options.port, "access_log": False})
    deployment: Any = Served
    serve.run(deployment.bind(options.model), route_prefix="/infer")
    while True:
        time.sleep(3600)
