"""rapidocr-onnxruntime's own pre- and post-processing (PP-OCRv4), without its models.

The constructors of the library's classes each open an onnxruntime session, which our graph runs elsewhere; these
subclasses take their settings alone and inherit the rest. Importing this module imports OpenCV and onnxruntime: only
the executors that run a step of `examples.ocr.steps` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rapidocr_onnxruntime.ch_ppocr_cls import TextClassifier
from rapidocr_onnxruntime.ch_ppocr_det import TextDetector
from rapidocr_onnxruntime.ch_ppocr_det.utils import DBPostProcess
from rapidocr_onnxruntime.ch_ppocr_rec import TextRecognizer
from rapidocr_onnxruntime.ch_ppocr_rec.utils import CTCLabelDecode
from rapidocr_onnxruntime.main import DEFAULT_CFG_PATH, RapidOCR
from rapidocr_onnxruntime.utils import read_yaml

#: Smaller pages are enlarged until their shorter side has this many pixels. The library's 736 costs twice as much
#: detection and reads none of the sample pages better.
_DETECT_SIDE = 480
#: Boxes are kept from this mean probability on. The library's 0.5 misses whole lines of a photographed page.
_BOX_MIN = 0.3


class PageTool(RapidOCR):  # type: ignore[misc]  # the library is not typed
    """Limits the size of pictures, cuts lines out of them, maps boxes back."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.max_side_len = config["max_side_len"]
        self.min_side_len = config["min_side_len"]
        self.min_height = config["min_height"]
        self.width_height_ratio = config["width_height_ratio"]


class Detector(TextDetector):  # type: ignore[misc]
    """What comes before and after the detection model."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.limit_side_len = _DETECT_SIDE
        self.limit_type = "min"
        self.mean = config["mean"]
        self.std = config["std"]
        self.postprocess_op = DBPostProcess(
            thresh=config["thresh"],
            box_thresh=_BOX_MIN,
            max_candidates=config["max_candidates"],
            unclip_ratio=config["unclip_ratio"],
            use_dilation=config["use_dilation"],
            score_mode=config["score_mode"],
        )


class Classifier(TextClassifier):  # type: ignore[misc]
    """What comes before the direction classifier."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.cls_image_shape = config["cls_image_shape"]


class Recogniser(TextRecognizer):  # type: ignore[misc]
    """What comes before and after the recognition model."""

    def __init__(self, config: dict[str, Any], characters: list[str]) -> None:
        self.rec_image_shape = config["rec_img_shape"]
        self.postprocess_op = CTCLabelDecode(character=characters)


class Library:
    """One of each, with the settings that the library ships."""

    def __init__(self, characters: list[str], config: Path = DEFAULT_CFG_PATH) -> None:
        settings = read_yaml(config)
        self.page = PageTool(settings["Global"])
        self.detector = Detector(settings["Det"])
        self.classifier = Classifier(settings["Cls"])
        self.recogniser = Recogniser(settings["Rec"], characters)
