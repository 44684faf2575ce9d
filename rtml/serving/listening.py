"""A listening socket that takes no new connections, but those that are under way.

Closing a listening socket resets the connections that the kernel has completed and nobody has accepted; their clients
may have sent a request already. So before it is closed it drops, by a filter in the kernel, the first packet of every
further connection: those that are under way arrive and are accepted, and new clients, who try again after a second,
find the port closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from typing import Final

_SO_ATTACH_FILTER: Final = 26
#: What the filter sees begins with the TCP header, whose byte 13 has the flags: drop what has SYN without ACK.
_PROGRAM: Final = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # load the byte at 13
        (0x54, 0, 0, 0x12),  # keep SYN and ACK
        (0x15, 0, 1, 0x02),  # if that is SYN alone
        (0x06, 0, 0, 0),  # keep nothing of the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # else all of it
    )
)
_STEP_BYTES: Final = 8


def take_no_more(descriptor: int) -> None:
    """Let no further connection begin at a listening TCP socket. Where the kernel has no filters nothing happens."""
    program = ctypes.create_string_buffer(_PROGRAM, len(_PROGRAM))
    with socket.socket(fileno=os.dup(descriptor)) as listener, contextlib.suppress(OSError):
        address = ctypes.addressof(program)
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_PROGRAM) // _STEP_BYTES, address)
        )
