"""Who may do what: bearer tokens and tenants' quotas, for every protocol that the gateway speaks.

`enter` is asked before a request is read, and raises what its client is told: 401 without a known token, 403 with one
that is not good for this, 429 above the tenant's quota. The `Ticket` that it returns is given back with `leave`.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Final, NamedTuple

from rtml.metrics import Counter
from rtml.serving import tokens
from rtml.serving.http import HttpError
from rtml.serving.quotas import Table
from rtml.serving.tokens import Grant, Quota

_logger = logging.getLogger("rtml.serving")

#: The same for everybody, and asked for by browsers, which bring no token.
_PAGES: Final = frozenset(("/docs",))
_HEALTH: Final = frozenset(("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"))
_CHALLENGE: Final = 'Bearer realm="rtml"'


class Ticket(NamedTuple):
    """A request that was let in."""

    tenant: str = ""
    #: In the table of quotas; -1: the tenant has none.
    row: int = -1
    #: What it may do beyond the path that it was let in for (a gRPC stream names models later); None: everything.
    grant: Grant | None = None


_OPEN: Final = Ticket()


class Access:
    """The tokens of a file, and what their tenants use.

    Args:
        path: Of the token file (`rtml.serving.tokens`).
        table: Where use is counted.
        requests: Counts by tenant and what was decided.
        open_health: Questions about health need no token.
        open_metrics: `/metrics` needs none.

    Raises:
        ValueError: the file is wrong.
    """

    def __init__(
        self, path: str, table: Table, requests: Counter, *, open_health: bool = True, open_metrics: bool = False
    ) -> None:
        self._path = path
        self._table = table
        self._requests = requests
        self._open = (
            _PAGES | (_HEALTH if open_health else frozenset()) | ({"/metrics"} if open_metrics else frozenset())
        )
        self._tokens = tokens.Tokens({}, {})
        self._rows: dict[str, tuple[int, Quota]] = {}
        self._load()

    def reload(self) -> None:
        """Read the file again; if it is wrong, what is known stays."""
        try:
            self._load()
        except ValueError as error:
            _logger.error("tokens stay as they are: %s", error)
        else:
            _logger.info("read %d tokens from %s", len(self._tokens.grants), self._path)

    def _load(self) -> None:
        found = tokens.load(self._path)
        limited = {tenant: quota for tenant, quota in found.quotas.items() if quota != Quota()}
        self._rows = {tenant: (self._table.row(tenant), quota) for tenant, quota in limited.items()}
        self._tokens = found

    def enter(self, authorization: str | None, path: str) -> Ticket:
        """Let a request in.

        Args:
            authorization: The header (or gRPC metadata) of that name.
            path: What is asked for; `/v2/models/<name>/infer` for a model, whatever the protocol.

        Raises:
            HttpError: 401, 403 or 429.
        """
        if path in self._open:
            return _OPEN
        grant = None if authorization is None else self._tokens.find(authorization)
        if grant is None:
            self._count("", "unauthorized")
            message = "a bearer token is needed" if authorization is None else "this is no token that is known here"
            challenge = _CHALLENGE if authorization is None else f'{_CHALLENGE}, error="invalid_token"'
            raise HttpError(401, message, "Unauthorized", {"WWW-Authenticate": challenge})
        if not grant.allows(path):
            self._count(grant.tenant, "forbidden")
            message = f"the token of tenant {grant.tenant!r} is not good for {path[:200]}"
            raise HttpError(403, message, "Forbidden")
        row = self._admit(grant.tenant)
        self._count(grant.tenant, "admitted")
        return Ticket(grant.tenant, row, grant)

    def leave(self, ticket: Ticket) -> None:
        """A request that was let in has ended."""
        if ticket.row >= 0:
            self._table.leave(ticket.row)

    def _admit(self, tenant: str) -> int:
        limited = self._rows.get(tenant)
        if limited is None:
            return -1
        row, quota = limited
        wait = self._table.admit(row, quota, time.monotonic())
        if wait > 0:
            self._count(tenant, "over_quota")
            message = f"tenant {tenant!r} is above its quota ({_describe(quota)}); try again in {wait:.3f} s"
            raise HttpError(429, message, "QuotaExceeded", {"Retry-After": str(math.ceil(wait))})
        return row

    def _count(self, tenant: str, outcome: str) -> None:
        self._requests.labels(tenant, outcome).value += 1


def _describe(quota: Quota) -> str:
    parts = []
    if quota.rate is not None:
        parts.append(f"{quota.rate:g} requests/s")
    if quota.concurrency is not None:
        parts.append(f"{quota.concurrency} at a time")
    return ", ".join(parts)
