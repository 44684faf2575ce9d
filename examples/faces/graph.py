"""The face finder's graph: a pyramid of pictures in parallel, then as many candidates as it yields, refined twice.

    open_picture -> each level of the pyramid:  level -> pnet -> propose
                 -> merge: N candidates, known only now
                 -> patches of 24 pixels -> rnet (N rows) -> refine: those that pass
                 -> patches of 48 pixels -> onet -> faces

The models run 1 to 3 ms: what an engine adds per task decides whether such a graph is fast. Levels of equal size and
patches share batches across requests.
"""

from __future__ import annotations

import msgspec

import rtml
from examples.faces import steps

#: Smaller faces, in pixels, are not looked for: half the size costs four times as much in the first model.
_FACE_MIN = 40


class Faces(msgspec.Struct):
    """What was found in a picture."""

    faces: list[steps.Face]
    #: Candidates after each of the first two models.
    proposed: int
    refined: int


pnet = rtml.model(steps.MODELS / "pnet.onnx", batch=8, warmup=(1, 154, 154, 3))
rnet = rtml.model(steps.MODELS / "rnet.onnx", batch=128)
onet = rtml.model(steps.MODELS / "onet.onnx", batch=32)

open_picture = rtml.task(steps.open_picture)
level = rtml.task(steps.level)
propose = rtml.task(steps.propose)
merge = rtml.task(steps.merge)
patches = rtml.task(steps.patches)
refine = rtml.task(steps.refine)
faces = rtml.task(steps.faces)


@rtml.task
async def find_faces(image: bytes) -> Faces:
    """Find the faces in a picture.

    Args:
        image: A picture file: PNG, JPEG, or whatever else Pillow opens.
    """
    picture = open_picture.submit(image)
    height, width = (await picture).shape[:2]
    scales = steps.pyramid(height, width, _FACE_MIN)
    if not scales:
        return Faces([], 0, 0)
    levels = [propose.submit(pnet.submit(level.submit(picture, scale)), scale) for scale in scales]
    boxes = await merge.submit(levels)
    if not len(boxes):
        return Faces([], 0, 0)
    better = await refine.submit(boxes, rnet.submit(patches.submit(picture, boxes, 24)))
    if not len(better):
        return Faces([], len(boxes), 0)
    found = await faces.submit(better, onet.submit(patches.submit(picture, better, 48)))
    return Faces(found, len(boxes), len(better))
