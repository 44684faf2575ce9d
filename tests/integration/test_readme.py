"""The README's programs run as they stand, and print what their comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

#: `print(...)  # 285`: what the line must print.
PRINTED = re.compile(r"^\s*print\(.*\)  # (.+)$", re.M)


def test_there_are_snippets() -> None:
    assert SNIPPETS


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number: int, tmp_path: Path) -> None:
    program = tmp_path / "snippet.py"
    program.write_text(SNIPPETS[number])
    done = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for expected in PRINTED.findall(SNIPPETS[number]):
        assert expected in done.stdout.splitlines()
