"""A model repository's files: what is there, in which state, and private copies of what is loaded.

    <repository>/<model>/[config.pbtxt | config.json]
    <repository>/<model>/<version>/model.onnx

Everything here blocks, and is called in threads.

What executors open is a copy: whoever overwrites or removes a file that is served changes nothing for the graphs that
work with it, nor for an executor that has to open it again. Copies are named after their content, so that several
gateways that share a directory of copies share the models in the executors, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

from rtml.workers import janitor

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
MODEL_FILE: Final = "model.onnx"
#: Of directories of copies that nobody gave: engines that start remove those whose owner is dead.
PREFIX: Final = f"{janitor.PREFIX}models-"
_CONFIGS: Final[dict[str, Literal["pbtxt", "json"]]] = {"config.pbtxt": "pbtxt", "config.json": "json"}
#: Of a version's directory: no model has that many, but a wrong directory may.
_FILES_MAX: Final = 10_000
_BLOCK: Final = 1 << 20

#: (relative path, bytes, time of change in ns, inode) of each file: differs as soon as something was written.
Stamp = tuple[tuple[str, int, int, int], ...]


class Found(NamedTuple):
    """A model's directory."""

    path: Path
    #: Of its own files: configuration, labels.
    stamp: Stamp
    versions: dict[str, Stamp]


def scan(directories: Sequence[Path]) -> tuple[dict[str, Found], dict[str, str]]:
    """The models of repositories by name, and what is wrong with others.

    Raises:
        OSError: a repository cannot be read.
    """
    found: dict[str, Found] = {}
    wrong: dict[str, str] = {}
    for directory in directories:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            if not _NAME.fullmatch(entry.name):
                wrong[entry.name] = "a model's name has letters, digits, '.', '_' and '-' only"
            elif entry.name in found:
                wrong[entry.name] = f"it is in {found[entry.name].path.parent} and in {directory}"
            else:
                try:
                    found[entry.name] = look(Path(entry.path))
                except FileNotFoundError:
                    continue  # removed meanwhile
                except OSError as error:
                    wrong[entry.name] = f"its directory cannot be read: {error.strerror or error}"
    return {name: model for name, model in found.items() if name not in wrong}, wrong


def look(path: Path) -> Found:
    """What is in a model's directory."""
    own = []
    versions = {}
    for entry in os.scandir(path):
        if entry.is_dir():
            if _VERSION.fullmatch(entry.name):
                versions[entry.name] = _stamp(Path(entry.path))
        elif entry.is_file():
            own.append(_file_stamp(entry.name, entry.stat()))
    return Found(path, tuple(sorted(own)), versions)


def _stamp(directory: Path) -> Stamp:
    found = []
    for parent, folders, files in os.walk(directory):
        folders.sort()
        for name in files:
            file = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found.append(_file_stamp(os.path.relpath(file, directory), os.stat(file)))
            if len(found) > _FILES_MAX:
                raise OSError(f"{directory} has more than {_FILES_MAX} files")
    return tuple(sorted(found))


def _file_stamp(name: str, found: os.stat_result) -> tuple[str, int, int, int]:
    return name, found.st_size, found.st_mtime_ns, found.st_ino


def config_text(path: Path) -> tuple[str, Literal["pbtxt", "json"]] | None:
    """The text of a model's configuration, and its form; None if it has none.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    for name, form in _CONFIGS.items():
        if (path / name).is_file():
            return (path / name).read_text("utf-8"), form
    return None


def valid_name(name: str) -> bool:
    """Whether a directory of this name is a model's."""
    return _NAME.fullmatch(name) is not None


def inside(root: Path, place: str) -> Path:
    """The path of a file of an upload, like "1/model.onnx".

    Raises:
        ValueError: it would lie elsewhere.
    """
    parts = place.split("/")
    if not all(parts) or any(part.startswith(".") or "\0" in part for part in parts):
        raise ValueError(f"file {place!r}: expected a name like '1/model.onnx'")
    return root.joinpath(*parts)


def labels(directory: Path, name: str) -> list[str]:
    """The names of classes, one a line, of a file in the model's directory.

    Raises:
        OSError: it cannot be read.
        ValueError: it lies elsewhere, or is no text.
    """
    if "/" in name or name.startswith("."):
        raise ValueError(f"label_filename {name!r} is a file's name, not a path")
    with _opened(directory / name) as file:
        return file.read().decode().splitlines()


class Copy(NamedTuple):
    """The private copy of a version's directory."""

    path: Path
    digest: str


class Copies:
    """The copies that this process uses.

    Args:
        directory: Where they lie; a directory of our own by default. Executors must be able to read it.
        bytes_max: Of the files of one version.
    """

    def __init__(self, directory: Path | None, bytes_max: int) -> None:
        self._own = directory is None
        self._directory = Path(tempfile.mkdtemp(prefix=PREFIX)) if directory is None else directory
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._own:
            janitor.own(str(self._directory))
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        #: How often each is used, and the lock that tells other processes.
        self._used: dict[str, tuple[int, int]] = {}

    def take(self, source: Path) -> Copy:
        """A copy of a directory, to be given back.

        Raises:
            OSError: it cannot be read or written, or changed meanwhile.
            ValueError: it is too large.
        """
        before = _stamp(source)
        size = sum(entry[1] for entry in before)
        if size > self._bytes_max:
            raise ValueError(f"its files have {size} bytes, more than {self._bytes_max} (--model-bytes-max)")
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=self._directory))
        try:
            digest = hashlib.blake2b(digest_size=16)
            for name, *_ in before:
                _copy(source / name, staged / name, digest)
            if _stamp(source) != before:
                raise OSError(f"{source} changed while it was read")
            os.chmod(staged, 0o755)
            return self._enter(staged, digest.hexdigest())
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _enter(self, staged: Path, digest: str) -> Copy:
        path = self._directory / digest
        with self._lock:
            count, lock = self._used.get(digest, (0, -1))
            if not count:
                lock = _locked(self._directory / f"{digest}.lock")
            self._used[digest] = (count + 1, lock)
            if not path.exists():
                with contextlib.suppress(OSError):  # another process was quicker
                    staged.rename(path)
        return Copy(path, digest)

    @property
    def directory(self) -> Path:
        """Where they lie."""
        return self._directory

    def give_back(self, copy: Copy) -> None:
        """It is not used for this any more; removed when nobody uses it."""
        with self._lock:
            count, lock = self._used.get(copy.digest, (0, -1))
            if count > 1:
                self._used[copy.digest] = (count - 1, lock)
                return
            self._used.pop(copy.digest, None)
            if lock < 0:
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # another process uses it, and will remove it
            else:
                shutil.rmtree(copy.path, ignore_errors=True)
                (self._directory / f"{copy.digest}.lock").unlink(missing_ok=True)
            os.close(lock)

    def close(self) -> None:
        """Give all back."""
        for digest in list(self._used):
            with self._lock:
                used = self._used.get(digest)
                if used is None:
                    continue  # given back a moment ago, by the thread of a load that was cancelled
                self._used[digest] = (1, used[1])
            self.give_back(Copy(self._directory / digest, digest))
        if self._own:
            shutil.rmtree(self._directory, ignore_errors=True)


def _locked(path: Path) -> int:
    """A file that is locked for sharing, and was not removed by its last user meanwhile."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)


def _copy(source: Path, target: Path, digest: hashlib.blake2b) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    relative = target.name.encode()
    digest.update(len(relative).to_bytes(8, "little") + relative)
    with _opened(source) as read, open(target, "wb") as write:
        while block := read.read(_BLOCK):
            digest.update(block)
            write.write(block)
        digest.update(write.tell().to_bytes(8, "little"))


def _opened(path: Path) -> BinaryIO:
    """A file to be read. Nobody may ever write into a pipe, and reading a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(f"{path.name} is no regular file")
