"""Where the packages that carry models and pictures lie. They are found, not imported: only their files are wanted."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def folder_of(package: str) -> Path:
    """The folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the examples need {package}: pip install 'rtml[examples]'", name=package)
    return Path(found.submodule_search_locations[0])
