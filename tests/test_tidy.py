"""Rules about the source that no linter knows. Each message says what to do."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("rtml", "tests", "examples", "benchmarks", "loadtests")

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
PARAMETERS_MAX = 7
BLOB_BYTES_MAX = 1 << 20

#: Words that mark work left open, spelt so that this file does not match itself.
OPEN_ENDS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:ro" + r"ot|home/\w+|wo" + r"rk|Users)/")
INDEX_HOSTS = re.compile(r"https?://|--(?:extra-)?index-url|--find-links|--trusted-host")


@cache
def tracked() -> tuple[Path, ...]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(path for name in listing.split("\0") if name and (path := ROOT / name).is_file())


def sources() -> list[Path]:
    """Python files of the project."""
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in CODE]


@cache
def tree(path: Path) -> ast.Module:
    """The file, parsed."""
    return ast.parse(path.read_text(), str(path))


def named(path: Path) -> str:
    """The path as messages show it."""
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, nested ones too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_there_are_sources() -> None:
    assert ROOT / "rtml" / "messages.py" in sources()


def lines_max(path: Path) -> int:
    """The wire is in one file, whatever is on it."""
    return 900 if path == ROOT / "rtml" / "messages.py" else FILE_LINES_MAX


def test_files_are_short() -> None:
    long = {named(path): n for path in sources() if (n := len(path.read_text().splitlines())) > lines_max(path)}
    assert not long, f"split these files (at most {FILE_LINES_MAX} lines): {long}"


def test_functions_are_short() -> None:
    long = [
        f"{named(path)}:{node.lineno} {node.name} {node.end_lineno - node.lineno + 1}"
        for path in sources()
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert not long, f"split these functions (at most {FUNCTION_LINES_MAX} lines): {long}"


def test_positional_parameters_are_few() -> None:
    many = [
        f"{named(path)}:{node.lineno} {node.name}"
        for path in sources()
        for node in functions(path)
        if len([a for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]) > PARAMETERS_MAX
    ]
    assert not many, f"put the parameters of these into a struct (at most {PARAMETERS_MAX}): {many}"


def test_modules_say_what_they_are() -> None:
    silent = [named(path) for path in sources() if path.read_text().strip() and not ast.get_docstring(tree(path))]
    assert not silent, f"these modules need a docstring: {silent}"


def test_nothing_is_left_open() -> None:
    found = [
        f"{named(path)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OPEN_ENDS.search(line)
    ]
    assert not found, f"finish these, or put them into an issue: {found}"


def test_tests_do_not_mock() -> None:
    found = [
        named(path)
        for path in sources()
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("unittest") for alias in node.names))
    ]
    assert not found, f"use fakes or the real thing instead of unittest.mock: {found}"


def module_name(path: Path) -> str:
    """The dotted name under which Python imports the file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def mentioned(path: Path, modules: set[str]) -> set[str]:
    """Modules of the project that a file imports, or names in a string (what `python -m` starts)."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(re.findall(r"\brtml(?:\.\w+)+", node.value) if node.value.startswith("rtml.") else ())
    return names & modules


def test_every_module_is_reached_by_tests() -> None:
    """From what tests import and start, all of rtml is reached: a module nobody uses is dead."""
    files = {module_name(path): path for path in sources()}
    modules = {name for name in files if name.split(".")[0] == "rtml"}
    reached: set[str] = set()
    todo = set().union(*(mentioned(path, modules) for name, path in files.items() if name.split(".")[0] == "tests"))
    while todo:
        name = todo.pop()
        reached.add(name)
        parents = {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)} & modules
        todo |= (mentioned(files[name], modules) | parents) - reached
    dead = sorted(named(files[name]) for name in modules - reached)
    assert not dead, f"no test imports or starts what uses these modules: {dead}"


def test_no_path_of_a_machine() -> None:
    found = [
        f"{named(path)}:{number}"
        for path in tracked()
        if path.stat().st_size < BLOB_BYTES_MAX
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found, f"these lines name a path of somebody's machine: {found}"


def test_no_big_files() -> None:
    big = {named(path): path.stat().st_size for path in tracked() if path.stat().st_size > BLOB_BYTES_MAX}
    assert not big, f"keep big files out of the repository (at most {BLOB_BYTES_MAX} bytes): {big}"


@pytest.mark.parametrize("lock", sorted(path for path in tracked() if path.suffix == ".lock"), ids=named)
def test_locks_are_exact(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if INDEX_HOSTS.search(line)], "a lock names no host or index"
    assert not [line for line in lines if "==" not in line.split(";")[0]], "a lock has exact versions"


def test_dependencies_are_locked() -> None:
    """Each runtime dependency of pyproject.toml is in the lock."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    wanted = {re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"]}
    assert wanted <= locked, f"run `make lock`: {wanted - locked}"


def test_links_in_documents_lead_somewhere() -> None:
    broken = [
        f"{named(path)}: {target}"
        for path in tracked()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not broken, f"these links lead nowhere: {broken}"


def test_make_targets_are_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    undescribed = [name for name in phony[1].split() if not re.search(rf"^{name}:.*## ", makefile, re.M)]
    assert not undescribed, f"`make` alone does not list: {undescribed}"


def test_benchmark_history_is_readable() -> None:
    """One JSON object a line, each with what is needed to compare it."""
    import json

    history = ROOT / "benchmarks" / "history.jsonl"
    for number, line in enumerate(history.read_text().splitlines() if history.exists() else [], 1):
        missing = {"date", "commit", "machine", "rows"} - json.loads(line).keys()
        assert not missing, f"{history.name}:{number} lacks {missing}"
