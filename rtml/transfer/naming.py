"""Objects that are told of by a name before anybody knows where in memory they will be, or how large they are.

Whoever plans several steps at once gives each result a name, and every step the names of what it reads. All steps begin
together; the endpoint where an object is made answers who asks for its name when it is begun.
"""

from __future__ import annotations

import socket
import time
from typing import Final

from rtml.errors import ObjectLost
from rtml.exchange import Await, Awaited, Follow
from rtml.messages import ObjectRef
from rtml.transfer.copies import Copies
from rtml.transfer.pulling import STALLED, Caller

#: Seconds after which one that waits hears that there is nothing yet.
STILL_HERE: Final = STALLED / 3


def found_name(caller: Caller, copies: Copies, asked: Follow, sock: socket.socket) -> ObjectRef:
    """What a name stands for.

    Args:
        caller: connects to the endpoint of the node where it is made.
        copies: of this node.
        asked: names the object and the node, and says how long to wait.
        sock: of whoever asked.

    Raises:
        ObjectLost: nobody makes it in time, or its node cannot be reached.
    """
    where = asked.ref.node
    until = time.monotonic() + asked.seconds
    reason = f"nobody has begun it in {asked.seconds:g} s"
    while time.monotonic() < until and not _is_gone(sock):
        try:
            ref = _ask(caller, copies, where, asked.name)
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"
            break
        if ref is not None:
            return ref
    raise ObjectLost(f"a part of a reduction cannot be had from {where}: {reason}")


def _ask(caller: Caller, copies: Copies, where: str, name: int) -> ObjectRef | None:
    if where == caller.own:
        return copies.named(name, STILL_HERE)
    sock, answer = caller.ask(where, Await(name), Awaited)
    caller.keep(where, sock)
    return answer.ref


def _is_gone(sock: socket.socket) -> bool:
    """Whether whoever asked has hung up."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
