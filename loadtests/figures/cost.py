"""What one request costs each process on its way: CPU time, and how often the kernel switched to it.

Unlike a latency both hold on a machine that others use, too; CPU time only roughly, since caches are shared. The bare
aiohttp server with the same body is measured beside the gateway's processes, at one request at a time and at 64.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from loadtests import generators, servers
from loadtests.figures import overhead
from loadtests.sender import Target

#: Requests at a time.
_LEVELS: Final = (1, 64)
#: Seconds that executors may need to load what the app serves.
SETTLE: Final = 3.0


def _role(pid: int, first: int) -> str:
    """What a server's process does; "" if it has no part in a request."""
    if pid == first:
        return "server"
    try:
        name = Path(f"/proc/{pid}/comm").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
    if "rtml.dispatcher" in command:
        return "dispatcher"
    return {"rtml-exec": "executors", "rtml-asyn": "async executor"}.get(name[:9], "")


def _spent(server: servers.Process) -> Counter[tuple[str, str]]:
    """Seconds of CPU and switches so far, by (role, what)."""
    found: Counter[tuple[str, str]] = Counter()
    for pid in server.all():
        role = _role(pid, server.process.pid)
        for thread in Path(f"/proc/{pid}/task").glob("*") if role else ():
            try:
                found[role, "cpu"] += int((thread / "schedstat").read_text().split()[0])
                lines = (thread / "status").read_text().splitlines()
            except OSError:
                continue
            found[role, "switches"] += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return found


def _cost(server: servers.Process, target: Target, level: int, seconds: float) -> dict[str, dict[str, float]]:
    """By role: microseconds of CPU and switches of a request."""
    generators.keep(target, level, 0.5)
    before = _spent(server)
    sent = generators.keep(target, level, seconds)
    spent = _spent(server) - before
    good = max(1, int((sent.status == 200).sum()))
    roles = dict.fromkeys(role for role, _ in spent)
    return {
        role: {"cpu_us": spent[role, "cpu"] / good / 1e3, "switches": spent[role, "switches"] / good} for role in roles
    }


def measure(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about 15 s, quick or 35 s."""
    seconds = 1.0 if quick else 3.0
    log = servers.ROOT / "out/load/noop.log"
    command = [sys.executable, "-m", "loadtests.figures.noop"]
    lines: list[str] = []
    document: dict[str, Any] = {}
    with (
        servers.started(command, log, ready=r"serving on (http://\S+)") as noop,
        servers.gateway("loadtests.app:app") as gateway,
    ):
        time.sleep(SETTLE)
        asked = {
            "noop": (noop, overhead.target(noop.url, "/infer")),
            "model": (gateway, overhead.target(gateway.url, "/v2/models/four/infer")),
            "graph": (gateway, overhead.target(gateway.url, "/v2/models/one/infer")),
        }
        for level in _LEVELS:
            for name, (server, target) in asked.items():
                found = _cost(server, target, level, seconds)
                document[f"{name}-{level}"] = found
                told = [f"{role} {spent['cpu_us']:.0f} us, {spent['switches']:.1f}x" for role, spent in found.items()]
                lines.append(f"{name:5} at {level:2}: {'; '.join(told)}")
    return lines, document
