"""Generators as processes of their own, started together; their results as those of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from loadtests.schedule import Plan
from loadtests.sender import Sender, Sent, Target, closed

#: Seconds that a generator may take until it is ready, and beyond its plan until it has ended.
_PATIENCE: Final = 60.0
_ROOT: Final = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """A plan and what became of it."""

    plan: Plan
    sent: Sent


class Child:
    """A generator's process, and a pipe to it; a context that ends it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.pipe = Connection(ours.detach())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtests.generators", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        theirs.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def received(self, patience: float) -> Any:
        """What it says next.

        Raises:
            ConnectionError: it says so, or nothing for so many seconds, or it died.
        """
        if not self.pipe.poll(patience):
            raise ConnectionError(f"a generator said nothing for {patience:g} seconds")
        try:
            found = self.pipe.recv()
        except EOFError:
            raise ConnectionError("a generator died") from None
        if isinstance(found, ConnectionError):
            raise found
        return found


def run(
    target: Target, plan: Plan, processes: int = 1, bar: Callable[[float, int, int], None] | None = None
) -> Outcome:
    """Sends the plan from so many processes.

    Args:
        target: Where to, and what.
        plan: When, and which.
        processes: Each sends every n-th request.
        bar: Told the part of the plan's time that is over, and how many requests were sent and have ended.

    Raises:
        ConnectionError: nothing listens there.
    """
    with ExitStack() as stack:
        children = [stack.enter_context(Child()) for _ in range(processes)]
        for number, child in enumerate(children):
            child.pipe.send(("plan", target, plan.part(number, processes)))
        for child in children:
            child.received(_PATIENCE)
        start = time.monotonic() + 0.1
        for child in children:
            child.pipe.send(start)
        seconds = float(plan.times[-1]) if len(plan.times) else 0.0
        parts = _followed(children, start, seconds, _PATIENCE + target.timeout, bar)
    return Outcome(plan, _together(parts, len(plan.times)))


def keep(target: Target, concurrency: int, seconds: float) -> Sent:
    """Closed loop: so many requests under way for so long, from one process.

    Raises:
        ConnectionError: nothing listens there.
    """
    with Child() as child:
        child.pipe.send(("closed", target, concurrency, seconds))
        found = child.received(seconds + _PATIENCE + target.timeout)
        assert isinstance(found, Sent)
        return found


def _followed(
    children: list[Child], start: float, seconds: float, patience: float, bar: Callable[[float, int, int], None] | None
) -> list[Sent]:
    """What each has in the end; until then they say how far they are."""
    progress = [(0, 0)] * len(children)
    parts: dict[int, Sent] = {}
    while len(parts) < len(children):
        left = max(0.0, start + seconds + patience - time.monotonic())
        open_ones = [child for number, child in enumerate(children) if number not in parts]
        ready = wait([child.pipe for child in open_ones], left)
        for child in open_ones if not ready else [child for child in open_ones if child.pipe in ready]:
            number = children.index(child)
            found = child.received(0.0)
            if isinstance(found, Sent):
                parts[number] = found
            else:
                progress[number] = found
        if bar is not None:
            over = (time.monotonic() - start) / max(seconds, 1e-9)
            bar(min(1.0, max(0.0, over)), sum(sent for sent, _ in progress), sum(ended for _, ended in progress))
    return [parts[number] for number in range(len(children))]


def _together(parts: list[Sent], count: int) -> Sent:
    whole = Sent(np.empty(count), np.empty(count), np.empty(count, np.int16))
    for number, part in enumerate(parts):
        for name in ("sent", "done", "status"):
            getattr(whole, name)[number :: len(parts)] = getattr(part, name)
        if part.spent is not None:
            whole.spent = np.empty((count, 3)) if whole.spent is None else whole.spent
            whole.spent[number :: len(parts)] = part.spent
    whole.cpu = max((part.cpu for part in parts), default=0.0)
    whole.waited = sum(part.waited for part in parts)
    return whole


async def _planned(pipe: Connection, target: Target, plan: Plan) -> Sent:
    sender = Sender(target, plan, lambda sent, ended: pipe.send((sent, ended)))
    await sender.prepare(min(64, len(plan.times)))
    pipe.send("ready")
    # Nothing else runs here yet.
    return await sender.run(pipe.recv())


def child(fd: int) -> None:
    """What a generator's process does: one plan, or one closed loop."""
    import uvloop

    pipe = Connection(fd)
    kind, *arguments = pipe.recv()
    try:
        pipe.send(uvloop.run(_planned(pipe, *arguments) if kind == "plan" else closed(*arguments)))
    except ConnectionError as error:
        pipe.send(ConnectionError(str(error)))


if __name__ == "__main__":
    try:
        child(int(sys.argv[1]))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        sys.exit(1)
