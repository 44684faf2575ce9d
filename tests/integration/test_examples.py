"""The examples on a real engine, and the demo as it is run by hand: on both links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import rtml
from rtml.errors import InvalidInput

pytest.importorskip("rapidocr_onnxruntime")

from examples.faces import graph as faces
from examples.faces.pictures import all_pictures, same_faces
from examples.ocr import graph as ocr
from examples.ocr.pages import all_pages, same_text

ROOT = Path(__file__).resolve().parent.parent.parent
#: Generous: a loaded machine is slow, and a test must not fail for that.
PATIENCE = 120

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["unix", "zmq"])
def engine(request: pytest.FixtureRequest) -> Iterator[rtml.Client]:
    link: Literal["unix", "zmq"] = request.param
    with rtml.connect(workers=2, link=link) as client:
        yield client


@pytest.mark.usefixtures("engine")
def test_pages_are_read_all_at_once() -> None:
    pages = all_pages()
    futures = [ocr.read_page.submit(page.png) for page in pages]
    for page, future in zip(pages, futures, strict=True):
        rows = future.result(PATIENCE).text.split("\n")
        assert len(rows) == len(page.expected), page.name
        assert all(map(same_text, rows, page.expected)), (page.name, rows)


@pytest.mark.usefixtures("engine")
def test_faces_are_found_all_at_once() -> None:
    pictures = all_pictures()
    futures = [faces.find_faces.submit(picture.png) for picture in pictures]
    for picture, future in zip(pictures, futures, strict=True):
        found = future.result(PATIENCE).faces
        assert same_faces([face.box for face in found], picture.expected), (picture.name, found)


@pytest.mark.usefixtures("engine")
def test_the_whole_answer() -> None:
    (table,) = [page for page in all_pages() if page.name == "table"]
    page = ocr.read_page.submit(table.png).result(PATIENCE)
    assert [line.row for line in page.lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert (page.width, page.height) == (620, 360)
    assert not page.upside_down
    assert all(0.8 < line.score <= 1 for line in page.lines)
    assert all(0 <= x <= 620 and 0 <= y <= 360 for line in page.lines for x, y in line.box)


@pytest.mark.usefixtures("engine")
def test_what_is_no_picture_is_the_callers_fault() -> None:
    for program in (ocr.read_page, faces.find_faces):
        with pytest.raises(InvalidInput, match="the body is no picture"):
            program.submit(b"nonsense").result(PATIENCE)


def demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # On a busy machine several clients would be refused: what was seen is slow, and not all could be in time.
        [sys.executable, "-m", "examples.demo", "--clients", "1", "--seconds", "1", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_demo(tmp_path: Path) -> None:
    with demo(tmp_path, "--link", "zmq") as process:
        text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, text
    assert "every text and every face is right" in text
    assert "WRONG" not in text
    assert (tmp_path / "out" / "read-letter.png").stat().st_size > 10_000


def test_demo_keeps_serving_until_interrupted(tmp_path: Path) -> None:
    with demo(tmp_path, "--keep") as process:  # over the other link
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "serving until Ctrl-C" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, "".join(seen) + rest
    assert any("every text and every face is right" in line for line in seen)
    assert any("curl --data-binary @out/letter.png" in line for line in seen)
    assert (tmp_path / "out" / "letter.png").exists()
    assert "Traceback" not in rest


def test_demo_says_why_it_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTML_WORKERS", "many")
    with demo(tmp_path) as process:
        text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, text
    assert "RTML_WORKERS" in text
