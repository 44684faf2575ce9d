"""Audio streams with speech in them, cut into what a request brings.

There is one real recording (ten seconds of a reading; only the file is taken from its package). Each stream is another
mix of it: from another place on, at another loudness, with pauses of silence and of noise in between.
"""

from __future__ import annotations

import wave
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.packages import folder_of

#: Samples a second.
RATE = 16_000
#: Samples that are new in each request: 32 ms.
CHUNK = 512
#: Samples before them that the model wants to see again.
CONTEXT = 64

Sound = npt.NDArray[np.float32]


def recording() -> Sound:
    """Ten seconds of speech, from -1 to 1.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    with wave.open(str(folder_of("moonshine_onnx") / "assets" / "beckett.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)


def streams(count: int, seconds: float) -> list[Sound]:
    """Different streams, always the same ones."""
    speech = recording()
    found = []
    for number in range(count):
        random = np.random.default_rng(number)
        parts: list[Any] = []
        length = 0
        while length < seconds * RATE:
            begin = int(random.integers(0, len(speech) - RATE))
            spoken = speech[begin : begin + int(random.uniform(1.0, 3.5) * RATE)] * random.uniform(0.3, 1.0)
            pause = random.normal(0.0, random.choice([0.0, 0.002]), int(random.uniform(0.4, 1.5) * RATE))
            parts += [pause, spoken]
            length += len(pause) + len(spoken)
        found.append(np.concatenate(parts)[: int(seconds * RATE)].astype(np.float32))
    return found


def chunks(sound: Sound) -> Sound:
    """What requests bring, one a row: the new samples behind the last ones of the row before."""
    count = -(-len(sound) // CHUNK)
    padded = np.zeros(CONTEXT + count * CHUNK, np.float32)
    padded[CONTEXT : CONTEXT + len(sound)] = sound
    return np.stack([padded[place : place + CONTEXT + CHUNK] for place in range(0, count * CHUNK, CHUNK)])
