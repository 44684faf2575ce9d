"""Regions of shared memory that clients register."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rtml.errors import InvalidInput
from rtml.serving.http import HttpError
from rtml.serving.sharedmemory import REGIONS_MAX, SharedMemory


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SharedMemory]:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    found = SharedMemory(1000, str(tmp_path))
    yield found
    found.close()


def test_tensors_are_read_from_and_written_to_a_region(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("r", "/file", 10, 50)
    assert bytes(memory.read("r", 5, 3)) == bytes([15, 16, 17])
    assert bytes(memory.read("r", 50, 0)) == b""
    memory.write("r", 48, 2, b"\xfe\xff")
    assert (tmp_path / "file").read_bytes()[58:61] == b"\xfe\xff\x3c"
    assert memory.status("r") == memory.status(None) == [{"name": "r", "key": "/file", "offset": 10, "byte_size": 50}]
    memory.unregister("r")
    memory.unregister("r")
    assert memory.status(None) == []
    with pytest.raises(HttpError, match="there is no region 'r'"):
        memory.status("r")


@pytest.mark.parametrize(
    ("key", "offset", "size", "message"),
    [
        ("/none", 0, 1, "cannot open 'none'"),
        ("/../file", 0, 1, "must be the name of a file"),
        ("/a/file", 0, 1, "must be the name of a file"),
        ("..", 0, 1, "must be the name of a file"),
        (".hidden", 0, 1, "must be the name of a file"),
        ("", 0, 1, "must be the name of a file"),
        ("fi\0le", 0, 1, "must be the name of a file"),
        ("x" * 300, 0, 1, "must be the name of a file"),
        (7, 0, 1, "must be the name of a file"),
        ("/link", 0, 1, "cannot open 'link'"),
        ("/fifo", 0, 1, "is no regular file"),
        ("/folder", 0, 1, "cannot open 'folder'"),
        ("/file", 0, 101, "has 100 bytes, fewer than"),
        ("/file", 100, 1, "has 100 bytes, fewer than"),
        ("/file", 2**62, 1, "has 100 bytes, fewer than"),
        ("/file", -1, 1, "offset must be a number of bytes"),
        ("/file", 0, 0, "byte_size must be from 1 to 1000"),
        ("/file", 0, 1001, "byte_size must be from 1 to 1000"),
        ("/file", 0, None, "byte_size must be a number of bytes"),
        ("/file", True, 1, "offset must be a number of bytes"),
    ],
)
def test_what_cannot_be_registered(
    memory: SharedMemory, tmp_path: Path, key: Any, offset: Any, size: Any, message: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HttpError, match=message) as caught:
        memory.register("r", key, offset, size)
    assert caught.value.status == 400
    assert memory.status(None) == []


def test_names_are_taken_once_and_bounded(memory: SharedMemory) -> None:
    memory.register("r", "file", 0, 1)
    for name, message in (("r", "registered already"), ("", "1 to 256 characters"), ("x" * 257, "1 to 256 characters")):
        with pytest.raises(HttpError, match=message):
            memory.register(name, "file", 0, 1)
    for number in range(REGIONS_MAX - 1):
        memory.register(f"r{number}", "file", 0, 1)
    with pytest.raises(HttpError, match="no more are possible"):
        memory.register("one more", "file", 0, 1)


def test_tensors_stay_within_their_region(memory: SharedMemory) -> None:
    memory.register("r", "file", 0, 50)
    with pytest.raises(InvalidInput, match="reach beyond the 50 bytes of region 'r'"):
        memory.read("r", 49, 2)
    with pytest.raises(InvalidInput, match="reach beyond"):
        memory.write("r", 0, 51, b"x")
    with pytest.raises(InvalidInput, match="does not fit into the 2 bytes"):
        memory.write("r", 0, 2, b"xyz")
    with pytest.raises(InvalidInput, match="no shared memory region 'none'"):
        memory.read("none", 0, 1)


def test_a_file_that_its_client_cuts_off_is_an_error(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("r", "file", 0, 100)
    os.truncate(tmp_path / "file", 10)
    with pytest.raises(InvalidInput, match="has become shorter"):
        memory.read("r", 5, 10)
    with pytest.raises(InvalidInput, match="has become shorter"):
        memory.write("r", 5, 10, b"0123456789")
    assert (tmp_path / "file").stat().st_size == 10
