"""A bar and what was measured, as one line."""

from __future__ import annotations

PASSED = "passed"
MISSED = "MISSED"


def verdict(good: bool, text: str) -> str:
    """The line; `text` says what was measured and what is asked."""
    return f"{PASSED if good else MISSED} {text}"


def is_verdict(line: str) -> bool:
    """Whether a printed line is one."""
    return line.startswith((PASSED, MISSED))
