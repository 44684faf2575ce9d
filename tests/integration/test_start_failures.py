"""Executors that die before they have said anything are started ever later, and serve when the cause is gone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

import pytest

import rtml
from tests.integration import programs
from tests.integration.engine import eventually

#: As long as the file `broken` exists, executors end where they begin; each notes when.
BROKEN = """
import os, time
import rtml.workers.{module} as module

run = module.{run}

def fail(settings):
    with open({log!r}, "a") as log:
        print(time.clock_gettime(time.CLOCK_MONOTONIC), file=log)
    if os.path.exists({broken!r}):
        {how}
    return run(settings)

module.{run} = fail
"""

RAISE, EXIT = 'raise RuntimeError("broken at the start")', "os._exit(3)"


@pytest.mark.parametrize(("kind", "how"), [("sync", RAISE), ("sync", EXIT), ("async", RAISE)])
def test_executors_that_fail_at_their_start_are_started_ever_later(
    kind: Literal["sync", "async"], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, broken, name = tmp_path / "log", tmp_path / "broken", f"broken_{kind}_{len(how)}"
    broken.touch()
    module, run = ("executor", "run_executor") if kind == "sync" else ("async_executor", "run_async_executor")
    text = BROKEN.format(module=module, run=run, log=str(log), broken=str(broken), how=how)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def starts() -> list[float]:
        return [float(line) for line in log.read_text().split()] if log.exists() else []

    with rtml.connect(workers=1, preimport=[name]) as client:
        future = programs.square.submit(3) if kind == "sync" else programs.total_async.submit(3)
        try:
            assert eventually(lambda: len(starts()) >= 6, 30)
            gaps = [after - before for before, after in zip(starts(), starts()[1:])]
            # The dispatcher waits 0.1 s after the first death that it hears of, then twice as long each time. Half of
            # that; and the first executor may have died before the dispatcher was there to hear of it.
            assert all(gap >= 0.025 * 2**n for n, gap in enumerate(gaps[1:])), gaps
            assert not future.done()
            assert json.loads(client.query("status"))["tasks"]["ready"] == 1
        finally:
            # Whatever was found: leaving the block waits for the future.
            broken.unlink()
        begin = time.monotonic()
        assert future.result(30) == (9 if kind == "sync" else 5)
        assert time.monotonic() - begin < 20
