"""The process behind `rtml serve`, `rtml up` and `rtml gateway`: engine, gateway, signals, in this order and back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
import uvloop

from rtml.metrics import GatewayMetrics
from rtml.serving import modelfiles
from rtml.serving.app import App
from rtml.serving.conditions import open_conditions
from rtml.serving.engine import ClientEngine
from rtml.serving.gateway import Gateway
from rtml.serving.member import Member, Start
from rtml.serving.processes import reserved, supervise
from rtml.serving.repository import RepositorySettings
from rtml.settings import HttpSettings
from rtml.workers import janitor

#: The exit code of a process that ended by a signal before it was done.
_INTERRUPTED: Final = 130
#: Descriptors of a gateway process.
FILES_MAX: Final = 1 << 20
#: The exit code when the engine went away: whoever started this should start it again.
_ENGINE_ENDED: Final = 1


def load_apps(places: Sequence[str]) -> list[App]:
    """The apps at "module:attribute" each (":app" may be left out), with the current directory importable.

    Raises:
        ValueError: there is no such module or attribute, it is no `App`, or the module cannot be imported: then the
            message has the traceback, from the module's own code on.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return [_load_app(place) for place in places]


def _load_app(place: str) -> App:
    module_name, _, attribute = place.partition(":")
    if not module_name or module_name.startswith("."):
        raise ValueError(f"{place!r} does not name a module; expected MODULE:APP")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001 - a module may raise anything
        name = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and name and (module_name + ".").startswith(name + "."):
            text = f"there is no module {name!r} for {place!r}; run from the directory it is in"
            raise ValueError(text) from None
        raise ValueError(f"cannot import {module_name!r}\n{_own_traceback(error)}") from None
    for part in (attribute or "app").split("."):
        if not hasattr(found, part):
            raise ValueError(f"there is no {part!r} in {place!r}, where an rtml.serving.App is expected")
        found = getattr(found, part)
    if not isinstance(found, App):
        raise ValueError(f"{place!r} is no rtml.serving.App but {found!r}")
    return found


def _own_traceback(error: Exception) -> str:
    """The traceback without the frames of this file and of the import system."""
    frames = error.__traceback__
    ours = (__file__, importlib.__file__)
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if file not in ours and not file.startswith("<frozen importlib"):
            break
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def run(
    apps: Sequence[str], http: HttpSettings, address: str | None, engine: dict[str, Any], say: Callable[[str], None]
) -> int:
    """Serve until SIGTERM or SIGINT; a second one does not wait for running requests.

    Args:
        apps: What to serve: "module:attribute" each.
        http: Where and how, and with how many processes.
        address: Of a running dispatcher; None starts an engine.
        engine: Further arguments of `rtml.connect`.
        say: Tells the operator a line.

    Returns:
        The process's exit code.

    Raises:
        ValueError: an app cannot be loaded.
        AddressError: the port cannot be used.
    """
    prepare_process()
    if http.processes > 1:
        return uvloop.run(_supervise(apps, http, address, engine, say))
    return uvloop.run(serve(load_apps(apps), http, address, engine, say))


def prepare_process() -> None:
    """What holds for every gateway process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    # Requests leave cycles behind, but few; the default threshold looks at them too often for a tight p99.
    gc.set_threshold(20_000, 20, 100)
    # Each connection takes a descriptor, and each model of a repository: shells allow 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (_files(most), most))


def _files(most: int) -> int:
    """How many descriptors to have, of those that the system allows."""
    return FILES_MAX if most == resource.RLIM_INFINITY else min(most, FILES_MAX)


class _Stop:
    """What ends a process that serves: a signal, or its engine."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.event = asyncio.Event()
        self.code = 0
        #: Told twice: what runs is not waited for.
        self.hurried = False
        self._say = say
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.event.is_set() and self._task is not None:
            self.hurried = True
            self._task.cancel()
        self.event.set()

    def on_engine_end(self) -> None:
        self.code = _ENGINE_ENDED
        self._say("the engine has ended by itself, or nobody answers there any more; stopping")
        self.event.set()


async def serve(
    apps: Sequence[App],
    http: HttpSettings,
    address: str | None,
    settings: dict[str, Any],
    say: Callable[[str], None],
    member: Member | None = None,
) -> int:
    """Serve in this process; `member` if it is one of several, under a supervisor whose end is its own."""
    stop = _Stop(say)
    metrics = GatewayMetrics()
    if member is not None:
        member.share(metrics)
    conditions = open_conditions(http, metrics, member)
    if conditions.reloadable:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, conditions.reload)
    try:
        engine = ClientEngine.open(address, **settings)
    except BaseException:
        conditions.close()
        raise
    engine.on_end(stop.on_engine_end)
    try:
        gateway = Gateway(
            engine, apps, body_max=http.body_max, read_timeout=http.read_timeout, drain_timeout=http.drain_timeout,
            metrics=metrics, conditions=conditions,
        )  # fmt: skip
        if http.model_repository:
            gateway.open_repository(RepositorySettings.of(http))
        try:
            if member is not None:
                member.run_until_gone(stop.event.set)
            port = await gateway.start(http.host, http.port, http.grpc_port or None)
            if member is not None:
                member.serving()
            for line in _places(apps, http, port, engine.address):
                say(line)
            await stop.event.wait()
            if stop.code == _ENGINE_ENDED:
                # Nobody will answer what is running, so there is nothing to wait for.
                engine.close()
            say("stopping: no new requests; a second signal does not wait for those that run")
        finally:
            # The second signal may come before the first one has had any effect.
            if not stop.hurried:
                await gateway.stop()
    except asyncio.CancelledError:
        return _INTERRUPTED
    finally:
        engine.close()
        conditions.close()
    return stop.code


async def _supervise(
    places: Sequence[str],
    http: HttpSettings,
    address: str | None,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> int:
    """Serve in several processes, on an engine of this one's own if there is none at `address`."""
    apps = load_apps(places)
    if http.model_repository:
        RepositorySettings.of(http)  # what is wrong with them is said once
    stop = _Stop(say)
    with contextlib.ExitStack() as held:
        port = held.enter_context(reserved(http.host, http.port))
        if http.grpc_port:
            held.enter_context(reserved(http.host, http.grpc_port))
        engine = None
        more = {"keys": settings.get("keys", "")} if address else {}
        try:
            if address is None:
                engine = ClientEngine.open(None, **settings)
                engine.on_end(stop.on_engine_end)
                address = engine.address
            shared: dict[str, Any] = {"port": port}
            if http.model_repository and not http.model_cache:
                # Copies of models have one place, so that executors open each once and not once for each gateway.
                shared["model_cache"] = held.enter_context(tempfile.TemporaryDirectory(prefix=modelfiles.PREFIX))
                janitor.own(shared["model_cache"])
            start = Start(list(places), msgspec.structs.replace(http, **shared), address, more)
            lines = list(_places(apps, http, port, address))
            return await supervise(start, say, lines, stop.event, lambda: stop.code != 0) or stop.code
        except asyncio.CancelledError:
            return _INTERRUPTED
        finally:
            if engine is not None:
                engine.close()


def _places(apps: Sequence[App], http: HttpSettings, port: int, address: str) -> Iterator[str]:
    """Where everything is."""
    url = f"{'https' if http.tls_cert else 'http'}://{http.host}:{port}"
    for app in apps:
        yield f"{app.name}: {app.title}" if app.title else app.name
        for model in app.models:
            yield f"  POST {url}/v2/models/{model}/infer"
        for path in app.endpoints:
            yield f"  POST {url}{path}"
    yield f"metrics: {url}/metrics, health: {url}/healthz and /readyz, description: {url}/docs"
    if http.grpc_port:
        yield f"gRPC: {http.host}:{http.grpc_port}"
    yield f"engine: {address}"
    yield f"serving on {url}"
