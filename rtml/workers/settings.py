"""What a supervisor is told on its command line."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What a supervisor is told on its command line. Directories are absolute."""

    session_dir: str
    shm_dir: str
    workers: int
    async_executors: int = 1
    driver_pid: int = 0
    listen: tuple[str, ...] = ()
    link: str = "unix"
    name: str = "local"
    cpu: float | None = None
    gpu: float = 0.0
    memory: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    blocked_max: int = 64
    preimport: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    logs: bool = True
    drain: float = 2.0
    dispatcher_args: tuple[str, ...] = ()
    #: Where the data endpoint listens, "host:port", "" for none; and the host that others are told.
    data: str = ""
    advertise: str = ""
    data_keys: str = ""
    object_memory: int = 0
    spill_dir: str = ""
    spill_max: int = 0

    @property
    def directories(self) -> list[str]:
        """What this node owns, and removes at its end."""
        own = [self.session_dir, self.shm_dir]
        return own if os.path.dirname(self.spill_dir) == self.session_dir else [*own, self.spill_dir]

    @property
    def unix_address(self) -> str:
        """Where the dispatcher listens for the processes of this node."""
        return f"unix:{self.session_dir}/dispatcher.sock"

    @property
    def executor_address(self) -> str:
        """Where executors connect."""
        return self.unix_address if self.link == "unix" else f"ipc://{self.session_dir}/dispatcher.zmq"

    @property
    def listen_addresses(self) -> list[str]:
        """All addresses of the dispatcher."""
        addresses = [self.unix_address]
        if self.executor_address not in addresses:
            addresses.append(self.executor_address)
        return addresses + [address for address in self.listen if address not in addresses]


def parse(arguments: list[str], description: str) -> Settings:
    """The settings of a command line; ends the process with a message if there is something wrong with it."""
    parser = argparse.ArgumentParser(prog="python -m rtml.workers.supervisor", description=description)
    add: Any = parser.add_argument
    add("--session-dir", required=True, help="private directory of the dispatcher's sockets; removed at the end")
    add("--shm-dir", required=True, help="directory of shared-memory objects; removed at the end")
    add("--workers", type=int, required=True, help="sync executors")
    add("--async-executors", type=int, default=1, help="async executors")
    add("--driver-pid", type=int, default=0, help="end with this process")
    add("--listen", action="append", default=[], help="a further address for the dispatcher (repeatable)")
    add("--link", choices=("unix", "zmq"), default="unix", help="what executors use")
    add("--name", default="local", help="the node's name")
    add("--cpu", type=float, default=None, help="cpu slots (default: one per sync executor)")
    add("--gpu", type=float, default=0.0, help="gpus")
    add("--memory", type=int, default=0, help="bytes (default: all of the machine)")
    add("--resources", type=json.loads, default={}, help="custom labels as a JSON object of numbers")
    add("--blocked-max", type=int, default=64, help="executors beyond --workers for blocked tasks")
    add("--preimport", default="", help="modules to import before the fork, comma-separated")
    add("--path", action="append", default=[], help="put in front of sys.path of executors (repeatable)")
    add("--no-logs", dest="logs", action="store_false", help="drop what tasks print and log")
    add("--drain", type=float, default=2.0, help="seconds that running tasks get when it is told to stop")
    add("--dispatcher-arg", action="append", default=[], help="passed on to the dispatcher (repeatable)")
    add("--data", default="", help="host:port of the data endpoint (port 0: any); none by default")
    add("--advertise", default="", help="host by which others reach the data endpoint")
    add("--data-keys", default="", help="directory with data.secret")
    add("--object-memory", type=int, default=0, help="most bytes of shared memory for objects")
    add("--spill-dir", default="", help="where objects go that have no room; by default the session's directory")
    add("--spill-max", type=int, default=0, help="most bytes there; by default half of what is free")
    found = parser.parse_args(arguments)
    session_dir = os.path.abspath(found.session_dir)
    spill_dir = os.path.join(session_dir, "objects")
    if found.spill_dir:
        spill_dir = os.path.join(os.path.abspath(found.spill_dir), os.path.basename(session_dir))
    return Settings(
        session_dir=session_dir,
        shm_dir=os.path.abspath(found.shm_dir),
        workers=found.workers,
        async_executors=found.async_executors,
        driver_pid=found.driver_pid,
        listen=tuple(found.listen),
        link=found.link,
        name=found.name,
        cpu=found.cpu,
        gpu=found.gpu,
        memory=found.memory,
        resources=found.resources,
        blocked_max=found.blocked_max,
        preimport=tuple(filter(None, found.preimport.split(","))),
        path=tuple(found.path),
        logs=found.logs,
        drain=found.drain,
        dispatcher_args=tuple(found.dispatcher_arg),
        data=found.data,
        advertise=found.advertise,
        data_keys=found.data_keys,
        object_memory=found.object_memory,
        spill_dir=spill_dir,
        spill_max=found.spill_max,
    )
