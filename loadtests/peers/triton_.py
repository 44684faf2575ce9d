"""NVIDIA's Triton from nvidia-pytriton's wheel: its python backend around onnxruntime (the wheel has no other one).

Two instances, dynamic batching. What it takes to run, beside the wheel: numpy below 2 in the first `python` on PATH,
and the library folder of that python before the system's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from loadtests.peers.session import BATCH, arguments

MODEL = """
import numpy as np
import triton_python_backend_utils as utils

from loadtests.peers.session import Session


class TritonPythonModel:
    def initialize(self, args):
        self.session = Session({path!r})

    def execute(self, requests):
        arrays = [utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        found = self.session.run_all(arrays)
        return [utils.InferenceResponse([utils.Tensor("y", np.ascontiguousarray(y))]) for y in found]
"""
CONFIG = """
backend: "python"
max_batch_size: {batch}
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 2 }} ]
dynamic_batching {{ }}
"""


def main() -> None:
    """Writes a repository and runs the server; at its end nothing of both is left."""
    options = arguments()
    import pytriton

    home = Path(pytriton.__file__).parent / "tritonserver"
    folder = Path(tempfile.mkdtemp(prefix="triton-"))
    version = folder / "models" / "model" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL.format(path=options.model))
    (version.parent / "config.pbtxt").write_text(CONFIG.format(batch=BATCH))
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    stub = (
        home
        / "python_backend_stubs"
        / f"{sys.version_info.major}.{sys.version_info.minor}"
        / "triton_python_backend_stub"
    )
    for part in (*(home / "backends" / "python").glob("*.*"), stub):
        (backend / part.name).symlink_to(part)
    libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "PYTRITON_HOME": str(folder / "home"),
    }
    server = shutil.which(str(home / "bin" / "tritonserver")) or "tritonserver"
    command = [
        server, "--model-repository", str(folder / "models"), "--backend-directory", str(backend.parent),
        "--http-address", "127.0.0.1", "--http-port", str(options.port), "--allow-grpc", "false",
        "--allow-metrics", "false", "--exit-timeout-secs", "3",
        "--backend-config", f"python,shm-region-prefix-name={folder.name}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: process.send_signal(number))
    try:
        sys.exit(process.wait())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Which it leaves when it, or its stub, is killed: a MiB or more each.
        for region in Path("/dev/shm").glob(f"{folder.name}*"):
            region.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
