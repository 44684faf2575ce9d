"""Emulated hosts: network namespaces on a bridge, their links shaped. For tests that need real addresses.

    with hosts(3, rate="100mbit") as network:
        network.popen(1, "worker", "--dispatcher", f"tcp://{network.address(0)}:7411", ...)

Needs root and the commands `ip` and `tc`; `reason()` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def reason() -> str:
    """Why hosts cannot be emulated here; "" if they can."""
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"the command {command} is missing (iproute2)"
    name = f"rtml{os.getpid()}x"
    done = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are not allowed: {done.stderr.strip()}"
    _run("ip", "netns", "delete", name)
    return ""


class Network:
    """Hosts by number, from 0 on."""

    def __init__(self, count: int, rate: str) -> None:
        # Numbers that other networks on this machine hardly have.
        self._tag = f"{os.getpid() % 10_000}"
        self._net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self._count = count
        bridge = f"rb{self._tag}"
        self.names = [f"rtml{self._tag}h{number}" for number in range(count)]
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(self.names):
            outside, inside = self.outside(number), self.inside(number)
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", inside, "netns", name)
            _run("ip", "link", "set", outside, "master", bridge, "up")
            self._inside(name, "ip", "address", "add", f"{self.address(number)}/24", "dev", inside)
            self._inside(name, "ip", "link", "set", inside, "up")
            self._inside(name, "ip", "link", "set", "lo", "up")
            if rate:
                shape = ("root", "tbf", "rate", rate, "burst", "64k", "latency", "20ms")
                self._inside(name, "tc", "qdisc", "add", "dev", inside, *shape)

    def address(self, number: int) -> str:
        """Of a host."""
        return f"{self._net}.{number + 1}"

    def outside(self, number: int) -> str:
        """The switch's end of a host's link."""
        return f"rv{self._tag}o{number}"

    def inside(self, number: int) -> str:
        """The host's own end."""
        return f"rv{self._tag}i{number}"

    def _inside(self, name: str, *command: str) -> None:
        _run("ip", "netns", "exec", name, *command)

    def command(self, number: int, *arguments: str) -> list[str]:
        """What runs Python with these arguments on a host."""
        return ["ip", "netns", "exec", self.names[number], sys.executable, *arguments]

    def popen(self, number: int, *arguments: str) -> subprocess.Popen[bytes]:
        """Run `rtml` with these arguments on a host."""
        return subprocess.Popen(self.command(number, "-m", "rtml", *arguments), stdin=subprocess.DEVNULL)

    def cut(self, number: int) -> None:
        """Pull the host's plug."""
        _run("ip", "link", "set", f"rv{self._tag}o{number}", "down")

    def close(self) -> None:
        """Remove everything."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        for number in range(self._count):
            subprocess.run(["ip", "link", "delete", f"rv{self._tag}o{number}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", f"rb{self._tag}"], check=False, capture_output=True)


@contextmanager
def hosts(count: int, rate: str = "") -> Iterator[Network]:
    """So many hosts, each with a link of this rate (of `tc`; "" is unshaped) to a switch."""
    network = None
    try:
        network = Network(count, rate)
        yield network
    finally:
        if network is not None:
            network.close()
