"""The floor under HTTP in Python: a bare aiohttp server that reads the body and always gives the same answer."""

from __future__ import annotations

import sys

import uvloop
from aiohttp import web

ANSWER = (
    b'{"model_name":"four","model_version":"1","outputs":[{"name":"y","datatype":"FP32","shape":[1,4],'
    b'"parameters":{"binary_data_size":16}}]}'
)
HEADERS = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(ANSWER))}


async def infer(request: web.Request) -> web.Response:
    """Like the answer of the model `four`."""
    await request.read()
    return web.Response(body=ANSWER + bytes(16), headers=HEADERS)


async def serve() -> None:
    """Until it is told to stop."""
    import asyncio

    app = web.Application()
    app.router.add_post("/infer", infer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sys.stdout.write(f"serving on http://127.0.0.1:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        uvloop.run(serve())
    except KeyboardInterrupt:
        sys.exit(0)
