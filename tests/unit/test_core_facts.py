"""What tasks and peers declare, and what becomes of it on the way through the core."""

from __future__ import annotations

from rtml.graph.core import Core
from rtml.graph.tables import Send
from rtml.messages import (
    CLIENT,
    EXECUTOR,
    OK,
    SUPERVISOR,
    Assign,
    Attempt,
    Define,
    Finished,
    Function,
    Hello,
    Message,
    Node,
    Options,
    Submit,
    Task,
    TaskResult,
    task_id,
)

PLAIN, MODEL, BATCH = 1, 2, 3
SUPERVISES, GATEWAY, PROGRAM, RUNS = 1, 2, 3, 4
FUNCTIONS = [
    Function(PLAIN, "plain", "m:plain"),
    Function(MODEL, "model", "m:model", options=Options(batch=8), rows=True),
    Function(BATCH, "batch", "m:batch", options=Options(batch=8)),
]


class Engine:
    """A core with one executor, a gateway and a program."""

    def __init__(self) -> None:
        self.core = Core(1)
        self.say(SUPERVISES, Hello(SUPERVISOR, 11), Node("", 1.0, executors=[(1, EXECUTOR, 0)]))
        self.say(RUNS, Hello(EXECUTOR, 14, worker=1))
        self.say(GATEWAY, Hello(CLIENT, 12, data_only=True), Define(FUNCTIONS))
        self.say(PROGRAM, Hello(CLIENT, 13), Define(FUNCTIONS))

    def say(self, peer: int, *messages: Message) -> list[Attempt]:
        """What the executor is told to run then."""
        effects = self.core.handle([(peer, list(messages))], 0.0)
        sent = [message for effect in effects if isinstance(effect, Send) for message in effect.messages]
        return [attempt for message in sent if isinstance(message, Assign) for attempt in message.attempts]

    def finish(self, serial: int, *attempts: Attempt, items: int = 1) -> list[Attempt]:
        results = [TaskResult(attempt.id, attempt.attempt, OK, b"N", items=items) for attempt in attempts]
        return self.say(RUNS, Finished(serial, results))


def test_attempts_say_that_their_submitter_takes_data_only() -> None:
    engine = Engine()
    (root,) = engine.say(GATEWAY, Submit([Task(task_id(12, 1), PLAIN, b"")]))
    assert root.data_only
    engine.finish(1, root)
    (other,) = engine.say(PROGRAM, Submit([Task(task_id(13, 1), PLAIN, b"")]))
    assert not other.data_only


def test_children_of_a_gateways_task_report_to_an_executor() -> None:
    engine = Engine()
    assert engine.say(SUPERVISES, Node("", 2.0, executors=[(1, EXECUTOR, 0), (2, EXECUTOR, 0)])) == []
    engine.say(5, Hello(EXECUTOR, 15, worker=2))
    (root,) = engine.say(GATEWAY, Submit([Task(task_id(12, 1), PLAIN, b"")]))
    own = [worker.session for worker in engine.core.tables.workers.values() if root.id in worker.queue]
    assert own[0] is not None
    assert own[0].peer is not None
    (child,) = engine.say(
        own[0].peer, Define(FUNCTIONS), Submit([Task(task_id(own[0].id, 1), PLAIN, b"", parent=root.id)])
    )
    assert root.data_only
    assert not child.data_only


def test_rows_of_a_dependency_count_for_models_only() -> None:
    for function, together in ((MODEL, 2), (BATCH, 5)):
        engine = Engine()
        made, *waiting = [task_id(13, number) for number in range(1, 7)]
        first = engine.say(
            PROGRAM,
            Submit([Task(made, PLAIN, b""), *(Task(task, function, b"", deps=[(made, None)]) for task in waiting)]),
        )
        batch = engine.finish(1, *first, items=4)
        assert [attempt.id for attempt in batch] == waiting[:together]
