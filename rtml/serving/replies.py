"""Answers as HTTP sends them: large ones in the parts that they come in, compressed if the client wants it.

A tensor in shared memory is written to the socket from there: nothing joins head and tensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from rtml.serving import bodies
from rtml.serving.bodies import Buffer

#: Joining costs less than a second system call up to this size.
_JOIN_MAX: Final = 64 * 1024
#: Compressing this many bytes holds up the others for a fifth of a millisecond.
_COMPRESS_HERE: Final = 16 * 1024


class Parts(Payload):
    """A body in parts.

    Args:
        parts: In this order.
        size: Of all of them, in bytes.
        content_type: The body's media type.
    """

    _autoclose = True

    def __init__(self, parts: Sequence[Buffer], size: int, content_type: str) -> None:
        super().__init__(parts, content_type=content_type)
        self._size = size

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The body as text."""
        return b"".join(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send it."""
        for part in self._value:
            await writer.write(part)


async def respond(
    request: web.BaseRequest, parts: Sequence[Buffer], content_type: str, headers: dict[str, str] | None = None
) -> web.Response:
    """The answer whose body `parts` are together.

    Args:
        request: Says whether it may be compressed (`Accept-Encoding`).
        parts: Not empty.
        content_type: Of the body.
        headers: Further ones.
    """
    size = sum(len(part) for part in parts) if len(parts) > 1 else len(parts[0])
    found: dict[str, str] = {"Content-Type": content_type, **(headers or {})}
    if size >= bodies.COMPRESS_MIN and (wanted := request.headers.get("Accept-Encoding")):
        found["Vary"] = "Accept-Encoding"
        encoding = bodies.accepted(wanted)
        if encoding and (packed := await _compressed(encoding, parts, size)) is not None:
            found["Content-Encoding"] = encoding
            return web.Response(body=packed, headers=found)
    body: Any
    if len(parts) == 1 and isinstance(parts[0], bytes):
        body = parts[0]
    elif size <= _JOIN_MAX:
        body = b"".join(parts)
    else:
        body = Parts(parts, size, content_type)
    return web.Response(body=body, headers=found)


async def _compressed(encoding: str, parts: Sequence[Buffer], size: int) -> bytes | None:
    if size > _COMPRESS_HERE:
        return await asyncio.to_thread(bodies.compress, encoding, parts)
    return bodies.compress(encoding, parts)
