"""The files of a model repository: what is found, what has changed, and copies that belong to several."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from rtml.serving import modelfiles
from rtml.serving.modelfiles import Copies
from rtml.workers import janitor


def put(root: Path, place: str, content: bytes = b"x") -> Path:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_scan_finds_models_and_versions_and_says_what_is_wrong(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for place in ("a/1/model.onnx", "a/20/model.onnx", "a/latest/model.onnx", "a/01/model.onnx", "b/1/model.onnx"):
        put(one, place)
    put(one, ".hidden/1/model.onnx")
    put(one, "bad name/1/model.onnx")
    put(one, "file-in-the-repository")
    put(two, "b/1/model.onnx")
    (two / "empty").mkdir()
    found, wrong = modelfiles.scan([one, two])
    assert {name: sorted(model.versions) for name, model in found.items()} == {"a": ["1", "20"], "empty": []}
    assert set(wrong) == {"bad name", "b"}
    assert f"it is in {one} and in {two}" in wrong["b"]
    with pytest.raises(OSError, match="none"):
        modelfiles.scan([tmp_path / "none"])


def test_every_change_changes_the_stamp(tmp_path: Path) -> None:
    path = put(tmp_path, "a/1/model.onnx", b"one")
    seen = [modelfiles.look(tmp_path / "a")]
    path.write_bytes(b"longer")
    seen.append(modelfiles.look(tmp_path / "a"))
    put(tmp_path, "new", b"LONGER").rename(path)  # of the same size
    seen.append(modelfiles.look(tmp_path / "a"))
    put(tmp_path, "a/1/model.onnx.data")
    seen.append(modelfiles.look(tmp_path / "a"))
    put(tmp_path, "a/config.json", b"{}")
    seen.append(modelfiles.look(tmp_path / "a"))
    assert len(set(map(repr, seen))) == len(seen)
    assert modelfiles.look(tmp_path / "a") == seen[-1]


def test_a_copy_outlives_its_source_and_is_removed_by_its_last_user(tmp_path: Path) -> None:
    source, cache = tmp_path / "a" / "1", tmp_path / "cache"
    put(source, "model.onnx", b"weights")
    put(source, "more/data", b"data")
    first, second = Copies(cache, 1000), Copies(cache, 1000)
    one, again, other = first.take(source), first.take(source), second.take(source)
    assert one == again == other
    put(source, "model.onnx", b"changed")
    assert (one.path / "model.onnx").read_bytes() == b"weights"
    assert (one.path / "more" / "data").read_bytes() == b"data"
    changed = first.take(source)
    assert changed.digest != one.digest
    first.give_back(one)
    first.give_back(again)
    assert one.path.is_dir(), "another process uses it"
    second.give_back(other)
    assert not one.path.exists()
    first.close()
    second.close()
    assert list(cache.iterdir()) == []


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(put(tmp_path, "1/model.onnx"), "wb") as file:
        file.truncate(1 << 40)
    copies = Copies(None, 1 << 20)
    with pytest.raises(ValueError, match=r"1099511627776 bytes, more than 1048576 \(--model-bytes-max\)"):
        copies.take(tmp_path / "1")
    copies.close()


@pytest.mark.parametrize("place", ["", "/etc/passwd", "../x", "1/../../x", "1//x", "1/.x", "1/x\0"])
def test_uploads_stay_inside(tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match="expected a name like"):
        modelfiles.inside(tmp_path, place)


def test_labels_are_lines_of_a_file_beside(tmp_path: Path) -> None:
    put(tmp_path, "names.txt", b"cat\ndog\n")
    assert modelfiles.labels(tmp_path, "names.txt") == ["cat", "dog"]
    with pytest.raises(ValueError, match="not a path"):
        modelfiles.labels(tmp_path, "../names.txt")
    with pytest.raises(OSError, match="none"):
        modelfiles.labels(tmp_path, "none.txt")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a" / "1").mkdir(parents=True)
    os.mkfifo(tmp_path / "a" / "1" / "model.onnx")
    with pytest.raises(OSError, match=r"model\.onnx is no regular file"):
        Copies(tmp_path / "cache", 1000).take(tmp_path / "a" / "1")
    os.mkfifo(tmp_path / "a" / "names.txt")
    with pytest.raises(OSError, match=r"names\.txt is no regular file"):
        modelfiles.labels(tmp_path / "a", "names.txt")


def test_an_engine_that_starts_elsewhere_leaves_the_copies_of_one_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    put(tmp_path, "a/1/model.onnx")
    copies = Copies(None, 1000)
    copy = copies.take(tmp_path / "a" / "1")
    os.utime(copies.directory, (1, 1))
    assert janitor.sweep(str(tmp_path / "temporary")) == []
    assert (copy.path / "model.onnx").exists()
    (copies.directory / janitor.OWNER_FILE).write_text("999999 1")  # a gateway that was killed
    assert janitor.sweep(str(tmp_path / "temporary")) == [str(copies.directory)]
    copies.close()
