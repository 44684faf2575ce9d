"""Goodput at parts and multiples of the capacity, Poisson and bursts, mixed deadlines; a plain FIFO server beside it.

The plain server is the same gateway with `--policy fifo` that is told of no deadline, so that nothing is refused: what
servers without deadlines do. Both get the loads that the first one's capacity says.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from loadtests import measuring, messages, report, servers
from loadtests.scenario import Bursts, Poisson, Scenario, read, scaled

LOADS: Final = (0.5, 0.9, 1.2, 2.0)
#: The figure, at 2.0 times the capacity: goodput as part of it, and misses of those that were let in.
GOODPUT_LEAST: Final = 0.9
MISSED_MOST: Final = 0.01
#: The model's CPU time is to be so many times the gateway's.
WORK_LEAST: Final = 20.0


def _shaped(scenario: Scenario, bursts: bool, seconds: float) -> Scenario:
    phase = Bursts(60.0, seconds, 10.0) if bursts else Poisson(60.0, seconds)
    return msgspec.structs.replace(scenario, name="bursts" if bursts else "poisson", phases=[phase])


def _work(server: servers.Process, target: Any, scenario: Scenario, rate: float) -> tuple[float, float]:
    """Seconds of CPU of a request: in the gateway, and elsewhere in the engine."""
    front = servers.gateway_pids(server)
    before = server.cpu(front), server.cpu()
    shape = scaled(msgspec.structs.replace(scenario, warmup=0.0), 0.5 * rate)
    found = measuring.run(target, shape, label="work of a request")[0].all
    gateway, whole = server.cpu(front) - before[0], server.cpu() - before[1]
    count = max(1, found.requests)
    return gateway / count, (whole - gateway) / count


def measure(quick: bool, name: str = "poisson") -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and what to save. Takes about four minutes, quick or one.

    Args:
        quick: Three seconds for each figure instead of ten, and two loads.
        name: A scenario; "tiny" is bound by the gateway itself.
    """
    seconds, probes, loads = (3.0, 5, (1.2, 2.0)) if quick else (10.0, 8, LOADS)
    scenario = read(name)
    document: dict[str, Any] = {"scenario": scenario}
    lines: list[str] = []
    rows: list[list[str]] = [[*report.COLUMNS, "of capacity"]]
    judged: dict[str, measuring.Run] = {}
    with servers.gateway(scenario.app) as server:
        site = messages.Site(server.url)
        target = messages.target(site, scenario)
        poisson = _shaped(scenario, False, seconds)
        found = measuring.capacity(target, poisson, seconds=seconds, start=scenario.mean, probes=probes)
        document["capacity"] = found
        if not found.rate:
            return [f"no capacity found: {found.probes}"], document
        gateway, engine = _work(server, target, poisson, found.rate)
        before = server.memory()
        for bursts in (False, True):
            shape = _shaped(scenario, bursts, seconds)
            runs = measuring.at_loads(target, shape, found.rate, seconds, loads=loads)
            rows += measuring.loads_table(shape.name, found.rate, runs)
            document[shape.name] = measuring.saved(runs)
            judged[shape.name] = runs[2.0]
        memory = before, server.memory()
    with servers.gateway(scenario.app, ["--policy", "fifo"]) as server:
        target = messages.target(messages.Site(server.url), scenario, None)
        for bursts in (False, True):
            shape = _shaped(scenario, bursts, seconds)
            runs = measuring.at_loads(target, shape, found.rate, seconds, loads=loads)
            rows += measuring.loads_table(f"fifo {shape.name}", found.rate, runs)
            document[f"fifo {shape.name}"] = measuring.saved(runs)
    document |= {"gateway_s": gateway, "engine_s": engine, "memory_mib": memory}
    lines += [report.table(rows), ""]
    lines.append(
        f"capacity {found.rate:.1f}/s; CPU of a request: gateway {gateway * 1e6:.0f} us, engine and model "
        f"{engine * 1e6:.0f} us, {engine / max(gateway, 1e-9):.1f} times that (asked: {WORK_LEAST:g})"
    )
    lines.append(f"memory before and after overload: {memory[0]:.0f} and {memory[1]:.0f} MiB")
    lines += [_verdict(kind, one, found.rate) for kind, one in judged.items()]
    return lines, document


def _verdict(kind: str, one: measuring.Run, capacity: float) -> str:
    part, missed = one.all.goodput / capacity, one.all.missed_of_admitted
    mark = "reached" if part >= GOODPUT_LEAST and missed <= MISSED_MOST else "MISSED "
    return (
        f"{mark} {kind} at 2.0 x capacity: goodput {part:.1%} of it (at least {GOODPUT_LEAST:.0%}), of what was let in "
        f"{missed:.2%} missed (at most {MISSED_MOST:.0%})"
    )
