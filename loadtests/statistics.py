"""Figures of what was sent: goodput, latencies from the planned times, and what went wrong. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from loadtests.generators import Outcome
from loadtests.schedule import Floats
from loadtests.wire import BROKEN, TIMEOUT

SHED: Final = (429, 503)
EXPIRED: Final = 504
QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)


class Figures(Struct):
    """One kind of requests, or all of them. Latencies are seconds from the planned time, of answers with status 200.

    Attributes:
        requests: Planned.
        good: Answered with 200 within their deadline (or at all, without one).
        late: Answered with 200 after it.
        shed: Refused: 429, 503.
        expired: 504.
        errors: Any other status.
        broken: The connection failed.
        timeouts: Given up by the client.
        misses: Sent later than `late_ms` after their time: the client's fault. They are counted like all others.
        offered: Planned requests a second.
        goodput: Good ones a second.
        fraction: Good ones of all.
        missed_of_admitted: Late and expired (and broken and given up) of all that were not refused.
        p50, p90, p99, p999, worst: Latencies.
        shed_p99: How long a refusal took.
    """

    requests: int
    good: int
    late: int
    shed: int
    expired: int
    errors: int
    broken: int
    timeouts: int
    misses: int
    offered: float
    goodput: float
    fraction: float
    missed_of_admitted: float
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    worst: float | None
    shed_p99: float | None


def latencies(outcome: Outcome) -> Floats:
    """Seconds from the planned time, of every request."""
    return outcome.sent.done - outcome.plan.times


def figures(outcome: Outcome, seconds: float, late: float = 0.005, kind: int | None = None) -> Figures:
    """What came of the counted requests.

    Args:
        outcome: Everything.
        seconds: How long counted requests were planned.
        late: Seconds after its time from which on a request counts as sent late.
        kind: Only this kind; None: all.
    """
    plan, sent = outcome
    chosen = plan.counted if kind is None else plan.counted & (plan.kinds == kind)
    status, taken = sent.status[chosen], latencies(outcome)[chosen]
    answered = status == 200
    in_time = answered & (taken <= plan.deadlines[chosen])
    total, good = len(status), int(in_time.sum())
    shed = np.isin(status, SHED)
    expired, broken, timeouts = status == EXPIRED, status == BROKEN, status == TIMEOUT
    others = ~(answered | shed | expired | broken | timeouts)
    misses = ~(sent.sent[chosen] - plan.times[chosen] <= late)
    admitted = total - int(shed.sum())
    p50, p90, p99, p999 = (quantile(taken[answered], q) for q in QUANTILES)
    return Figures(
        requests=total,
        good=good,
        late=int(answered.sum()) - good,
        shed=int(shed.sum()),
        expired=int(expired.sum()),
        errors=int(others.sum()),
        broken=int(broken.sum()),
        timeouts=int(timeouts.sum()),
        misses=int(misses.sum()),
        offered=total / seconds,
        goodput=good / seconds,
        fraction=good / total if total else 0.0,
        missed_of_admitted=1 - (good + int(others.sum())) / admitted if admitted else 0.0,
        p50=p50,
        p90=p90,
        p99=p99,
        p999=p999,
        worst=float(taken[answered].max()) if answered.any() else None,
        shed_p99=quantile(taken[shed], 0.99),
    )


def quantile(values: Floats, q: float) -> float | None:
    """The value that a part `q` of the values does not exceed; None without values."""
    return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else None


def over_time(outcome: Outcome, width: float = 0.5) -> dict[str, list[float]]:
    """For plots: planned, good, and not good requests a second, and the p99, in slices of the planned time."""
    plan, sent = outcome
    taken = latencies(outcome)
    answered = sent.status == 200
    good = answered & (taken <= plan.deadlines)
    slices: npt.NDArray[np.int64] = (plan.times / width).astype(np.int64)
    count = int(slices.max()) + 1 if len(slices) else 0
    p99 = [quantile(taken[answered & (slices == number)], 0.99) for number in range(count)]

    def rates(chosen: npt.NDArray[np.bool_]) -> list[float]:
        return [float(value) / width for value in np.bincount(slices[chosen], minlength=count)]

    return {
        "time": [number * width for number in range(count)],
        "offered": rates(np.ones(len(slices), bool)),
        "good": rates(good),
        "shed": rates(np.isin(sent.status, SHED)),
        "missed": rates(~good & ~np.isin(sent.status, SHED)),
        "p99": [float("nan") if value is None else value for value in p99],
    }
