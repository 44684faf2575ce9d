"""What the text of a tcp address says."""

from __future__ import annotations

import ipaddress
from typing import Final

from rtml.link.base import AddressError

_PORT_MAX: Final = 65_535


def check_port(address: str) -> None:
    """Refuse ports that ZeroMQ would take modulo 65536.

    Raises:
        AddressError: the port is too large.
    """
    port = address.rpartition(":")[2]
    if address.startswith("tcp://") and port.isdigit() and int(port) > _PORT_MAX:
        raise AddressError(f"{address}: a port is at most {_PORT_MAX}")


def check_peer(address: str) -> None:
    """Refuse what no dispatcher can be connected to at: ZeroMQ would try for ever, or end with "Invalid argument".

    Raises:
        AddressError: a tcp address lacks its host or a port from 1 to 65535.
    """
    if not address.startswith("tcp://"):
        return
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon:
        raise AddressError(f"{address!r} has no port: tcp://host:port is expected, like tcp://10.0.0.1:7411")
    if not host or host == "*" or any(letter.isspace() for letter in address):
        raise AddressError(f"{address!r} names no host: tcp://host:port is expected, like tcp://10.0.0.1:7411")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= _PORT_MAX):
        raise AddressError(f"{address!r} has no port from 1 to {_PORT_MAX}: tcp://host:port is expected")


def is_loopback(address: str) -> bool:
    """Whether a tcp address can be reached from this machine only, as far as its text tells."""
    host = address[len("tcp://") :].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name, an interface or "*".
        return False
