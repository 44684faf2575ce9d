"""The speech detector: sixteen streams at once are heard as each would be alone, and as its library hears them."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest

pytest.importorskip("onnxruntime")
if not all(importlib.util.find_spec(package) for package in ("silero_vad", "moonshine_onnx")):
    pytest.skip("pip install --no-deps silero-vad useful-moonshine-onnx", allow_module_level=True)

import onnxruntime

from examples.packages import folder_of
from examples.vad import library
from examples.vad.app import app
from examples.vad.client import over_grpc, over_http
from examples.vad.sound import RATE, Sound, chunks, streams
from rtml.serving.engine import ClientEngine
from rtml.serving.gateway import Gateway

COUNT = 16
SECONDS = 3.0
PATIENCE = 120
TOLERANCE = 1e-5

pytestmark = pytest.mark.slow


def alone(sound: Sound) -> list[float]:
    """The stream by the plain onnxruntime, one step after the other."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    file = folder_of("silero_vad") / "data" / "silero_vad_op18_ifless.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    state: Any = np.zeros((2, 1, 128), np.float32)
    found = []
    for row in chunks(sound):
        chance, state = session.run(None, {"input": row[None], "sr": np.array(RATE), "state": state})
        found.append(float(chance[0, 0]))
    return found


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Gateway, str]]:
    engine = ClientEngine.open(None, workers=1)
    gateway = Gateway(engine, [app], drain_timeout=1)
    try:
        port = await gateway.start("127.0.0.1", 0, 0)
        yield gateway, f"http://127.0.0.1:{port}"
    finally:
        await gateway.stop()
        engine.close()


def test_many_streams_are_heard_as_each_would_be_alone() -> None:
    sounds = streams(COUNT, SECONDS)
    expected = [alone(sound) for sound in sounds]

    async def over_both() -> list[list[float]]:
        async with asyncio.timeout(PATIENCE), serving() as (gateway, url):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                heard = await asyncio.gather(
                    *(over_http(session, url, sound, number + 1) for number, sound in enumerate(sounds))
                )
                async with session.get(f"{url}/v2/models/vad/stats") as response:
                    (statistics,) = (await response.json())["model_stats"]
            assert max(row["batch_size"] for row in statistics["batch_stats"]) > 1
            found = [one.chances for one in heard]
            if importlib.util.find_spec("tritonclient"):
                from tritonclient.grpc.aio import InferenceServerClient

                async with InferenceServerClient(f"127.0.0.1:{gateway.grpc_port}") as client:
                    heard = await asyncio.gather(
                        *(over_grpc(client, sound, number + 1) for number, sound in enumerate(sounds[:4]))
                    )
                found += [one.chances for one in heard]
            return found

    found = asyncio.run(over_both())
    assert len({tuple(np.round(chances, 3)) for chances in expected}) == COUNT  # the streams differ
    for one, other in zip(found, expected + expected, strict=False):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
    for sound, chances in zip(sounds, found, strict=False):
        np.testing.assert_allclose(chances, library.probabilities(sound), atol=TOLERANCE)
        segments = library.segments(np.array(chances, np.float32), len(sound))
        assert segments == library.segments(library.probabilities(sound), len(sound))
    assert sum(chance > 0.5 for chances in expected for chance in chances) > 100  # and there is speech in them
