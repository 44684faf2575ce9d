"""Which gpus tasks and actors see, by the environment of their processes: no gpu is needed for that."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

import rtml

VARIABLE = "CUDA_VISIBLE_DEVICES"


def seen(seconds: float = 0.0) -> tuple[str | None, int]:
    time.sleep(seconds)
    return os.environ.get(VARIABLE), os.getpid()


async def seen_by_coroutine() -> str | None:
    return os.environ.get(VARIABLE)


class SeesClass:
    def what(self) -> str | None:
        return os.environ.get(VARIABLE)


Sees: Any = rtml.actor(SeesClass)


def test_tasks_and_actors_see_the_gpus_that_they_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setenv(VARIABLE, "4,7")  # as schedulers of clusters say what a job may use
    with rtml.connect(workers=2, cpu=8, gpu=2):
        plain, whole, both = rtml.task(seen), rtml.task(gpu=1)(seen), rtml.task(gpu=2)(seen)
        assert plain.submit().result(30)[0] == ""
        halves = [rtml.task(gpu=0.5)(seen).submit(0.3).result for _ in range(2)]
        found = [result(30) for result in halves]
        assert len({pid for _, pid in found}) == 2
        assert {device for device, _ in found} == {"4"}
        at_once = [whole.submit(0.3) for _ in range(2)]
        assert sorted(str(future.result(30)[0]) for future in at_once) == ["4", "7"]
        assert both.submit().result(30)[0] == "4,7"
        assert rtml.task(gpu=0.25)(seen_by_coroutine).submit().result(30) in {"4", "7"}
        actor = Sees.options(gpu=1).create()
        assert actor.what.submit().result(30) in {"4", "7"}
        assert Sees.create().what.submit().result(30) == ""
        assert plain.submit().result(30)[0] == ""


def test_without_declared_gpus_nothing_is_hidden(monkeypatch: Any) -> None:
    monkeypatch.setenv(VARIABLE, "3")
    with rtml.connect(workers=1) as client:
        assert client.submit(seen).result(30)[0] == "3"


def test_a_task_with_alternatives_takes_the_better_one_and_the_other_when_that_is_busy(monkeypatch: Any) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    either = rtml.task(alternatives=[{"gpu": 1, "cpu": 0}, {"cpu": 1}])(seen)
    with rtml.connect(workers=2, gpu=1):
        assert either.submit().result(30)[0] == "0"
        both = [either.submit(0.5) for _ in range(2)]
        assert sorted(str(future.result(30)[0]) for future in both) == ["", "0"]
        with pytest.raises(rtml.errors.SubmitError, match="alternatives"):
            rtml.task(gpu=1, alternatives=[{"cpu": 1}])(seen)
        with pytest.raises(rtml.errors.SubmitError, match="names some of cpu"):
            rtml.task(alternatives=[{"tpu": 1}])(seen)
        with pytest.raises(rtml.errors.SubmitError, match="is async"):
            rtml.task(alternatives=[{"gpu": 1}, {"cpu": 1}])(seen_by_coroutine)
