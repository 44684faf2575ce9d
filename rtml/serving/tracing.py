"""W3C trace context: which trace a request belongs to.

A valid `traceparent` names the trace that the request's graph continues (`rtml trace <trace id>` finds it); an invalid
one is ignored, as the standard says, and a new trace begins. The answer carries a `traceparent` of the same trace with
the gateway's own span, and `tracestate` as it came.
"""

from __future__ import annotations

import random
import re
from typing import Final, NamedTuple

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

#: version, trace id, parent id, flags; a version above 00 may have more after the flags.
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_INVALID_VERSION: Final = "ff"
#: What the standard asks to be passed on at least; longer ones are dropped whole, as it allows.
_STATE_MAX: Final = 512
_STATE: Final = re.compile(r"[\x20-\x7e]*")


class Trace(NamedTuple):
    """The trace of one request."""

    #: 32 hexadecimal digits.
    id: str
    #: The gateway's own span: 16 hexadecimal digits.
    span: str
    flags: str = "00"
    #: The caller's span, or "" if the trace begins here.
    parent: str = ""
    state: str = ""

    @property
    def header(self) -> str:
        """As `traceparent`."""
        return f"00-{self.id}-{self.span}-{self.flags}"


def begin() -> Trace:
    """A new trace. Its ids are random, as the standard wants, but no secret."""
    digits = random.randbytes(24).hex()
    return Trace(digits[:32], digits[32:])


def follow(parent: str, state: str = "") -> Trace:
    """The trace that a request's headers name; a new one if `traceparent` is invalid."""
    found = _FORM.fullmatch(parent.strip())
    if found is None:
        return begin()
    version, trace, span, flags, more = found.groups()
    if version == _INVALID_VERSION or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return begin()
    if len(state) > _STATE_MAX or not _STATE.fullmatch(state):
        state = ""
    # Of the flags only `sampled` is known to version 00; others must not be passed on.
    return Trace(trace, _span(), f"{int(flags, 16) & 1:02x}", span, state)


def _span() -> str:
    return random.randbytes(8).hex()
