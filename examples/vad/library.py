"""What the model's own library makes of a whole recording, to compare with: one offline computation a stream.

The library imports torch, of which this way through it uses nothing but names in annotations and a decorator; where
torch is not installed something stands in for it while the library is imported.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.packages import folder_of
from examples.vad.sound import RATE, Sound

#: The name that the library has here, without what its `__init__` imports.
_ALIAS = "examples_vad_library"


class _StandIn(ModuleType):
    """Enough of torch for annotations, default values and decorators."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: lambda function: function


@cache
def _library() -> Any:
    package = ModuleType(_ALIAS)
    package.__path__ = [str(folder_of("silero_vad"))]
    sys.modules[_ALIAS] = package
    try:
        return importlib.import_module(f"{_ALIAS}.sequence_vad")
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
    sys.modules["torch"] = _StandIn("torch")
    try:
        return importlib.import_module(f"{_ALIAS}.sequence_vad")
    finally:
        del sys.modules["torch"]


@cache
def _model() -> Any:
    return _library().SileroVADSequence(folder_of("silero_vad") / "data" / "silero_vad_16k_sequence.onnx")


def probabilities(sound: Sound) -> npt.NDArray[np.float32]:
    """The probability of speech in each chunk of a whole recording."""
    found: npt.NDArray[np.float32] = _model().audio_forward(sound, RATE)
    return found


def segments(chances: npt.NDArray[np.float32], samples: int) -> list[tuple[float, float]]:
    """Where there is speech, in seconds, by the probabilities of the chunks.

    Args:
        chances: One for each chunk.
        samples: Of the recording.
    """
    find = _library().get_speech_timestamps_from_probs
    found = find([float(chance) for chance in chances], sampling_rate=RATE, audio_length_samples=samples)
    return [(one["start"] / RATE, one["end"] / RATE) for one in found]
