"""What the documents promise, as programs and tables: tests run the ones and compare the others with the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: `print(...)  # 285`: what the line must print.
_PRINTED = re.compile(r"^\s*print\(.*\)  # (.+)$", re.M)
#: The first line of a block that is a file rather than a part of the page's program.
_FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def files(page: Path) -> dict[str, str]:
    """The blocks that begin with `# name.py`, by that name."""
    return {found[1]: block for block in blocks(page, "python") if (found := _FILE.match(block))}


def program(page: Path) -> str:
    """All other Python blocks: one program from top to bottom."""
    return "\n".join(block for block in blocks(page, "python") if not _FILE.match(block))


def printed(text: str) -> list[str]:
    """What the comments of a program say that it prints."""
    return _PRINTED.findall(text)


def requests(page: Path) -> list[tuple[list[str], str]]:
    """The `$ curl ...` commands of the page's console blocks, split into words, each with its output."""
    found = []
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.replace("\\\n", "").partition("\n")
            while command.count("'") % 2:  # a quoted text goes on
                line, _, output = output.partition("\n")
                command += "\n" + line
            words = shlex.split(command)
            if words[0] == "curl":
                found.append((words, output.strip()))
    return found


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table whose head begins with `heading`, their cells without formatting."""
    lines = page.read_text().split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def code(cell: str) -> list[str]:
    """What stands in backquotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)
