"""Compressed bodies. Pure: bytes in, bytes out.

Of requests: never more bytes than allowed, and whole or not at all. Of answers: only what becomes smaller by it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

Buffer = bytes | bytearray | memoryview

#: What `decompress` understands; "identity" is nothing to do.
ENCODINGS: Final = ("gzip", "deflate", "identity")

_GZIP: Final = 16 + zlib.MAX_WBITS
#: Answers up to this size fit into a packet or two whatever is done to them.
COMPRESS_MIN: Final = 1024
#: Of larger answers, this much is tried first: numbers that look random are sent as they are.
_SAMPLE: Final = 16 * 1024
_WORTHWHILE: Final = 0.9
#: How much is given to zlib at a time: it copies what it does not need of that, at the end of each member.
_PIECE: Final = 16 * 1024
#: A member of gzip, of which a body may have several, holds at least so many bytes on average.
_MEMBER_MIN: Final = 4096
#: Level 1 takes a quarter of the default's time for a tenth more bytes.
_LEVEL: Final = 1


def decompress(encoding: str, body: Buffer, limit: int) -> Buffer | None:
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
    view = memoryview(body)
    parts: list[bytes] = []
    size = position = members = 0
    members_max = 16 + limit // _MEMBER_MIN
    while True:
        inflater = zlib.decompressobj(_GZIP if encoding == "gzip" else _deflate_bits(view))
        while not inflater.eof:
            if position == len(view):
                raise ValueError(f"the body is no whole {encoding}: it ends too early")
            piece = view[position : position + _PIECE]
            try:
                part = inflater.decompress(piece, limit - size + 1)
            except zlib.error as error:
                raise ValueError(f"the body is no {encoding}: {error}") from None
            position += len(piece) - len(inflater.unused_data)
            parts.append(part)
            size += len(part)
            if size > limit:
                return None
        if position == len(view):
            return b"".join(parts)
        if encoding != "gzip":  # only gzip may have several members
            raise ValueError(f"{len(view) - position} bytes follow the {encoding} data of the body")
        members += 1
        if members > members_max:
            raise ValueError(f"the body has more than {members_max} members of gzip")


def accepted(header: str) -> str:
    """How an answer may be compressed: "gzip" or "deflate", or "" for not at all.

    Args:
        header: `Accept-Encoding` as it came.
    """
    best, chosen = 0.0, ""
    for part in header.lower().split(","):
        name, _, rest = part.partition(";")
        name = name.strip()
        if name not in ("gzip", "deflate", "*"):
            continue
        _, _, text = rest.partition("q=")
        try:
            quality = float(text) if text.strip() else 1.0
        except ValueError:
            continue
        if quality > best:
            best, chosen = quality, "gzip" if name == "*" else name
    return chosen


def compress(encoding: str, parts: Sequence[Buffer]) -> bytes | None:
    """The body that `parts` are together, compressed; None if that is hardly worth it.

    Args:
        encoding: "gzip" or "deflate".
        parts: Not empty.
    """
    size = sum(len(part) for part in parts)
    if size > 2 * _SAMPLE:
        sample = memoryview(max(parts, key=len))[:_SAMPLE]
        if len(zlib.compress(sample, _LEVEL)) > _WORTHWHILE * len(sample):
            return None
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP if encoding == "gzip" else zlib.MAX_WBITS)
    found = [deflater.compress(part) for part in parts]
    found.append(deflater.flush())
    whole = b"".join(found)
    return whole if len(whole) < size else None


def _deflate_bits(body: Buffer) -> int:
    """Window bits for "deflate": the standard means zlib's format, some clients send it without its head."""
    headed = len(body) > 1 and body[0] & 0xF == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if headed else -zlib.MAX_WBITS
