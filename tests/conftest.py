"""What every test module gets: a temporary directory of its own run, and a check that it left nothing behind.

Whoever starts a process, opens a descriptor or makes a shared-memory directory in a test module must have ended it when
the module ends. The check waits a little for what is on its way out, then fails and names what is left. Processes are
recognised by an environment variable, so that an orphan that init adopted is found too.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

#: Descendants inherit it; survivors of a killed parent keep it.
MARK_NAME = "TEST_RUN_MARK"
MARK = uuid.uuid4().hex

#: Seconds that processes and files may take to go after a module's last test.
SETTLE_S = 10.0

#: The same for shared memory that nobody uses: another run may have killed its users, and tidies up in its own time.
SETTLE_SHARED_S = 60.0

#: Descriptors that libraries open once and keep for the life of the process.
KEPT_TARGETS = ("/dev/null", "/dev/urandom", "/dev/pts", "/dev/tty", "/proc/", "/sys/", ".hypothesis")

#: Of each of these kinds gRPC's library opens and closes a few by threads of its own whenever it likes, even in
#: modules that do not use it; more than these few are somebody's leak.
POLLERS = ("anon_inode:[eventfd]", "anon_inode:[eventpoll]")
POLLERS_OF_GRPC = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--rewrite` and `--whole`."""
    parser.addoption("--rewrite", action="store_true", help="write what happened into tests/transcripts")
    parser.addoption("--whole", action="store_true", help="all of `make conformance`, however long it takes")


def pytest_configure(config: pytest.Config) -> None:
    """Marks this run's processes and gives them a temporary directory of their own (short: it holds socket paths).

    Each of several processes of pytest-xdist is a run of its own here.
    """
    os.environ[MARK_NAME] = MARK
    # The same examples each time, so that a change is judged by what it changes; and an example may take long on a busy
    # machine.
    hypothesis.settings.register_profile("suite", deadline=None, derandomize=not config.getoption("--whole"))
    hypothesis.settings.load_profile("suite")
    # It keeps a database of what it was used for open, and sends it.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # Not inside the directory of the process that started this one.
    within = Path(tempfile.gettempdir()).parent if hasattr(config, "workerinput") else None
    directory = tempfile.mkdtemp(prefix="t-", dir=within)
    os.environ["TMPDIR"] = directory
    tempfile.tempdir = directory


def pytest_unconfigure() -> None:
    """Removes the run's temporary directory; what tests left in it was reported by then."""
    directory = os.environ.pop("TMPDIR", "")
    tempfile.tempdir = None
    if Path(directory).name.startswith("t-"):
        import shutil

        shutil.rmtree(directory, ignore_errors=True)


def _read(path: Path) -> bytes:
    """The file's content; nothing if it (a process) is gone or not ours."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _processes() -> dict[int, str]:
    """Live processes of this run but this one: pid -> command line."""
    needle = f"{MARK_NAME}={MARK}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # Forks of this process show its own first environment, without the mark, but they are its children.
        parent = _read(entry / "stat").rpartition(b")")[2].split()[1:2]
        if parent == [str(os.getpid()).encode()] or needle in _read(entry / "environ"):
            command = _read(entry / "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            found[int(entry.name)] = command or "(zombie)"
    return found


def _descriptors() -> dict[tuple[int, str], str]:
    """Open descriptors of this process: (number, target) -> target."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own descriptor
        if not any(kept in target for kept in KEPT_TARGETS):
            found[int(name), target] = target
    return found


def _used_by_strangers(path: str) -> bool:
    """Some live process of another run owns `path`, names it in its arguments or maps a file in it."""
    needle, mark = path.encode(), f"{MARK_NAME}={MARK}".encode()
    owner = _read(Path(path) / ".owner").partition(b" ")[0].decode()
    if owner and int(owner) != os.getpid() and (environment := _read(Path(f"/proc/{owner}/environ"))):
        return mark not in environment
    others = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())
    return any(
        needle in _read(entry / "cmdline") or needle in _read(entry / "maps")
        for entry in others
        if mark not in _read(entry / "environ")
    )


def _shared_memory() -> set[str]:
    """Shared-memory directories and files of rtml, and those that tests of parts of it make."""
    return {str(path) for prefix in ("rtml", "test") for path in Path("/dev/shm").glob(f"{prefix}-*")}


def _temporary() -> set[str]:
    """Session directories of rtml in this run's temporary directory."""
    return {str(path) for path in Path(tempfile.gettempdir()).glob("rtml-*")}


def _unix_listeners() -> set[str]:
    """Unix socket paths under this run's temporary directory that are still bound."""
    here = tempfile.gettempdir()
    lines = _read(Path("/proc/net/unix")).decode(errors="replace").splitlines()
    return {line.split()[-1] for line in lines if line.split()[-1].startswith(here)}


class Snapshot:
    """Everything that a test module can leave behind, at one moment."""

    def __init__(self) -> None:
        self.processes = _processes()
        self.descriptors = _descriptors()
        self.shared_memory = _shared_memory()
        self.temporary = _temporary()
        self.sockets = _unix_listeners()

    def leaked_since(self, before: Snapshot) -> list[str]:
        """One line for each thing that is here and was not there before."""
        lines = [f"process {pid}: {text}" for pid, text in self.processes.items() if pid not in before.processes]
        lines += self._descriptors_since(before)
        lines += [
            f"shared memory {path}"
            for path in sorted(self.shared_memory - before.shared_memory)
            if not _used_by_strangers(path)
        ]
        lines += [f"session directory {path}" for path in sorted(self.temporary - before.temporary)]
        lines += [f"unix socket {path}" for path in sorted(self.sockets - before.sockets)]
        return lines

    def _descriptors_since(self, before: Snapshot) -> list[str]:
        opened = [key for key in self.descriptors if key not in before.descriptors]
        if "grpc" in sys.modules:
            now, then = (Counter(snapshot.descriptors.values()) for snapshot in (self, before))
            few = {kind for kind in POLLERS if now[kind] - then[kind] <= POLLERS_OF_GRPC}
            opened = [key for key in opened if key[1] not in few]
        return [f"descriptor {number}: {target}" for number, target in opened]


@pytest.fixture(scope="module", autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails if the module leaves processes, descriptors, sockets, shared memory or session directories."""
    gc.collect()
    # What the modules before left for good (imports, most of it) need not be looked through again and again: that was a
    # third of the processor time of tests/unit.
    gc.freeze()
    before = Snapshot()
    yield
    gc.collect()
    began = time.monotonic()
    while leaked := Snapshot().leaked_since(before):
        only_shared = all(line.startswith("shared memory") for line in leaked)
        if time.monotonic() - began > (SETTLE_SHARED_S if only_shared else SETTLE_S):
            module = request.node.name
            pytest.fail(f"{module} left behind:\n  " + "\n  ".join(leaked), pytrace=False)
        gc.collect()
        time.sleep(0.05)
