"""The language of tests/transcripts: commands for an `Engine`, and how its effects are written down.

A block is some command lines, `----`, and what the dispatcher then sent; an empty line ends it. All commands of a block
arrive in one wake-up, but for those that are no messages: `engine`, `define`, `restart`, `advance`, `show`. Words with
`=` are options of the command; lists are written `(a,b)`, yes and no are booleans. `finish a stores=o` makes the value
an object `o` in shared memory; everything else is a method of `Engine`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from rtml.graph.state import State, WorkerState
from rtml.graph.tables import Ahead, Close, Effect, Knock, LetGo, Limits, Send, Sweep, Unlink
from rtml.messages import (
    CANCELLED,
    OUTCOMES,
    Ack,
    ActorOptions,
    Assign,
    Attempt,
    Define,
    Free,
    Interrupt,
    KillExecutor,
    Logs,
    LoopLag,
    Message,
    ObjectRef,
    Query,
    Refused,
    Rehello,
    Release,
    Results,
    Revoke,
    Safe,
    StartExecutor,
    TaskResult,
    Unwatch,
    Watch,
    WatchResults,
    Welcome,
)
from tests.unit.cores import Engine

SEPARATOR = "----"

#: Commands that are not messages to the core.
_IMMEDIATE = {"engine", "define", "restart", "advance", "show"}

#: Methods of `Engine` that are commands as they are.
_METHODS = {
    "ack", "advance", "again", "block", "cancel", "define", "die", "finish", "gone", "hello", "join", "lose", "node",
    "restart", "resume", "submit",
}  # fmt: skip


def rewritten(text: str) -> str:
    """The transcript with what really happens."""
    scene = Scene()
    blocks = []
    for block in text.strip("\n").split("\n\n"):
        commands, separator, _ = block.partition(f"\n{SEPARATOR}")
        lines = [line for line in commands.splitlines() if not line.startswith("#")]
        blocks.append("\n".join([commands, SEPARATOR, *scene.play(lines)]) if separator else block)
    return "\n\n".join(blocks) + "\n"


def _parsed(text: str) -> object:
    if text.startswith("("):
        return [_parsed(part) for part in text.strip("()").split(",") if part]
    if text in {"yes", "no"}:
        return text == "yes"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d*\.\d+", text) else text


class Scene:
    """One transcript's engine."""

    def __init__(self) -> None:
        self.engine = Engine(0)
        self.objects: dict[str, ObjectRef] = {}
        self._shown: list[str] = []

    def play(self, lines: list[str]) -> list[str]:
        """What the commands bring about."""
        self._shown = []
        told = len(self.engine.effects)
        timed = any(line.startswith("advance") for line in lines)
        first = next((number for number, line in enumerate(lines) if line.split()[0] not in _IMMEDIATE), len(lines))
        for line in lines[:first]:
            self._do(line)
        if lines[0].startswith("engine"):
            told = 0
        if first < len(lines):
            with self.engine.together():
                for line in lines[first:]:
                    self._do(line)
        out = []
        for when, peer, effect in self.engine.effects[told:]:
            prefix = f"{when:7.3f} " if timed else ""
            out += [prefix + line for line in self._effect(peer, effect)]
        return [*out, *self._shown] or ["nothing"]

    def _do(self, line: str) -> None:
        command, *words = line.split()
        options = {name: _parsed(text) for name, _, text in (word.partition("=") for word in words if "=" in word)}
        plain = [_parsed(word) for word in words if "=" not in word]
        own: Callable[..., None] | None = getattr(self, f"_do_{command}", None)
        if own is None:
            assert command in _METHODS, f"no such command: {line}"
            own = getattr(self.engine, command)
        try:
            own(*plain, **options)
        except Exception as error:
            error.add_note(f"in the command {line!r}")
            raise

    # --- commands

    def _do_engine(self, **options: Any) -> None:
        bounds = {name: options.pop(name) for name in list(options) if name in Limits._fields}
        self.engine = Engine(limits=Limits(**bounds) if bounds else None, **options)
        self.objects.clear()
        self._shown.append("peers: " + " ".join(self.engine.peers))

    def _do_finish(self, *names: str, stores: str = "", value: str = "v", **options: Any) -> None:
        payload: bytes | ObjectRef = str(value).encode()
        if stores:
            on = str(options.get("on") or self.engine.holder(names[0]))
            payload = self.objects[stores] = self.engine.stored(on, stores)
        self.engine.finish(*names, value=payload, **options)

    def _do_create(self, *names: str, actor_name: str = "", concurrency: int = 1, **options: Any) -> None:
        """Actors."""
        self.engine.submit(*names, hosts=ActorOptions(actor_name, concurrency), **options)

    def _do_drop(self, *names: str) -> None:
        """What an executor answers to Revoke."""
        self.engine.finish(*names, outcome=CANCELLED)

    def _do_returned(self, on: str, *names: str, leaving: bool = False) -> None:
        self.engine.give_back(on, *names, leaving=leaving)

    def _do_watch(self, *names: str, by: str) -> None:
        self.engine.post(by, Watch([self.engine.ids[name] for name in names]))

    def _do_unwatch(self, *names: str, by: str) -> None:
        self.engine.post(by, Unwatch([self.engine.ids[name] for name in names]))

    def _do_release(self, *names: str, by: str = "ann") -> None:
        self.engine.post(by, Release([self.objects[name].id for name in names]))

    def _do_lag(self, seconds: float, on: str, task: str) -> None:
        self.engine.post(on, LoopLag(self.engine.ids[task], seconds))

    def _do_logs(self, task: str, text: str, on: str) -> None:
        self.engine.post(on, Logs([(self.engine.ids[task], "f", 0, "out", text)]))

    def _do_query(self, what: str, by: str = "ann") -> None:
        self.engine.post(by, Query(1, what))

    def _do_stray(self) -> None:
        self.engine.stray(Ack(1))

    def _do_show(self) -> None:
        tables = self.engine.core.tables
        for task in tables.tasks.values():
            line = f"{self.engine.name_of(task.id)} {State.NAMES[task.state]}"
            if task.state is State.ASSIGNED and task.worker is not None:
                line += f" to {self._executor(task.worker)}, attempt {task.attempt}"
            if task.blocked:
                line += ", blocked"
            self._shown.append(line)
        for node in tables.nodes.values():
            free = {"cpu": node.free_cpu, **node.free_extra}
            self._shown.append("free: " + ", ".join(f"{name}={amount:g}" for name, amount in free.items()))

    # --- writing down

    def _executor(self, worker: WorkerState) -> str:
        names = (name for name, peer in self.engine.peers.items() if peer.worker == worker.id)
        return next(names, f"executor {worker.id}")

    def _effect(self, peer: str, effect: Effect) -> Iterable[str]:
        if isinstance(effect, Send):
            for message in effect.messages:
                first, *more = self._message(message)
                yield f"{peer} <- {first}"
                yield from (f"{'':{len(peer)}}      {line}" for line in more)
        elif isinstance(effect, Close):
            yield f"{peer}: link closed"
        elif isinstance(effect, Unlink):
            yield f"shared memory: {effect.ref.segment} removed"
        elif isinstance(effect, Sweep):
            yield f"shared memory: all of session {effect.session} removed but {sorted(effect.keep)}"
        elif isinstance(effect, Ahead):
            yield f"to be fetched: {[ref.segment for ref in effect.refs]}"
        elif isinstance(effect, Knock):
            yield f"to be knocked at: {effect.data}"
        elif isinstance(effect, LetGo):
            yield f"copies that nobody needs: {[f'{number:#x}' for number in effect.objects]}"
        else:
            yield f"answer to {peer}: {effect.query.what}"

    def _message(self, message: Message) -> list[str]:
        kind = type(message).__name__
        if isinstance(message, Assign):
            return self._several(kind, [self._attempt(attempt) for attempt in message.attempts])
        if isinstance(message, Results):
            return self._several(f"{kind} {message.serial}", [self._result(result) for result in message.results])
        if isinstance(message, WatchResults):
            return self._several(kind, [self._result(result) for result in message.results])
        if isinstance(message, Revoke):
            return [f"{kind} " + " ".join(f"{self._name(task)}#{attempt}" for task, attempt in message.attempts)]
        if isinstance(message, Define):
            return [f"{kind} " + " ".join(function.name for function in message.functions)]
        if isinstance(message, Free):
            return [f"{kind} " + " ".join(self._object(number) for number in message.objects)]
        if isinstance(message, Logs):
            return self._several(kind, [f"{self._name(line[0])}: {line[4]}" for line in message.lines])
        detail = ""
        if isinstance(message, Welcome | Rehello):
            detail = f" epoch={message.epoch}"
        elif isinstance(message, Safe):
            detail = f" {message.serial}"
        elif isinstance(message, Refused):
            detail = f": {message.reason}"
        elif isinstance(message, StartExecutor):
            detail = f" {message.role} {message.worker}"
        elif isinstance(message, KillExecutor):
            detail = f" {message.worker}: {message.reason}"
        elif isinstance(message, Interrupt):
            detail = f" {message.worker}"
        return [kind + detail]

    def _several(self, kind: str, lines: list[str]) -> list[str]:
        return [f"{kind}: {lines[0]}"] if len(lines) == 1 else [f"{kind}:", *lines]

    def _name(self, task: int) -> str:
        return self.engine.name_of(task)

    def _object(self, number: int) -> str:
        return next((name for name, ref in self.objects.items() if ref.id == number), f"{number:x}")

    def _payload(self, payload: bytes | ObjectRef) -> str:
        return f"@{payload.segment}" if isinstance(payload, ObjectRef) else payload.decode()

    def _attempt(self, attempt: Attempt) -> str:
        facts = {
            "deps": ",".join(self._payload(dep) for dep in attempt.deps or ()),
            "budget": "" if attempt.budget is None else f"{attempt.budget:.6g}",
            "batch": str(attempt.batch or ""),
            "under": self._name(attempt.under) if attempt.under else "",
            "chain": ">".join(attempt.chain or ()),
        }
        given = [f"{name}={text}" for name, text in facts.items() if text]
        return " ".join([f"{self._name(attempt.id)}#{attempt.attempt}", *given])

    def _result(self, result: TaskResult) -> str:
        text = f"{self._name(result.id)} {OUTCOMES[result.outcome]}"
        if result.error is None:
            return f"{text} {self._payload(result.payload)}"
        chain = f" ({' > '.join(result.error.chain)})" if result.error.chain else ""
        return f"{text} {result.error.type}: {result.error.message}{chain}"
