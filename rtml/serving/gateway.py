"""The gateway process: apps and an engine behind an HTTP server, until it is told to stop.

Beside the apps' own routes it answers `/v2...` (the server's part of the Open Inference Protocol), `/metrics`, and the
two questions of an orchestrator: `/healthz` (is the process alive) and `/readyz` (should it get requests).

Stopping is a drain: the gateway says that it is not ready, closes its listeners and idle connections, lets the requests
that it has end, and cancels what is left after `drain_timeout` (its clients are told: 503).
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from aiohttp import web

from rtml.errors import RtmlError
from rtml.link import AddressError
from rtml.metrics import GatewayMetrics, Target
from rtml.serving import front, http
from rtml.serving.adminroutes import AdminRoutes, Hands
from rtml.serving.app import App
from rtml.serving.aside import Aside
from rtml.serving.conditions import Conditions
from rtml.serving.docroutes import DocRoutes
from rtml.serving.engine import Engine
from rtml.serving.ensembles import Ensembles, model_name_of, of_endpoint
from rtml.serving.events import StreamRoute
from rtml.serving.front import Door, Front, Load
from rtml.serving.inference import Inference
from rtml.serving.listening import take_no_more
from rtml.serving.member import Peers
from rtml.serving.modelroutes import ModelRoutes
from rtml.serving.protocol import Server
from rtml.serving.registry import ModelVersion, Registry, of_app
from rtml.serving.repository import APP as REPOSITORY_APP
from rtml.serving.repository import ModelRepository, RepositorySettings
from rtml.serving.results import is_stream, served
from rtml.serving.routes import ProgramRoute, Reading
from rtml.serving.sequences import Stateful
from rtml.serving.statefulmodels import of_spec
from rtml.serving.together import EverywhereRepository, Together
from rtml.serving.tritonmetrics import show_aliases

_logger = logging.getLogger("rtml.serving")

#: Seconds between two looks at how late the event loop is.
_LAG_PERIOD: Final = 0.25
#: Seconds that the dispatcher may take for its metrics.
_SCRAPE_TIMEOUT: Final = 2.0
#: Bytes of a body that may wait for its route before the client is told to pause; twice this for a moment.
_READ_AHEAD: Final = 256 * 1024
#: Seconds that the last answers have to be sent in, once they are there.
_GOODBYE: Final = 1.0
#: Seconds that a connection which was accepted at the last moment has for its request.
_LAST_WORDS: Final = 0.1


class Gateway:
    """Serves apps.

    Args:
        engine: Runs what they name.
        apps: What to serve; the names of their models and their paths must differ.
        body_max: Largest request body, decompressed, in bytes.
        read_timeout: Seconds that a client may take to send the head of a request, and again its body.
        drain_timeout: Seconds that running requests get when the gateway stops.
        metrics: Where it counts; its own by default.
        conditions: Limits, tokens, certificates, the access log.
    """

    def __init__(
        self,
        engine: Engine,
        apps: Sequence[App],
        *,
        body_max: int = 64 * 1024 * 1024,
        read_timeout: float = 60.0,
        drain_timeout: float = 30.0,
        metrics: GatewayMetrics | None = None,
        conditions: Conditions = Conditions(),  # noqa: B008  # immutable
    ) -> None:
        self.metrics = metrics or GatewayMetrics()
        self._conditions = conditions
        self.registry = Registry()
        self.inference = Inference(engine)
        self.together = Together(conditions.peers)
        self.ensembles = Ensembles(engine, self.registry, self.together)
        self.features = conditions.features
        self._engine = engine
        self._apps = apps
        self._body_max = body_max
        self._read_timeout = read_timeout
        self._ids = http.RequestIds()
        #: Where gRPC is served, once it is.
        self.grpc_port: int | None = None
        self._drain_timeout = drain_timeout
        self._draining = False
        checks = conditions.checks
        self._door = Door(checks, Load(checks.concurrency_max), self.metrics.refused)
        self._routes: http.Routes | None = None
        self._hands = Hands()
        self._aside = Aside()
        self._runner: web.ServerRunner | None = None
        self._grpc: Any = None
        self._lag_timer: asyncio.TimerHandle | None = None
        self._stop_gc_watch: Any = None
        self._repository: ModelRepository | None = None
        self._stateful: list[Stateful] = []
        self._warming: list[asyncio.Task[None]] = []

    def open_repository(self, settings: RepositorySettings) -> None:
        """Serve the models of a repository, too; before `start`.

        Raises:
            OSError: there is no place for copies of its files.
        """

        def target(name: str) -> Target:
            found = targets.get(name)
            if found is None:
                found = targets[name] = self.metrics.target(REPOSITORY_APP, name)
            return found

        targets: dict[str, Target] = {}
        self._repository = ModelRepository(self._engine, self.registry, target, settings)
        self.registry.repository = self._repository
        if self._conditions.peers is not None:
            self.registry.repository = EverywhereRepository(
                self._repository, self.together, self._repository.check_allowed
            )

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int, grpc_port: int | None = None) -> int:
        """Listen.

        Args:
            host: Address to listen on.
            port: 0 picks a free one.
            grpc_port: The same for gRPC; None: none.

        Returns:
            The port.

        Raises:
            ValueError: two apps serve the same path, a model does not say what it takes, or gRPC is not installed.
            TypeError: a program has a signature that cannot be served.
            AddressError: the address cannot be used.
        """
        self._routes = routes = self.routes()
        loop = asyncio.get_running_loop()

        def make_request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=self._body_max)

        settings = {"request_factory": make_request, "handler_cancellation": True, "access_log": None}
        settings["read_bufsize"] = _READ_AHEAD
        settings["auto_decompress"] = False  # `http.read_body` does, and notices what is cut off
        conditions = self._conditions
        settings["max_line_size"] = settings["max_field_size"] = conditions.header_max
        answer: http.Handler = routes.answer
        if conditions.checks.any:
            answer = Front(answer, self._door, self._ids).answer
        crowd, turned_away = conditions.crowd(self.metrics), partial(front.turned_away, self._door)
        server = Server(answer, self._ids, self._read_timeout, crowd, turned_away, **settings)
        self._server = server
        self._runner = web.ServerRunner(server, shutdown_timeout=_GOODBYE)
        await self._runner.setup()
        if conditions.peers is not None:
            await self._join(conditions.peers)
        listening: dict[str, Any] = {"backlog": 1024, "reuse_address": True, "reuse_port": conditions.peers is not None}
        if conditions.certificates is not None:
            listening["ssl_context"] = conditions.certificates.context
        try:
            await web.TCPSite(self._runner, host, port, **listening).start()
        except OSError as error:
            raise AddressError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
        for stateful in self._stateful:
            stateful.open_soon()
        if grpc_port is not None:
            self.grpc_port = await self._start_grpc(host, grpc_port)
        if self._repository is not None and conditions.peers is None:
            self._repository.start()
        self._warming = [loop.create_task(self._warm(model), name=f"warm {model.name}") for model in self._to_load()]
        self._stop_gc_watch = self.metrics.watch_gc(self.metrics.gc_pause.labels())
        self._watch_loop(loop)
        # What start-up has made stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        bound: int = self._runner.addresses[0][1]
        return bound

    def _to_load(self) -> list[ModelVersion]:
        """The apps' models that have something to load: those of a repository are loaded before they are served."""
        found = [model for model in self.registry.snapshot().values() if model.app != REPOSITORY_APP]
        plain = [model for model in found if model.stateful is None]
        return [model for model in plain if hasattr(getattr(model.function, "function", None), "__rtml_load__")]

    async def _warm(self, model: ModelVersion) -> None:
        """Have executors load an app's model, here and on other nodes, rather than the first requests wait for that."""
        try:
            executors = await self._engine.keep(model.prepared)
        except RtmlError as error:  # requests will be told, too
            _logger.warning("model %s cannot be loaded beforehand: %s", model.name, error)
        else:
            _logger.info("model %s is loaded in %d executors", model.name, executors)

    async def _join(self, peers: Peers) -> None:
        """Have what the other processes have, before clients come: they cannot choose who answers them."""
        if self._repository is not None:
            self._repository.start()
            await self._repository.started.wait()
        await peers.caught_up()

    async def stop(self) -> None:
        """Drain, then close. Idempotent."""
        self._draining = True
        if self._lag_timer is not None:
            self._lag_timer.cancel()
            self._lag_timer = None
        if self._runner is not None:
            runner, self._runner = self._runner, None
            if self._conditions.linger:
                await self._linger(runner)
            for site in runner.sites:
                await site.stop()
            if runner.server is not None:
                runner.server.pre_shutdown()
            async with asyncio.TaskGroup() as group:
                if self._routes is not None:
                    group.create_task(self._routes.drain(self._drain_timeout))
                if self._grpc is not None:
                    group.create_task(self._grpc.stop(self._drain_timeout))
            await runner.cleanup()
        for task in self._warming:
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)
        await self._aside.close()
        self._hands.close()
        self._hands = Hands()
        for stateful in self._stateful:
            await stateful.leave()
        if self._repository is not None:
            await self._repository.stop()
        if self._stop_gc_watch is not None:
            self._stop_gc_watch()
            self._stop_gc_watch = None

    async def _linger(self, runner: web.ServerRunner) -> None:
        """Answer what clients send on connections that they have, or are just opening, before connections end.

        A client cannot know that its idle connection is about to end, and what it sends at that moment is lost. So
        each connection gets one more answer, which says that it is the last one. Connections that are idle all the
        time that this may take end without a word.
        """
        if self._routes is not None:
            self._routes.say_goodbye()
        await self._server.wait_until_empty(self._conditions.linger)
        for site in runner.sites:
            for listener in site._server.sockets if site._server is not None else ():  # type: ignore[attr-defined]
                take_no_more(listener.fileno())
        # Those that are under way arrive now, and those that came last have not said anything yet.
        await asyncio.sleep(min(_LAST_WORDS, self._conditions.linger))
        for site in runner.sites:
            await site.stop()
        await self._server.wait_until_empty(min(_LAST_WORDS, self._conditions.linger))

    async def _start_grpc(self, host: str, port: int) -> int:
        """Listen for gRPC. Raises as `start`."""
        try:
            from rtml.serving.grpc_server import Backend, GrpcServer  # an extra, and 40 MB of memory
        except ImportError as error:
            raise ValueError(f"--grpc-port needs gRPC: pip install 'rtml[grpc]' ({error})") from None
        conditions = self._conditions
        backend = Backend(
            registry=self.registry,
            inference=self.inference,
            ids=self._ids,
            ensembles=self.ensembles,
            admin=self._admin,
            describe=lambda: self.description,
            ready=lambda: self.ready,
            door=self._door,
            certificates=conditions.certificates,
            reuse_port=conditions.peers is not None,
        )
        self._grpc = GrpcServer(backend, self._body_max)
        bound: int = await self._grpc.start(host, port)
        return bound

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        loaded = self._repository is None or self._repository.started.is_set()
        return self._engine.ready and not self._draining and loaded

    # --- routes -------------------------------------------------------------------------------------------------------

    def routes(self) -> http.Routes:
        """Everything that is served. Raises as `start`."""
        routes = http.Routes(self._ids)
        reading = Reading(self._ids, self._read_timeout, self._aside)
        self._add_models()
        self._add_programs(routes, reading)
        self.registry.on_change = self._publish
        self._publish()
        self._hands = Hands.open(self.features, self._body_max, alone=self._conditions.peers is None)
        self.inference.traces = self._hands.traces
        self._admin = admin = AdminRoutes(self.registry, self._hands, self.features, reading, self.together)
        models = ModelRoutes(self.registry, self.inference, self.ensembles, admin, reading, lambda: self._engine.ready)
        models.add_to(routes)  # first: most requests are for these
        admin.add_to(routes)
        routes.add("GET", "/v2", self._describe)
        routes.add("GET", "/v2/health/live", self._health)
        routes.add("GET", "/v2/health/ready", self._readiness)
        routes.add("GET", "/healthz", self._health)
        routes.add("GET", "/readyz", self._readiness)
        routes.add("GET", "/metrics", self._scrape)
        secured = self._conditions.checks.access is not None
        DocRoutes(self._apps, self.registry, _version(), secured=secured).add_to(routes)
        return routes

    def _add_models(self) -> None:
        """Register the apps' models."""
        for app in self._apps:
            for model in app.models.values():
                if model.name in self.registry.names():
                    raise ValueError(f"two apps have a model {model.name!r}")
                target = self.metrics.target(app.name, model.name)
                version = of_app(self._engine, target, app.name, model)
                if model.sequence is not None:
                    self._stateful.append(of_spec(self._engine, version, model.sequence))
                self.registry.add(version)

    def _add_programs(self, routes: http.Routes, reading: Reading) -> None:
        """Serve the apps' graph programs, each under its path and as a model."""
        for app in self._apps:
            for path, endpoint in app.endpoints.items():
                name = model_name_of(endpoint, self.registry.names())
                target = self.metrics.target(app.name, path)
                model = of_endpoint(self._engine, target, app.name, endpoint, name)
                self.registry.add(model)
                prepared = self._engine.prepare(served(endpoint.function))
                kind = StreamRoute if is_stream(endpoint.function) else ProgramRoute
                routes.add("POST", path, kind(self.inference, prepared, endpoint, model, reading))

    @property
    def description(self) -> dict[str, Any]:
        """What the protocol says of the server: name, version, extensions."""
        repository = self.registry.repository is not None
        return {"name": "rtml", "version": _version(), "extensions": self.features.extensions(repository)}

    async def _describe(self, request: web.BaseRequest) -> web.Response:
        return http.json_response(self.description)

    def _publish(self) -> None:
        """Graphs that begin from now on work with the versions that are served now."""
        self._engine.publish(
            lambda: {
                model.name: (model.version, model.prepared)
                for model in self.registry.snapshot().values()
                if model.program is None
            }
        )

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return http.json_response({"live": True, "ready": self.ready})

    async def _readiness(self, request: web.BaseRequest) -> web.Response:
        ready: dict[str, Any] = {"live": True, "ready": self.ready}
        if self._conditions.peers is not None:
            whole = self._conditions.peers.whole
            ready["processes"] = {"serving": whole.serving, "wanted": whole.wanted}
        return http.json_response(ready, 200 if self.ready else 503)

    async def _scrape(self, request: web.BaseRequest) -> web.Response:
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT):
                dispatcher = await self._engine.query("metrics")
        except (RtmlError, TimeoutError) as error:
            # What the gateway itself knows is worth more than an error, all the more when the dispatcher is gone.
            _logger.warning("no metrics of the dispatcher: %r", error)
            dispatcher = ""
        self._look()
        self.metrics.dispatcher_up.labels().value = float(bool(dispatcher))
        text = await self._own_metrics() + dispatcher
        return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _own_metrics(self) -> str:
        """What all processes of the gateway count, in one text."""
        peers = self._conditions.peers
        if peers is None:
            return self.metrics.render()
        try:
            return await peers.metrics()
        except TimeoutError:
            _logger.warning("the supervisor does not answer: the metrics are those of this process alone")
            return self.metrics.render()

    def _look(self) -> None:
        """Bring those metrics up to date that nobody counts when it happens."""
        self.metrics.observe_process()
        if self.metrics.aliases_shown:
            registry = self.registry
            for name in registry.names():
                for number in registry.versions(name):
                    show_aliases(self.metrics, registry.find(name, number))

    def _watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure how late timers run, until `stop`."""
        lag = self.metrics.loop_lag.labels()
        due = loop.time() + _LAG_PERIOD

        def tick() -> None:
            nonlocal due
            lag.observe(max(0.0, loop.time() - due))
            if self._grpc is not None:
                self._grpc.look()
            self._look()
            due = loop.time() + _LAG_PERIOD
            self._lag_timer = loop.call_at(due, tick)

        self._lag_timer = loop.call_at(due, tick)


def _version() -> str:
    try:
        return version("rtml")
    except PackageNotFoundError:  # run from a checkout
        return "0"
