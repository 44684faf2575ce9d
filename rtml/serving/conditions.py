"""Under which conditions a gateway serves: what an operator sets, beside what is served."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

from rtml.metrics import GatewayMetrics
from rtml.serving.access import Access
from rtml.serving.accesslog import AccessLog
from rtml.serving.features import Features
from rtml.serving.front import Checks
from rtml.serving.member import Member, Peers
from rtml.serving.protocol import Crowd
from rtml.serving.quotas import Table
from rtml.serving.tls import Certificates, TlsFiles
from rtml.settings import HttpSettings


class Conditions(NamedTuple):
    """Made by `open_conditions`; without arguments there are none."""

    checks: Checks = Checks()
    certificates: Certificates | None = None
    connections_max: float = math.inf
    #: Longest line of a request's head, in bytes.
    header_max: int = 8190
    #: Seconds that clients get for a last request before their idle connections end.
    linger: float = 0.0
    #: The other processes that listen on the same port; None: there are none.
    peers: Peers | None = None
    #: What of the Open Inference Protocol is switched on.
    features: Features = Features()
    #: Ends what was opened.
    close: Callable[[], None] = lambda: None

    def crowd(self, metrics: GatewayMetrics) -> Crowd:
        """How many connections there may be, counted in `metrics`."""
        refused = metrics.refused.labels("TooManyConnections")
        return Crowd(metrics.connections.labels(), refused, self.connections_max)

    @property
    def reloadable(self) -> bool:
        """Whether there are files that `reload` looks at again."""
        return bool(self.certificates or self.checks.access or self.checks.log)

    def reload(self) -> None:
        """Look at all files again: the operator has changed or moved one (SIGHUP)."""
        if self.certificates is not None:
            self.certificates.reload()
        if self.checks.access is not None:
            self.checks.access.reload()
        if self.checks.log is not None:
            self.checks.log.reopen()


def open_conditions(http: HttpSettings, metrics: GatewayMetrics, member: Member | None = None) -> Conditions:
    """What the settings ask for.

    Args:
        http: The settings.
        metrics: Of the gateway that will serve under these conditions; no target may have been made yet.
        member: This process, if it is one of several of a gateway.

    Raises:
        ValueError: a file cannot be used, or settings contradict each other.
    """
    if bool(http.tls_cert) != bool(http.tls_key) or (http.tls_client_ca and not http.tls_cert):
        raise ValueError("--tls-cert and --tls-key belong together, and --tls-client-ca needs both")
    metrics.aliases_shown = http.triton_metrics
    metrics.in_flight_limits = http.queues
    metrics.in_flight_max = math.inf if http.queue_max is None else http.queue_max
    with contextlib.ExitStack() as opened:
        certificates = None
        if http.tls_cert:
            certificates = Certificates(TlsFiles(http.tls_cert, http.tls_key, http.tls_client_ca))
        access = log = None
        if http.tokens:
            table = Table() if member is None else Table(member.quotas, member.number)
            opened.callback(table.close)
            access = Access(
                http.tokens, table, metrics.tenants, open_health=http.open_health, open_metrics=http.open_metrics
            )
        if http.access_log:
            lost = metrics.log_lines_lost
            log = AccessLog(http.access_log, lost.labels("slow"), lost.labels("failed"))
            log.open()
            opened.callback(log.close)
        return Conditions(
            checks=Checks(access, log, http.concurrency_max),
            certificates=certificates,
            connections_max=math.inf if http.connections_max is None else http.connections_max,
            header_max=http.header_max,
            linger=http.linger,
            features=Features(
                shared_memory=http.allow_shared_memory,
                trace=http.allow_trace,
                trace_file=http.trace_file,
                logging=http.allow_logging,
                model_upload=http.allow_model_upload,
            ),
            peers=member,
            close=opened.pop_all().close,
        )
