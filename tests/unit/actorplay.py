"""Random work with actors and streams on a tree of dispatchers: what dies, and what must be true all the time.

Beside the invariants that every core checks after every step:

* an ordered actor begins the calls of one submitter in the order of their submission, unless one is tried again;
* a call whose `retries` are 0 is begun at most once, whatever dies;
* every call ends, and nothing is left when nobody wants anything any more.
"""

from __future__ import annotations

import random
from collections import Counter

from rtml.graph.state import State
from rtml.messages import DISPATCHER, STOP, ActorOptions, Cancel, StartExecutor, Unwatch
from tests.unit.cores import Engine
from tests.unit.streamplay import Streams
from tests.unit.trees import Member, Tree

#: What a step may be, and how often it is chosen.
STEPS = {
    "create": 2, "work": 4, "call": 8, "run": 10, "begin": 4, "finish": 4, "advance": 3, "cut": 0.4, "connect": 1,
    "crash": 0.4, "lose": 0.15, "kill": 0.15, "stop": 0.2, "settle": 8, "stream": 1, "flow": 6, "cancel": 0.3,
}  # fmt: skip


class ActorPlay:
    """A random run of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tree = Tree(nodes=self.random.randint(2, 4), workers=1, root_workers=seed % 3 % 2, gpu=1.0)
        root = self.tree.root
        for restarts in (0, 3):
            root.define(f"C{restarts}", cpu=0.0, gpu=0.1, retries=restarts)
            root.define(f"N{restarts}", cpu=0.0, retries=restarts)
        for retries in (0, 3):
            root.define(f"m{retries}", method="m", cpu=0.0, retries=retries)
        root.define("stop", method=STOP, cpu=0.0, retries=5)
        self.faults = seed % 4 != 0
        self.away: set[str] = set()
        self.number = 0
        self.creators: dict[str, Member] = {}
        #: handles of actors that a task was given
        self.given: dict[str, list[str]] = {}
        self.submitted: dict[str, Engine] = {}
        #: of a call: its actor, its submitter, its function
        self.calls: dict[str, tuple[str, tuple[str, str], str]] = {}
        #: calls that a process is inside of
        self.inside: dict[tuple[str, str], str] = {}
        self.begun: Counter[str] = Counter()
        self.last: dict[tuple[str, tuple[str, str]], int] = {}
        self.streams = Streams(self.random)

    @property
    def members(self) -> list[Member]:
        return [self.tree.root, *self.tree.nodes.values()]

    def name(self, kind: str) -> str:
        self.number += 1
        return f"{kind}{self.number}"

    def pick(self, choices: object) -> object:
        found = list(choices)  # type: ignore[call-overload]
        return self.random.choice(found) if found else None

    def step(self) -> None:
        what = self.random.choices(list(STEPS), list(STEPS.values()))[0]
        getattr(self, what)()
        if self.random.random() < 0.6:
            self.settle()

    # --- what programs do

    def create(self) -> None:
        if len(self.creators) >= 4:
            return
        member, name = self.random.choice(self.members), self.name("actor")
        of = self.random.choice(["C", "C", "N"]) + self.random.choice("003")
        self.creators[name] = member
        member.submit(name, of=of, hosts=ActorOptions())

    def work(self) -> None:
        """A task with handles of some actors, wherever it may run."""
        member, name = self.random.choice(self.members), self.name("t")
        known = [actor for actor, creator in self.creators.items() if creator is member]
        self.given[name] = self.random.sample(known, min(len(known), 2))
        self.submitted[name] = member
        member.submit(name, handles=self.given[name])

    def tasks(self) -> list[tuple[Member, str]]:
        return [
            (member, task)
            for member in self.members
            for peer in member.peers
            if peer.startswith("w") and member.peers[peer].link is not None
            for task in member.assigned(peer)[:1]
        ]

    def callers(self) -> list[tuple[Member, str, str]]:
        """(where, the running task or "" for the client, actor)."""
        found = [(member, "", actor) for actor, member in self.creators.items() if member in self.members]
        found += [(member, task, actor) for member, task in self.tasks() for actor in self.given.get(task, ())]
        return found

    def call(self) -> None:
        if not (callers := self.callers()):
            return
        member, parent, actor = self.random.choice(callers)
        of = self.random.choice(["m0", "m0", "m3"])
        for _ in range(self.random.choice((1, 1, 3))):
            self._call(member, parent, actor, of)

    def _call(self, member: Member, parent: str, actor: str, of: str) -> None:
        name = self.name("c")
        by = member.holder(parent) if parent else "ann"
        self.calls[name] = (actor, (member.name, by), of)
        if not parent:
            self.submitted[name] = member
        member.submit(name, of=of, actor=actor, parent=parent, by=by)

    def stream(self) -> None:
        """A client asks for a stream, which runs wherever there is room."""
        member, name = self.random.choice(self.members), self.name("s")
        self.submitted[name] = member
        self.streams.submit(member, name)

    def flow(self) -> None:
        """Producers and consumers of streams go on."""
        for member, task in self.tasks():
            if task in self.streams.made:
                self.streams.produce(member, task)
        self.streams.consume()

    def cancel(self) -> None:
        """A client does not want something any more."""
        if self.submitted:
            name = self.random.choice(list(self.submitted))
            if self.submitted[name] in self.members:
                self.submitted[name].cancel(name)

    def kill(self) -> None:
        if callers := self.callers():
            member, parent, actor = self.random.choice(callers)
            member.post(member.holder(parent) if parent else "ann", Cancel([member.ids[actor]]))

    def stop(self) -> None:
        if callers := self.callers():
            self._call(*self.random.choice(callers), "stop")

    # --- what processes do

    def processes(self) -> list[tuple[Member, str]]:
        return [
            (member, name)
            for member in self.members
            for name, peer in member.peers.items()
            if name.startswith("a") and name != "ann" and peer.link is not None
        ]

    def begin(self) -> None:
        """A process goes into the next call that it has."""
        if not (processes := self.processes()):
            return
        member, process = self.random.choice(processes)
        calls = [name for name in member.assigned(process) if name in self.calls]
        if (member.name, process) in self.inside or not calls:
            return
        call = calls[0]
        actor, submitter, of = self.calls[call]
        assert actor in member.assigned(process), f"{call} is not in its actor's process"
        self.begun[call] += 1
        if of == "m0":
            assert self.begun[call] == 1, f"{call} is begun again"
            assert self.last.get((actor, submitter), 0) < int(call[1:]), f"{call} is begun too late"
            self.last[actor, submitter] = int(call[1:])
        self.inside[member.name, process] = call

    def finish(self) -> None:
        """Something that runs ends."""
        self._finish_task() if self.random.random() < 0.3 else self._finish_call()

    def _finish_task(self) -> None:
        if tasks := [found for found in self.tasks() if found[1] not in self.streams.made]:
            member, task = self.random.choice(tasks)
            member.finish(task, run=self.random.choice([1e-4, 1e-2, 1.0]), handles=self.given.get(task, [])[:1])

    def _finish_call(self) -> None:
        inside = [(m, p) for m, p in self.processes() if (m.name, p) in self.inside]
        if not inside:
            return
        member, process = self.random.choice(inside)
        call = self.inside.pop((member.name, process))
        if call in member.assigned(process):
            member.finish(call, on=process)
            if self.calls[call][2] == "stop":
                self._leave(member, process)

    def run(self) -> None:
        self.greet()
        self.begin()
        self._finish_call()

    def greet(self) -> None:
        """Processes of actors that were started say Hello; those that are to go do."""
        for member in self.members:
            for message in member.heard("node", StartExecutor):
                assert isinstance(message, StartExecutor)
                for name in [name for name, peer in member.peers.items() if peer.worker == message.worker]:
                    member.hello(name)
            for name in [name for name in member.peers if name.startswith("w")]:
                worker = member.core.tables.workers.get(member.peers[name].worker)
                if worker is not None and worker.dying:
                    member.die(name, reason="killed: does not react to a cancellation")
        for member, process in self.processes():
            worker = member.core.tables.workers.get(member.peers[process].worker)
            if worker is not None and worker.dying:
                self.inside.pop((member.name, process), None)
                member.die(process, reason="killed: its actor was ended")
            elif worker is not None and worker.actor is not None and worker.actor.leaving:
                self._leave(member, process)

    def _leave(self, member: Member, process: str) -> None:
        for name in member.assigned(process):
            if name in self.creators:
                member.finish(name, on=process)
        member.die(process, reason="left")

    def crash(self) -> None:
        """A process of an actor dies, inside of a call or not."""
        if self.faults and (processes := self.processes()):
            member, process = self.random.choice(processes)
            call = self.inside.pop((member.name, process), "")
            held = member.assigned(process)
            running = [call] if call in held else [name for name in held if name in self.creators][:1]
            member.die(process, running=running)

    # --- what machines do

    def advance(self) -> None:
        self.tree.advance(self.random.choice([0.001, 0.01, 0.1]))

    def cut(self) -> None:
        name = self.random.choice(sorted(self.tree.nodes))
        if self.faults and name not in self.away:
            self.away.add(name)
            self.tree.cut(name)

    def connect(self) -> None:
        for name in sorted(self.away)[:1]:
            self.away.discard(name)
            self.tree.connect(name)

    def lose(self) -> None:
        """A node dies for ever, with its clients and executors."""
        if not self.faults or len(self.tree.nodes) < 2:
            return
        name = self.random.choice(sorted(self.tree.nodes))
        if name in self.away:
            return
        refused = self.random.random() < 0.5
        self.tree.kill(name, refused=refused)
        self.tree.advance(1.0 if refused else 12.0, step=0.5)

    def settle(self) -> None:
        self.tree.settle()
        self.greet()
        self.tree.settle()

    # --- the end

    def end(self) -> None:
        """Everything is repaired, everybody does what he is given, and every call ends."""
        for name in sorted(self.away):
            self.tree.connect(name)
        self.away.clear()
        for _ in range(600):
            self._turn()
            if not self.missing():
                break
        else:
            raise AssertionError(f"never ended: {self.missing()}")
        for member in self.members:
            member.post("ann", Unwatch([member.ids[actor] for actor in self.creators]))
        for _ in range(60):
            self._turn()
        # What another dispatcher was told it says to be safe only with its next message, and what is inside of that.
        unsafe: set[int] = set()
        for member in self.members:
            for task in member.core.tables.tasks.values():
                if task.state is State.DONE and task.session.role == DISPATCHER:
                    unsafe |= {task.id, *task.inner}
        for member in self.members:
            left = [member.name_of(task.id) for task in member.core.tables.tasks.values() if task.id not in unsafe]
            assert not left, f"left at {member.name}: {left}"

    def _turn(self) -> None:
        self.settle()
        for member, process in self.processes():
            for _ in member.assigned(process):
                self._drive(member, process)
        self.flow()
        for member, task in self.tasks():
            if task in self.streams.made:
                continue
            waits = [
                call
                for call, (_, (where, by), _) in self.calls.items()
                if (where, by) == (member.name, member.holder(task)) and call not in member.results
            ]
            if not waits or self.random.random() < 0.2:
                member.finish(task)
        for member in self.members:
            for name, peer in member.peers.items():
                if peer.link is not None and name != "node":
                    member.ack(name)
        self.tree.advance(0.06)

    def _drive(self, member: Member, process: str) -> None:
        if process not in member.peers:
            return
        call = self.inside.pop((member.name, process), None)
        if call is None:
            for name in member.assigned(process):
                if name in self.calls:
                    call = name
                    break
        if call is not None and call in member.assigned(process):
            member.finish(call, on=process)
            if self.calls[call][2] == "stop":
                self._leave(member, process)

    def missing(self) -> list[str]:
        return [name for name, member in self.submitted.items() if member in self.members and not member.outcome(name)]
