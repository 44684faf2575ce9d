"""TLS: one settings object for all listeners, and certificates that change while they listen.

`Certificates.context` is given to a listener once. Every new connection is wrapped by the context that the files made
when they were read last, so after `reload` new connections have the new certificate and client authorities, and those
that are open go on as they are.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any, NamedTuple

_logger = logging.getLogger("rtml.serving")


class TlsFiles(NamedTuple):
    """Where certificates are, as PEM; the same for HTTP and gRPC."""

    #: The server's chain, its own certificate first.
    cert: str
    key: str
    #: Whoever connects must show a certificate that one of these authorities signed; "": nobody is asked.
    client_ca: str = ""

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Their contents, as gRPC's credentials take them; the last is empty without client authorities.

        Raises:
            ValueError: a file cannot be read.
        """
        try:
            ca = Path(self.client_ca).read_bytes() if self.client_ca else b""
            return Path(self.key).read_bytes(), Path(self.cert).read_bytes(), ca
        except OSError as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None

    def make_context(self) -> ssl.SSLContext:
        """What the files say now.

        Raises:
            ValueError: a file cannot be read, is no PEM, or certificate and key do not belong together.
        """
        self.read()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._fill(context)
        return context

    def _fill(self, context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Forward secrecy and authenticated encryption only, for TLS 1.2; TLS 1.3 has nothing else.
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
            if self.client_ca:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.client_ca)
        except (ssl.SSLError, OSError) as error:
            what = ", ".join(path for path in self if path)
            raise ValueError(f"these are no certificate and key of each other, as PEM: {what} ({error})") from None


class _Current(ssl.SSLContext):
    """Wraps each connection by the context that is current then."""

    current: ssl.SSLContext

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self.current.wrap_bio(*args, **kwargs)


class Certificates:
    """The certificates of a gateway.

    Args:
        files: Where they are.

    Raises:
        ValueError: they cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.context = _Current(ssl.PROTOCOL_TLS_SERVER)
        self.context.current = files.make_context()

    def reload(self) -> None:
        """Read the files again; if they cannot be used, what is there stays."""
        try:
            self.context.current = self.files.make_context()
        except ValueError as error:
            _logger.error("certificates stay as they are: %s", error)
        else:
            _logger.info("read the certificate %s", self.files.cert)


def _no_password() -> str:
    """Asked for the password of an encrypted key: without this OpenSSL would ask the terminal."""
    raise ValueError("the key is encrypted; give one that is not, readable by the gateway only")
