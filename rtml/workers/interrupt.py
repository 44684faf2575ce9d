"""When a signal handler may act: inside user code, and not inside code of ours that user code called."""

from __future__ import annotations

from types import CodeType, FrameType
from typing import Final

#: Code of ours that must not be interrupted although user code called it: it holds locks, or would lose what it has in
#: hand. Not `rtml.client.calls` and `rtml.client.functions`, which only lead to user code.
_CRITICAL: Final = (
    "rtml.client.api",
    "rtml.client.client",
    "rtml.client.context",
    "rtml.client.core",
    "rtml.client.future",
    "rtml.client.gathered",
    "rtml.client.handles",
    "rtml.client.references",
    "rtml.client.results",
    "rtml.client.streams",
    "rtml.client.waiting",
    "rtml.codec",
    "rtml.link",
    "rtml.messages",
    "rtml.segment",
    "rtml.store",
    "rtml.workers",
)


#: Of those, functions that only lead to user code.
_LEADING: Final = frozenset({"run_coroutine"})


def in_our_code(frame: FrameType | None, caller: CodeType) -> bool:
    """Whether between `frame` and the function of ours that called user code there is another one of ours.

    Args:
        frame: what the signal interrupted.
        caller: the code of the function that calls user code.
    """
    while frame is not None and frame.f_code is not caller:
        if frame.f_globals.get("__name__", "").startswith(_CRITICAL) and frame.f_code.co_name not in _LEADING:
            return True
        frame = frame.f_back
    return False
