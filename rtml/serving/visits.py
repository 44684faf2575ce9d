"""What a protocol knows of a request before a route sees it: on whose behalf it is made, and in which trace.

It lies in a context variable, so that routes, models and the engine's client need not hand it on: each request is
handled in a task, that is in a context, of its own. Most requests have none.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from rtml.serving.tracing import Trace


class Visit:
    """One request, as it came in.

    Args:
        trace: That it belongs to; None: it named none.
        tenant: Whose token it brought; "" without tokens.
    """

    __slots__ = ("progress", "tenant", "trace")

    def __init__(self, trace: Trace | None = None, tenant: str = "") -> None:
        self.trace = trace
        self.tenant = tenant
        #: `rtml.serving.inference.Progress`, once a route has made it.
        self.progress: Any = None


#: Of the request that is being handled.
VISIT: ContextVar[Visit | None] = ContextVar("rtml-visit", default=None)
