"""The shell around the real `Core`, and the checks of everything that leaves it."""

from __future__ import annotations

from rtml.graph.check import check
from rtml.graph.core import Core
from rtml.graph.tables import Answer, Close, Effect, Limits, Send, Sweep, Unlink
from rtml.messages import CANCELLED, OK, Assign, Message, Reply, Results, TaskResult, session_of
from tests.sim.network import Link, Peer
from tests.sim.world import Violation, World

#: `check` costs time in proportion to all tasks, so it is not made at every step of a large run.
_CHECK_TASKS = 400


class Dispatcher:
    """One dispatcher after the other: a new incarnation knows nothing of the last."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.core: Core | None = None
        self.epoch = 0
        self.links: dict[int, Link] = {}
        self._numbers = 0
        self._inbox: list[tuple[int, list[Message] | None]] = []
        self._wake_at: float | None = None
        self._unchecked = 0
        #: of this incarnation: task -> number of the attempt handed out last
        self._attempts: dict[int, int] = {}
        #: and that of the attempt beside which it was, if it was a spare
        self._beside: dict[int, int] = {}
        #: of this incarnation: task -> (outcome, attempt, payload)
        self._results: dict[int, tuple[object, ...]] = {}
        self._serials: dict[int, int] = {}

    # --- life

    def start(self) -> None:
        """A new incarnation."""
        settings = self.world.settings
        self.epoch += 1
        limits = Limits(
            session_grace=settings.session_grace,
            worker_grace=settings.worker_grace,
            recovery=settings.recovery,
            hedge_share=1.0,
        )
        self.core = Core(self.epoch, limits)
        self.core.hedging.runs_min = 1
        self._attempts.clear()
        self._beside.clear()
        self._results.clear()
        self._serials.clear()
        self.world.log("dispatcher", "starts, epoch", self.epoch)

    def die(self) -> None:
        """kill -9."""
        self.world.log("dispatcher", "dies")
        self.world.dispatcher_deaths += 1
        self.core = None
        self._inbox.clear()
        self._wake_at = None
        for link in list(self.links.values()):
            link.cut()
        self.links.clear()

    def accept(self, peer: Peer) -> Link | None:
        """A new link, if there is a dispatcher."""
        if self.core is None:
            return None
        self._numbers += 1
        link = self.links[self._numbers] = Link(self.world, self._numbers, peer, self)
        return link

    # --- the loop

    def arrived(self, link: Link, messages: list[Message]) -> None:
        """A frame came."""
        if link.number in self.links:
            self._inbox.append((link.number, messages))
            self._wake(1e-6)

    def lost(self, link: Link) -> None:
        """A link is closed."""
        if self.links.pop(link.number, None) is not None:
            self._inbox.append((link.number, None))
            self._wake(1e-6)

    def _wake(self, delay: float) -> None:
        at = self.world.now + delay
        if self._wake_at is None or at < self._wake_at:
            self._wake_at = at
            self.world.at(delay, self._turn, self.epoch, at)

    def _turn(self, epoch: int, at: float) -> None:
        core = self.core
        if core is None or epoch != self.epoch or at != self._wake_at:
            return
        self._wake_at = None
        arrivals, self._inbox = self._inbox, []
        for peer, messages in arrivals:
            self.world.log("dispatcher", "<-", peer, *("closed",) if messages is None else messages)
        effects = core.handle(arrivals, self.world.now)
        for effect in effects:
            self._execute(effect)
        for effect in core.settle():
            self._execute(effect)
        core.take_ended()
        self._check(core)
        wakeup = core.next_wakeup()
        if wakeup is not None:
            self._wake(max(1e-6, wakeup - self.world.now))

    def _check(self, core: Core) -> None:
        self._unchecked += len(core.tables.tasks) + 10
        if self._unchecked >= _CHECK_TASKS or len(core.tables.tasks) < 10:
            self._unchecked = 0
            check(core)

    def _execute(self, effect: Effect) -> None:
        link = self.links.get(getattr(effect, "peer", -1))
        if isinstance(effect, Send):
            self.world.log("dispatcher", "->", effect.peer, *effect.messages)
            for message in effect.messages:
                self._inspect(message, effect.peer)
            if link is not None:
                link.down(effect.messages)
        elif isinstance(effect, Close):
            if self.links.pop(effect.peer, None) is not None and link is not None:
                link.close_by_dispatcher()
        elif isinstance(effect, Unlink):
            self.world.memory.pop(effect.ref.id, None)
        elif isinstance(effect, Sweep):
            for number in list(self.world.memory):
                if session_of(number) == effect.session and str(number) not in effect.keep:
                    del self.world.memory[number]
        elif isinstance(effect, Answer) and link is not None:
            link.down([Reply(effect.query.id, "")])

    # --- what must never be sent

    def _inspect(self, message: Message, peer: int) -> None:
        if isinstance(message, Assign):
            for attempt in message.attempts:
                if attempt.budget is not None and attempt.budget <= 0:
                    raise Violation(f"task {attempt.id} is handed out {-attempt.budget:.6f} s after its deadline")
                if attempt.deps is not None and any(payload is None for payload in attempt.deps):
                    raise Violation(f"task {attempt.id} is handed out with an unresolved dependency")
                if not self.world.sessions_end and attempt.attempt <= self._attempts.get(attempt.id, 0):
                    raise Violation(f"task {attempt.id}: attempt {attempt.attempt} was handed out before")
                if not self.world.sessions_end and attempt.id in self._results:
                    raise Violation(f"task {attempt.id} is handed out after its end")
                self._attempts[attempt.id] = attempt.attempt
                self._beside.pop(attempt.id, None)
                task = None if self.core is None else self.core.tables.tasks.get(attempt.id)
                if task is not None and task.pair is not None and task.pair.attempt == attempt.attempt:
                    self._beside[attempt.id] = task.attempt
        elif isinstance(message, Results):
            for result in message.results:
                self._inspect_result(result)

    def _inspect_result(self, result: TaskResult) -> None:
        handed_out = self._attempts.get(result.id)
        expected = {None, result.attempt}
        if result.outcome == OK and handed_out not in expected and self._beside.get(result.id) not in expected - {None}:
            raise Violation(f"task {result.id}: result of attempt {result.attempt}, not of {handed_out}")
        if result.outcome == CANCELLED and result.error is None:
            return  # somebody who came back cancelled what is not known
        content = (result.outcome, result.attempt, result.payload)
        if self._results.setdefault(result.id, content) != content and not self.world.sessions_end:
            raise Violation(f"task {result.id} has two results: {self._results[result.id]} and {content}")
