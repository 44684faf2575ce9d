"""What `rtml status`, `rtml trace` and `rtml bench` do: questions to a running engine, answered as text."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from rtml.client.client import Client
from rtml.client.connecting import Connector
from rtml.client.embedded import open_client
from rtml.client.threads import ThreadDriver

#: Seconds that an engine may take to be there: an operator asks one that runs.
_PATIENCE: Final = 3.0

#: Width of a timeline, in characters.
_TIMELINE: Final = 50


def find_address(address: str) -> str:
    """The address, or that of the only engine of this user on this machine if it is empty.

    Raises:
        ValueError: there is none, or more than one.
    """
    if address:
        return address
    found = [
        path
        for path in sorted(Path(tempfile.gettempdir()).glob("rtml-*/dispatcher.sock"))
        if path.stat().st_uid == os.getuid()
    ]
    if len(found) != 1:
        seen = ": " + ", ".join(f"unix:{path}" for path in found) if found else ""
        raise ValueError(f"there are {len(found)} engines on this machine, so say which with --address{seen}")
    return f"unix:{found[0]}"


def ask(address: str, what: str, argument: str = "", *, keys: str = "") -> str:
    """The dispatcher's answer, as JSON.

    Args:
        address: of the dispatcher; "" for the only one here.
        what: the question, see `rtml.messages.Query`.
        argument: its argument.
        keys: directory of keys, for a tcp address.

    Raises:
        ValueError: no engine is found.
        ConnectionLost: nobody answers.
        AddressError: the keys cannot be used.
    """

    def make_driver(connector: Connector) -> ThreadDriver:
        return ThreadDriver(Connector(connector.address, connect_timeout=_PATIENCE, keys=connector.keys))

    client = open_client(Client, make_driver, find_address(address), logs=False, keys=keys)
    try:
        return client.query(what, argument)
    finally:
        client.shutdown()


def describe_status(answer: str) -> str:
    """The answer to "status" for people."""
    status = msgspec.json.decode(answer)
    lines = [
        "tasks       " + ", ".join(f"{count} {state}" for state, count in status["tasks"].items()),
        f"peers       {', '.join(f'{role} {count}' for role, count in sorted(status['peers'].items()))}",
        f"known       functions {status['functions']}, objects {status['objects']}",
    ]
    for node in status["nodes"]:
        roles = Counter(worker["role"] for worker in node["executors"])
        busy = sum(1 for worker in node["executors"] if worker["queued"])
        executors = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
        lines.append(
            f"node        {node['name'] or '(this one)'}: {node['free_cpu']:g} of {node['cpu']:g} cpus free; "
            f"executors: {executors or 'none'}; {busy} with work"
        )
        lagging = [worker["id"] for worker in node["executors"] if worker["lagging"]]
        lines += [f"            executor {number}: its event loop is blocked" for number in lagging]
    for peer in status.get("dispatchers", ()):
        what = "above" if peer["above"] else "node"
        state = "" if peer["connected"] else "; not connected"
        work = f"{peer['given']} tasks given to it, {peer['taken']} taken from it"
        lines.append(f"{what:11} {peer['name']}: {peer['free_cpu']:g} of {peer['cpu']:g} cpus free; {work}{state}")
    return "\n".join(lines)


def describe_trace(answer: str) -> str:
    """The answer to "trace" for people: one line per task, with where in the graph's time it waited and ran."""
    trace = msgspec.json.decode(answer)
    tasks = trace["tasks"]
    if not tasks:
        return f"nothing is remembered of graph {trace['graph']}" if trace["graph"] else "no graph has ended yet"
    depths = _depths(tasks)
    whole = max(task["finished"] for task in tasks) or 1e-9
    names = [("  " * depths[task["id"]]) + task["function"] for task in tasks]
    width = max(map(len, names))
    lines = [
        f"graph {trace['graph']}: {len(tasks)} tasks, {whole * 1e3:.3f} ms; . waits for arguments, - queued, # with an "
        "executor"
    ]
    for name, task in zip(names, tasks, strict=True):
        notes = f"{(task['finished'] - task['submitted']) * 1e3:9.3f} ms, run {task['run'] * 1e3:.3f}"
        if task["batch"] > 1:
            notes += f", batch of {task['batch']}"
        if task["attempts"] > 1:
            notes += f", attempt {task['attempts']}"
        if task["outcome"] != "ok":
            notes += f", {task['outcome']}"
        lines.append(f"{name:{width}} |{_bar(task, whole)}| {notes}")
    return "\n".join(lines)


def _depths(tasks: list[dict[str, Any]]) -> dict[int, int]:
    """How deep below the root each task is; parents come before their children."""
    depths: dict[int, int] = {}
    for task in tasks:
        depths[task["id"]] = depths.get(task["parent"], -1) + 1
    return depths


def _bar(task: dict[str, Any], whole: float) -> str:
    """One task's part of the graph's time."""
    cells = [" "] * _TIMELINE
    marks = [("submitted", "."), ("ready", "-"), ("assigned", "#")]
    for mark, sign in marks:
        start = task[mark]
        if start is not None:
            first = min(int(start / whole * _TIMELINE), _TIMELINE - 1)
            last = min(int(task["finished"] / whole * _TIMELINE), _TIMELINE - 1)
            cells[first : last + 1] = [sign] * (last + 1 - first)
    return "".join(cells)


def _nothing(*_: Any) -> None:
    """The task that is measured."""


def measure(seconds: float, **settings: Any) -> dict[str, float]:
    """A few figures of an engine that is started for it.

    Args:
        seconds: For each of them.
        **settings: As for `rtml.connect`.

    Returns:
        Name -> figure.
    """
    begin = time.perf_counter()
    client = open_client(Client, ThreadDriver, **settings)
    try:
        client.submit(_nothing).result()
        figures = {"first_result_ms": (time.perf_counter() - begin) * 1e3}
        times = sorted(_repeat(lambda: client.submit(_nothing).result(), seconds))
        figures["round_trip_p50_us"] = times[len(times) // 2] * 1e6
        figures["round_trip_p99_us"] = times[len(times) * 99 // 100] * 1e6
        burst = 2_000

        def run_burst() -> None:
            for future in [client.submit(_nothing) for _ in range(burst)]:
                future.result()

        figures["tasks_per_s"] = burst / min(_repeat(run_burst, seconds))
    finally:
        client.shutdown()
    return figures


def _repeat(action: Callable[[], object], seconds: float) -> list[float]:
    """How long each of the repetitions took that `seconds` have room for; one at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return times
