"""The command line: `python -m loadtests --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtests import machine, measuring, messages, plots, report, servers, statistics
from loadtests.scenario import FOLDER, Scenario, lasting, read, scaled
from loadtests.sender import Target

OUT: Final = Path("out/load")
DEADLINE_HEADER: Final = "x-rtml-deadline-ms"
#: Scenarios of `standard`, which `make load` runs.
STANDARD: Final = ("constant", "poisson", "bursts", "ramp", "mixed", "graph")
#: Seconds of each of them, and of each probe and load of the capacity part.
FULL_SECONDS: Final = 10.0
QUICK_SECONDS: Final = 1.5


def parser() -> argparse.ArgumentParser:
    """What can be asked."""
    top = argparse.ArgumentParser(
        prog="python -m loadtests",
        description="Open-loop load: requests are sent at planned times whatever became of those before, and measured "
        "from those times. Scenarios are files; without --url a gateway with the scenario's app is started.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the scenarios that come with the project")
    one = commands.add_parser("run", help="one scenario")
    search = commands.add_parser("capacity", help="the highest rate of which 99 %% is in time, and goodput beyond it")
    for command in (one, search):
        command.add_argument("scenario", help="a file (.toml, .yaml, .json), or a name that `list` shows")
    standard = commands.add_parser("standard", help="all scenarios of the project, then capacity and goodput")
    standard.add_argument("--quick", action="store_true", help="a second and a half each: under a minute")
    one.add_argument("--rate", type=float, help="requests a second on average, instead of the file's")
    search.add_argument("--rate", type=float, default=0.0, help="where the search begins, instead of the file's rate")
    search.add_argument("--probes", type=int, default=8, help="most rates that are tried (default 8)")
    for command in (one, search):
        command.add_argument("--seconds", type=float, help="run for so long instead (of a search: each probe and load)")
        command.add_argument("--seed", type=int, help="instead of the file's")
        command.add_argument(
            "--no-deadlines", action="store_true", help="do not tell the server; they still say what is good"
        )
    for command in (one, search, standard):
        command.add_argument("--url", help="of a server that runs, like http://127.0.0.1:8000")
        command.add_argument("--serve", default="", metavar="OPTIONS", help="of the gateway, like '--policy fifo'")
        command.add_argument("--processes", type=int, default=1, help="generators (default 1)")
        command.add_argument("--out", type=Path, default=OUT, help=f"folder for JSON and PNG (default {OUT})")
    return top


@contextmanager
def server(options: argparse.Namespace, app: str) -> Iterator[messages.Site]:
    """The one that was named, or one of our own."""
    if options.url:
        yield messages.Site(options.url)
        return
    with servers.gateway(app, options.serve.split()) as process:
        site = messages.Site(process.url)
        site.wait()
        yield site


def _target(site: messages.Site, scenario: Scenario, options: argparse.Namespace) -> Target:
    header = None if getattr(options, "no_deadlines", False) else DEADLINE_HEADER
    return messages.target(site, scenario, header)


def _adjusted(options: argparse.Namespace) -> Scenario:
    scenario = read(options.scenario)
    if options.seed is not None:
        scenario = msgspec.structs.replace(scenario, seed=options.seed)
    if options.seconds and options.command == "run":
        scenario = lasting(scenario, options.seconds)
    if options.rate and options.command == "run":
        scenario = scaled(scenario, options.rate)
    return scenario


def _one(site: messages.Site, scenario: Scenario, options: argparse.Namespace) -> measuring.Run:
    """Runs it, saves JSON and plot."""
    found, outcome = measuring.run(_target(site, scenario, options), scenario, options.processes)
    slices = statistics.over_time(outcome)
    path = options.out / f"{scenario.name}.json"
    report.save(path, {"machine": machine.facts(), "scenario": scenario, "run": found, "over_time": slices})
    if plots.available():
        taken = statistics.latencies(outcome)[outcome.plan.counted & (outcome.sent.status == 200)]
        plots.run(path.with_suffix(".png"), f"{scenario.name}: {scenario.about}", taken, slices)
    for text in report.warnings(found.all, found.cpu, found.waited):
        report.say(f"{scenario.name}: {text}")
    return found


def _capacity(
    site: messages.Site, scenario: Scenario, options: argparse.Namespace, seconds: float, probes: int
) -> tuple[list[list[str]], dict[str, Any]]:
    """Searches and measures; rows of a table, and what to save."""
    target = _target(site, scenario, options)
    found = measuring.capacity(
        target,
        scenario,
        seconds=seconds,
        start=getattr(options, "rate", 0.0),
        probes=probes,
        processes=options.processes,
    )
    document: dict[str, Any] = {"machine": machine.facts(), "scenario": scenario, "capacity": found}
    if not found.rate:
        report.say(f"{scenario.name}: no rate that was tried is within capacity: {found.probes}")
        return [], document
    loads = measuring.at_loads(target, scenario, found.rate, seconds, processes=options.processes)
    document["loads"] = measuring.saved(loads)
    report.save(options.out / f"capacity-{scenario.name}.json", document)
    if plots.available():
        points = [(load, one.all.goodput / found.rate) for load, one in loads.items()]
        title = f"{scenario.name}: capacity {found.rate:.0f}/s"
        plots.goodput(options.out / f"capacity-{scenario.name}.png", title, {scenario.name: points})
    return measuring.loads_table(scenario.name, found.rate, loads), document


def _standard(options: argparse.Namespace) -> None:
    seconds = QUICK_SECONDS if options.quick else FULL_SECONDS
    with server(options, "loadtests.app:app") as site:
        found = {}
        for name in STANDARD:
            scenario = lasting(read(name), seconds)
            if options.quick:
                scenario = msgspec.structs.replace(scenario, warmup=0.5)
            found[name] = _one(site, scenario, options).kinds
        rows, document = _capacity(site, read("poisson"), options, seconds, 4 if options.quick else 8)
    print(report.runs(found))
    if rows:
        print(f"\npoisson, capacity {document['capacity'].rate:.1f}/s")
        print(report.table([[*report.COLUMNS, "of capacity"], *rows]))
    print(f"\nsaved in {options.out}")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0, or 2 where something that was given cannot be used."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "list":
            for path in sorted(FOLDER.glob("*.toml")):
                print(f"{path.stem:10} {read(str(path)).about}")
        elif options.command == "standard":
            _standard(options)
        else:
            scenario = _adjusted(options)
            with server(options, scenario.app) as site:
                if options.command == "run":
                    print(report.runs({scenario.name: _one(site, scenario, options).kinds}))
                else:
                    rows, document = _capacity(site, scenario, options, options.seconds or 5.0, options.probes)
                    print(f"capacity {document['capacity'].rate:.1f} requests/s")
                    if rows:
                        print(report.table([[*report.COLUMNS, "of capacity"], *rows]))
            print(f"\nsaved in {options.out}")
    except (ValueError, ConnectionError, RuntimeError, TimeoutError) as error:
        report.say(f"loadtests: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
