"""Shows what tasks print, with the task's name, on the submitter's terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def show(lines: Iterable[tuple[int, str, int, str, str]]) -> None:
    """Write lines of a `Logs` message: what tasks wrote to stdout goes to stdout, the rest to stderr."""
    for _, name, pid, stream, text in lines:
        target = sys.stdout if stream == "out" else sys.stderr
        if target is None:
            continue
        prefix = f"({name} pid={pid}) "
        try:
            target.write("".join(f"{prefix}{line}\n" for line in text.splitlines() or [""]))
            target.flush()
        except (OSError, ValueError):
            return  # A closed or broken terminal must not take results down with it.
