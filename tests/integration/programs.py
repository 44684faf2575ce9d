"""Tasks of the integration tests, importable by executors."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

import rtml


@rtml.task
def square(x: int) -> int:
    return x * x


@rtml.task
def add(*numbers: int) -> int:
    return sum(numbers)


@rtml.task
def total_blocking(n: int) -> int:
    return sum(rtml.get([square.submit(i) for i in range(n)]))


@rtml.task
async def total_async(n: int) -> int:
    return sum(await rtml.gather(*[square.submit(i) for i in range(n)]))


@rtml.task
def deep(n: int) -> int:
    return 0 if n == 0 else 1 + deep.submit(n - 1).result()


@rtml.task
def slow(seconds: float, value: int = 0) -> int:
    """Sleeps in steps, so that an interrupt is taken at once."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)
    return value


@rtml.task
def touch_until_cancelled(path: str) -> None:
    """Says that it began, and that it was stopped."""
    try:
        Path(path + ".began").touch()
        while True:
            time.sleep(0.001)
    finally:
        Path(path + ".stopped").touch()


@rtml.task
def parent_of_sleepers(path: str, n: int) -> list[None]:
    return rtml.get([touch_until_cancelled.submit(f"{path}.{i}") for i in range(n)])


class Mistake(ValueError):
    """A user's own exception type."""

    def __init__(self, code: int) -> None:
        super().__init__(f"mistake {code}")
        self.code = code


@rtml.task
def fail(code: int) -> None:
    raise Mistake(code)


@rtml.task
def fail_in_child(code: int) -> None:
    fail.submit(code).result()


@rtml.task(retries=3, retry_on=(OSError,))
def flaky(path: str, succeed_at: int) -> int:
    with Path(path).open("a") as log:
        log.write(".")
    tries = Path(path).stat().st_size
    if tries < succeed_at:
        raise OSError("not yet")
    return tries


@rtml.task(retries=1)
def die(how: str, path: str = "") -> str:
    if path:
        with Path(path).open("a") as log:
            log.write(".")
        if Path(path).stat().st_size > 1:
            return "survived"
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), 9)
    return "alive"


@rtml.task
def pid() -> int:
    return os.getpid()


@rtml.task
def niceness() -> int:
    return os.nice(0)


@rtml.task
def mean(array: Any) -> float:
    return float(np.mean(array))


@rtml.task
def put_and_return(n: int) -> Any:
    return rtml.put(np.ones(n))


@rtml.task
def return_ended_children(n: int) -> list[Any]:
    children = [ones.submit(n), ones.submit(n)]
    rtml.get(children)
    return children


@rtml.task
def return_running_child(n: int) -> Any:
    return ones.submit(n)


@rtml.task
def ones(n: int) -> Any:
    return np.ones(n, dtype=np.uint8)


@rtml.task(batch=16)
def batched(xs: list[int]) -> list[Any]:
    return [ValueError(f"bad {x}") if x < 0 else (x, len(xs)) for x in xs]


@rtml.task
def chatty(text: str) -> None:
    print(text)


@rtml.task(timeout=0.3)
def stuck() -> None:
    while True:
        time.sleep(0.01)


@rtml.task(gpu=1)
def holds_gpu_and_waits() -> str:
    return str(needs_gpu.submit().result())


@rtml.task(gpu=1)
def needs_gpu() -> str:
    return "ran"


@rtml.task(retries=10)
def record(path: str, number: int) -> int:
    """Leaves a line per execution, so that lost and repeated ones can be counted."""
    with Path(path).open("a") as log:
        log.write(f"{number}\n")
    return number
