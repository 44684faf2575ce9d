"""Every Prometheus metric of gateway and dispatcher: names, labels, buckets, in one place.

The two processes have different metrics on purpose (the gateway's `/metrics` appends the dispatcher's text to its own,
and a name may occur once only): what happens to requests is `rtml_gateway_*`, everything else is about tasks.

Counting is on the path of every task, so a count is an attribute of a plain object (`cell.value += 1`) and an
observation one bisection: 0.09 us against 0.6 us with `prometheus_client`'s locks, which buy nothing in processes of
one thread. `prometheus_client` writes the text, and is imported when somebody scrapes.

Conventions: seconds, closed sets of labels, never an id. A label set that grows with user code (functions) is cut off
at `FUNCTIONS_MAX`; what comes later is counted under "(other)".
"""

from __future__ import annotations

import gc
import math
import resource
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from rtml.messages import OUTCOMES

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from rtml.graph.tables import Ended

#: Upper bounds in seconds: sub-millisecond scheduling must be visible.
SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: Upper bounds in seconds of what may be negative: below zero the deadline was missed by that much.
SLACK: Final = (-1, -0.1, -0.01, -0.001, 0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: Upper bounds in seconds of differences.
AROUND_ZERO: Final = (*(-bound for bound in SECONDS[:-2][::-1]), 0, *SECONDS[:-2])
#: Upper bounds of counts of calls.
CALLS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

#: Functions that are counted by name.
FUNCTIONS_MAX: Final = 256
#: Label sets of one metric; whatever comes later shares one child.
CHILDREN_MAX: Final = 8 * FUNCTIONS_MAX + 64
_OTHER: Final = "(other)"

#: How the deadline of a request ended.
DEADLINE_OUTCOMES: Final = ("met", "partial", "missed", "shed_admission", "cancelled", "failed")


class Cell:
    """One number: a counter's or gauge's value under one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Buckets:
    """One histogram under one set of labels."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count `value`."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: list[float]) -> None:
        """Count many values; the list is sorted in place."""
        values.sort()
        self.total += sum(values)
        below = 0
        for number, bound in enumerate(self.bounds):
            if below == len(values):
                return
            upto = bisect_right(values, bound)
            self.counts[number] += upto - below
            below = upto
        self.counts[-1] += len(values) - below


_Child = TypeVar("_Child", Cell, Buckets)


class Family(Generic[_Child]):
    """One metric: its name and its children by label values.

    Args:
        name: Full name without the suffix `_total`.
        help: One line for people.
        labels: Names of the labels.
    """

    kind = ""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help
        self.label_names = tuple(labels)
        self.children: dict[tuple[str, ...], _Child] = {}
        #: Makes children somewhere else (in memory that other processes see); None from it: they are made here.
        self.make_child: Callable[[Family[Any], tuple[str, ...]], Any] | None = None

    def labels(self, *values: str) -> _Child:
        """The child under these label values; keep it where it is used often."""
        child = self.children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"metric {self.name} has the labels {self.label_names}, not {len(values)} of them")
            if len(self.children) >= CHILDREN_MAX:
                values = (_OTHER,) * len(values)
            child = self.children.get(values)
            if child is None:
                made = None if self.make_child is None else self.make_child(self, values)
                child = self.children[values] = self.new_child() if made is None else made
        return child

    def new_child(self) -> _Child:
        """A child with nothing counted."""
        raise NotImplementedError

    def collect(self) -> Metric:
        """For `prometheus_client`."""
        raise NotImplementedError


class Counter(Family[Cell]):
    """Counts that only grow."""

    def new_child(self) -> Cell:  # noqa: D102
        return Cell()

    def collect(self) -> Metric:  # noqa: D102
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(self.name, self.help, labels=self.label_names)
        for values, cell in self.children.items():
            family.add_metric(values, cell.value)
        return family


class Gauge(Family[Cell]):
    """Values that go up and down."""

    def new_child(self) -> Cell:  # noqa: D102
        return Cell()

    def collect(self) -> Metric:  # noqa: D102
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(self.name, self.help, labels=self.label_names)
        for values, cell in self.children.items():
            family.add_metric(values, cell.value)
        return family


class Alias(Family[Cell]):
    """A metric of another server's, under the name that its dashboards know: counters there have no suffix.

    Args:
        name: The name.
        help: One line for people.
        labels: Names of the labels, whose values must not need quoting.
        kind: "counter" or "gauge".
    """

    def __init__(self, name: str, help: str, labels: Sequence[str] = (), kind: str = "counter") -> None:
        super().__init__(name, help, labels)
        self.kind = kind

    def new_child(self) -> Cell:  # noqa: D102
        return Cell()

    def text(self) -> str:
        """In the Prometheus text format."""
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} {self.kind}"]
        for values, cell in self.children.items():
            labels = ",".join(f'{name}="{value}"' for name, value in zip(self.label_names, values))
            lines.append(f"{self.name}{{{labels}}} {cell.value!r}")
        return "\n".join(lines) + "\n"


class Histogram(Family[Buckets]):
    """Distributions."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS) -> None:
        super().__init__(name, help, labels)
        self.bounds = tuple(bounds)

    def new_child(self) -> Buckets:  # noqa: D102
        return Buckets(self.bounds)

    def collect(self) -> Metric:  # noqa: D102
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self.name, self.help, labels=self.label_names)
        for values, child in self.children.items():
            below = 0
            buckets = []
            for bound, count in zip((*map(float, self.bounds), "+Inf"), child.counts, strict=True):
                below += count
                buckets.append((str(bound), below))
            family.add_metric(values, buckets, child.total)
        return family


class Metrics:
    """The metrics of one process: every attribute that is a `Family` is one."""

    def collect(self) -> Iterator[Metric]:
        """For `prometheus_client`'s registry, whose `Collector` this is."""
        for family in vars(self).values():
            if isinstance(family, Family) and not isinstance(family, Alias):
                yield family.collect()

    def render(self) -> str:
        """The Prometheus text exposition."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode()

    def watch_gc(self, pauses: Buckets) -> Callable[[], None]:
        """Observe every pause of the garbage collector, until the returned function is called."""
        started = 0.0

        def callback(phase: str, info: dict[str, int]) -> None:
            nonlocal started
            if phase == "start":
                started = time.perf_counter()
            else:
                pauses.observe(time.perf_counter() - started)

        gc.callbacks.append(callback)
        return lambda: gc.callbacks.remove(callback)


def deadline_outcome(code: int, seconds: float, deadline: float, partial: bool = False) -> str:
    """How a request's deadline ended: one of `DEADLINE_OUTCOMES`.

    Args:
        code: The HTTP status; 499 when the client had gone.
        seconds: From the request's head to the answer.
        deadline: The request's budget in seconds.
        partial: Some steps of its graph are missing in the answer.
    """
    if code in (429, 503):
        return "shed_admission"
    if code == 504 or seconds > deadline:
        return "missed"
    if code == 499:
        return "cancelled"
    if code >= 400:
        return "failed"
    return "partial" if partial else "met"


#: Triton's words for why a request failed.
_REASONS: Final = {429: "REJECTED", 503: "REJECTED", 499: "CANCELED"}


class Target:
    """What the gateway counts of one model or endpoint."""

    __slots__ = ("_app", "_codes", "_metrics", "_name", "deadlines", "in_flight", "in_flight_max", "seconds", "slack")

    def __init__(self, metrics: GatewayMetrics, app: str, name: str) -> None:
        self._metrics = metrics
        self._app = app
        self._name = name
        self._codes: dict[tuple[str, int], Cell] = {}
        self.seconds = metrics.seconds.labels(app, name)
        self.in_flight = metrics.in_flight.labels(app, name)
        #: Requests that may be answered at a time; further ones are refused.
        self.in_flight_max = metrics.in_flight_limits.get(name, metrics.in_flight_max)
        self.deadlines = {outcome: metrics.deadlines.labels(app, name, outcome) for outcome in DEADLINE_OUTCOMES}
        self.slack = metrics.slack.labels(app, name)

    def refused(self, protocol: str = "http") -> None:
        """A request was not let in, as there are `in_flight_max`."""
        self._count(503, protocol)

    def failures(self) -> dict[str, float]:
        """Requests that were not answered, by Triton's reasons."""
        found = {"REJECTED": 0.0, "CANCELED": 0.0, "BACKEND": 0.0, "OTHER": 0.0}
        for (_, code), cell in self._codes.items():
            if code >= 400:
                found[_REASONS.get(code, "BACKEND" if code >= 500 else "OTHER")] += cell.value
        return found

    def _count(self, code: int, protocol: str) -> None:
        cell = self._codes.get((protocol, code))
        if cell is None:
            cell = self._metrics.requests.labels(self._app, self._name, protocol, str(code))
            self._codes[protocol, code] = cell
        cell.value += 1

    def ended(
        self, code: int, seconds: float, deadline: float | None, partial: bool = False, protocol: str = "http"
    ) -> None:
        """A request was answered.

        Args:
            code: The HTTP status; 499 when the client had gone.
            seconds: From the request's head to the answer.
            deadline: The request's budget in seconds, if it had one.
            partial: Some steps of its graph are missing in the answer.
            protocol: By which it came: "http" or "grpc".
        """
        self._count(code, protocol)
        self.seconds.observe(seconds)
        if deadline is not None:
            self.slack.observe(deadline - seconds)
            self.deadlines[deadline_outcome(code, seconds, deadline, partial)].value += 1


class GatewayMetrics(Metrics):
    """What a gateway counts."""

    def __init__(self) -> None:
        where = ("app", "model")
        self.requests = Counter(
            "rtml_gateway_requests",
            "Requests answered, by protocol (http, grpc) and HTTP status (499: the client had gone).",
            (*where, "protocol", "code"),
        )
        self.seconds = Histogram("rtml_gateway_request_seconds", "From a request's head to its answer.", where)
        self.in_flight = Gauge("rtml_gateway_requests_in_flight", "Requests being answered.", where)
        self.deadlines = Counter(
            "rtml_gateway_deadlines", "Requests that had a deadline, by how it ended.", (*where, "outcome")
        )
        self.slack = Histogram(
            "rtml_gateway_deadline_slack_seconds", "Budget left at the answer; negative if missed.", where, SLACK
        )
        self.loop_lag = Histogram("rtml_gateway_event_loop_lag_seconds", "How late the event loop runs its timers.")
        self.gc_pause = Histogram("rtml_gateway_gc_pause_seconds", "Pauses of the garbage collector.")
        self.dispatcher_up = Gauge("rtml_gateway_dispatcher_up", "Whether the dispatcher gave its metrics.")
        self.processes = Gauge(
            "rtml_gateway_processes", "Processes of a gateway that has several, by state.", ("state",)
        )
        self.process_deaths = Counter(
            "rtml_gateway_process_deaths", "Processes of a gateway that ended unasked.", ("reason",)
        )
        self.cpu = Counter("rtml_gateway_cpu_seconds", "CPU time of the gateway's processes.")
        self.memory = Gauge("rtml_gateway_resident_bytes", "Memory of the gateway's processes.")
        self.connections = Gauge("rtml_gateway_connections", "Open connections.")
        self.refused = Counter(
            "rtml_gateway_refused", "Requests and connections that no route saw, by the error's type.", ("reason",)
        )
        self.tenants = Counter(
            "rtml_gateway_tenant_requests", "Requests that brought a token, by what was decided.", ("tenant", "outcome")
        )
        self.log_lines_lost = Counter(
            "rtml_gateway_access_log_lines_lost", "Lines of the access log that were not written.", ("reason",)
        )
        #: Requests of a target that may be answered at a time: of the named ones, and of all others.
        self.in_flight_limits: Mapping[str, float] = {}
        self.in_flight_max = math.inf
        #: Triton's names for what models do, shown if an operator wants them.
        self.aliases_shown = False
        of = ("model", "version")
        self.nv_success = Alias("nv_inference_request_success", "Requests that were answered.", of)
        self.nv_failure = Alias("nv_inference_request_failure", "Requests that were not.", (*of, "reason"))
        self.nv_count = Alias("nv_inference_count", "Inferences: rows of requests.", of)
        self.nv_executions = Alias("nv_inference_exec_count", "Runs of the model.", of)
        self.nv_pending = Alias("nv_inference_pending_request_count", "Requests being answered.", of, "gauge")
        self.nv_request = Alias("nv_inference_request_duration_us", "Time of requests in all.", of)
        self.nv_queue = Alias("nv_inference_queue_duration_us", "Time of waiting in all.", of)
        self.nv_input = Alias("nv_inference_compute_input_duration_us", "Time of transfer in all.", of)
        self.nv_infer = Alias("nv_inference_compute_infer_duration_us", "Time inside the model in all.", of)
        self.nv_output = Alias("nv_inference_compute_output_duration_us", "Always 0: input has both ways.", of)

    def observe_process(self) -> None:
        """Look at what this process uses; now and then."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu.labels().value = usage.ru_utime + usage.ru_stime
        with open("/proc/self/statm", "rb") as statm:
            self.memory.labels().value = float(statm.read().split()[1]) * resource.getpagesize()

    def render(self) -> str:
        """The text exposition."""
        text = super().render()
        if self.aliases_shown:
            text += "".join(family.text() for family in vars(self).values() if isinstance(family, Alias))
        return text

    def target(self, app: str, name: str) -> Target:
        """The counters of one model or endpoint."""
        return Target(self, app, name)


class FunctionMeter:
    """What the dispatcher counts of one function's tasks."""

    __slots__ = (
        "attempts",
        "_deadlines",
        "_name",
        "attempts",
        "batch",
        "outcomes",
        "prediction",
        "queued",
        "run",
        "seconds",
        "slack",
        "transfer",
        "waiting",
    )

    def __init__(self, metrics: DispatcherMetrics, function: str) -> None:
        self.outcomes = [metrics.tasks.labels(function, outcome) for outcome in OUTCOMES]
        self.waiting = metrics.waiting.labels(function)
        self.queued = metrics.queued.labels(function)
        self.transfer = metrics.transfer.labels(function)
        self.run = metrics.run.labels(function)
        self.seconds = metrics.seconds.labels(function)
        self.batch = metrics.batch.labels(function)
        self.attempts = metrics.attempts.labels(function)
        self._name = function
        self._deadlines = metrics.deadlines
        self.slack = metrics.slack.labels(function)
        self.prediction = metrics.prediction.labels(function)

    def count(self, ended: list[Ended]) -> None:
        """Tasks of this function ended. Counted in bulk: sorting is cheaper than a bisection for each value."""
        for end in ended:
            self.outcomes[end.outcome].value += 1
            if end.ending:
                self._deadlines.labels(self._name, end.ending).value += 1
                if end.slack is not None and end.ending != "shed_admission":
                    self.slack.observe(end.slack)
            if end.error is not None:
                self.prediction.observe(end.error)
        ran = [end for end in ended if end.assigned]
        self.waiting.observe_all([end.ready - end.submitted for end in ran])
        self.queued.observe_all([end.assigned - end.ready for end in ran])
        self.transfer.observe_all([max(0.0, end.finished - end.assigned - end.run) for end in ran])
        self.run.observe_all([end.run for end in ran])
        self.seconds.observe_all([end.finished - end.submitted for end in ran])
        self.batch.observe_all([end.batch for end in ran])
        self.attempts.value += sum(end.attempts for end in ran)


class DispatcherMetrics(Metrics):
    """What a dispatcher counts. Gauges are set by `observe_state` when somebody asks."""

    def __init__(self) -> None:
        of = ("function",)
        self.tasks = Counter("rtml_tasks", "Tasks that ended, by outcome.", (*of, "outcome"))
        self.attempts = Counter("rtml_task_attempts", "Attempts of tasks that ended; above the tasks: retries.", of)
        self.waiting = Histogram("rtml_task_waiting_seconds", "From submission until all arguments were there.", of)
        self.queued = Histogram("rtml_task_queue_seconds", "From all arguments there until handed to an executor.", of)
        self.transfer = Histogram("rtml_task_transfer_seconds", "Between dispatcher and executor, both ways.", of)
        self.run = Histogram("rtml_task_run_seconds", "Inside the function.", of)
        self.seconds = Histogram("rtml_task_seconds", "From submission to the result.", of)
        self.batch = Histogram("rtml_task_batch_calls", "Calls that shared an execution.", of, CALLS)
        self.deadlines = Counter("rtml_deadline", "Graphs that had a deadline, by how it ended.", (*of, "outcome"))
        self.slack = Histogram(
            "rtml_deadline_slack_seconds", "Budget left when a graph ended; negative if missed.", of, SLACK
        )
        self.prediction = Histogram(
            "rtml_predicted_minus_actual_seconds", "What was predicted of a graph, less what it took.", of, AROUND_ZERO
        )
        self.wasted = Counter("rtml_wasted_compute_seconds", "Executors' time for what nobody wanted any more.")
        self.hedges = Counter("rtml_hedge", "Second attempts beside slow ones, by how it ended.", ("outcome",))
        self.live = Gauge("rtml_tasks_live", "Tasks that have not ended, by state.", ("state",))
        self.executors = Gauge("rtml_executors", "Executor processes, by role and state.", ("role", "state"))
        self.peers = Gauge("rtml_peers", "Connections, by role.", ("role",))
        self.frames = Counter("rtml_dispatcher_frames", "Frames, by direction.", ("direction",))
        self.bytes = Counter("rtml_dispatcher_bytes", "Bytes in frames, by direction.", ("direction",))
        self.rejected = Counter("rtml_dispatcher_rejected_frames", "Frames that were no valid messages.", ("reason",))
        self.deaths = Counter("rtml_executor_deaths", "Executor processes that died.", ("reason",))
        self.turn = Histogram("rtml_dispatcher_turn_seconds", "One wake-up: drain, decide, send.")
        self.loop_lag = Histogram("rtml_executor_loop_lag_seconds", "Blocked event loops of async executors.")
        way, how = ("direction",), ("outcome",)
        self.object_bytes = Counter("rtml_object_bytes", "Bytes of objects between data endpoints, by direction.", way)
        self.transfers = Counter("rtml_object_transfers", "Objects that were fetched, by how it ended.", how)
        self.transferring = Gauge("rtml_object_transfers_in_flight", "Objects that are being fetched.")
        self.sources = Counter(
            "rtml_object_sources_failed", "Sources that were replaced, by when they failed.", ("when",)
        )
        self.gc_pause = Histogram("rtml_dispatcher_gc_pause_seconds", "Pauses of the garbage collector.")
        self.cpu = Counter("rtml_dispatcher_cpu_seconds", "CPU time of the dispatcher.")
        self.memory = Gauge("rtml_dispatcher_resident_bytes_max", "Most memory that the dispatcher ever had.")
        self._meters: dict[str, FunctionMeter] = {}

    def observe_transfers(self, counts: Mapping[str, int]) -> None:
        """Take over what this node's data endpoint has counted, if it has one: see `rtml.transfer.counts`."""
        if counts:
            for direction in ("in", "out"):
                self.object_bytes.labels(direction).value = counts[f"bytes_{direction}"]
            self.transfers.labels("ok").value = counts["pulled"]
            self.transfers.labels("failed").value = counts["failed"]
            self.transferring.labels().value = counts["in_flight"]
            self.sources.labels("midway").value = counts["resumed"]
            self.sources.labels("at_once").value = counts["refused"]

    def meter(self, function: str) -> FunctionMeter:
        """The counters of the function called `function`."""
        meter = self._meters.get(function)
        if meter is None:
            if len(self._meters) >= FUNCTIONS_MAX and function != _OTHER:
                return self.meter(_OTHER)
            meter = self._meters[function] = FunctionMeter(self, function)
        return meter

    def render(self) -> str:
        """The text exposition, with the process's own use of CPU and memory."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu.labels().value = usage.ru_utime + usage.ru_stime
        self.memory.labels().value = usage.ru_maxrss * 1024
        return super().render()
