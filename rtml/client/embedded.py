"""`rtml.connect()`: a client of a dispatcher, or of a private process tree that it starts and ends.

The tree is one child, the supervisor (`rtml.workers.supervisor`), which starts the rest and watches this process: when
it ends in whatever way, all processes, sockets, files and shared memory of the tree vanish.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from rtml.client.client import Client
from rtml.client.connecting import Connector
from rtml.client.context import current_client, install, is_executor
from rtml.client.core import ClientCore
from rtml.client.driver import Driver
from rtml.client.threads import ThreadDriver
from rtml.link import Hub
from rtml.link.keys import data_secret, has_data_secret, hub_keys
from rtml.messages import SESSION_MAX
from rtml.store import Store

C = TypeVar("C", bound=Client)

#: Seconds that the process tree may take to appear, and to end before it is killed.
START_TIMEOUT: Final = 30.0
STOP_TIMEOUT: Final = 10.0

_SHARED_MEMORY: Final = "/dev/shm"
_SOCKET: Final = "dispatcher.sock"
#: Settings that are numbers, and whether they are whole ones.
_AMOUNTS: Final = {
    "workers": True, "async_executors": True, "cpu": False, "gpu": False, "memory": True, "blocked_max": True,
    "drain": False, "object_memory": True, "spill_max": True,
}  # fmt: skip


class Embedded:
    """A process tree of this process's own.

    Args:
        arguments: for the supervisor, beside the directories and the driver's pid.
        link: "unix" or "zmq": what this client and the executors use.
    """

    def __init__(self, arguments: list[str], link: str) -> None:
        self._arguments = arguments
        self._link = link
        self._process: subprocess.Popen[bytes] | None = None
        self.session_dir = ""
        self.shm_dir = ""

    @property
    def address(self) -> str:
        """Where the dispatcher listens for the driver."""
        return (
            f"unix:{self.session_dir}/{_SOCKET}" if self._link == "unix" else f"ipc://{self.session_dir}/dispatcher.zmq"
        )

    def start(self) -> None:
        """Start the supervisor; does not wait for it."""
        self.session_dir = tempfile.mkdtemp(prefix="rtml-")
        # The same name, so that a client that is given the socket's path finds the memory too.
        self.shm_dir = shared_memory_of(self.session_dir)
        Store.make(self.shm_dir)
        command = [sys.executable, "-P", "-m", "rtml.workers.supervisor"]
        command += ["--session-dir", self.session_dir, "--shm-dir", self.shm_dir, "--driver-pid", str(os.getpid())]
        command += ["--link", self._link, *self._arguments]
        for path in sys.path:
            command += ["--path", os.path.abspath(path)]
        environment = dict(os.environ)
        # The children must find this very package, however the driver found it.
        package = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        # A process group of its own: Ctrl-C is the driver's business, which then ends the tree. But no session of its
        # own: Linux shares the cpu between sessions first, and priorities count only inside of one.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, process_group=0)

    def close(self, patience: float = STOP_TIMEOUT, impatient: int = -1) -> None:
        """End the tree and wait until it is gone.

        Args:
            patience: seconds until it is killed.
            impatient: a descriptor; readable, it means that running tasks are not to be waited for any more.
        """
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            if impatient >= 0 and _readable_before_end(process.pid, impatient, patience):
                process.terminate()  # the second time, the supervisor does not wait
                patience = STOP_TIMEOUT
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # The supervisor removes both; this is for one that was killed.
        shutil.rmtree(self.session_dir, ignore_errors=True)
        Store.remove(self.shm_dir)

    @property
    def pid(self) -> int:
        """Of the supervisor: when it ends, so has the tree."""
        assert self._process is not None, "started"
        return self._process.pid

    def obstacle(self) -> str:
        """Why the tree is not there, or ""."""
        code = None if self._process is None else self._process.poll()
        return "" if code is None else f"the supervisor ended with code {code}, see its output above"


def _readable_before_end(pid: int, fd: int, patience: float) -> bool:
    """Whether `fd` becomes readable before the process ends, within `patience` seconds."""
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)  # the first signal's
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        ready, _, _ = select.select([fd, pidfd], [], [], patience)
        return fd in ready and pidfd not in ready
    finally:
        os.close(pidfd)


def shared_memory_of(session_dir: str) -> str:
    """The directory of shared memory that belongs to a session directory."""
    return f"{_SHARED_MEMORY}/{Path(session_dir).name}"


def connect(
    address: str | None = None,
    *,
    workers: int | None = None,
    link: Literal["unix", "zmq"] = "unix",
    logs: bool = True,
    timings: bool = False,
    reconnect_timeout: float = 30.0,
    keys: str | os.PathLike[str] = "",
    **settings: Any,
) -> Client:
    """Connect to an engine, by default to a new one of this program's own, and make it the current client.

    Use it as a context manager, or call `shutdown()`; what is left is closed when the program ends.

    Args:
        address: of a running dispatcher ("unix:/path", "tcp://host:port"); None starts dispatcher and workers here.
        workers: sync executors to start; by default one per usable cpu.
        link: what the started processes talk through; "zmq" is what machines use between them.
        logs: show here what tasks print and log.
        timings: fill in `Future.timing`; costs a microsecond a task.
        reconnect_timeout: seconds without a dispatcher after which all futures end with `ConnectionLost`.
        keys: directory of keys (`rtml keys make`) for tcp addresses: to connect with, or that `listen` wants.
        **settings: further settings of the started node: `async_executors`, `cpu`, `gpu`, `memory` (bytes),
            `resources` (labels), `blocked_max`, `preimport` (module names), `listen` (further addresses), `drain`
            (seconds), `policy` (the order of tasks: "fifo", "edf", "slack", "deferred"), `tenant_weights` (turns in a
            row by tenant, like `{"gold": 4}`), and `limits` of the dispatcher by name (`rtml.graph.tables.Limits`),
            like `{"depth_max": 5000}`.

    Raises:
        AddressError: an address, or the keys, cannot be used.
        ConnectionLost: nobody answers.
        ProtocolError: the dispatcher refuses.
        ValueError: a limit has no such name or value.
        TypeError: a setting is unknown, or one of the node's is given together with an address.
    """
    current = current_client()
    if is_executor() and current is not None:
        return current
    client = open_client(
        Client,
        ThreadDriver,
        address,
        workers=workers,
        link=link,
        logs=logs,
        timings=timings,
        reconnect_timeout=reconnect_timeout,
        keys=keys,
        **settings,
    )
    install(client)
    return client


def open_client(  # noqa: PLR0913 - what `connect` takes, and two types
    client_type: Callable[..., C],
    driver_type: Callable[[Connector], Driver],
    address: str | None = None,
    *,
    workers: int | None = None,
    link: Literal["unix", "zmq"] = "unix",
    logs: bool = True,
    timings: bool = False,
    reconnect_timeout: float = 30.0,
    keys: str | os.PathLike[str] = "",
    **settings: Any,
) -> C:
    """Like `connect`, for a client and driver of other types, and without making it the current client.

    Args:
        client_type: `Client` or a subclass.
        driver_type: moves its messages; `AsyncDriver` has to be opened in its running loop.
        address: this and all others are as for `connect`.
        workers: see there.
        link: see there.
        logs: see there.
        timings: see there.
        reconnect_timeout: see there.
        keys: see there.
        **settings: see there.
    """
    embedded: Embedded | None = None
    key_dir = os.path.abspath(keys) if keys else ""
    _check_kinds(address, link)
    session = secrets.randbelow(SESSION_MAX) + 1
    if address is None:
        arguments = node_arguments(workers, logs, settings)
        if key_dir:
            arguments.append(f"--dispatcher-arg=--keys={key_dir}")
        tcp = next((one for one in _several(settings.get("listen", ())) if one.startswith("tcp://")), "")
        arguments += data_arguments(settings.get("data", ""), settings.get("advertise", ""), tcp, key_dir)
        embedded = Embedded(arguments, link)
        if "listen" in settings:
            check_addresses(_several(settings["listen"]), key_dir)
        embedded.start()
        address, store = embedded.address, Store(embedded.shm_dir, session)
    else:
        if settings or workers is not None:
            raise TypeError("workers and the node's settings belong to a new engine, not to one that is running")
        shm_dir = _shm_dir_for(address)
        if shm_dir:
            store = Store(shm_dir, session)
        else:
            from rtml.transfer.remote import RemoteStore

            secret = data_secret(key_dir) if has_data_secret(key_dir) else b""
            store = RemoteStore(session, address, secret)
    connector = Connector(
        address,
        timings=timings,
        connect_timeout=START_TIMEOUT,
        reconnect_timeout=reconnect_timeout,
        obstacle=None if embedded is None else embedded.obstacle,
        keys=key_dir,
    )
    driver = driver_type(connector)
    client = client_type(ClientCore(session), driver, store, show_logs=logs, resource=embedded)
    try:
        client.open()
    except BaseException:
        if embedded is not None:
            embedded.close()
        raise
    return client


def _shm_dir_for(address: str) -> str:
    """The shared memory of the node whose dispatcher has this address, if it is on this machine; else ""."""
    scheme, _, path = address.partition(":")
    if scheme in ("unix", "ipc"):
        found = shared_memory_of(str(Path(path.removeprefix("//")).parent))
        if Path(found).is_dir():
            return found
    return ""


def node_arguments(workers: int | None, logs: bool, settings: Mapping[str, Any]) -> list[str]:
    """The supervisor's command line for what `connect` was asked."""
    known = {
        "async_executors",
        "cpu",
        "gpu",
        "memory",
        "resources",
        "blocked_max",
        "preimport",
        "listen",
        "drain",
        "name",
        "limits",
        "policy",
        "data",
        "advertise",
        "object_memory",
        "spill_dir",
        "spill_max",
        "tenant_weights",
    }
    unknown = set(settings) - known
    if unknown:
        there = sorted({*known, "workers", "link", "logs", "timings", "reconnect_timeout", "keys"})
        raise TypeError(f"connect() has no setting {sorted(unknown)[0]!r}; there are {', '.join(there)}")
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_amounts({"workers": count, **settings})
    arguments = ["--workers", str(count)]
    if not logs:
        arguments.append("--no-logs")
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name == "listen":
            for one in _several(value):
                arguments += [option, one]
        elif name == "limits":
            arguments += [f"--dispatcher-arg={argument}" for argument in limit_arguments(value)]
        elif name in ("policy", "tenant_weights"):
            arguments += [f"--dispatcher-arg={argument}" for argument in order_arguments(**{name: value})]
        elif name in ("data", "advertise"):
            continue  # see `data_arguments`
        elif name == "preimport":
            arguments += [option, ",".join(_several(value))]
        elif name == "resources":
            import json

            arguments += [option, json.dumps(value)]
        else:
            arguments += [option, str(value)]
    return arguments


def data_arguments(data: str, advertise: str, peer: str, keys: str) -> list[str]:
    """The supervisor's arguments for the node's data endpoint.

    Args:
        data: where it shall listen, "host:port"; "" for what suits `peer`.
        advertise: the host that others are told; "" for what it listens on.
        peer: address of a dispatcher elsewhere for which this is a node, or at which this engine listens for others; ""
            if there is none. Only then is there an endpoint by default.
        keys: directory of keys, or "".
    """
    secret = has_data_secret(keys)
    if not data and peer.startswith("tcp://"):
        if secret:
            own = advertise or own_address(peer)
            data, advertise = ("[::]:0" if ":" in own else "0.0.0.0:0"), own
        else:
            data = "127.0.0.1:0"
    if not data:
        return []
    if data.startswith(("0.0.0.0:", "[::]:")) and not advertise:
        advertise = own_address(peer) if peer else socket.gethostname()
    arguments = ["--data", data, "--advertise", advertise]
    return [*arguments, "--data-keys", keys] if secret else arguments


def own_address(towards: str) -> str:
    """The address of this machine that a machine at "tcp://host:port" would see."""
    host, _, port = towards.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, int(port) or 9))
        except (OSError, ValueError):
            return socket.gethostname()
        return str(sock.getsockname()[0])


def _check_kinds(address: object, link: object) -> None:
    if link not in ("unix", "zmq"):
        raise ValueError(f"link is 'unix' or 'zmq', not {link!r}")
    if address is not None and not isinstance(address, str):
        raise TypeError(f"address is text like 'tcp://host:port', not {address!r}")


def _check_amounts(settings: Mapping[str, Any]) -> None:
    """Look at the numbers: with a wrong one the dispatcher would not know this node, and nothing would ever run."""
    amounts = {name: settings[name] for name in _AMOUNTS if name in settings}
    resources = settings.get("resources", {})
    if not isinstance(resources, Mapping) or not all(isinstance(label, str) for label in resources):
        raise ValueError(f"resources are amounts by label, like {{'licence': 1}}, not {resources!r}")
    amounts.update((f"resource {label!r}", amount) for label, amount in resources.items())
    for name, amount in amounts.items():
        whole = _AMOUNTS.get(name, False)
        if isinstance(amount, bool) or not isinstance(amount, int if whole else int | float) or not 0 <= amount <= 1e15:
            raise ValueError(f"{name} must be a {'whole ' if whole else ''}number and not negative, not {amount!r}")


def _several(value: str | Iterable[str]) -> list[str]:
    several = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(one, str) for one in several):
        raise TypeError(f"expected text, or a list of texts, not {value!r}")
    return several


def limit_arguments(limits: Mapping[str, float]) -> list[str]:
    """The dispatcher's arguments for these limits.

    Raises:
        ValueError: there is no such limit, or the value is none for it.
    """
    from rtml.graph.tables import Limits  # most programs have the defaults, and need not know them

    defaults = Limits()._asdict()
    arguments = []
    for name, value in limits.items():
        if name not in defaults:
            raise ValueError(f"there is no limit {name!r}; there are {', '.join(defaults)}")
        whole = isinstance(defaults[name], int)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"limit {name} must be a number and not negative, not {value!r}")
        if whole and (value < 1 or value != int(value)):
            raise ValueError(f"limit {name} must be a whole number and at least 1, not {value!r}")
        arguments.append(f"--{name.replace('_', '-')}={int(value) if whole else float(value)}")
    return arguments


def order_arguments(policy: str = "", tenant_weights: Mapping[str, int] | None = None) -> list[str]:
    """The dispatcher's arguments for the order of tasks.

    Raises:
        ValueError: there is no such policy, or a weight is no whole number of turns.
    """
    from rtml.graph.policy import POLICIES, TURNS_MAX

    if policy and policy not in POLICIES:
        raise ValueError(f"there is no policy {policy!r}; there are {', '.join(POLICIES)}")
    arguments = [f"--policy={policy}"] if policy else []
    for tenant, turns in (tenant_weights or {}).items():
        if isinstance(turns, bool) or not isinstance(turns, int) or not 1 <= turns <= TURNS_MAX:
            raise ValueError(f"tenant {tenant!r} has 1 to {TURNS_MAX} turns in a row, not {turns!r}")
        arguments.append(f"--tenant-weight={tenant}={turns}")
    return arguments


def check_addresses(addresses: Iterable[str], keys: str = "") -> None:
    """Listen at further addresses of a dispatcher for a moment, since it could only die of one that cannot be used.

    Args:
        addresses: where.
        keys: directory of keys for those that are tcp.

    Raises:
        AddressError: malformed, in use, or open to the network without keys; or the keys cannot be used.
    """
    hub = Hub()
    try:
        for address in addresses:
            hub.listen(address, hub_keys(keys) if keys and address.startswith("tcp://") else None)
    finally:
        hub.close()
