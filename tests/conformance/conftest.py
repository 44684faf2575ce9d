"""A real gateway on a real engine, for each test module."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance import onnxmodels
from tests.integration.test_serve import Server, wait_for


class Gateway(Server):
    """`rtml serve` with a model repository and everything that is off by default."""

    def __init__(self, directory: Path, *arguments: str, patience: float = 60) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.grpc_port = probe.getsockname()[1]
        self.trace_file = directory / "trace.json"
        super().__init__(
            "serve",
            "tests.conformance.served:app",
            "--grpc-port",
            str(self.grpc_port),
            "--model-repository",
            str(directory / "models"),
            "--triton-metrics",
            "--allow-shared-memory",
            "--allow-trace",
            "--trace-file",
            str(self.trace_file),
            *arguments,
        )
        # The log of a thousand refused models is more than a pipe holds.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            wait_for(lambda: self.request("GET", "/v2/health/ready")[0] == 200, patience)
        except BaseException:
            self.stop()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            self.lines += map(str.rstrip, self.process.stdout)

    def rest(self) -> list[str]:
        """All lines, when the process has ended."""
        self.process.wait(60)
        self._reader.join()
        return self.lines

    @property
    def resident(self) -> int:
        """Bytes of memory that the gateway's process has now."""
        return self._memory("VmRSS")

    @property
    def peak(self) -> int:
        """The most that it ever had, or had since `/proc/PID/clear_refs` was told to forget."""
        return self._memory("VmHWM")

    def _memory(self, what: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{what}:")))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """With the models of `onnxmodels`."""
    directory = tmp_path_factory.mktemp("conformance")
    (directory / "models").mkdir()
    onnxmodels.write(directory / "models")
    found = Gateway(directory)
    yield found
    found.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--whole`, leave out what only belongs to the whole."""
    if config.getoption("--whole"):
        return
    out = [item for item in items if item.get_closest_marker("whole")]
    items[:] = [item for item in items if item not in out]
    config.hook.pytest_deselected(items=out)


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether everything is wanted, however long it takes."""
    return bool(request.config.getoption("--whole"))
