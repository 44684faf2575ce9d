"""The gateway's gRPC side: a server on a port of its own, beside the HTTP one, on the same loop.

Only `rtml.serving.gateway` imports this, and only for a gateway that is told to have the port: grpc is an extra. It is
grpc's asyncio server, which runs on uvloop as it does on asyncio's own loop, for less (an empty call with its client
in one process costs 230 us of CPU on uvloop, 400 us on asyncio's).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from rtml.link import AddressError
from rtml.serving import grpc_messages, http
from rtml.serving.adminroutes import AdminRoutes
from rtml.serving.ensembles import Ensembles
from rtml.serving.front import Door
from rtml.serving.grpc_admin import AdminCalls
from rtml.serving.grpc_calls import Calls
from rtml.serving.grpc_health import Health, HealthResponse
from rtml.serving.grpc_infer import InferCalls
from rtml.serving.inference import Inference
from rtml.serving.registry import Registry
from rtml.serving.tls import Certificates

#: Seconds that the last answers have to be sent in, once they are there.
_GOODBYE: Final = 1.0
#: Milliseconds without a sign of life after which a client is asked for one, and then to answer in.
_PING_AFTER: Final = 60_000
_PING_TIMEOUT: Final = 20_000
#: Milliseconds between pings of clients; those that ping more often are cut off.
_PINGED_AFTER: Final = 10_000


class Backend(NamedTuple):
    """What is served."""

    registry: Registry
    inference: Inference
    ids: http.RequestIds
    ensembles: Ensembles
    #: Does what changes the server, as far as it is allowed.
    admin: AdminRoutes
    #: The answer to `GET /v2`.
    describe: Callable[[], Mapping[str, Any]]
    #: Whether requests should be sent here.
    ready: Callable[[], bool]
    door: Door
    certificates: Certificates | None = None
    #: Other processes listen on the same port.
    reuse_port: bool = False


class GrpcServer:
    """`GRPCInferenceService`, `grpc.health.v1` and reflection.

    Args:
        backend: What is served.
        body_max: Largest message, decompressed, in bytes.
    """

    def __init__(self, backend: Backend, body_max: int) -> None:
        self._backend = backend
        self._body_max = body_max
        self._calls = Calls(backend.ids, backend.door)
        self._health = Health(backend.ready)
        self._server: Any = None

    async def start(self, host: str, port: int) -> int:
        """Listen.

        Args:
            host: Address to listen on.
            port: 0 picks a free one.

        Returns:
            The port.

        Raises:
            AddressError: the address cannot be used.
        """
        reuse_port, certificates = self._backend.reuse_port, self._backend.certificates
        _probe(host, port, reuse_port)
        options = {
            "grpc.max_receive_message_length": self._body_max,
            "grpc.max_send_message_length": -1,
            "grpc.so_reuseport": int(reuse_port),
            "grpc.keepalive_time_ms": _PING_AFTER,
            "grpc.keepalive_timeout_ms": _PING_TIMEOUT,
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.http2.min_recv_ping_interval_without_data_ms": _PINGED_AFTER,
        }
        self._server = server = grpc.aio.server(options=list(options.items()))
        server.add_generic_rpc_handlers((self._inference_service(), self._health_service()))
        names = (grpc_messages.INFERENCE, grpc_messages.HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server, grpc_messages.pool)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        bound: int
        if certificates is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _credentials(certificates))
        await server.start()
        return bound

    def look(self) -> None:
        """Tell those who watch the health service what has changed. Called now and then."""
        self._health.look()

    async def stop(self, timeout: float) -> None:
        """Drain, then close: no new calls, and those that run have `timeout` seconds."""
        if self._server is None:
            return
        server, self._server = self._server, None
        self._health.close()
        refusing = asyncio.get_running_loop().create_task(server.stop(timeout + _GOODBYE))
        await self._calls.drain(timeout)
        await server.stop(_GOODBYE)
        await refusing

    def _inference_service(self) -> Any:
        backend = self._backend
        admin = AdminCalls(
            self._calls, backend.registry, backend.ensembles, backend.admin, backend.describe, backend.ready
        )
        infer = InferCalls(self._calls, backend.registry, backend.inference, backend.admin.hands.shared_memory)
        # These two read and write bytes: their messages are taken apart and put together here.
        handlers = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(infer.infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(infer.stream),
        }
        for method in grpc_messages.methods(grpc_messages.INFERENCE):
            if method.name not in handlers:
                handlers[method.name] = admin.rpc(method)
        return grpc.method_handlers_generic_handler(grpc_messages.INFERENCE, handlers)

    def _health_service(self) -> Any:
        request = grpc_messages.message("grpc.health.v1.HealthCheckRequest").FromString
        response = HealthResponse.SerializeToString
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(self._health.check, request, response),
            "Watch": grpc.unary_stream_rpc_method_handler(self._health.watch, request, response),
        }
        return grpc.method_handlers_generic_handler(grpc_messages.HEALTH, handlers)


def _credentials(certificates: Certificates) -> Any:
    """For grpc, which asks at every connection whether there is something new: so `reload` takes effect."""
    seen = certificates.context.current

    def read() -> Any:
        key, chain, ca = certificates.files.read()
        return grpc.ssl_server_certificate_configuration([(key, chain)], ca or None)

    def fetch() -> Any:  # in a thread of grpc's
        nonlocal seen
        current = certificates.context.current
        if current is seen:
            return None
        seen = current
        return read()

    return grpc.dynamic_ssl_server_credentials(read(), fetch, bool(certificates.files.client_ca))


def _probe(host: str, port: int, reuse_port: bool) -> None:
    """Whether the address can be listened on: grpc would not say what is wrong with it, and log instead.

    Raises:
        AddressError: it cannot.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
            probe.bind(address)
    except OSError as error:
        raise AddressError(f"cannot listen for gRPC on {host}, port {port}: {error.strerror or error}") from None
