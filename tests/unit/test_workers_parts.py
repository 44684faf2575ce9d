"""The small parts around executors: running page, janitor, captured output, settings, forking, steps, interruption."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType

import pytest

from rtml.client.context import TaskInfo, process
from rtml.messages import Logs, LoopLag
from rtml.workers import janitor
from rtml.workers.interrupt import in_our_code
from rtml.workers.logs import LINE_MAX, PENDING_MAX, CapturedStream, LogBuffer
from rtml.workers.page import COUNT, FIRST, IDS_MAX, RunningPage
from rtml.workers.settings import parse
from rtml.workers.steps import LAG_S, CarriedError, Steps, Watch

# --- page -------------------------------------------------------------------------------------------------------------


def test_a_count_beyond_the_slot_is_cut() -> None:
    page = RunningPage()
    page.slot(1)[COUNT] = 10_000
    assert len(page.running(1)) == IDS_MAX


@pytest.mark.parametrize(
    "check",
    [
        "the_page_is_shared_with_forked_processes",
        "reasons_name_signals",
        "a_child_that_raises_ends",
        "the_janitor_cleans_up",
        "a_zombie_is_dead",
        "poll_sees_the_end_of_a_process",
    ],
)
def test_processes(check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.unit.forking_checks", check],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert ("in the child" in done.stderr) == (check == "a_child_that_raises_ends")


# --- janitor ----------------------------------------------------------------------------------------------------------


def test_sweep_removes_only_what_dead_owners_left(tmp_path: Path) -> None:
    for name, owner in {"rtml-dead": "999999 5", "rtml-recycled": f"{os.getpid()} 5", "other": "999999 5"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / janitor.OWNER_FILE).write_text(owner)
    janitor.own(str(tmp_path / "rtml-mine"))
    for name in ("rtml-new", "rtml-old", "rtml-strange"):
        (tmp_path / name).mkdir()
    # Whoever calls a directory like that need not have heard of owner files.
    (tmp_path / "rtml-strange" / "thesis.txt").touch()
    for name in ("rtml-old", "rtml-strange"):
        os.utime(tmp_path / name, (1, 1))
    swept = janitor.sweep(str(tmp_path))
    assert {Path(path).name for path in swept} == {"rtml-dead", "rtml-recycled", "rtml-old"}
    assert {path.name for path in tmp_path.iterdir()} == {"other", "rtml-mine", "rtml-new", "rtml-strange"}
    assert janitor.sweep(str(tmp_path / "missing")) == []


# --- captured output --------------------------------------------------------------------------------------------------


@pytest.fixture
def task() -> Iterator[TaskInfo]:
    info = TaskInfo(5, 1, "speak", ["speak"], None, 5)
    before, process.task = process.task, info
    yield info
    process.task = before


def texts(messages: list[Logs]) -> list[tuple[int, str, str, str]]:
    return [(task, name, stream, text) for message in messages for task, name, _, stream, text in message.lines]


@pytest.mark.usefixtures("task")
def test_lines_are_kept_whole() -> None:
    woken: list[int] = []
    buffer = LogBuffer(lambda: woken.append(1))
    out, err = CapturedStream("out", buffer, 1), CapturedStream("err", buffer, 2)
    out.write("half")
    assert not buffer.dirty
    err.write("other\n")
    out.write(" line\nnext\nrest")
    assert woken == [1]
    assert texts(buffer.take()) == [(5, "speak", "err", "other"), (5, "speak", "out", "half line\nnext")]
    buffer.end_lines(5)
    assert texts(buffer.take()) == [(5, "speak", "out", "rest")]
    assert buffer.take() == []
    print("printed", file=out)
    out.buffer.write("öffentlich\n".encode())
    assert texts(buffer.take()) == [(5, "speak", "out", "printed\nöffentlich")]
    assert woken == [1, 1]


@pytest.mark.usefixtures("task")
def test_what_is_printed_is_bounded() -> None:
    buffer = LogBuffer(lambda: None)
    out = CapturedStream("out", buffer, 1)
    out.write("x" * (LINE_MAX + 5))
    assert len(texts(buffer.take())[0][3]) == LINE_MAX
    for _ in range(3 * PENDING_MAX // 1000):
        out.write("y" * 999 + "\n")
    lines = texts(buffer.take())
    assert sum(len(text) for *_, text in lines) <= PENDING_MAX + 100
    assert "lines dropped" in lines[-1][3]


def test_streams_behave_like_files() -> None:
    stream = CapturedStream("out", LogBuffer(lambda: None), 1)
    assert stream.writable()
    assert not stream.isatty()
    assert stream.fileno() == 1
    assert stream.buffer.writable()
    stream.flush()
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    settings = parse(
        [
            *("--session-dir", "/s", "--shm-dir", "/m", "--workers", "3", "--link", "zmq"),
            *("--listen", "tcp://127.0.0.1:1", "--resources", '{"tpu": 2}', "--preimport", "json,re", "--no-logs"),
        ],
        "text",
    )
    assert settings.listen_addresses == ["unix:/s/dispatcher.sock", "ipc:///s/dispatcher.zmq", "tcp://127.0.0.1:1"]
    assert settings.executor_address == "ipc:///s/dispatcher.zmq"
    assert settings.resources == {"tpu": 2}
    assert settings.preimport == ("json", "re")
    assert not settings.logs
    plain = parse(["--session-dir", "/s", "--shm-dir", "/m", "--workers", "3"], "")
    assert plain.listen_addresses == [plain.executor_address] == ["unix:/s/dispatcher.sock"]


# --- steps ------------------------------------------------------------------------------------------------------------


class Step:
    """Awaits once."""

    def __await__(self) -> Generator[str, None, None]:
        yield "waiting"


async def two_steps(page: memoryview) -> int:
    assert page[COUNT] == 1
    assert page[FIRST] == 9
    await Step()
    assert page[COUNT] == 1
    return 1


def test_steps_show_in_the_page() -> None:
    page = RunningPage().slot(1)
    told: list[object] = []
    steps = Steps(two_steps(page), 9, Watch(page, lambda _: None), told.append)
    assert steps.send(None) == "waiting"
    assert page[COUNT] == 0
    assert not told
    with pytest.raises(StopIteration) as end:
        steps.send(None)
    assert page[COUNT] == 0
    assert told == [end.value.value]


async def ends_the_program() -> None:
    raise SystemExit(3)


def test_an_exit_is_carried_through_the_loop() -> None:
    told: list[object] = []
    steps = Steps(ends_the_program(), 9, Watch(RunningPage().slot(1), lambda _: None), told.append)
    with pytest.raises(CarriedError) as caught:
        steps.send(None)
    assert not told
    assert isinstance(caught.value.__cause__, SystemExit)


def test_a_long_step_is_reported_and_its_end_too() -> None:
    page = RunningPage().slot(1)
    reports: list[LoopLag] = []
    heard = threading.Event()

    def report(lag: LoopLag) -> None:
        reports.append(lag)
        heard.set()

    watch = Watch(page, report)
    watch.busy()
    watch.enter(9)
    assert heard.wait(10)
    watch.leave()
    watch.idle()
    assert [lag.task for lag in reports] == [9, 9]
    assert reports[0].lag >= LAG_S
    assert reports[1].lag == 0.0


# --- interruption -----------------------------------------------------------------------------------------------------


def caller(inner: object) -> bool:
    return bool(inner())  # type: ignore[operator]


def here() -> FrameType:
    return sys._getframe()


def test_user_code_may_be_interrupted_and_ours_not() -> None:
    assert not caller(lambda: in_our_code(here(), caller.__code__))
    found = []
    buffer = LogBuffer(lambda: found.append(in_our_code(here(), caller.__code__)))
    caller(lambda: buffer.write("out", "text\n"))
    assert found == [True]
