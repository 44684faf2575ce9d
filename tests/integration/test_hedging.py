"""Second attempts on a real engine: a straggler does not hold up whoever waits, and runs no longer than it must."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import rtml
from rtml import errors
from tests.integration.engine import eventually


@rtml.task(hedge=0.9)
def step(directory: str, name: str, seconds: float) -> int:
    """Takes its time, but for the first attempt of "slow", which would take for ever."""
    if name == "slow":
        try:
            os.close(os.open(Path(directory, "first"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return os.getpid()
        try:
            while True:
                time.sleep(0.01)
        finally:
            Path(directory, "stopped").touch()
    time.sleep(seconds)
    return os.getpid()


def test_a_straggler_is_overtaken_and_stopped(tmp_path: Path) -> None:
    with rtml.connect(workers=2) as client:
        for number in range(40):
            step.submit(str(tmp_path), str(number), 0.002).result()
        future = step.submit(str(tmp_path), "slow", 0.0)
        future.result(timeout=20)
        eventually((tmp_path / "stopped").exists)
        eventually(lambda: 'rtml_hedge_total{outcome="won"} 1.0' in client.query("metrics"))
        assert step.submit(str(tmp_path), "after", 0.0).result(timeout=20) > 0


def test_a_portion_is_below_one() -> None:
    for wrong in (1, 2.0, -0.5, "often"):
        with pytest.raises(errors.SubmitError, match="hedge"):
            step.options(hedge=wrong)
