"""Graph programs that are generators as server-sent events: one event for each item, as soon as it is there.

    data: {"page": 1}

An item that is text in JSON, or any other body, is its own data, line by line. After the first event the status cannot
change any more, so an error is an event of the type "error" with the JSON that would have been the body. A client that
goes away ends the generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from rtml.serving import http
from rtml.serving.bodies import Buffer
from rtml.serving.inference import Progress
from rtml.serving.routes import ProgramRoute

HEADERS: Final = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


def event(data: bytes, kind: str = "") -> bytes:
    """The bytes of one event."""
    head = f"event: {kind}\n".encode() if kind else b""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return head + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


class StreamRoute(ProgramRoute):
    """`POST` of the endpoint of a generator."""

    async def answer(self, request: web.BaseRequest, body: Buffer, progress: Progress) -> web.StreamResponse:
        """The program's items, each encoded by the executor (`rtml.serving.results`)."""
        query: Mapping[str, str] = request.query if "?" in request.raw_path else {}
        args, kwargs = self.call(request.headers.get("Content-Type", ""), body, query)
        items = self._inference.stream_program(self._model, self._prepared, args, kwargs, progress)
        async with contextlib.aclosing(items):
            # What goes wrong before the first event still has a status of its own.
            first = await anext(items, None)
            response = web.StreamResponse(headers={**HEADERS, http.REQUEST_ID: progress.id})
            await response.prepare(request)
            try:
                if first is not None:
                    await response.write(event(first[0]))
                async for item in items:
                    await response.write(event(item[0]))
            except ConnectionError:
                raise  # the client has gone
            except Exception as error:  # noqa: BLE001 - the status has been sent: the error is an event
                http.log_error(request.path, progress.id, error)
                await response.write(event(http.error_json(error), "error"))
        await response.write_eof()
        return response
