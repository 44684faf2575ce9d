"""How much Python one call executes, in each process on its way: opcodes per function, without a clock.

    python -m benchmarks.opcodes [task | chain | actor | all] [--calls N] [--top N] [--json]

A lone round trip's time is the amount of code that its three processes execute cold (ARCHITECTURE.md, A19), and that is
counted here exactly, whatever else the machine does. Each process gets a `sitecustomize` that counts, between two
signals, every opcode of its main thread by the function it is in. Means over some calls: what is done in bulk for many
tasks is in them with its part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
#: Where the processes leave their counts.
VARIABLE: Final = "RTML_OPCODES"
WARM: Final = 300
CHAIN: Final = 100
#: Seconds that a process may take to write its counts.
PATIENCE: Final = 30.0


class Counting:
    """Counts the opcodes of the thread that starts it."""

    def __init__(self) -> None:
        self.opcodes: Counter[CodeType] = Counter()
        self.on = False

    def start(self, frame: FrameType | None) -> None:
        """Count from here on, in the functions that are running too."""
        self.opcodes.clear()
        self.on = True
        while frame is not None:
            frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = self._trace, True, False
            frame = frame.f_back
        sys.settrace(self._trace)

    def stop(self) -> dict[str, int]:
        """Opcodes by function."""
        sys.settrace(None)
        self.on = False
        counts: Counter[str] = Counter()
        for code, count in self.opcodes.items():
            if code.co_filename != __file__:
                counts[f"{_module(code.co_filename)}:{code.co_qualname}"] += count
        return dict(counts)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not self.on:
            return None
        if event == "opcode":
            self.opcodes[frame.f_code] += 1
        elif event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace


def _module(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return str(path.with_suffix("")) if path.parts[0] == "rtml" else path.stem


def install() -> None:
    """In a process of the engine: count between one SIGUSR2 and the next."""
    counting = Counting()

    def switch(number: int, frame: FrameType | None) -> None:
        _no_wakeup()
        if not counting.on:
            Path(os.environ[VARIABLE], f"{os.getpid()}.on").touch()
            counting.start(frame)
            return
        text = json.dumps(counting.stop())
        path = Path(os.environ[VARIABLE], f"{os.getpid()}.json")
        path.with_suffix(".part").write_text(text)
        path.with_suffix(".part").rename(path)

    signal.signal(signal.SIGUSR2, switch)


def _no_wakeup() -> None:
    """Take back the byte that the signal wrote for a loop that ends when it reads one."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    if wakeup >= 0 and stat.S_ISFIFO(os.fstat(wakeup).st_mode):  # an event loop has a socket, and reads it itself
        reader = os.open(f"/proc/self/fd/{wakeup}", os.O_RDONLY | os.O_NONBLOCK)
        os.read(reader, 1)
        os.close(reader)


# --- what is counted


def echo(value: int) -> int:
    return value


def whoami() -> int:
    return os.getpid()


class Adder:
    """An actor."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def pid(self) -> int:
        return os.getpid()


def _run(directory: str, what: str, calls: int) -> dict[str, dict[str, float]]:
    """Opcodes by process and function of so many calls."""
    import rtml

    with rtml.connect(workers=1) as client:
        task = rtml.task(echo)
        if what == "actor":
            actor = rtml.actor(Adder).create()
            executor = actor.pid.submit().result()
        else:
            executor = rtml.task(whoami).submit().result()
        once: dict[str, Callable[[], object]] = {
            "task": lambda: task.submit(1).result(),
            "chain": lambda: chain(task),
            "actor": lambda: actor.add.submit(1).result(),
        }
        each = CHAIN if what == "chain" else 1
        rounds = max(1, calls // each)
        for _ in range(WARM // each + 1):
            once[what]()
        pids = {"dispatcher": json.loads(client.query("status"))["pid"], "executor": executor}
        for pid in pids.values():
            os.kill(pid, signal.SIGUSR2)
            wait_for(Path(directory, f"{pid}.on"))
        counting = Counting()
        counting.start(None)
        for _ in range(rounds):
            once[what]()
        own = counting.stop()
        for pid in pids.values():
            os.kill(pid, signal.SIGUSR2)
        found = {"client": own, **{name: _counted(directory, pid) for name, pid in pids.items()}}
    return {name: {key: count / (rounds * each) for key, count in counts.items()} for name, counts in found.items()}


def chain(task: Any) -> object:
    future: Any = 0
    for _ in range(CHAIN):
        future = task.submit(future)
    return future.result()


def _counted(directory: str, pid: int) -> dict[str, int]:
    counts: dict[str, int] = json.loads(wait_for(Path(directory, f"{pid}.json")).read_text())
    return counts


def wait_for(path: Path) -> Path:
    """A file that another process is about to write."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.stem}: the process did not answer")
        time.sleep(0.01)
    return path


def measure(what: str, calls: int) -> dict[str, dict[str, float]]:
    """Opcodes a call by process and function."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "sitecustomize.py").write_text(
            "import sys\nif 'rtml.dispatcher' in ' '.join(sys.orig_argv) or 'supervisor' in ' '.join(sys.orig_argv):\n"
            "    from benchmarks import opcodes\n    opcodes.install()\n"
        )
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([directory, str(ROOT)])
        os.environ[VARIABLE] = directory
        try:
            return _run(directory, what, calls)
        finally:
            del os.environ[VARIABLE], os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.opcodes", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", nargs="?", default="all", choices=("task", "chain", "actor", "all"))
    parser.add_argument("--calls", type=int, default=512)
    parser.add_argument("--top", type=int, default=0, help="functions listed of each process (default: none)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = ("task", "chain", "actor") if options.what == "all" else (options.what,)
    for what in wanted:
        counts = measure(what, options.calls)
        if options.json:
            print(json.dumps({what: counts}))
            continue
        for process, functions in counts.items():
            print(f"{what:6} {process:11} {sum(functions.values()):7.0f}")
            ordered = sorted(functions.items(), key=lambda item: -item[1])
            for function, count in ordered[: options.top]:
                print(f"{count:26.1f}  {function}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
