"""Where the packages that carry models and pictures lie. They are found, not imported: only their files are wanted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_EXAMPLES = "pip install 'rtml[examples]'"
_VAD = "pip install --no-deps silero-vad useful-moonshine-onnx"
_HOW = {"silero_vad": _VAD, "moonshine_onnx": _VAD}


def folder_of(package: str) -> Path:
    """The folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the example needs {package}: {_HOW.get(package, _EXAMPLES)}", name=package)
    return Path(found.submodule_search_locations[0])
