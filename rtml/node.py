"""A node: the process tree of one machine or pod, which works for a dispatcher elsewhere (`rtml worker`).

It is the same tree that `rtml.connect()` starts, supervisor, dispatcher and executors, and its dispatcher has one above
it. This process watches it and answers an orchestrator and Prometheus over HTTP:

    /healthz   the tree is alive                     /readyz   its dispatcher is connected to the one above
    /metrics   the node dispatcher's metrics

On SIGTERM the node drains: what it has not begun goes back, what runs may end, objects that are needed go to other
nodes, then it leaves.
"""

from __future__ import annotations

import http.server
import math
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from rtml.client.embedded import Embedded, data_arguments, node_arguments
from rtml.errors import RtmlError
from rtml.exchange import LABEL_AMOUNT
from rtml.link import AddressError
from rtml.link.addresses import check_peer
from rtml.link.keys import NODE, peer_keys
from rtml.operating import ask
from rtml.settings import NodeSettings, ObjectSettings, plain

#: Seconds that the tree may take to end after its tasks had their time.
_GOODBYE: Final = 5.0
_EXIT_ENDED: Final = 1


def arguments_of(settings: NodeSettings, keys: str, objects: ObjectSettings) -> list[str]:
    """The supervisor's command line for a node.

    Raises:
        AddressError: the dispatcher's address, or the keys, cannot be used.
        ValueError: a number makes no sense.
    """
    if not settings.dispatcher.startswith(("tcp://", "ipc://")):
        raise AddressError(f"--dispatcher {settings.dispatcher!r}: tcp://host:port (or ipc:///path) is expected")
    check_peer(settings.dispatcher)
    cpus, workers = size_of(settings)
    resources = dict(settings.resources)
    resources |= {f"{name}={value}": LABEL_AMOUNT for name, value in settings.labels.items()}
    given: dict[str, object] = {
        "cpu": cpus,
        "gpu": settings.gpu,
        "resources": resources,
        "drain": settings.drain_timeout,
    }
    given |= {"name": name_of(settings), "async_executors": settings.async_executors}
    if settings.memory is not None:
        given["memory"] = settings.memory
    if settings.preimport:
        given["preimport"] = settings.preimport
    arguments = node_arguments(workers, settings.logs, given | objects.for_connect())
    key_dir = os.path.abspath(keys) if keys else ""
    arguments += data_arguments(objects.data, objects.advertise, settings.dispatcher, key_dir)
    for option in (f"--uplink={settings.dispatcher}", f"--node={name_of(settings)}"):
        arguments.append(f"--dispatcher-arg={option}")
    if keys:
        peer_keys(keys, NODE)  # what is wrong with them is said here, not by a process that cannot start
        arguments.append(f"--dispatcher-arg=--keys={os.path.abspath(keys)}")
    return arguments


def size_of(settings: NodeSettings) -> tuple[float, int]:
    """Cpus and executors of a node."""
    cpus = settings.cpu if settings.cpu is not None else float(len(os.sched_getaffinity(0)))
    return cpus, settings.workers if settings.workers is not None else max(1, math.ceil(cpus))


def name_of(settings: NodeSettings) -> str:
    """What the node is called: by default after its machine and this process."""
    return settings.name or f"{socket.gethostname()}-{os.getpid()}"


def run(
    settings: NodeSettings,
    keys: str,
    say: Callable[[str], None],
    objects: ObjectSettings = ObjectSettings(),  # noqa: B008 - frozen
) -> int:
    """Serve until SIGTERM or SIGINT; a second one does not wait for running tasks.

    Args:
        settings: what the node offers, and to whom.
        keys: directory of keys; "" for none.
        say: tells the operator a line.
        objects: where its objects lie, and how others get them.

    Returns:
        The process's exit code.

    Raises:
        AddressError: an address, or the keys, cannot be used.
    """
    tree = Embedded(arguments_of(settings, keys, objects), "unix")
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writable)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = _server(settings, tree)
    tree.start()
    code = 0
    try:
        if server is not None:
            threading.Thread(target=server.serve_forever, name="rtml-metrics", daemon=True).start()
            place = f"http://{settings.metrics_host}:{server.server_address[1]}"
            say(f"metrics: {place}/metrics, health: /healthz and /readyz")
        cpus, workers = size_of(settings)
        executors = f"{plain(cpus)} cpus, {workers} executors and {settings.async_executors} for async functions"
        say(f"node {name_of(settings)} of the dispatcher at {settings.dispatcher}: {executors}")
        if not _wait(tree, readable):
            code = _EXIT_ENDED
            say("the node has ended by itself, see its output above")
        else:
            say("draining: what runs may end; a second signal does not wait")
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
        tree.close(settings.drain_timeout + _GOODBYE, readable)
    return code


def _wait(tree: Embedded, readable: int) -> bool:
    """Until a signal came (True) or the tree ended (False)."""
    pidfd = os.pidfd_open(tree.pid)
    try:
        ready, _, _ = select.select([readable, pidfd], [], [])
        return readable in ready
    finally:
        os.close(pidfd)


def _server(settings: NodeSettings, tree: Embedded) -> http.server.ThreadingHTTPServer | None:
    if not settings.metrics_port:
        return None

    class Handler(http.server.BaseHTTPRequestHandler):
        """Three questions."""

        def do_GET(self) -> None:
            """Answer one."""
            if self.path not in ("/healthz", "/readyz", "/metrics"):
                self._reply(404, "there is /healthz, /readyz and /metrics\n")
                return
            try:
                if self.path == "/metrics":
                    self._reply(200, ask(tree.address, "metrics"))
                    return
                ready = self.path == "/healthz" or _connected(ask(tree.address, "status"))
                self._reply(200 if ready else 503, "ok\n" if ready else "not connected to the dispatcher above\n")
            except (RtmlError, TimeoutError, ValueError) as error:
                self._reply(503, f"{error}\n")

        def _reply(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds."""

    try:
        return http.server.ThreadingHTTPServer((settings.metrics_host, settings.metrics_port), Handler)
    except OSError as error:
        where = f"{settings.metrics_host}, port {settings.metrics_port}"
        raise AddressError(f"cannot listen on {where}: {error.strerror or error}") from None


def _connected(status: str) -> bool:
    answer = msgspec.json.decode(status)
    return any(peer["above"] and peer["connected"] for peer in answer["dispatchers"])
