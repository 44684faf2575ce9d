"""Links: how frames travel between a dispatcher (`Hub`) and its peers (`Link`), on Unix sockets or ZeroMQ.

base.py     the interface, packets, what both transports share
unix.py     "unix:/path": one machine, the hot path
zeromq.py   "tcp://host:port", "ipc:///path": between machines; the only file that imports zmq
keys.py     the keys of tcp links, in files
hub.py      the dispatcher's side
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rtml.link.base import AddressError, KeyRefused, Link, LinkClosed
from rtml.link.hub import Hub
from rtml.link.unix import connect_unix

if TYPE_CHECKING:
    from rtml.link.keys import CurveKeys

__all__ = ["AddressError", "Hub", "KeyRefused", "Link", "LinkClosed", "connect"]


def connect(address: str, timeout: float = 10.0, keys: CurveKeys | None = None) -> Link:
    """Connect to the hub at `address`, which need not be there yet.

    After `LinkClosed` from a link, close it and connect again: links do not reconnect by themselves.

    Args:
        address: "unix:/path", "tcp://host:port" or "ipc:///path".
        timeout: seconds to wait for the hub.
        keys: for tcp with encryption: own keys and the hub's public key.

    Raises:
        LinkClosed: nobody answered in time, or access is denied.
        AddressError: the address is malformed.
    """
    if address.startswith("unix:") and len(address) > len("unix:"):
        return connect_unix(address[len("unix:") :], timeout)
    if address.startswith(("tcp://", "ipc://")):
        # Not at the top: most processes never need ZeroMQ, and none may load it before a fork.
        from rtml.link.zeromq import connect_zeromq

        return connect_zeromq(address, timeout, keys)
    raise AddressError(f"{address!r} is no address: unix:/path, tcp://host:port or ipc:///path")
