"""An engine on emulated hosts: a dispatcher on host 0, nodes on the others, links shaped by `tc`.

    with cluster(2, rate="100mbit", python="benchmarks.workloads.ray_locality") as made: ...

Needs root, `ip` and `tc`, as `tests/integration/hosts.py`, from which it has its hosts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from benchmarks import processes
from benchmarks.workloads.report import SCRATCH
from benchmarks.workloads.turns import ROOT, Process
from rtml.link.keys import make_keys
from tests.integration.hosts import Network, hosts


class Cluster:
    """A root and nodes n1, n2, ..., each labelled `at=<number>`."""

    def __init__(self, network: Network, keys: str, cpus: int) -> None:
        self.network = network
        self.keys = keys
        self.address = f"tcp://{network.address(0)}:7411"
        self._cpus = cpus
        SCRATCH.mkdir(parents=True, exist_ok=True)
        self._log = (SCRATCH / "cluster.log").open("w")
        self._marks: dict[int, str] = {}
        self._names: dict[str, str] = {}
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int, *more: str) -> None:
        """The dispatcher on host 0, or a node."""
        keys = ("--keys", self.keys)
        if number == 0:
            arguments = ["dispatcher", "--listen", self.address, *keys, *more]
        else:
            arguments = ["worker", "--dispatcher", self.address, *keys, "--name", f"n{number}", "--no-logs"]
            arguments += ["--cpu", str(self._cpus), "--label", f"at={number}", *more]
        mark = self._marks[number] = uuid.uuid4().hex
        self._names[mark] = "root" if number == 0 else f"n{number}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), processes.MARK_NAME: mark, "OPENBLAS_NUM_THREADS": "1"}
        self._running[number] = subprocess.Popen(
            self.network.command(number, "-m", "rtml", *arguments),
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment, cwd=ROOT,
        )  # fmt: skip

    def pids(self, number: int) -> list[int]:
        """All processes of a host."""
        return processes.marked(self._marks[number])

    def names(self) -> dict[str, str]:
        """Of hosts, by the mark that their processes carry in the environment."""
        return dict(self._names)

    def cpu_s(self) -> dict[int, float]:
        """CPU time that the living processes of each host have used so far."""
        return {number: processes.cpu_seconds(self.pids(number)) for number in self._running}

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of a host at once, as if its power were cut."""
        for pid in self.pids(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._running.pop(number).wait()

    def received(self, number: int) -> int:
        """Bytes that came to a host over its link so far."""
        (name,) = self._devices(number)
        return int(self._devices(number)[name])

    def _devices(self, number: int) -> dict[str, str]:
        command = ["ip", "netns", "exec", self.network.names[number], "cat", "/proc/net/dev"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[2:]
        found = {line.split(":")[0].strip(): line.split(":")[1].split()[0] for line in lines}
        found.pop("lo")
        return found

    def program(self, name: str, module: str, *arguments: str) -> Process:
        """A program on host 0 that answers questions (`turns.serve`); it gets the address and the keys first."""
        enter = ("ip", "netns", "exec", self.network.names[0])
        return Process(name, module, self.address, self.keys, *arguments, enter=enter)

    def close(self) -> None:
        """End everything."""
        for number in sorted(self._running, reverse=True):
            self._running[number].terminate()
        for number, process in sorted(self._running.items(), reverse=True):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill(number)
        self._log.close()


@contextlib.contextmanager
def cluster(nodes: int, rate: str = "", cpus: int = 1, root: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """So many nodes of so many cpus each.

    Args:
        nodes: without the root's host, on which no task runs.
        rate: of each host's link, of `tc`; "" is not shaped.
        cpus: of each node.
        root: further options of `rtml dispatcher`.
    """
    with hosts(nodes + 1, rate) as network, tempfile.TemporaryDirectory() as directory:
        keys = str(Path(directory) / "keys")
        make_keys(keys)
        made = Cluster(network, keys, cpus)
        try:
            made.start(0, *root)
            for number in range(1, nodes + 1):
                made.start(number)
            yield made
        finally:
            made.close()
