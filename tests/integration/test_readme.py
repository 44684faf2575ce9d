"""The programs in README.md and docs/ run as they stand, and print what their comments say."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import docs
from tests.integration.test_serve import Server
from tests.unit import tiny_onnx

#: Requests that a page shows, answered by the app that it shows.
SERVED = [page for page in docs.PAGES if docs.requests(page)]


def write_files(page: Path, directory: Path) -> None:
    """What the page's programs find beside them."""
    for name, text in docs.files(page).items():
        (directory / name).write_text(text)
    both = [tiny_onnx.tensor(name, tiny_onnx.FLOAT, ("N", 3)) for name in ("x", "y")]
    doubled = tiny_onnx.model([tiny_onnx.node("Add", ["x", "x"], ["y"])], inputs=both[:1], outputs=both[1:])
    (directory / "classifier.onnx").write_bytes(doubled)
    (directory / "sum.onnx").write_bytes(tiny_onnx.accumulator())


def test_every_page_is_found() -> None:
    assert {page.name for page in docs.PAGES} >= {"README.md", "guide.md", "models.md", "serving.md", "operations.md"}
    assert {page.name for page in SERVED} >= {"serving.md"}


@pytest.mark.parametrize("page", [page for page in docs.PAGES if docs.program(page)], ids=lambda page: page.stem)
def test_program_runs(page: Path, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    program = tmp_path / "program.py"
    program.write_text(re.sub(r"(?<=127\.0\.0\.1:)\d+", str(free_port()), docs.program(page)))
    environment = {**os.environ, "PYTHONPATH": str(docs.ROOT)}
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = iter(done.stdout.splitlines())
    for expected in docs.printed(docs.program(page)):
        assert expected in lines, f"{expected!r} is not printed, or too early:\n{done.stdout}"


@pytest.mark.parametrize("page", SERVED, ids=lambda page: page.stem)
def test_requests_are_answered_as_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(page, tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(docs.ROOT))
    monkeypatch.chdir(tmp_path)
    (module,) = (name.removesuffix(".py") for name in docs.files(page))
    server = Server("serve", f"{module}:app")
    try:
        for words, expected in docs.requests(page):
            answer = curl(server, words)
            # "..." stands for any text, as in doctest.
            pattern = ".*".join(re.escape(part) for part in expected.split("..."))
            assert re.fullmatch(pattern, answer.strip()), f"{words}: {answer}"
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def curl(server: Server, words: list[str]) -> str:
    """What `curl` prints for these arguments (not every machine has it)."""
    method, path = "GET", ""
    body: bytes | None = None
    headers: dict[str, str] = {}
    given = iter(words[1:])
    for word in given:
        if word == "-X":
            method = next(given)
        elif word in ("-d", "--data-binary"):
            data = next(given)
            method = "POST"
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
            body = Path(data[1:]).read_bytes() if data.startswith("@") else data.encode()
        elif word == "-H":
            name, _, value = next(given).partition(": ")
            headers[name] = value
        else:
            found = re.fullmatch(r"(?:http://)?localhost:8000(/.*)", word)
            assert found, f"{word} is not understood"
            path = found[1]
    content = server.request(method, path, body, **headers)[1]
    if isinstance(content, bytes):
        return content.decode()
    return json.dumps(content, separators=(",", ":"))
