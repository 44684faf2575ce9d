"""The whole engine, real processes, on both links: what a program can ask of it."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import rtml
from rtml import errors
from tests.integration import programs
from tests.integration.engine import eventually


@pytest.fixture(params=["unix", "zmq"], scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[rtml.Client]:
    with rtml.connect(workers=2, link=request.param) as client:
        yield client


pytestmark = pytest.mark.usefixtures("client")


def test_results_and_chains_of_futures() -> None:
    futures = [programs.square.submit(n) for n in range(100)]
    assert rtml.get(futures) == [n * n for n in range(100)]
    link = programs.add.submit(1)
    for _ in range(50):
        link = programs.add.submit(link, 1)
    assert link.result(10) == 51


@rtml.task
def depths(tree: dict[str, list[tuple[int, int]]]) -> int:
    return sum(sum(pair) for pair in tree["pairs"])


def test_futures_at_any_depth_of_containers_become_values() -> None:
    tree = {"pairs": [(programs.square.submit(2), 1), (2, programs.square.submit(3))]}
    assert depths.submit(tree).result(10) == 4 + 1 + 2 + 9


def test_tasks_make_tasks() -> None:
    assert programs.total_blocking.submit(20).result(10) == sum(n * n for n in range(20))
    assert programs.total_async.submit(20).result(10) == sum(n * n for n in range(20))


def test_blocking_gets_nest_deeper_than_there_are_processes() -> None:
    assert programs.deep.submit(40).result(20) == 40


def test_user_exceptions_keep_type_fields_and_remote_traceback() -> None:
    with pytest.raises(programs.Mistake) as caught:
        programs.fail.submit(7).result(10)
    assert caught.value.code == 7
    assert "raise Mistake(code)" in str(caught.value.__cause__)
    with pytest.raises(programs.Mistake) as nested:
        programs.fail_in_child.submit(8).result(10)
    assert "fail_in_child" in str(nested.value.__cause__)


def test_failed_dependency_fails_its_dependents_with_its_own_error() -> None:
    with pytest.raises(programs.Mistake):
        programs.add.submit(programs.fail.submit(1), 2).result(10)


def test_retries_by_exception_type(tmp_path: Path) -> None:
    assert programs.flaky.submit(str(tmp_path / "a"), 3).result(10) == 3
    with pytest.raises(OSError, match="not yet"):
        programs.flaky.submit(str(tmp_path / "b"), 9).result(10)
    assert (tmp_path / "b").stat().st_size == 4


@pytest.mark.parametrize("how", ["exit", "segfault", "kill"])
def test_crashes_are_retried_then_reported(how: str, tmp_path: Path) -> None:
    assert programs.die.submit(how, str(tmp_path / "tries")).result(20) == "survived"
    with pytest.raises(errors.WorkerDied, match="2 attempts"):
        programs.die.submit(how).result(20)


def test_innocents_of_a_crash_are_not_charged() -> None:
    others = [programs.square.options(retries=0).submit(n) for n in range(200)]
    crash = programs.die.options(retries=0).submit("exit")
    more = [programs.square.options(retries=0).submit(n) for n in range(200)]
    with pytest.raises(errors.WorkerDied):
        crash.result(20)
    assert rtml.get(others + more, timeout=20) == [n * n for n in range(200)] * 2


def test_cancel_reaches_running_code_and_its_children(tmp_path: Path) -> None:
    path = str(tmp_path / "child")
    future = programs.parent_of_sleepers.submit(path, 1)
    assert eventually(Path(path + ".0.began").exists)
    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(5)
    assert eventually(Path(path + ".0.stopped").exists)
    assert programs.square.submit(3).result(5) == 9


def test_deadline_is_inherited_and_ends_what_runs(tmp_path: Path) -> None:
    path = str(tmp_path / "child")
    started = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        programs.parent_of_sleepers.options(deadline=2.0).submit(path, 2).result(20)
    assert time.monotonic() - started < 10
    assert eventually(Path(path + ".0.stopped").exists)


def test_timeout_ends_a_stuck_process() -> None:
    with pytest.raises(errors.TaskTimeout, match=r"0\.3 s"):
        programs.stuck.submit().result(10)
    assert programs.square.submit(4).result(10) == 16


def test_impossible_requests_say_so() -> None:
    with pytest.raises(errors.Unschedulable, match="gpu=1"):
        programs.needs_gpu.submit().result(10)
    with pytest.raises(errors.Unschedulable, match="cpu=64"):
        programs.square.options(cpu=64).submit(1).result(10)


def test_large_arguments_and_results_go_through_shared_memory() -> None:
    array = np.arange(4_000_000, dtype=np.float64)
    assert programs.mean.submit(array).result(20) == pytest.approx(array.mean())
    result = programs.ones.submit(3_000_000).result(20)
    assert result.shape == (3_000_000,)
    assert result.sum() == 3_000_000
    assert programs.mean.submit(programs.ones.submit(1_000_000)).result(20) == 1.0
    stored = rtml.put(array)
    assert rtml.get([programs.mean.submit(stored) for _ in range(5)]) == [pytest.approx(array.mean())] * 5


@pytest.mark.parametrize("n", [10, 1_000_000])
def test_futures_returned_from_tasks_keep_their_values(n: int) -> None:
    returned = [
        programs.put_and_return.submit(n).result(20),
        *programs.return_ended_children.submit(n).result(20),
        programs.return_running_child.submit(n).result(20),
    ]
    # What their makers had in shared memory is used again meanwhile.
    for _ in range(5):
        programs.ones.submit(n).result(20)
    assert [future.result(20).sum() for future in returned] == [n] * 4
    assert programs.mean.submit(returned[0]).result(20) == 1.0


def test_batches_form_and_items_fail_alone() -> None:
    blockers = [programs.slow.submit(0.1) for _ in range(4)]
    futures = [programs.batched.submit(n) for n in [*range(20), -1]]
    assert isinstance(futures[-1].exception(20), ValueError)
    results = [future.result(20) for future in futures[:-1]]
    assert [value for value, _ in results] == list(range(20))
    assert max(size for _, size in results) > 1
    rtml.get(blockers)


def test_wait_returns_what_is_done() -> None:
    quick, late = programs.square.submit(1), programs.slow.submit(5.0)
    done, pending = rtml.wait([quick, late], num_returns=1, timeout=5)
    assert (list(done), list(pending)) == ([quick], [late])
    late.cancel()


def test_executors_run_below_the_control_plane() -> None:
    assert programs.niceness.submit().result(10) == 19


def test_unpicklable_things_say_which() -> None:
    with pytest.raises(errors.SerializationError, match="argument"):
        programs.add.submit(open)
        programs.add.submit(n for n in range(3))
    with pytest.raises(errors.SerializationError, match="result"):
        rtml.submit(lambda: (n for n in range(3))).result(10)


def test_texts_that_are_no_unicode_are_escaped() -> None:
    assert rtml.submit(print, "a file called \udcff").result(10) is None
    with pytest.raises(FileNotFoundError, match=r"udcff"):
        rtml.submit(open, "no file called \udcff").result(10)


def test_future_can_be_awaited_by_any_program() -> None:
    import asyncio

    async def main() -> list[int]:
        return list(await asyncio.gather(*[_awaited(n) for n in range(10)]))

    async def _awaited(n: int) -> int:
        return int(await programs.square.submit(n))

    assert asyncio.run(main()) == [n * n for n in range(10)]
