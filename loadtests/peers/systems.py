"""The compared servers: how each is started, and what a request to it looks like."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from loadtests import messages, onnxmodels, servers
from loadtests.sender import Target

MODELS: Final = servers.ROOT / "out/load/models"
VARIANTS: Final = 16
#: Seconds from the start to a first answer.
START_TIMEOUT: Final = 90.0
#: Seconds after which a request is given up.
REQUEST_TIMEOUT: Final = 3.0


class System(NamedTuple):
    """One server.

    Attributes:
        name: Also of its environment, `.venv-serve-NAME`.
        title: For tables.
        path: Where it takes requests.
        arguments: Of its python; `{port}` and `{model}` are filled in. Empty: the module of its name.
        array: It takes `{"x": rows}` instead of the protocol's tensors.
        front: What speaks HTTP in it.
    """

    name: str
    title: str
    path: str
    front: str
    package: str
    arguments: tuple[str, ...] = ()
    array: bool = False

    @property
    def python(self) -> Path:
        """Of its environment."""
        return servers.ROOT / f".venv-serve-{self.name}" / "bin" / "python"

    @property
    def ready(self) -> bool:
        """Whether its environment is there."""
        return self.name == "rtml" or self.python.exists()

    def command(self, port: int, model: Path) -> list[str]:
        """How it is started."""
        if self.name == "rtml":
            app = "loadtests.app:app"
            return [sys.executable, "-m", "rtml", "serve", app, "--workers", "2", "--port", str(port)]
        arguments = self.arguments or ("-m", f"loadtests.peers.{self.name}_", "--port", "{port}", "--model", "{model}")
        return [str(self.python), *(text.format(port=port, model=model) for text in arguments)]


_V2: Final = "/v2/models/model/infer"
_BENTOML: Final = (
    "-m",
    "bentoml",
    "serve",
    "loadtests.peers.bentoml_:Served",
    "--host",
    "127.0.0.1",
    "--port",
    "{port}",
)
SYSTEMS: Final = (
    System("rtml", "rtml", "/v2/models/{name}/infer", "Python", "rtml"),
    System("triton", "Triton", _V2, "C++", "nvidia-pytriton"),
    System("mosec", "Mosec", "/inference", "Rust", "mosec"),
    System("kserve", "KServe", _V2, "Python", "kserve"),
    System("mlserver", "MLServer", _V2, "Python", "mlserver"),
    System("litserve", "LitServe", "/infer", "Python", "litserve"),
    System("ray", "Ray Serve", "/infer", "Python", "ray"),
    System("bentoml", "BentoML", "/infer", "Python", "bentoml", _BENTOML, array=True),
)


def body(system: System, rng: np.random.Generator, width: int) -> bytes:
    """One row as JSON."""
    row = rng.normal(0, 1, (1, width)).round(3)
    if system.array:
        document: dict[str, Any] = {"x": row.tolist()}
    else:
        document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, width], "data": row.ravel().tolist()}]}
    return json.dumps(document, separators=(",", ":")).encode()


def numbers(answer: bytes) -> list[float]:
    """The result in an answer, of whatever form."""
    document = json.loads(answer)
    return [
        float(value) for value in np.ravel(document if isinstance(document, list) else document["outputs"][0]["data"])
    ]


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving(system: System, model: str) -> Iterator[tuple[Target, servers.Process, list[float]]]:
    """The server with the model, ready; where to send, its processes, and its answer to the first request.

    Raises:
        RuntimeError: it does not answer with 200 in time; the message has the end of what it printed.
    """
    port = free_port()
    file = onnxmodels.file(model, MODELS)
    log = servers.ROOT / "out/load" / f"peer-{system.name}.log"
    environment = {"PYTHONPATH": str(servers.ROOT), "LOAD_MODEL": str(file), "RTML_LOAD_MODELS": str(MODELS)}
    site = messages.Site(f"http://127.0.0.1:{port}")
    path = system.path.format(name=model)
    rng = np.random.default_rng(1)
    headers = {"Content-Type": "application/json"}
    variants = [
        messages.message(site, path, body(system, rng, onnxmodels.WIDTHS[model][0]), headers) for _ in range(VARIANTS)
    ]
    with servers.started(system.command(port, file), log, environment, url=site.url) as process:
        try:
            answer = site.first(variants[0], path, START_TIMEOUT, lambda: process.process.poll() is None)
        except TimeoutError as error:
            raise RuntimeError(f"{system.title}: {error}\n{log.read_text()[-1500:]}") from None
        header = "x-rtml-deadline-ms" if system.name == "rtml" else None
        yield Target(site.host, site.port, [variants], header, timeout=REQUEST_TIMEOUT), process, numbers(answer)


def version(system: System) -> str:
    """Of its package, in its environment."""
    import subprocess

    python = sys.executable if system.name == "rtml" else str(system.python)
    code = f"import importlib.metadata as m; print(m.version({system.package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"
