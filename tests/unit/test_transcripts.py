"""Plays tests/transcripts. After an intended change: `pytest --rewrite`, then read the difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.transcripts import rewritten

TRANSCRIPTS = sorted((Path(__file__).parent.parent / "transcripts").glob("*.txt"))


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) > 30


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path, request: pytest.FixtureRequest) -> None:
    written = path.read_text()
    happened = rewritten(written)
    if request.config.getoption("--rewrite"):
        path.write_text(happened)
    else:
        assert happened.splitlines() == written.splitlines(), f"see `pytest --rewrite {path.name}`"


def test_a_mistyped_command_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no such command: sumbit a"):
        rewritten("sumbit a\n----\n")
    with pytest.raises(TypeError, match="colour") as raised:
        rewritten("engine colour=red\n----\n")
    assert raised.value.__notes__ == ["in the command 'engine colour=red'"]
