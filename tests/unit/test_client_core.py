"""The submitter's core: what it sends, what it keeps, what it acknowledges."""

from __future__ import annotations

import pytest

from rtml.client.core import SUBMIT_BYTES_MAX, ClientCore
from rtml.messages import (
    OK,
    Ack,
    Cancel,
    Define,
    Forgot,
    Function,
    Hello,
    Holding,
    Keep,
    Message,
    ObjectRef,
    Options,
    Query,
    Rehello,
    Release,
    Results,
    Submit,
    Task,
    TaskResult,
    Unwatch,
    Watch,
    WatchResults,
    Welcome,
)

FUNCTION = Function(9, "f", "m:f")


def make(window: int = 100) -> ClientCore:
    core = ClientCore(1, window)
    core.receive(Welcome(7), 0.0)
    core.define(FUNCTION)
    return core


def submit(core: ClientCore, *numbers: int, deps: list[int] | None = None, deadline: float | None = None) -> None:
    for number in numbers:
        links: list[tuple[int, bytes | ObjectRef | None]] | None = (
            None if deps is None else [(dep, None) for dep in deps]
        )
        core.submit(Task(number, 9, b"", deps=links), deadline)


def results(serial: int, *numbers: int) -> Results:
    return Results(serial, [TaskResult(number, 1, OK, b"N") for number in numbers])


def kinds(messages: list[Message]) -> list[type]:
    return [type(message) for message in messages]


def sent(messages: list[Message]) -> list[int]:
    return [task.id for message in messages if isinstance(message, Submit) for task in message.tasks]


def test_definitions_go_first_and_once() -> None:
    core = make()
    core.define(FUNCTION)
    submit(core, 1, 2)
    assert core.unresolved == core.buffered == 2
    idle = core.idle
    assert core.flush(0.0) == [Define([FUNCTION]), Submit([Task(1, 9, b""), Task(2, 9, b"")])]
    assert (idle, core.idle) == (True, False)
    submit(core, 3)
    assert kinds(core.flush(0.0)) == [Submit]
    assert core.flush(0.0) == []


def test_the_first_result_counts_and_is_acknowledged_with_the_next_tasks() -> None:
    core = make()
    submit(core, 1, 2)
    core.flush(0.0)
    assert [result.id for result in core.receive(results(1, 1), 0.0)] == [1]
    assert core.receive(results(2, 1), 0.0) == []
    assert not core.urgent
    assert core.pending_output
    submit(core, 3)
    (message,) = core.flush(0.0)
    assert isinstance(message, Submit)
    assert message.ack == 2
    core.receive(results(3, 2, 3), 0.0)
    assert core.flush(0.0) == [Ack(3)]
    assert core.unresolved == 0


def test_many_results_are_acknowledged_without_waiting() -> None:
    core = make(10_000)
    submit(core, *range(1, 1001))
    core.flush(0.0)
    core.receive(results(1, *range(1, 1001)), 0.0)
    assert core.urgent


def test_budgets_are_what_is_left_when_sent() -> None:
    core = make()
    shared = Options(deadline=5.0, priority=3)
    core.submit(Task(1, 9, b"", options=shared), 10.0)
    core.submit(Task(2, 9, b""), 1.0)
    message = core.flush(4.0)[-1]
    assert isinstance(message, Submit)
    assert [task.options for task in message.tasks] == [Options(deadline=6.0, priority=3), Options(deadline=0.0)]
    assert shared.deadline == 5.0


def test_the_window_limits_what_is_with_the_dispatcher() -> None:
    core = make(window=3)
    submit(core, 1, 2, 3, 4, 5)
    assert sent(core.flush(0.0)) == [1, 2, 3]
    assert core.flush(0.0) == []
    before = core.urgent
    assert core.sent(3)
    assert not core.sent(4)
    core.receive(results(1, 2), 0.0)
    assert (before, core.urgent) == (False, True)
    assert sent(core.flush(0.0)) == [4]
    core.receive(results(2, 1, 3, 4), 0.0)
    assert sent(core.flush(0.0)) == [5]


def test_a_result_is_not_acknowledged_while_an_unsent_task_may_need_it() -> None:
    core = make(window=1)
    submit(core, 1)
    submit(core, 2, deps=[1])
    assert sent(core.flush(0.0)) == [1]
    core.receive(results(1, 1), 0.0)
    # The dispatcher must still know task 1 when task 2 arrives, and may forget it by the same frame.
    (message,) = core.flush(0.0)
    assert sent([message]) == [2]
    assert isinstance(message, Submit)
    assert message.ack == 1


def test_the_acknowledgement_waits_for_the_dependent() -> None:
    core = make(window=1)
    submit(core, 1)
    submit(core, 2)
    submit(core, 3, deps=[1])
    core.flush(0.0)
    core.receive(results(1, 1), 0.0)
    (message,) = core.flush(0.0)
    assert sent([message]) == [2]
    assert isinstance(message, Submit)
    assert message.ack == 0
    core.receive(results(2, 2), 0.0)
    (message,) = core.flush(0.0)
    assert isinstance(message, Submit)
    assert (sent([message]), message.ack) == ([3], 2)


def test_cancelling() -> None:
    core = make()
    submit(core, 1, 2)
    core.flush(0.0)
    assert core.cancel([1, 5]) == [1]
    assert not core.settled(1)
    assert core.flush(0.0) == [Cancel([1])]
    assert core.receive(results(1, 1, 2), 0.0)[0].id == 2
    assert core.settled(1)
    assert core.cancel([1]) == []


def test_an_unsent_task_is_sent_and_cancelled() -> None:
    # Others may depend on it; the dispatcher fails them.
    core = make()
    submit(core, 1)
    submit(core, 2, deps=[1])
    core.cancel([1])
    messages = core.flush(0.0)
    assert kinds(messages) == [Define, Submit, Cancel]
    assert sent(messages) == [1, 2]


def test_watching_comes_before_acknowledging() -> None:
    core = make()
    submit(core, 1)
    core.flush(0.0)
    core.receive(results(1, 1), 0.0)
    core.watch(77)
    core.watch(77)
    assert core.flush(0.0) == [Watch([77]), Ack(1)]
    assert core.receive(WatchResults([TaskResult(78, 1, OK, b"N")]), 0.0) == []
    assert [result.id for result in core.receive(WatchResults([TaskResult(77, 1, OK, b"N")]), 0.0)] == [77]
    # The value in which the handle came may still be sent on.
    assert core.flush(0.0) == []
    core.unwatch(77)
    assert core.flush(0.0) == [Unwatch([77])]


def test_releasing() -> None:
    core = make()
    core.release([4])
    core.release([5])
    assert not core.urgent
    assert core.flush(0.0) == [Define([FUNCTION]), Release([4, 5])]


def test_big_submissions_are_cut() -> None:
    core = make()
    big = bytes(SUBMIT_BYTES_MAX // 2)
    for number in (1, 2, 3):
        core.submit(Task(number, 9, big))
    core.submit(Task(4, 9, b"", deps=[(1, big), (2, big)]))
    messages = core.flush(0.0)[1:]
    assert [sent([message]) for message in messages] == [[1, 2], [3], [4]]


def test_of_what_is_kept_ready_only_news_is_said() -> None:
    core = make()
    core.flush(0.0)
    core.keep_ready([3, 1])
    assert core.flush(0.0) == [Keep([1, 3], more=True)]
    core.keep_ready([5], [3])
    core.keep_ready([6])
    assert core.flush(0.0) == [Keep([5, 6], [3], more=True)]
    assert core.flush(0.0) == []
    assert Keep([1, 5, 6], [3]) in core.resume(0.0)
    core.receive(Forgot([3]), 0.0)
    assert Keep([1, 5, 6]) in core.resume(0.0)


def test_after_a_new_connection_everything_is_said_again() -> None:
    core = make()
    submit(core, 1, 2, 3)
    core.watch(77)
    core.flush(0.0)
    core.receive(results(1, 2), 0.0)
    core.cancel([3])
    core.flush(0.0)
    assert core.hello(pid=5).epoch == 7
    messages = core.resume(0.0)
    assert kinds(messages) == [Holding, Define, Watch, Submit, Cancel]
    assert sent(messages) == [1]


def test_what_was_not_answered_is_asked_again() -> None:
    core = make()
    for number, what in (1, "status"), (2, "trace"), (3, "metrics"):
        core.query(number, what)
    assert len([message for message in core.flush(0.0) if isinstance(message, Query)]) == 3
    core.answered(2)
    core.query(4, "calls")
    asked = [message.id for message in core.resume(0.0) if isinstance(message, Query)]
    assert asked == [1, 3, 4]
    assert not core.pending_output


@pytest.mark.parametrize("epoch", [7, 8])
def test_serials_begin_anew_only_with_another_incarnation(epoch: int) -> None:
    core = make()
    submit(core, 1, 2)
    core.flush(0.0)
    core.receive(results(5, 1), 0.0)
    core.receive(Welcome(epoch), 0.0)
    core.resume(0.0)
    core.receive(results(1, 2), 0.0)
    acks = [message.serial for message in core.flush(0.0) if isinstance(message, Ack)]
    assert acks == ([] if epoch == 7 else [1])


def test_rehello_is_answered_with_everything() -> None:
    core = make()
    core.hello(pid=5)
    submit(core, 1)
    core.flush(0.0)
    core.receive(Rehello(8), 0.0)
    assert core.urgent
    assert core.returning
    messages = core.flush(0.0)
    assert kinds(messages) == [Hello, Holding, Define, Submit]
    assert isinstance(messages[0], Hello)
    assert messages[0].epoch == 8
    assert not core.returning
