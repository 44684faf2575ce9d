"""Clients of the speech detector: one audio stream each, over HTTP or gRPC, as any client would."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from examples.vad.sound import CHUNK, RATE, Sound, chunks


class Heard:
    """What became of one stream."""

    def __init__(self) -> None:
        #: The probability of speech in each chunk.
        self.chances: list[float] = []
        #: Seconds that each answer took, from when its chunk was there.
        self.seconds: list[float] = []

    @property
    def array(self) -> npt.NDArray[np.float32]:
        """The probabilities."""
        return np.array(self.chances, np.float32)


def body_of(chunk: Sound, number: int, *, start: bool, end: bool) -> tuple[bytes, dict[str, str]]:
    """A request with a binary tensor: the body and its headers."""
    data = chunk.tobytes()
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, len(chunk)]}
    head = json.dumps(
        {
            "parameters": {"sequence_id": number, "sequence_start": start, "sequence_end": end},
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
        }
    ).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


async def over_http(session: aiohttp.ClientSession, url: str, sound: Sound, number: int, period: float = 0.0) -> Heard:
    """Send a stream chunk by chunk, the next one when the last one is answered.

    Args:
        session: With a connection for each stream.
        url: Of the gateway.
        sound: The stream.
        number: Its sequence id.
        period: Seconds between two chunks, as a microphone has them; 0: as fast as they are answered.

    Raises:
        AssertionError: an answer is an error.
    """
    heard = Heard()
    rows = chunks(sound)
    begin = time.perf_counter()
    for place, row in enumerate(rows):
        due = begin + place * period if period else time.perf_counter()
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        body, headers = body_of(row, number, start=place == 0, end=place == len(rows) - 1)
        async with session.post(f"{url}/v2/models/vad/infer", data=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == 200, answer
        heard.seconds.append(time.perf_counter() - due)
        heard.chances.append(answer["outputs"][0]["data"][0])
    return heard


async def over_grpc(client: Any, sound: Sound, number: int) -> Heard:
    """Send a stream by one `ModelStreamInfer`, without waiting for answers.

    Args:
        client: A `tritonclient.grpc.aio.InferenceServerClient`.
        sound: The stream.
        number: Its sequence id.

    Raises:
        AssertionError: an answer is an error.
    """
    from tritonclient.grpc import InferInput

    heard = Heard()
    rows = chunks(sound)
    sent: list[float] = []

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for place, row in enumerate(rows):
            tensor = InferInput("input", [1, len(row)], "FP32")
            tensor.set_data_from_numpy(row[None])
            sent.append(time.perf_counter())
            yield {
                "model_name": "vad",
                "inputs": [tensor],
                "sequence_id": number,
                "sequence_start": place == 0,
                "sequence_end": place == len(rows) - 1,
            }

    async for result, error in client.stream_infer(requests()):
        assert error is None, error
        heard.seconds.append(time.perf_counter() - sent[len(heard.chances)])
        heard.chances.append(float(result.as_numpy("output")[0, 0]))
    return heard


def duration(sound: Sound) -> float:
    """Seconds of a stream."""
    return len(sound) / RATE


#: Seconds of sound in a chunk.
PERIOD = CHUNK / RATE
