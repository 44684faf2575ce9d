"""Where the time of requests went that were let in and missed their deadlines. Pure.

What the server says of an answer (`Server-Timing`) is subtracted from what the client saw. A miss is put down to the
part that took most beyond what is usual for those that were in time.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from loadtests.generators import Outcome
from loadtests.statistics import EXPIRED

#: The parts, in the order of a request's way.
PARTS: Final = ("sent late", "on the way", "queued", "run", "gateway", "expired")


def where(outcome: Outcome) -> Counter[str]:
    """How many of the counted requests that missed did so for which part; `expired` said nothing of their way.

    "on the way" is the client's sockets, the kernel, and the gateway's until it counts the request as there; "gateway"
    what the server took beside the queue and the run.
    """
    plan, sent = outcome
    if sent.spent is None:
        return Counter()
    taken = sent.done - plan.times
    total, queued, run = sent.spent.T
    late = sent.sent - plan.times
    parts = np.stack([late, taken - late - total, queued, run, total - queued - run])
    known = plan.counted & (sent.status == 200) & np.isfinite(parts).all(axis=0)
    good = known & (taken <= plan.deadlines)
    missed = known & (taken > plan.deadlines)
    usual = np.median(parts[:, good], axis=1) if good.any() else np.zeros(len(parts))
    worst = np.argmax(parts[:, missed] - usual[:, None], axis=0)
    found = Counter(PARTS[int(number)] for number in worst)
    found["expired"] = int((plan.counted & (sent.status == EXPIRED)).sum())
    return +found
