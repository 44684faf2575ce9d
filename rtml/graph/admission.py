"""Which submissions are refused at once, because they could not end in time.

The question is asked once for a graph, when its root arrives, and only of submissions that ask for it; what has been
let in is never refused later, it can only expire. A graph is refused if

* its tenant has as many unfinished graphs as it may have, or
* it has a deadline, and the work before it and its own time, as predicted, are longer than its budget, or
* those that were promised their deadlines would miss them if it came before them.

Where nothing is known, everything is let in. A prediction can be wrong, and nothing is learned from what is refused:
so while executors are free the median counts instead of a high quantile, and a graph that nobody of its kind ran
lately is let in as a *probe* now and then; a probe that ends in time refutes what was learned.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from rtml.graph.backlog import Backlog, Plan, Share
from rtml.graph.policy import Scheduling
from rtml.graph.predict import Forecast
from rtml.graph.state import FunctionState, Graph, Profile, State, TaskState, failure
from rtml.graph.tables import Ended, Tables
from rtml.messages import CANCELLED, ERROR, EXECUTOR, EXPIRED, OK, ErrorInfo, Task

#: The portion of graphs that must make it for a promise to be given.
SURE: Final = 0.99
#: And while executors are free, when nobody is hurt by one that fails.
LIKELY: Final = 0.5

#: The portion of a budget that may be planned at admission: the rest is room for more urgent graphs that come later,
#: and for what nobody foresaw. In `benchmarks/policies.py` 0.6 costs goodput in bursts, 0.9 doubles the promises that
#: are broken and leaves half as much to the tightest deadlines.
FILL: Final = 0.75

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
        #: graphs that have not ended, by tenant
        self.live: Counter[str] = Counter()

    def admit(
        self, graph: Graph, spec: Task, function: FunctionState, profile: Profile, now: float
    ) -> ErrorInfo | None:
        """Give a new graph its plan; or the reason why it is refused."""
        forecast = function.forecast
        if forecast is None:
            forecast = function.forecast = Forecast()
        share = self.backlog.share(graph.share, profile.priority, self.weights.get(profile.tenant, 1))
        budget = None if spec.options is None else spec.options.deadline
        plan = Plan(self.backlog, forecast, profile.tenant, now, budget)
        refused = None
        if profile.admission and self.live[profile.tenant] >= self.tables.limits.tenant_graphs_max:
            refused = self._over_quota(plan)
        else:
            worked, under_way = self._under_way(now)
            plan.worked = self.backlog.worked + worked
            work = _expected(forecast, function, profile, spec)
            latest = self._predict(plan, share, work, under_way)
            if profile.admission and plan.budget is not None and plan.predicted is not None:
                refused = self._refusal(plan, share, latest, (work or 0.0, under_way))
        if refused is not None:
            self._record(graph, spec, profile, plan, now)
            return refused
        graph.plan = plan
        forecast.live += 1
        self.live[profile.tenant] += 1
        if plan.share is None:
            self.backlog.add(plan, share, latest, work or 0.0, now)
            if work is None and len(forecast.unknown) < _UNKNOWN_MAX:
                forecast.unknown.append(plan)
        return None

    def _slots(self) -> float:
        """Tasks that run at a time."""
        return max(1.0, sum(node.cpu for node in self.tables.nodes.values()))

    def _under_way(self, now: float, but: Plan | None = None) -> tuple[float, float]:
        """Seconds that executors have worked for plans and not reported; and what of them the backlog still counts.

        Args:
            now: the time.
            but: a plan whose own work is not meant.
        """
        seconds = counted = 0.0
        for worker in self.tables.workers.values():
            if worker.queue and worker.role == EXECUTOR:
                head = next(iter(worker.queue.values()))
                plan = head.graph.plan
                if plan is not None and plan is not but:
                    elapsed = now - max(worker.head_since, head.assigned_at)
                    seconds += elapsed
                    # What takes longer than expected takes nothing off the others. A batch that has begun will take
                    # its own time, not that of its calls' parts of a full one.
                    left = plan.left * head.batch_size
                    counted += left - max(0.0, (head.cost if head.batch_head else left) - elapsed)
        return seconds, counted

    def _predict(self, plan: Plan, share: Share, work: float | None, under_way: float) -> float:
        """Fill in what is predicted; the moment at which the graph has to begin."""
        forecast, now = plan.forecast, plan.began
        sure = forecast.own.at(SURE) or 0.0
        if self.policy.due is None:
            latest = now
        elif plan.budget is None:
            latest = now + self.policy.patience
        else:
            latest = now + min(plan.budget - sure, self.policy.patience)
        if work is not None:
            slots = self._slots()
            before = max(0.0, self.backlog.before(share, latest, work, now) - under_way)
            plan.base = before / slots
            cautious = before >= work * slots or forecast.missing > _OFTEN
            own = sure if cautious else forecast.own.at(LIKELY) or 0.0
            plan.predicted = max(0.0, plan.base + own)
        elif not self.backlog.shares:
            plan.base = 0.0
        return latest

    def _refusal(self, plan: Plan, share: Share, latest: float, amounts: tuple[float, float]) -> ErrorInfo | None:
        """The reason not to let it in; `amounts` are its work, and what of the backlog is under way."""
        predicted, budget, now = plan.predicted, plan.budget, plan.began
        assert predicted is not None
        assert budget is not None
        work, under_way = amounts
        if predicted > FILL * budget:
            if self._is_probe(plan, now):
                return None
            most = f"of its {budget * 1e3:.1f} ms only {FILL * budget * 1e3:.1f} are planned"
            message = f"it would probably take {predicted * 1e3:.1f} ms; {most}"
            retry = predicted - FILL * budget
        elif self.backlog.harmed(share, latest, work, now, (self._slots(), under_way)):
            message = f"within its {budget * 1e3:.1f} ms there is only time for what was admitted before"
            retry = predicted
        else:
            return None
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
        forecast = plan.forecast
        plan.ending = "" if root.deadline is None else _ending(root, outcome, before, now)
        self.backlog.remove(plan)
        forecast.live -= 1
        self.live[plan.tenant] -= 1
        if not self.live[plan.tenant]:
            del self.live[plan.tenant]
        actual = now - plan.began
        if outcome in (OK, EXPIRED):
            forecast.ended(outcome == EXPIRED)
        if outcome == OK:
            plan.error = None if plan.predicted is None else plan.predicted - actual
            forecast.probed_at = max(forecast.probed_at, now)
            if plan.probe and plan.budget is not None and actual <= plan.budget:
                forecast.own.forget_above(plan.budget)
            if plan.base is not None:
                forecast.own.observe(self._unexplained(plan, actual, now))
            self._learn_work(forecast, plan.done)
        elif outcome == EXPIRED:
            self._learn_censored(plan, actual, now)

    def _learn_censored(self, plan: Plan, actual: float, now: float) -> None:
        """How long it would have taken is not known, only that it is more than this."""
        forecast = plan.forecast
        often = forecast.missing > _OFTEN or now - forecast.censored_at >= _CENSOR_EVERY
        if plan.base is not None and often:
            own = self._unexplained(plan, actual, now)
            if own > (forecast.own.at(LIKELY) or 0.0):
                forecast.censored_at = now
                forecast.own.observe(own)
        if plan.done > (forecast.work or 0.0):
            self._learn_work(forecast, plan.done)

    def _unexplained(self, plan: Plan, actual: float, now: float) -> float:
        """What of a graph's time was not spent on other graphs' work.

        Either what was expected when it began is subtracted, or what was really done meanwhile: it may have been
        overtaken by more urgent ones, which `Backlog.harmed` keeps within limits, not its own time.
        """
        slots = self._slots()
        others = self.backlog.worked + self._under_way(now, plan)[0] - plan.worked - plan.done
        # While it ran itself, the other slots worked for others.
        return actual - max(plan.base or 0.0, (others - (slots - 1.0) * plan.done) / slots)

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
