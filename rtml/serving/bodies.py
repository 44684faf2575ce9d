"""Compressed request bodies. Pure: bytes in, bytes out, never more of them than allowed, and whole or not at all."""

from __future__ import annotations

import zlib
from typing import Final

#: What `decompress` understands; "identity" is nothing to do.
ENCODINGS: Final = ("gzip", "deflate", "identity")

_GZIP: Final = 16 + zlib.MAX_WBITS


def decompress(encoding: str, body: bytes, limit: int) -> bytes | None:
    """The body that a client has compressed.

    Args:
        encoding: One of `ENCODINGS`, as it stands in `Content-Encoding`.
        body: What came.
        limit: Most bytes of the answer.

    Returns:
        The whole body; None if it would be larger than `limit`.

    Raises:
        ValueError: it is not compressed like that, ends too early, or something follows it.
    """
    if encoding == "identity":
        return body
    parts, size, rest = [], 0, body
    while True:
        inflater = zlib.decompressobj(_GZIP if encoding == "gzip" else _deflate_bits(rest))
        try:
            part = inflater.decompress(rest, limit - size + 1)
        except zlib.error as error:
            raise ValueError(f"the body is no {encoding}: {error}") from None
        parts.append(part)
        size += len(part)
        if size > limit:
            return None
        if not inflater.eof:
            raise ValueError(f"the body is no whole {encoding}: it ends too early")
        rest = inflater.unused_data
        if not rest:
            return b"".join(parts)
        if encoding != "gzip":  # only gzip may have several members
            raise ValueError(f"{len(rest)} bytes follow the {encoding} data of the body")


def _deflate_bits(body: bytes) -> int:
    """Window bits for "deflate": the standard means zlib's format, some clients send it without its head."""
    headed = len(body) > 1 and body[0] & 0xF == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if headed else -zlib.MAX_WBITS
