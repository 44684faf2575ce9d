"""The pure executor core: where an attempt can be, what is answered, and in which order messages leave."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rtml.messages import (
    CANCELLED,
    EXPIRED,
    OK,
    Assign,
    Attempt,
    Blocked,
    Define,
    Finished,
    Free,
    Function,
    Leave,
    Logs,
    Message,
    Recall,
    Rehello,
    Results,
    Resumed,
    Returned,
    Revoke,
    Safe,
    TaskResult,
    Welcome,
)
from rtml.workers.core import WorkerCore

SESSION = 77


def make() -> WorkerCore:
    return WorkerCore(worker=1, session=SESSION)


def attempt(number: int, *, batch: int = 0, budget: float | None = None, under: int = 0, function: int = 5) -> Attempt:
    return Attempt(id=number, attempt=1, function=function, args=b"", batch=batch, budget=budget, under=under)


def done(number: int) -> TaskResult:
    return TaskResult(id=number, attempt=1, outcome=OK, payload=b"N")


def take_ids(core: WorkerCore, now: float = 0.0) -> list[int]:
    return [started.id for started in core.take(now)]


def test_attempts_run_in_order_and_results_leave_in_one_message() -> None:
    core = make()
    core.receive(Assign([attempt(1), attempt(2)]), 0.0)
    assert take_ids(core) == [1]
    core.finish(done(1))
    assert take_ids(core) == [2]
    core.finish(done(2))
    assert core.take(0.0) == []
    assert core.unsent == 2
    assert core.flush() == [Finished(serial=1, results=[done(1), done(2)])]
    assert core.flush() == []
    assert not core.running


def test_other_messages_keep_their_place_between_results() -> None:
    core = make()
    core.receive(Assign([attempt(1), attempt(2)]), 0.0)
    core.take(0.0)
    core.finish(done(1))
    logs = Logs(lines=[])
    core.relay([logs])
    core.take(0.0)
    core.finish(done(2))
    assert core.flush() == [Finished(1, [done(1)]), logs, Finished(2, [done(2)])]


def test_batch_members_start_together_and_other_batches_do_not_join() -> None:
    core = make()
    core.receive(Assign([attempt(1, batch=4), attempt(2, batch=4), attempt(3, batch=5), attempt(4)]), 0.0)
    assert take_ids(core) == [1, 2]
    assert set(core.running) == {(1, 1), (2, 1)}
    assert take_ids(core) == [3]
    assert take_ids(core) == [4]


def test_a_batch_number_of_another_function_is_another_batch() -> None:
    core = make()
    core.receive(Assign([attempt(1, batch=4), attempt(2, batch=4, function=6)]), 0.0)
    assert take_ids(core) == [1]
    assert take_ids(core) == [2]


def test_late_attempts_are_answered_and_not_started() -> None:
    core = make()
    core.receive(Assign([attempt(1, budget=1.0), attempt(2, budget=3.0), attempt(3)]), 10.0)
    assert core.deadline(attempt(2)) == 13.0
    assert take_ids(core, 11.5) == [2]
    assert take_ids(core, 99.0) == [3]
    (finished,) = core.flush()
    assert isinstance(finished, Finished)
    assert [(result.id, result.outcome) for result in finished.results] == [(1, EXPIRED)]
    assert finished.results[0].error is not None
    assert finished.results[0].error.type == "DeadlineExceeded"


def test_late_members_leave_their_batch() -> None:
    core = make()
    core.receive(Assign([attempt(1, batch=1), attempt(2, batch=1, budget=0.5), attempt(3, batch=1)]), 0.0)
    assert take_ids(core, 1.0) == [1, 3]


def test_recall_returns_only_what_is_not_started() -> None:
    core = make()
    core.receive(Assign([attempt(1), attempt(2), attempt(3)]), 0.0)
    core.take(0.0)
    core.receive(Recall(), 0.0)
    assert core.flush() == [Returned([(2, 1), (3, 1)])]
    assert core.take(0.0) == []
    core.receive(Recall(), 0.0)
    assert core.flush() == [Returned([])], "the dispatcher waits for the answer"


def test_revoke_answers_unstarted_and_marks_running() -> None:
    core = make()
    core.receive(Assign([attempt(1), attempt(2), attempt(3)]), 0.0)
    core.take(0.0)
    core.receive(Revoke([(1, 1), (2, 1), (9, 1)]), 0.0)
    assert core.revoked == {(1, 1)}
    (finished,) = core.flush()
    assert isinstance(finished, Finished)
    assert [(result.id, result.outcome) for result in finished.results] == [(2, CANCELLED)]
    assert take_ids(core) == [3]
    core.finish(done(1))
    assert core.revoked == set()


def test_revoke_of_another_attempt_number_is_ignored() -> None:
    core = make()
    core.receive(Assign([attempt(1)]), 0.0)
    core.receive(Revoke([(1, 2)]), 0.0)
    assert take_ids(core) == [1]


def test_a_second_result_of_an_attempt_is_dropped() -> None:
    core = make()
    core.receive(Assign([attempt(1)]), 0.0)
    core.take(0.0)
    core.finish(done(1))
    core.finish(done(1))
    assert core.unsent == 1


def test_block_gives_back_the_rest_and_lets_only_descendants_in() -> None:
    core = make()
    core.receive(Assign([attempt(1), attempt(2)]), 0.0)
    (outer,) = core.take(0.0)
    core.block(outer)
    assert core.flush() == [Blocked(1, 1, returned=[(2, 1)])]
    core.receive(Assign([attempt(3, under=1), attempt(4), attempt(5, under=1), attempt(6, under=7)]), 0.0)
    assert core.flush() == [Returned([(4, 1), (6, 1)])]
    assert take_ids(core) == [3]
    core.finish(done(3))
    core.resume(outer)
    assert core.flush() == [Finished(1, [done(3)]), Resumed(1, 1), Returned([(5, 1)])]
    core.receive(Assign([attempt(4)]), 0.0)
    assert take_ids(core) == [4]


def test_nested_blocks_look_at_the_innermost() -> None:
    core = make()
    core.receive(Assign([attempt(1)]), 0.0)
    (outer,) = core.take(0.0)
    core.block(outer)
    core.receive(Assign([attempt(2, under=1)]), 0.0)
    (inner,) = core.take(0.0)
    core.block(inner)
    core.receive(Assign([attempt(3, under=1), attempt(4, under=2)]), 0.0)
    assert take_ids(core) == [4]
    core.finish(done(4))
    core.resume(inner)
    core.finish(done(2))
    assert core.blocked
    core.resume(outer)
    assert not core.blocked


def test_a_wait_beside_the_main_thread_takes_nothing_in() -> None:
    core = make()
    core.receive(Assign([attempt(1)]), 0.0)
    (outer,) = core.take(0.0)
    core.block(outer, inline=False)
    core.receive(Assign([attempt(9, under=1)]), 0.0)
    assert core.flush() == [Blocked(1, 1, inline=False), Returned([(9, 1)])]


def test_a_task_that_ends_while_a_thread_of_it_waits_is_not_blocked_any_more() -> None:
    core = make()
    core.receive(Assign([attempt(1)]), 0.0)
    (outer,) = core.take(0.0)
    core.block(outer, inline=False)
    core.finish(done(1))
    assert not core.blocked
    core.resume(outer)
    core.receive(Assign([attempt(2)]), 0.0)
    assert take_ids(core) == [2]


def test_leave_finishes_what_runs_and_refuses_more() -> None:
    core = make()
    core.receive(Assign([attempt(1), attempt(2)]), 0.0)
    core.take(0.0)
    core.receive(Leave(), 0.0)
    core.receive(Assign([attempt(3)]), 0.0)
    assert core.flush() == [Returned([(2, 1)], leaving=True), Returned([(3, 1)], leaving=True)]
    assert core.leaving
    assert list(core.running) == [(1, 1)]


def test_leave_of_an_idle_executor_says_so() -> None:
    core = make()
    core.leave()
    core.leave()
    assert core.flush() == [Returned([], leaving=True)]


def test_results_are_sent_again_until_they_are_safe() -> None:
    core = make()
    core.receive(Welcome(epoch=8), 0.0)
    assert core.epoch == 8
    core.receive(Assign([attempt(number) for number in range(1, 6)]), 0.0)
    for number in (1, 2, 3):
        core.take(0.0)
        core.finish(done(number))
        core.flush()
    core.receive(Safe(1), 0.0)
    (four,) = core.take(0.0)
    core.relay([Logs(lines=[])])
    hello = core.hello()
    assert hello.epoch == 8
    assert hello.holds == [(4, 1), (5, 1)]
    assert core.resume_link() == [Finished(2, [done(2)]), Finished(3, [done(3)])]
    assert core.flush() == []
    core.block(four)
    core.flush()
    assert core.resume_link()[-1] == Blocked(4, 1)
    core.receive(Safe(3), 0.0)
    core.leave()
    assert core.resume_link() == [Blocked(4, 1), Returned([], leaving=True)]


def test_other_messages_are_the_clients() -> None:
    core = make()
    assert core.receive(Define([Function(id=5, name="f")]), 0.0)
    assert core.functions[5].name == "f"
    assert core.receive(Free([1, 2]), 0.0)
    assert core.freed == [1, 2]
    assert not core.receive(Results(serial=1, results=[]), 0.0)
    assert not core.receive(Rehello(epoch=4), 0.0)
    core.rehello(Rehello(epoch=4))
    assert core.epoch == 4


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["assign", "take", "finish", "recall", "revoke", "block", "resume", "flush"]),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_each_attempt_is_answered_exactly_once(steps: list[tuple[str, int]]) -> None:
    """Whatever happens, each assigned attempt is held, or answered by exactly one result or return."""
    core, sent, assigned, stack = make(), list[Message](), list[int](), list[Attempt]()
    for step, value in steps:
        match step:
            case "assign":
                fresh = range(len(assigned) + 1, len(assigned) + 2 + value)
                under = stack[-1].id if stack and core.blocked else 0
                core.receive(Assign([attempt(number, batch=value % 3, under=under) for number in fresh]), 0.0)
                assigned.extend(fresh)
            case "take":
                core.take(0.0)
            case "finish" if core.running and not stack:
                core.finish(done(list(core.running)[-1][0]))
            case "recall":
                core.receive(Recall(), 0.0)
            case "revoke":
                core.receive(Revoke([(number, 1) for number in assigned[:value]]), 0.0)
            case "block" if core.running:
                stack.append(list(core.running.values())[-1])
                core.block(stack[-1])
            case "resume" if stack:
                core.resume(stack.pop())
            case "flush":
                sent.extend(core.flush())
    sent.extend(core.flush())
    answered = [result.id for message in sent if isinstance(message, Finished) for result in message.results]
    answered += [
        key[0]
        for message in sent
        if isinstance(message, Returned | Blocked)
        for key in (message.attempts if isinstance(message, Returned) else message.returned)
    ]
    held = [key[0] for key in core.hello().holds]
    assert sorted(answered + held) == assigned
