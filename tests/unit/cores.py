"""A `Core` with named peers and a clock that only the test moves.

    engine = Engine(workers=2)
    engine.submit("a", "b")
    assert engine.assigned("w1") == ["b"]
    engine.finish("a", run=0.001)
    assert engine.outcome("a") == "ok"

Peers: "node" is the supervisor, "w1", "w2", ... its sync executors, "l1", ... its async ones (loops), "ann" a client;
others `join`. Tasks and functions have names too. Each method is one wake-up of the core, several are one inside
`with engine.together()`. Every wake-up ends in `check`, and all messages go through the wire format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rtml.graph.check import check
from rtml.graph.core import Core
from rtml.graph.policy import Scheduling
from rtml.graph.state import TaskState
from rtml.graph.tables import Close, Effect, Limits, Send
from rtml.messages import (
    ASYNC_EXECUTOR,
    CLIENT,
    ERROR,
    EXECUTOR,
    OK,
    OUTCOMES,
    SUPERVISOR,
    Ack,
    ActorOptions,
    Assign,
    Attempt,
    Blocked,
    Cancel,
    Define,
    ErrorInfo,
    ExecutorDied,
    Finished,
    Folded,
    Function,
    Hello,
    Message,
    Node,
    ObjectRef,
    Options,
    Results,
    Resumed,
    Returned,
    StartExecutor,
    Submit,
    Task,
    TaskResult,
    WatchResults,
    decode,
    encode,
    task_id,
)

#: A future among the arguments: its task's name, or that with the value that the submitter has already.
Dep = str | tuple[str, bytes | ObjectRef]


class Peer:
    """One end of a link, and what it was told."""

    def __init__(self, role: str, session: int, worker: int = 0) -> None:
        self.role = role
        self.session = session
        self.worker = worker
        #: None while disconnected
        self.link: int | None = None
        self.epoch = 0
        self.heard: list[Message] = []
        self.sequence = 0
        self.defined: set[str] = set()
        #: attempts an executor has: task id -> attempt
        self.hands: dict[int, Attempt] = {}
        self.serial = 0
        #: number of the last `Results`
        self.received = 0


class Engine:
    """See the module. `node` are fields of the `Node` message."""

    def __init__(
        self,
        workers: int = 1,
        loops: int = 0,
        *,
        cpu: float | None = None,
        limits: Limits | None = None,
        uplink: str = "",
        first_session: int = 0,
        scheduling: Scheduling | None = None,
        **node: Any,
    ) -> None:
        self.limits = limits
        self.uplink = uplink
        self.scheduling = scheduling
        self.core = Core(1 + 3 * first_session, limits, uplink, scheduling)
        self.now = 0.0
        #: a test that makes thousands of tasks may leave it out on the way
        self.checked = True
        self.peers: dict[str, Peer] = {}
        self.ids: dict[str, int] = {}
        self.specs: dict[str, Task] = {}
        self.functions: dict[str, Function] = {}
        #: what submitters and watchers were told last
        self.results: dict[str, TaskResult] = {}
        self.watched: dict[str, TaskResult] = {}
        #: all effects: (when, the peer's name, effect)
        self.effects: list[tuple[float, str, Effect]] = []
        self._links: dict[int, str] = {}
        self._last_link = 0
        self._last_session = first_session
        self._arrivals: list[tuple[int, list[Message] | None]] = []
        self._held = 0
        self._offer = node | {"cpu": float(workers) if cpu is None else cpu}
        self.define("f")
        with self.together():
            self._add("node", SUPERVISOR)
            for kind, role, count in (("w", EXECUTOR, workers), ("l", ASYNC_EXECUTOR, loops)):
                for number in range(1, count + 1):
                    self._add(f"{kind}{number}", role, len(self.peers))
            self.hello("node")
            self.node()
            for name in self.peers:
                if name != "node":
                    self.hello(name)
        self.join("ann")
        self.effects.clear()

    # --- wake-ups

    @contextmanager
    def together(self) -> Iterator[None]:
        """Everything that is said inside arrives in one wake-up."""
        self._held += 1
        yield
        self._held -= 1
        self._turn()

    def post(self, name: str, *messages: Message) -> None:
        """A peer says something."""
        link = self.peers[name].link
        assert link is not None, f"{name} is not connected"
        self._arrivals.append((link, decode(encode(list(messages)))))
        self._turn()

    def advance(self, seconds: float) -> None:
        """Time passes; the core is called when it asked to be."""
        until = self.now + seconds
        while (wakeup := self.core.next_wakeup()) is not None and wakeup <= until:
            self.now = max(self.now, wakeup)
            self._turn()
        self.now = until
        self._turn()

    def _turn(self) -> None:
        if self._held:
            return
        arrivals, self._arrivals = self._arrivals, []
        self._carry_out(self.core.handle(arrivals, self.now))

    def knocked(self, worker: int) -> None:
        """Nothing listens any more where this node was."""
        self._carry_out(self.core.knocked(worker, self.now))

    def _carry_out(self, effects: list[Effect]) -> None:
        if self.checked:
            check(self.core)
        effects += self.core.settle()
        if self.checked:
            check(self.core)
        for effect in effects:
            name = self._links.get(getattr(effect, "peer", 0), "a stranger")
            self.effects.append((self.now, name, effect))
            if name == "a stranger":
                self.elsewhere(effect)
            if isinstance(effect, Send) and name in self.peers:
                self._receive(self.peers[name], decode(encode(effect.messages)))
            elif isinstance(effect, Close):
                self._links.pop(effect.peer, None)
                if name in self.peers and self.peers[name].link == effect.peer:
                    self.peers[name].link = None

    def elsewhere(self, effect: Effect) -> None:
        """An effect for none of the peers here."""

    def _receive(self, peer: Peer, messages: list[Message]) -> None:
        peer.heard += messages
        for message in messages:
            if isinstance(message, Assign):
                peer.hands.update({attempt.id: attempt for attempt in message.attempts})
            elif isinstance(message, Results):
                peer.received = message.serial
                self.results.update({self.name_of(result.id): result for result in message.results})
            elif isinstance(message, WatchResults):
                self.watched.update({self.name_of(result.id): result for result in message.results})
            elif isinstance(message, StartExecutor):
                letter = {EXECUTOR: "w", ASYNC_EXECUTOR: "l"}.get(message.role, "a")
                self._add(f"{letter}{message.worker}", message.role, message.worker)

    def stray(self, *messages: Message) -> None:
        """A link on which nobody said Hello."""
        self._arrivals.append((-1, list(messages)))
        self._turn()

    # --- peers

    def _add(self, name: str, role: str, worker: int = 0) -> Peer:
        self._last_session += 1
        peer = self.peers[name] = Peer(role, self._last_session, worker)
        return peer

    def join(self, name: str, /, role: str = CLIENT, worker: int = 0, **hello: Any) -> None:
        """A new peer says Hello."""
        self._add(name, role, worker)
        self.hello(name, **hello)

    def hello(self, name: str, /, **fields: Any) -> None:
        """A peer says Hello, on a new link if it has none; an executor says what it has in its hands."""
        peer = self.peers[name]
        if peer.link is None:
            peer.link = self._last_link = self._last_link + 1
            self._links[peer.link] = name
            peer.defined.clear()
        holds = [(attempt.id, attempt.attempt) for attempt in peer.hands.values()]
        known: dict[str, Any] = {
            "role": peer.role, "session": peer.session, "worker": peer.worker, "epoch": peer.epoch, "holds": holds,
            "name": name,
        }  # fmt: skip
        peer.epoch = self.core.tables.epoch
        self.post(name, Hello(**(known | fields)))

    def node(self, **changed: Any) -> None:
        """The supervisor says what the node offers, and which executors live."""
        self._offer |= changed
        alive = [(peer.worker, peer.role, 0) for peer in self.peers.values() if peer.worker]
        self.post("node", Node("n", executors=alive, **self._offer))

    def gone(self, name: str) -> None:
        """A peer's link breaks."""
        link = self.peers[name].link
        assert link is not None
        del self._links[link]
        self.peers[name].link = None
        self._arrivals.append((link, None))
        self._turn()

    def lose(self, name: str) -> None:
        """A peer's end of its link breaks, and the dispatcher has not noticed."""
        self.peers[name].link = None

    def die(self, name: str, running: Sequence[str] = (), reason: str = "signal SIGSEGV") -> None:
        """The supervisor reports an executor's death, with the tasks that were inside of a function."""
        peer = self.peers.pop(name)
        self.post("node", ExecutorDied(peer.worker, reason, [self.ids[task] for task in running]))

    def restart(self) -> None:
        """The dispatcher is killed and started again: all links are gone, and it knows nothing."""
        self.core = Core(self.core.tables.epoch + 1, self.limits, self.uplink, self.scheduling)
        self._links.clear()
        for peer in self.peers.values():
            peer.link = None

    # --- submitters

    def define(
        self, name: str, /, *, asynchronous: bool = False, rows: bool = False, method: str = "", **options: Any
    ) -> None:
        """A function; submitters send its definition before its first use."""
        number = len(self.functions) + 1
        chosen = Options(**options)
        self.functions[name] = Function(
            number, name, f"m:{name}", asynchronous=asynchronous, options=chosen, rows=rows, method=method
        )

    def submit(
        self, *names: str, of: str = "f", by: str = "", parent: str = "", deps: Iterable[Dep] = (),
        handles: Sequence[str] = (), args: bytes | ObjectRef = b"", batch_key: str = "", items: int = 1,
        trace: str = "", context: int = 0, actor: str = "", hosts: ActorOptions | None = None, stream: int = 0,
        **options: Any,
    ) -> None:  # fmt: skip
        """Calls of the function `of`, by its parent's executor or by "ann"; on an `actor`, or to create one."""
        by = by or (self.holder(parent) if parent else "ann")
        peer = self.peers[by]
        tasks = []
        for name in names:
            if name not in self.ids:
                peer.sequence += 1
                self.ids[name] = task_id(peer.session, peer.sequence)
            task = self.specs[name] = Task(
                self.ids[name],
                self.functions[of].id,
                args,
                parent=self.ids[parent] if parent else 0,
                deps=[self._dep(dep) for dep in deps] or None,
                handles=[self.ids[handle] for handle in handles] or None,
                options=Options(**options) if options else None,
                batch_key=batch_key,
                items=items,
                trace=trace,
                context=context,
                actor=self.ids[actor or name] if actor or hosts else 0,
                hosts=hosts,
                stream=stream,
            )
            tasks.append(task)
        define = [] if of in peer.defined else [Define([self.functions[of]])]
        peer.defined.add(of)
        self.post(by, *define, Submit(tasks))

    def _dep(self, dep: Dep) -> tuple[int, bytes | ObjectRef | None]:
        return (self.ids[dep], None) if isinstance(dep, str) else (self.ids[dep[0]], dep[1])

    def again(self, *names: str, by: str = "ann") -> None:
        """Sends unresolved tasks again, as they were, on a link where their functions are not defined yet."""
        self.post(by, Define(list(self.functions.values())), Submit([self.specs[name] for name in names]))

    def cancel(self, *names: str, by: str = "ann") -> None:
        """Cancels tasks."""
        self.post(by, Cancel([self.ids[name] for name in names]))

    def ack(self, by: str = "ann") -> None:
        """Acknowledges all results so far."""
        self.post(by, Ack(self.peers[by].received))

    # --- executors

    def holder(self, task: str) -> str:
        """The executor that has an attempt of the task."""
        return next(name for name, peer in self.peers.items() if self.ids[task] in peer.hands)

    def finish(
        self, *names: str, value: bytes | ObjectRef = b"v", error: str = "", retryable: bool = False, run: float = 0.0,
        handles: Sequence[str] = (), on: str = "", attempt: int = 0, outcome: int | None = None, batch_key: str = "",
        items: int = 1, folded: Folded | None = None,
    ) -> None:  # fmt: skip
        """An executor reports these attempts as ended, in one message."""
        peer = self.peers[on or self.holder(names[0])]
        assert on or all(self.ids[name] in peer.hands for name in names), "these are not all with one executor"
        on = on or self.holder(names[0])
        results = []
        for name in names:
            held = peer.hands.get(self.ids[name])
            if held and attempt in (0, held.attempt):
                del peer.hands[self.ids[name]]
            result = TaskResult(
                self.ids[name],
                attempt or (held.attempt if held else 1),
                (ERROR if error else OK) if outcome is None else outcome,
                b"" if error else value,
                error=ErrorInfo(error, "it failed", chain=[]) if error else None,
                run=run,
                retryable=retryable,
                handles=[self.ids[handle] for handle in handles] or None,
                batch_key=batch_key,
                items=items,
                folded=folded,
            )
            results.append(result)
        peer.serial += 1
        self.post(on, Finished(peer.serial, results))

    def stored(self, on: str, name: str) -> ObjectRef:
        """A new object in the shared memory of an executor."""
        peer = self.peers[on]
        peer.sequence += 1
        return ObjectRef(task_id(peer.session, peer.sequence), 1 << 20, name)

    def block(self, name: str, returned: Sequence[str] = (), inline: bool = True) -> None:
        """A running task waits in `get`; its executor gives back what it had not started."""
        on = self.holder(name)
        attempt = self.peers[on].hands[self.ids[name]].attempt
        self.post(on, Blocked(self.ids[name], attempt, self._give(on, returned), inline))

    def resume(self, name: str) -> None:
        """It goes on."""
        on = self.holder(name)
        self.post(on, Resumed(self.ids[name], self.peers[on].hands[self.ids[name]].attempt))

    def give_back(self, on: str, *names: str, leaving: bool = False) -> None:
        """An executor returns attempts that it had not started."""
        self.post(on, Returned(self._give(on, names), leaving))

    def _give(self, on: str, names: Sequence[str]) -> list[tuple[int, int]]:
        hands = self.peers[on].hands
        return [(self.ids[name], hands.pop(self.ids[name]).attempt) for name in names]

    # --- what is to be seen

    def name_of(self, task: int) -> str:
        """The name of a task id."""
        return next((name for name, known in self.ids.items() if known == task), f"{task:x}")

    def assigned(self, worker: str) -> list[str]:
        """Tasks in the hands of an executor, in order."""
        return [self.name_of(task) for task in self.peers[worker].hands]

    def attempt(self, task: str) -> Attempt:
        """The attempt as its executor was told it."""
        return self.peers[self.holder(task)].hands[self.ids[task]]

    def outcome(self, task: str) -> str:
        """How the task ended, as its submitter was told: "ok", "error WorkerDied"; "" if it was not."""
        result = self.results.get(task)
        if result is None:
            return ""
        return " ".join([OUTCOMES[result.outcome], *([result.error.type] if result.error else [])])

    def error(self, task: str) -> ErrorInfo:
        """The error that the task's submitter was told."""
        error = self.results[task].error
        assert error is not None
        return error

    def heard(self, name: str, kind: type[Message]) -> list[Message]:
        """What a peer was told of one kind, since the last call."""
        peer = self.peers[name]
        found = [message for message in peer.heard if isinstance(message, kind)]
        peer.heard = [message for message in peer.heard if not isinstance(message, kind)]
        return found

    def task(self, name: str) -> TaskState:
        """The core's record."""
        return self.core.tables.tasks[self.ids[name]]

    def known(self, name: str) -> bool:
        """Whether the core still has a record of the task."""
        return self.ids[name] in self.core.tables.tasks
