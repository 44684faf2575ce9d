"""The speech detector as an application. A request brings 32 ms of a stream, with the end of the chunk before it.

rtml serve examples.vad.app:app
python -m examples.vad.demo
"""

from __future__ import annotations

import rtml
from examples.packages import folder_of
from examples.vad.sound import RATE
from rtml.serving import App, SequenceSpec

#: Streams that one run can take.
BATCH = 64

app = App("vad", title="Detects speech in audio streams")
app.model(
    "vad",
    # The variant of the model that takes several streams in one run.
    rtml.model(folder_of("silero_vad") / "data" / "silero_vad_op18_ifless.onnx", name="vad"),
    sequence=SequenceSpec({"state": "stateN"}, constants={"sr": RATE}, idle=10.0, batch=BATCH),
)
