"""What figures were taken on."""

from __future__ import annotations

import datetime
from typing import Any

from benchmarks import run


def facts() -> dict[str, Any]:
    """The machine, its load, the commit, the date."""
    found = run.machine()
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found["commit"] = run.commit()
    return found
