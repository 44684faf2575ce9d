"""Which submissions are refused at once, because they could not end in time.

The question is asked once for a graph, when its root arrives, and only of submissions that ask for it; what has been
let in is never refused later, it can only expire. A graph is refused if

* its tenant has as many unfinished graphs as it may have, or
* it has a deadline, and its wait for the work before it and its own time, as predicted, are more than its budget, or
* those that were promised their deadlines would miss them if it came before them.

A wait is predicted with so many standard deviations to spare as it takes for the portion of promises that are broken to
be `BROKEN`: each one that is broken widens the margin, each one that is kept narrows it a little (adaptive conformal
inference: Gibbs and Candes, 2021), and so does who was refused although an executor was free when it would still have
been in time. So noise costs what it must, whatever its distribution.

Where nothing is known, everything is let in. A prediction can be wrong, and nothing is learned from what is refused:
so who finds a free executor is refused only if it would more likely miss than not, and a graph that nobody of its kind
ran lately is let in as a *probe* now and then; a probe that ends in time refutes what was learned.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

from rtml.graph.backlog import Amount, Backlog, Bucket, Plan, Room, Share
from rtml.graph.estimate import BatchCost
from rtml.graph.policy import Scheduling
from rtml.graph.predict import Forecast
from rtml.graph.state import FunctionState, Graph, Profile, State, TaskState, failure
from rtml.graph.tables import Ended, Tables
from rtml.messages import CANCELLED, ERROR, EXECUTOR, EXPIRED, OK, ErrorInfo, Task

#: The quantile of its own time that a graph is taken to need if it has to wait.
SURE: Final = 0.9
#: And if an executor is free, when nobody is hurt by one that fails.
LIKELY: Final = 0.5

#: The portion of the time that a graph can wait which may be planned at admission: the rest is room for more urgent
#: graphs that come later. In `benchmarks/policies.py` at twice the capacity 0.6 costs 1 % of goodput, and 1 leaves a
#: quarter less to the tightest deadlines.
FILL: Final = 0.8

#: The portion of promises that may be broken.
BROKEN: Final = 0.003
#: Standard deviations by which a wait may be longer than expected: at first, and at least and most.
MARGIN: Final = 4.0
_MARGIN_MIN: Final = 1.0
_MARGIN_MAX: Final = 8.0
#: How much of one a broken promise adds.
_MARGIN_STEP: Final = 0.4

#: And what one takes off that was refused needlessly for the sake of the margin.
_MARGIN_REGRET: Final = 0.1
#: Refused ones of which that is found out.
_REGRETS_MAX: Final = 1_000

#: Seconds between two probes of one function.
PROBE_EVERY: Final = 1.0

#: Seconds in which only one graph that missed is learned from: a machine that stood still hits many at once.
_CENSOR_EVERY: Final = 0.05
#: Unless more than this portion misses: then only those that were lucky would be learned from.
_OFTEN: Final = 0.3

#: Shortest advice to come back, in seconds.
_RETRY_MIN: Final = 0.001

#: Graphs of unknown work that are remembered until it is known.
_UNKNOWN_MAX: Final = 10_000

#: Graphs that nobody waited for and that waited for nobody are learned from when there are so many of them.
_LATELY_MAX: Final = 16

#: Names of missing steps in an error.
MISSING_MAX: Final = 16
#: Tasks looked at for them.
_SCAN_MAX: Final = 1_000


class Admission:
    """Decides which graphs are let in, and learns from those that were."""

    def __init__(self, tables: Tables, scheduling: Scheduling) -> None:
        self.tables = tables
        self.policy = scheduling.policy
        self.weights = scheduling.weights
        self.backlog = Backlog()
        #: standard deviations by which a wait may be longer than expected
        self.margin = MARGIN
        #: when those would have had to begin that were refused for the margin's sake
        self.doubtful: deque[float] = deque(maxlen=_REGRETS_MAX)
        #: graphs that have not ended, by tenant, but for `lone`
        self.live: Counter[str] = Counter()
        #: the only graph that was let in and has not ended, if it has no deadline and found the executors idle: it
        #: waits for nobody and nobody for it, so it is counted nowhere before another one comes
        self.lone: Graph | None = None
        #: of such ones that ended well and are still to be learned from: (kind, seconds to the end, executors' seconds)
        self._lately: list[tuple[Forecast, float, float]] = []

    def admit(
        self, graph: Graph, spec: Task, function: FunctionState, profile: Profile, now: float
    ) -> ErrorInfo | None:
        """Give a new graph its plan; or the reason why it is refused."""
        forecast = function.forecast
        if forecast is None:
            forecast = function.forecast = Forecast()
        if self._is_lone(spec):
            self._admit_lone(graph, forecast, profile, now)
            return None
        self._crowd()
        share = self.backlog.share(graph.share, profile.priority, self.weights.get(profile.tenant, 1))
        budget = None if spec.options is None else spec.options.deadline
        plan = Plan(self.backlog, forecast, profile.tenant, now, budget)
        refused = None
        if profile.admission and self.live[profile.tenant] >= self.tables.limits.tenant_graphs_max:
            refused = self._over_quota(plan)
        else:
            work = _expected(forecast, function, profile, spec)
            latest = self._latest(plan)
            room, plan.worked = self._room(now)
            plan.ratio = _ratio(forecast, function, profile)
            wait = self._predict(plan, share, latest, work, room)
            if self.doubtful and plan.base == 0.0:
                self._regret(now)
            if profile.admission and plan.budget is not None and work is not None:
                refused = self._refusal(plan, share, latest, Amount(work, work * plan.ratio), (wait, room))
        if refused is not None:
            self._record(graph, spec, profile, plan, now)
            return refused
        graph.plan = plan
        self._enter(plan, share, latest, work, now)
        return None

    def _is_lone(self, spec: Task) -> bool:
        """Whether nothing can be said about a graph but that it begins at once, and has as long as it takes."""
        if self.lone is not None or self.live or (spec.options is not None and spec.options.deadline is not None):
            return False
        for worker in self.tables.workers.values():  # noqa: SIM110 - half the time of `all`
            if worker.queue:
                return False
        return True

    def _admit_lone(self, graph: Graph, forecast: Forecast, profile: Profile, now: float) -> None:
        """Give a graph its plan that waits for nobody."""
        plan = graph.plan = Plan(self.backlog, forecast, profile.tenant, now, None)
        plan.base = 0.0
        plan.worked = self.backlog.worked
        if forecast.work is not None:
            plan.predicted = forecast.own.at(SURE if forecast.missing > _OFTEN else LIKELY) or 0.0
        if self.doubtful:
            self._regret(now)
        self.lone = graph

    def _crowd(self) -> None:
        """Another graph comes: from now on everything counts."""
        if self._lately:
            self._learn_lately()
        graph, self.lone = self.lone, None
        root = None if graph is None else self.tables.tasks.get(graph.id)
        if graph is None or root is None:
            return
        plan: Plan = graph.plan
        forecast, profile = plan.forecast, root.profile
        share = self.backlog.share(graph.share, profile.priority, self.weights.get(profile.tenant, 1))
        plan.ratio = _ratio(forecast, root.function, profile)
        self._enter(plan, share, self._latest(plan), _expected(forecast, root.function, profile, root.spec), plan.began)

    def _enter(self, plan: Plan, share: Share, latest: float, work: float | None, now: float) -> None:
        """From now on this graph is one of those that others may have to wait for."""
        forecast = plan.forecast
        forecast.live += 1
        self.live[plan.tenant] += 1
        self.backlog.add(plan, share, latest, work or 0.0, now)
        if work is None and len(forecast.unknown) < _UNKNOWN_MAX:
            forecast.unknown.append(plan)

    def _slots(self) -> float:
        """Tasks that run at a time."""
        return max(1.0, sum(node.cpu for node in self.tables.nodes.values()))

    def _under_way(self, now: float, but: Plan) -> float:
        """Seconds that executors have worked for plans and not reported, but for one plan."""
        seconds = 0.0
        for worker in self.tables.workers.values():
            if worker.queue and worker.role == EXECUTOR:
                head = next(iter(worker.queue.values()))
                if head.graph.plan is not None and head.graph.plan is not but:
                    seconds += now - max(worker.head_since, head.assigned_at)
        return seconds

    def _room(self, now: float) -> tuple[Room, float]:
        """When executors are free; and seconds that they have worked for plans, up to now.

        What takes longer than expected will probably take as long again as it is late: what was late for a while is
        mostly something that takes much longer.
        """
        busy: list[float] = []
        begun: dict[Bucket | Share, float] = {}
        worked = self.backlog.worked
        for worker in self.tables.workers.values():
            if not worker.queue or worker.role != EXECUTOR:
                continue
            head = next(iter(worker.queue.values()))
            plan = head.graph.plan
            elapsed = now - max(worker.head_since, head.assigned_at)
            left = 0.0 if plan is None else plan.left * head.batch_size
            expected = head.cost if head.batch_head or not left else min(left, head.cost)
            busy.append(abs(expected - elapsed))
            if plan is not None:
                worked += elapsed
                taken = left if head.batch_head else min(left, expected)
                for place in (plan.bucket, plan.share):
                    if place is not None:
                        begun[place] = begun.get(place, 0.0) + taken
        return Room(self._slots(), busy, begun), worked

    def _latest(self, plan: Plan) -> float:
        """When a graph has to begin."""
        if self.policy.due is None:
            return plan.began
        if plan.budget is None:
            return plan.began + self.policy.patience
        return plan.began + min(plan.budget - (plan.forecast.own.at(SURE) or 0.0), self.policy.patience)

    def _predict(self, plan: Plan, share: Share, latest: float, work: float | None, room: Room) -> float:
        """Fill in what is predicted; how long the graph may have to wait."""
        if work is None:
            plan.base = None if self.backlog.shares else 0.0
            return 0.0
        before = self.backlog.before(share, latest, work, plan.began, room)
        plan.base = room.wait(before.work)
        waits = plan.base > 0.0 or plan.forecast.missing > _OFTEN
        plan.predicted = max(0.0, plan.base + (plan.forecast.own.at(SURE if waits else LIKELY) or 0.0))
        return room.wait(before.work, before.spread, self.margin) if plan.base > 0.0 else 0.0

    def _refusal(
        self, plan: Plan, share: Share, latest: float, own: Amount, waits: tuple[float, Room]
    ) -> ErrorInfo | None:
        """The reason not to let it in; `own` is its work, `waits` how long it may have to wait, and for what."""
        predicted, base, budget, now = plan.predicted, plan.base, plan.budget, plan.began
        assert predicted is not None
        assert base is not None
        assert budget is not None
        wait, room = waits
        spare = max(wait, base / FILL) - base
        if predicted + spare > budget:
            if self._is_probe(plan, now):
                return None
            more = f" and needs {spare * 1e3:.1f} ms to spare" if spare else ""
            message = f"it would probably take {predicted * 1e3:.1f} ms{more}; it has {budget * 1e3:.1f}"
            retry = predicted + spare - budget
        elif self.backlog.harmed(share, latest, own, now, room, self.margin):
            message = f"within its {budget * 1e3:.1f} ms there is only time for what was admitted before"
            retry = predicted
        else:
            return None
        if base / FILL + predicted - base <= budget:
            self.doubtful.append(latest)
        return failure(
            "Overloaded", message, predicted=predicted, budget=budget, retry_after=max(_RETRY_MIN, retry), quota=False
        )

    def _is_probe(self, plan: Plan, now: float) -> bool:
        forecast = plan.forecast
        plan.probe = not forecast.live and now - forecast.probed_at >= PROBE_EVERY
        if plan.probe:
            forecast.probed_at = now
        return bool(plan.probe)

    def _over_quota(self, plan: Plan) -> ErrorInfo:
        limit = self.tables.limits.tenant_graphs_max
        who = f"tenant {plan.tenant!r} has" if plan.tenant else "there are"
        work = plan.forecast.work or 0.0
        return failure(
            "Overloaded", f"{who} {limit} unfinished requests (tenant_graphs_max)", predicted=None, budget=plan.budget,
            retry_after=max(_RETRY_MIN, work / self._slots()), quota=bool(plan.tenant),
        )  # fmt: skip

    def _record(self, graph: Graph, spec: Task, profile: Profile, plan: Plan, now: float) -> None:
        """A refusal is not a task, but counted as one that ended."""
        self.tables.shed.append(
            Ended(
                spec.id, 0, graph.id, profile.name, ERROR, 0, now, 0.0, 0.0, now, 0.0, 0, 1, graph.trace, plan.budget,
                "shed_admission",
            )
        )  # fmt: skip

    # --- ends

    def ended(self, root: TaskState, outcome: int, before: int, now: float) -> None:
        """The root of a graph with a plan has ended, from the state `before`: learn from it."""
        plan: Plan = root.graph.plan
        if self.lone is root.graph:
            if root.deadline is None:
                self._ended_lone(plan, outcome, now)
                return
            self._crowd()
        forecast = plan.forecast
        plan.ending = "" if root.deadline is None else _ending(root, outcome, before, now)
        self.backlog.remove(plan)
        forecast.live -= 1
        self.live[plan.tenant] -= 1
        if not self.live[plan.tenant]:
            del self.live[plan.tenant]
        actual = now - plan.began
        own = self._unexplained(root, now)
        if outcome in (OK, EXPIRED):
            forecast.ended(outcome == EXPIRED)
            if plan.ending and plan.base and plan.budget is not None:
                missed = plan.ending == "missed" or outcome == EXPIRED
                # What would have missed after the wait that was expected, too, was itself too slow.
                if not missed or own < plan.budget - plan.base:
                    self._keep_promises(not missed)
        if outcome == OK:
            plan.error = None if plan.predicted is None else plan.predicted - actual
            forecast.probed_at = max(forecast.probed_at, now)
            if plan.probe and plan.budget is not None and actual <= plan.budget:
                forecast.own.forget_above(plan.budget)
            if plan.base is not None:
                forecast.own.observe(own)
            forecast.learn_spread(plan.expected, plan.done)
            self._learn_work(forecast, plan.done)
        elif outcome == EXPIRED:
            self._learn_censored(plan, own, now)

    def _ended_lone(self, plan: Plan, outcome: int, now: float) -> None:
        """Nobody came beside it, so all of its time was its own."""
        self.lone = None
        plan.ending = ""
        if outcome != OK:
            return
        actual = now - plan.began
        if plan.predicted is not None:
            plan.error = plan.predicted - actual
        self._lately.append((plan.forecast, actual, plan.done))
        # A quantile of the last ones hardly changes with one more.
        if plan.forecast.work is None or len(self._lately) >= _LATELY_MAX:
            self._learn_lately()
        plan.forecast.probed_at = now

    def _learn_lately(self) -> None:
        lately, self._lately = self._lately, []
        for forecast, actual, done in lately:
            forecast.ended(False)
            forecast.own.observe(actual)
            forecast.learn_spread(forecast.work or 0.0, done)
            self._learn_work(forecast, done)

    def _keep_promises(self, kept: bool) -> None:
        """One who had to wait was in time, or was not.

        Those who found a free executor teach nothing about waiting.
        """
        step = _MARGIN_STEP * (-BROKEN if kept else 1.0 - BROKEN)
        self.margin = min(_MARGIN_MAX, max(_MARGIN_MIN, self.margin + step))

    def _regret(self, now: float) -> None:
        """An executor is free: those that were refused and could begin now were refused needlessly."""
        count = sum(latest > now for latest in self.doubtful)
        self.doubtful.clear()
        self.margin = max(_MARGIN_MIN, self.margin - _MARGIN_REGRET * count)

    def _learn_censored(self, plan: Plan, own: float, now: float) -> None:
        """How long it would have taken is not known, only that it is more than this."""
        forecast = plan.forecast
        often = forecast.missing > _OFTEN or now - forecast.censored_at >= _CENSOR_EVERY
        if plan.base is not None and often and own > (forecast.own.at(LIKELY) or 0.0):
            forecast.censored_at = now
            forecast.own.observe(own)
        if plan.done > (forecast.work or 0.0):
            self._learn_work(forecast, plan.done)

    def _unexplained(self, root: TaskState, now: float) -> float:
        """What of a graph's time was not spent on other graphs' work.

        Either what was expected when it began is subtracted, or what was really done meanwhile: it may have been
        overtaken by more urgent ones, which `Backlog.harmed` keeps within limits, not its own time.
        """
        plan: Plan = root.graph.plan
        slots = self._slots()
        # A batch takes the time of all its calls.
        own = plan.done * root.batch_size
        others = self.backlog.worked + self._under_way(now, plan) - plan.worked - own
        # While it ran itself, the other slots worked for others.
        return now - plan.began - max(plan.base or 0.0, (others - (slots - 1.0) * own) / slots)

    def _learn_work(self, forecast: Forecast, seconds: float) -> None:
        forecast.learn_work(seconds)
        if forecast.unknown:
            unknown, forecast.unknown = forecast.unknown, []
            for plan in unknown:
                self.backlog.expect(plan, seconds)


def _expected(forecast: Forecast, function: FunctionState, profile: Profile, spec: Task) -> float | None:
    """Seconds of executors' time that a graph will take; None if nothing is known.

    A call of a batch function that waits will share a full batch; what it takes beyond that is learned as its own time.
    """
    if not profile.batch:
        return forecast.work
    seconds: float | None = function.cost.predict(profile.batch)
    return None if seconds is None else seconds / profile.batch * spec.items


def _ratio(forecast: Forecast, function: FunctionState, profile: Profile) -> float:
    """The variance of a graph's work, divided by it: so it is of all graphs that are alike."""
    if not profile.batch:
        return forecast.spread
    # All calls of a batch are late together.
    cost: BatchCost = function.cost
    return cost.noise * (cost.predict(profile.batch) or 0.0)


def _ending(root: TaskState, outcome: int, before: int, now: float) -> str:
    """How a graph with a deadline ended, for metrics; `before` is the state of its root until then."""
    if outcome == EXPIRED:
        return "missed" if before is State.ASSIGNED else "expired_queue"
    if outcome == CANCELLED:
        return "cancelled"
    if outcome == ERROR:
        return "failed"
    if root.deadline is not None and root.deadline < now:
        return "missed"
    return "partial" if root.graph.missing else "met"


def missing_steps(root: TaskState) -> list[str]:
    """Names of the unfinished tasks below a task, each once, at most `MISSING_MAX`; its own if there are none."""
    names: dict[str, None] = {}
    pending = [root]
    for task in pending:
        if len(names) >= MISSING_MAX:
            break
        if task.children:
            pending += list(task.children.values())[: _SCAN_MAX - len(pending)]
        else:
            names[task.profile.name] = None
    return list(names)
