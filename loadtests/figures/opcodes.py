"""How much Python one request executes, in each process on its way: exact, whatever else the machine does.

Counted as `benchmarks.opcodes` counts a task's, between two signals, one request at a time. Counting makes requests
slow, so there are few, and what is done in bulk, for a thousand or once a second, has a larger part than it has.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from benchmarks import opcodes
from loadtests import generators, servers
from loadtests.figures import cost, overhead
from loadtests.sender import Target

#: Seconds in which everything was loaded, and ran often enough to run as it does later.
_WARM: Final = 2.0
#: Functions listed of each process.
_TOP: Final = 5


def _counted(server: servers.Process, target: Target, directory: str, seconds: float) -> dict[str, Counter[str]]:
    """Opcodes of a request by process and function."""
    generators.keep(target, 1, _WARM)
    roles = {pid: cost._role(pid, server.process.pid) for pid in server.all()}
    pids = [pid for pid, role in roles.items() if role]
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
        opcodes.wait_for(Path(directory, f"{pid}.on"))
    sent = generators.keep(target, 1, seconds)
    requests = max(1, int((sent.status == 200).sum()))
    found: dict[str, Counter[str]] = {}
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
        written = opcodes.wait_for(Path(directory, f"{pid}.json"))
        counts = json.loads(written.read_text())
        written.unlink()
        Path(directory, f"{pid}.on").unlink()
        each = {name: count / requests for name, count in counts.items()}
        found.setdefault(roles[pid], Counter()).update(each)
    return found


def measure(quick: bool) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about 25 s, quick or 20 s."""
    seconds = 2.0 if quick else 4.0
    lines: list[str] = []
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "sitecustomize.py").write_text("from benchmarks import opcodes\nopcodes.install()\n")
        environment = {opcodes.VARIABLE: directory, "PYTHONPATH": os.pathsep.join([directory, str(servers.ROOT)])}
        with servers.gateway("loadtests.app:app", environment=environment) as gateway:
            time.sleep(cost.SETTLE)
            for name, path in (("model", "/v2/models/four/infer"), ("graph", "/v2/models/one/infer")):
                target = overhead.target(gateway.url, path)
                document[name] = found = _counted(gateway, target, directory, seconds)
                for role, counts in found.items():
                    if total := sum(counts.values()):
                        most = ", ".join(f"{function} {count:.0f}" for function, count in counts.most_common(_TOP))
                        lines.append(f"{name:5} {role:14} {total:6.0f} opcodes; {most}")
    return lines, document
